"""The capabilities of this process, and what lacking each costs (capabilities(7))."""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path

# In the order of include/uapi/linux/capability.h: the index is the bit.
NAMES = (
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_DAC_READ_SEARCH",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETPCAP",
    "CAP_LINUX_IMMUTABLE",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_BROADCAST",
    "CAP_NET_ADMIN",
    "CAP_NET_RAW",
    "CAP_IPC_LOCK",
    "CAP_IPC_OWNER",
    "CAP_SYS_MODULE",
    "CAP_SYS_RAWIO",
    "CAP_SYS_CHROOT",
    "CAP_SYS_PTRACE",
    "CAP_SYS_PACCT",
    "CAP_SYS_ADMIN",
    "CAP_SYS_BOOT",
    "CAP_SYS_NICE",
    "CAP_SYS_RESOURCE",
    "CAP_SYS_TIME",
    "CAP_SYS_TTY_CONFIG",
    "CAP_MKNOD",
    "CAP_LEASE",
    "CAP_AUDIT_WRITE",
    "CAP_AUDIT_CONTROL",
    "CAP_SETFCAP",
    "CAP_MAC_OVERRIDE",
    "CAP_MAC_ADMIN",
    "CAP_SYSLOG",
    "CAP_WAKE_ALARM",
    "CAP_BLOCK_SUSPEND",
    "CAP_AUDIT_READ",
    "CAP_PERFMON",
    "CAP_BPF",
    "CAP_CHECKPOINT_RESTORE",
)

COSTS = {
    "CAP_BPF": "no program can be loaded and no map made: no monitor runs",
    "CAP_PERFMON": "no tracing: exec-monitor, net-monitor and all but XDP and TC",
    "CAP_NET_ADMIN": "no XDP, TC or cgroup programs: the xdp monitor does not run",
    "CAP_SYS_ADMIN": (
        "no detached mounts (tracepoints need tracefs), uprobes, run statistics "
        "or other users' programs"
    ),
    "CAP_SYS_RESOURCE": "locked memory cannot be raised: large maps fail before Linux 5.11",
}

AS_ROOT = "run it as root: `sudo hmebpf ...`"
IN_INITIAL_NAMESPACE = (
    "run it in the initial user namespace: in a rootful container, or on the host itself"
)
_AMBIENT = ("CAP_BPF", "CAP_PERFMON", "CAP_NET_ADMIN")


def grant_remedy(lacking: tuple[str, ...]) -> str:
    """What to type to have the capabilities in ``lacking``.

    setcap on a script has no effect; ambient capabilities survive execve(2).  The three that are
    for BPF can be given so; CAP_SYS_ADMIN is as good as root.
    """
    if in_user_namespace():
        return IN_INITIAL_NAMESPACE
    if not set(lacking) <= set(_AMBIENT) or not set(lacking) <= known_to_kernel():
        return AS_ROOT
    names = ",".join("+" + name.removeprefix("CAP_").lower() for name in _AMBIENT)
    return (
        f"{AS_ROOT}, or `sudo setpriv --reuid=$(id -u) --regid=$(id -g) --init-groups "
        f"--inh-caps={names} --ambient-caps={names} hmebpf ...`"
    )


def _status_field(name: str) -> str | None:
    for line in Path("/proc/thread-self/status").read_text().splitlines():
        field, _, value = line.partition(":")
        if field == name:
            return value.strip()
    return None


def effective() -> frozenset[str]:
    """The names of the effective capabilities, from CapEff of /proc/self/status."""
    mask = int(_status_field("CapEff") or "0", 16)
    return frozenset(name for bit, name in enumerate(NAMES) if mask >> bit & 1)


@lru_cache(maxsize=1)
def known_to_kernel() -> frozenset[str]:
    """The capabilities this kernel has: CAP_PERFMON and CAP_BPF came with Linux 5.8."""
    try:
        last = int(Path("/proc/sys/kernel/cap_last_cap").read_text())
    except OSError:
        last = len(NAMES) - 1
    return frozenset(NAMES[: last + 1])


@lru_cache(maxsize=1)
def in_user_namespace() -> bool:
    """True in a user namespace of its own, where capabilities do not count for bpf(2)."""
    try:
        fields = Path("/proc/self/uid_map").read_text().split()
    except OSError:
        return False
    return fields != ["0", "0", "4294967295"]


def has(name: str) -> bool:
    """True if the kernel will honour capability ``name`` of this process for BPF and tracing.

    CAP_SYS_ADMIN includes CAP_BPF and CAP_PERFMON (and stands for them before Linux 5.8).  In a
    child user namespace nothing is honoured: bpf(2) asks the initial one.
    """
    if in_user_namespace():
        return False
    held = effective()
    return name in held or (name in ("CAP_BPF", "CAP_PERFMON") and "CAP_SYS_ADMIN" in held)


def missing(*names: str) -> tuple[str, ...]:
    """Those of ``names`` that :func:`has` denies, in their order."""
    return tuple(name for name in names if not has(name))


def seccomp_filtered() -> bool:
    """True if a seccomp filter may refuse system calls, as container runtimes install one."""
    return _status_field("Seccomp") not in (None, "0")


def is_root() -> bool:
    """True for effective uid 0."""
    return os.geteuid() == 0
