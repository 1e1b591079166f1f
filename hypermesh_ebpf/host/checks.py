"""The single checks of check-system, by group: each gives findings, none changes anything."""

from __future__ import annotations

import errno
import os
import sys

from hypermesh_ebpf.bpf.info import read_program
from hypermesh_ebpf.errors import MissingBtf, MissingDependency, Unsupported
from hypermesh_ebpf.host import (
    capabilities,
    dependencies,
    environment,
    filesystems,
    kernel,
    kernel_btf,
    security,
    trials,
)
from hypermesh_ebpf.host.finding import Finding


def check_kernel() -> list[Finding]:
    """Release, documented minimums, bpf(2), JIT, BTF, container and machine."""
    release = kernel.read_kernel_release()
    below = [m for m in kernel.MINIMUMS if not release.reaches(m)]
    known = [release.release, release.distribution, release.machine]
    return [
        Finding(
            "kernel",
            "release",
            "ok",
            f"Linux {release.number} ({', '.join(filter(None, known))})",
            "what to expect; probes decide",
            "uname(2), /proc/version",
        ),
        Finding(
            "kernel",
            "minimums",
            "warn" if below else "ok",
            f"below: {', '.join(f'{m.feature} {m}' for m in below)}"
            if below
            else f"reached: {', '.join(f'{m.feature} {m}' for m in kernel.MINIMUMS)}",
            "the features named (a distribution may have backported them: see the hooks)",
            "the release against the documented minimums",
            "boot a newer kernel" if below else None,
        ),
        *_check_bpf(),
        _check_btf(),
        _check_environment(),
    ]


def _check_bpf() -> list[Finding]:
    what = "every monitor"
    probed = "bpf(2): a program loaded, its machine code asked for"
    try:
        program = trials.load_program(trials.SOCKET_FILTER)
    except MissingDependency as error:
        return [
            Finding("kernel", "bpf(2)", "fail", None, what, probed, error.remedy),
            Finding("kernel", "JIT", "info", None, "the cost of every event", probed),
        ]
    except OSError as error:
        if error.errno == errno.ENOSYS:
            found, remedy = "not in this kernel", "boot a kernel with CONFIG_BPF_SYSCALL=y"
        else:
            refused = security.refusal("load a program", error, ("CAP_BPF",))
            found, remedy = f"refused: {refused.cause}", refused.remedy or ""
        return [
            Finding("kernel", "bpf(2)", "fail", found, what, probed, remedy),
            _check_jit(None),
        ]
    try:
        length = read_program(program).jited_bytes
    finally:
        os.close(program)
    found = "maps and programs can be made"
    return [Finding("kernel", "bpf(2)", "ok", found, what, probed), _check_jit(length)]


def _check_jit(length: int | None) -> Finding:
    """``length``: bytes of machine code of a loaded program, None where none could be loaded."""
    setting = security.read_sysctl("net.core.bpf_jit_enable")
    harden = security.read_sysctl("net.core.bpf_jit_harden")
    enabled = bool(length) if length is not None else None if setting is None else setting != "0"
    words = {None: None, True: "on", False: "off: programs are interpreted"}[enabled]
    if words and setting == "2":
        words += ", writing its code to the kernel log (slow)"
    if words and harden not in (None, "0"):
        words += f", hardened ({harden})"
    mended = enabled is not False and setting != "2"
    return Finding(
        "kernel",
        "JIT",
        "info" if enabled is None else "ok" if mended else "warn",
        words,
        "the cost of every event: interpreted programs are several times slower",
        "a loaded program's machine code; net.core.bpf_jit_enable, bpf_jit_harden",
        None if mended else "sudo sysctl net.core.bpf_jit_enable=1",
    )


def _check_btf() -> Finding:
    affects = "fentry and LSM hooks; monitors that read kernel structures"
    path = kernel_btf.btf_path()
    probed = f"{path} opened and its magic read"
    try:
        size = os.stat(kernel_btf.require_btf()).st_size
    except MissingBtf as error:
        return Finding("kernel", "BTF", "fail", error.cause, affects, probed, error.remedy)
    return Finding("kernel", "BTF", "ok", f"{path}, {size / 1e6:.1f} MB", affects, probed)


def _check_environment() -> Finding:
    found = environment.detect_environment()
    words = [f"virtual machine ({found.machine})" if found.machine else "bare metal"]
    if found.container:
        words.insert(0, f"container ({found.container}) on")
    signs = [sign for sign in (found.container_sign, found.machine_sign) if sign]
    return Finding(
        "kernel",
        "environment",
        "info",
        " ".join(words),
        "in a container, monitors see the whole host but only this network namespace's interfaces"
        if found.container
        else "hardware performance counters are often missing in virtual machines"
        if found.machine
        else "nothing",
        f"seen by {', '.join(signs)}" if signs else "DMI, CPU flags, cgroup, container files",
    )


_FILESYSTEM_AFFECTS = {
    "tracefs": "tracepoints, kprobes before Linux 4.17",
    "debugfs": "the list of functions that kprobes may not touch",
    "bpf": "nothing of hmebpf; other tools pin programs and maps there",
}
_FIX = "`sudo hmebpf check-system --fix` mounts it (other tools may need it)"


def check_filesystems() -> list[Finding]:
    """tracefs, debugfs, bpffs: mounted, or at least to be opened without a mount."""
    return [
        _check_filesystem(fs)
        for fs in (filesystems.TRACEFS, filesystems.DEBUGFS, filesystems.BPFFS)
    ]


