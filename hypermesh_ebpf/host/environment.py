"""Container or virtual machine: the signs that systemd-detect-virt(1) also goes by."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

# What the DMI strings of a machine say of its maker (systemd's src/basic/virt.c has the same).
_DMI = (
    ("KVM", "KVM"),
    ("QEMU", "QEMU"),
    ("Amazon EC2", "Amazon EC2"),
    ("Google Compute Engine", "Google Compute Engine"),
    ("VMware", "VMware"),
    ("VirtualBox", "VirtualBox"),
    ("innotek", "VirtualBox"),
    ("Xen", "Xen"),
    ("Bochs", "Bochs"),
    ("Parallels", "Parallels"),
    ("BHYVE", "bhyve"),
    ("Microsoft Corporation Virtual", "Hyper-V"),
    ("OpenStack", "OpenStack"),
    ("DigitalOcean", "DigitalOcean"),
    ("Hetzner", "Hetzner"),
)
_CGROUP_MARKS = (
    ("kubepods", "Kubernetes"),
    ("docker", "Docker"),
    ("libpod", "Podman"),
    ("containerd", "containerd"),
    ("crio", "CRI-O"),
    ("lxc", "LXC"),
    ("garden", "Garden"),
    ("nspawn", "systemd-nspawn"),
)
# The inode numbers that the host's own namespaces always have (include/linux/proc_ns.h).
_INITIAL_NAMESPACES = {
    "ipc": 0xEFFFFFFF,
    "uts": 0xEFFFFFFE,
    "pid": 0xEFFFFFFC,
    "cgroup": 0xEFFFFFFB,
}


@dataclass(frozen=True, slots=True)
class Environment:
    """Where this process runs: names of the container and the machine, None for neither; and the
    sign by which each was told."""

    container: str | None
    container_sign: str | None
    machine: str | None
    machine_sign: str | None


def _read(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace").strip("\0\n ")
    except OSError:
        return ""


def own_namespaces() -> tuple[str, ...]:
    """The kinds of namespaces (pid, ipc, uts, cgroup) in which this process is not the host's."""
    found = []
    for kind, number in _INITIAL_NAMESPACES.items():
        try:
            if os.stat(f"/proc/self/ns/{kind}").st_ino != number:
                found.append(kind)
        except OSError:  # a kernel without that kind
            continue
    return tuple(found)


def _find_container() -> tuple[str | None, str | None]:
    if "microsoft" in _read("/proc/version").lower():
        return "WSL", "/proc/version"
    namespaces = own_namespaces()
    if not namespaces:
        return None, None  # whatever files an image left behind
    manager = _read("/run/systemd/container") or os.environ.get("container", "")  # noqa: SIM112
    if manager:
        return manager, "the variable container"
    for path, name in (("/.dockerenv", "Docker"), ("/run/.containerenv", "Podman")):
        if os.path.exists(path):
            return name, path
    for mark, name in _CGROUP_MARKS:
        if mark in _read("/proc/1/cgroup"):
            return name, "/proc/1/cgroup"
    if "pid" in namespaces:
        return "unknown", f"namespaces of its own: {', '.join(namespaces)}"
    return None, None


def _find_machine() -> tuple[str | None, str | None]:
    dmi = " ".join(
        _read(f"/sys/class/dmi/id/{name}")
        for name in ("sys_vendor", "product_name", "board_vendor", "bios_vendor")
    )
    for mark, name in _DMI:
        if mark in dmi:
            return name, "/sys/class/dmi/id"
    kind = _read("/sys/hypervisor/type")
    if kind:
        return kind, "/sys/hypervisor/type"
    tree = _read("/proc/device-tree/hypervisor/compatible")
    if tree:
        return tree, "/proc/device-tree"
    clocks = _read("/sys/devices/system/clocksource/clocksource0/available_clocksource")
    for mark, name in (("kvm-clock", "KVM"), ("hyperv", "Hyper-V"), ("xen", "Xen")):
        if mark in clocks:
            return name, "available_clocksource"
    for line in _read("/proc/cpuinfo").splitlines():
        if line.startswith("flags") and " hypervisor" in line:
            return "an unnamed hypervisor", "the CPU flag hypervisor"
        if not line:
            break
    return None, None


def detect_environment() -> Environment:
    """The container and the virtual machine that this process runs in, as far as they show."""
    return Environment(*_find_container(), *_find_machine())