def _check_filesystem(fs: filesystems.Filesystem) -> Finding:
    name = "bpffs" if fs is filesystems.BPFFS else fs.name
    affects = _FILESYSTEM_AFFECTS[fs.name]
    probed = f"mountinfo, statfs(2) magic {fs.magic:#x}; opened"
    point = filesystems.find_mount(fs.magic)
    try:
        os.close(filesystems.open_filesystem(fs))
    except Unsupported as error:
        # Only tracefs stands between a monitor and its work.
        status = "warn" if fs is filesystems.TRACEFS else "info"
        found = f"mounted at {point}, but closed to us" if point else f"not mounted; {error.cause}"
        remedy = error.remedy
        if fs is not filesystems.TRACEFS and error.errno == errno.EPERM:
            remedy = _FIX
        return Finding("file systems", name, status, found, affects, probed, remedy)
    if point:
        return Finding("file systems", name, "ok", f"mounted at {point}", affects, probed)
    if fs is filesystems.BPFFS:  # a pin in a mount that nobody sees would be gone with it
        return Finding("file systems", name, "info", "not mounted", affects, probed, _FIX)
    found = "not mounted; opened without a mount"
    return Finding("file systems", name, "ok", found, affects, probed, _FIX)


def check_privileges() -> list[Finding]:
    """User, capabilities, and what else may forbid BPF."""
    return [*_check_capabilities(), *_check_policies()]


def _check_capabilities() -> list[Finding]:
    findings = []
    for name, cost in capabilities.COSTS.items():
        if name not in capabilities.known_to_kernel():
            found = "unknown to this kernel; CAP_SYS_ADMIN stands for it"
        elif name in capabilities.effective():
            found = "held"
        elif capabilities.has(name):
            found = "held, as part of CAP_SYS_ADMIN"
        else:
            found = "lacking"
        has = capabilities.has(name)
        if not has and found != "lacking":
            found = "held only in this user namespace, where it does not count"
        # Memory is not locked for BPF any more since Linux 5.11 (commit 0c8d8d4e31ab and others).
        spare = name == "CAP_SYS_RESOURCE" and kernel.read_kernel_release().version >= (5, 11)
        findings.append(
            Finding(
                "privileges",
                name,
                "ok" if has else "info" if spare else "warn",
                found,
                cost,
                "CapEff in /proc/self/status, /proc/self/uid_map",
                None if has or spare else capabilities.grant_remedy((name,)),
            )
        )
    return findings


def _check_policies() -> list[Finding]:
    group, privileged = "privileges", capabilities.has("CAP_BPF")
    unprivileged = security.read_sysctl("kernel.unprivileged_bpf_disabled")
    meanings = {"0": "allowed", "1": "forbidden until reboot", "2": "forbidden"}
    paranoid = security.read_sysctl("kernel.perf_event_paranoid")
    shut_out = paranoid is not None and int(paranoid) > 2 and not capabilities.has("CAP_SYS_ADMIN")
    level = security.lockdown()
    lsms = security.active_lsms()
    filtered = capabilities.seccomp_filtered()
    return [
        Finding(
            group,
            "unprivileged bpf",
            "ok" if privileged or unprivileged == "0" else "info",
            None
            if unprivileged is None
            else f"{meanings.get(unprivileged, 'unknown value')} ({unprivileged})",
            "bpf(2) without CAP_BPF (forbidden is the safer setting; tracing needs CAP_BPF anyway)",
            "sysctl kernel.unprivileged_bpf_disabled",
        ),
        Finding(
            group,
            "perf events",
            "warn" if shut_out else "ok" if paranoid is not None else "info",
            None if paranoid is None else f"kernel.perf_event_paranoid is {paranoid}",
            "tracepoints, kprobes, uprobes and sampling without CAP_SYS_ADMIN (above 2: none)",
            "sysctl kernel.perf_event_paranoid",
            "run it as root, or `sudo sysctl kernel.perf_event_paranoid=2`" if shut_out else None,
        ),
        Finding(
            group,
            "lockdown",
            "fail" if level == "confidentiality" else "ok" if level else "info",
            level,
            "confidentiality forbids kprobes and reading kernel memory",
            "securityfs lockdown",
            "boot with lockdown=integrity; see kernel_lockdown(7)"
            if level == "confidentiality"
            else None,
        ),
        Finding(
            group,
            "active LSMs",
            "info",
            ", ".join(lsms) if lsms else None,
            "LSM hooks need bpf among them",
            "securityfs lsm, else lsm_list_modules(2)",
        ),
        Finding(
            group,
            "seccomp",
            "info" if filtered else "ok",
            "a filter is active, and may refuse bpf(2) or perf_event_open(2)"
            if filtered
            else "no filter",
            "every monitor, if the filter refuses its system calls",
            "Seccomp in /proc/self/status",
        ),
    ]


def check_tools() -> list[Finding]:
    """BCC, libbpf and Python."""
    python = ".".join(map(str, sys.version_info[:3]))
    findings = [
        Finding(
            "tools", "Python", "ok", f"{python} ({sys.executable})", "hmebpf itself", "sys.version"
        )
    ]
    try:
        found: str | None = dependencies.libbpf_version()
        status, remedy = "ok", None
    except MissingDependency as error:
        found, status, remedy = error.cause, "fail", error.remedy
    findings.append(
        Finding("tools", "libbpf", status, found, "every monitor", "loaded, version asked", remedy)
    )
    try:
        bcc = dependencies.find_bcc()
        found, status, remedy = f"{bcc.version} ({bcc.package_dir})", "ok", None
    except MissingDependency as error:
        found, status, remedy = error.cause, "fail", error.remedy
    findings.append(
        Finding("tools", "BCC", status, found, "compiling C", "package and library found", remedy)
    )
    return findings
