"""Trying each kind of hook: what :func:`hypermesh_ebpf.host.hooks.probe_hook` asks the kernel.

Every probe loads a program that does nothing and goes as far towards attaching it as is cheap:
all the way for raw tracepoints, fentry, LSM and perf events (for microseconds, to something rare
unless a target is given); for kprobes, uprobes and tracepoints up to the last check before the
kernel registers something, because taking that off again costs 40 to 100 ms of RCU grace periods
each.  XDP and TC programs are loaded but attached to no interface.  Each gives the target,
resolved, or raises Unsupported or MissingPrivilege.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from hypermesh_ebpf.errors import Unsupported
from hypermesh_ebpf.host import (
    architecture,
    filesystems,
    kernel_btf,
    security,
    symbols,
    targets,
    trials,
)
from hypermesh_ebpf.host.security import perf_refusal, refusal

_TRACING_NEEDS = ("CAP_BPF", "CAP_PERFMON")
_NETWORK_NEEDS = ("CAP_BPF", "CAP_NET_ADMIN")
_RARE_FUNCTION = "bpf_fentry_test1"  # net/bpf/test_run.c: only BPF_PROG_TEST_RUN calls it
_RARE_LSM_HOOK = "sb_pivotroot"
_RARE_TRACEPOINT = "sched_process_exec"
_OTHER_HOOK = "use a tracepoint or raw tracepoint instead"
_OTHERWISE = {
    **dict.fromkeys(("kprobe", "kretprobe", "fentry", "fexit"), _OTHER_HOOK),
    "lsm": "boot a kernel that allows BPF LSM programs; to watch only, use a tracepoint",
}


@contextmanager
def _descriptor(fd: int) -> Iterator[int]:
    try:
        yield fd
    finally:
        os.close(fd)


@contextmanager
def _loaded(
    kind: str, prog_type: int, needs: tuple[str, ...], attach_type: int = 0, btf_id: int = 0
) -> Iterator[int]:
    try:
        fd = trials.load_program(prog_type, attach_type, btf_id)
    except OSError as error:
        raise refusal(f"load a {kind} program", error, needs, _OTHERWISE.get(kind)) from error
    with _descriptor(fd):
        yield fd


def _probe_xdp(kind: str, target: str) -> str:
    with _loaded(kind, trials.XDP, _NETWORK_NEEDS):
        return target


def _probe_tc(kind: str, target: str) -> str:
    with _loaded(kind, trials.SCHED_CLS, _NETWORK_NEEDS):
        pass
    try:  # TCX (Linux 6.6) needs neither clsact nor cls_bpf; querying changes nothing
        trials.query_programs(1, trials.TCX_INGRESS)
    except OSError:
        _require_clsact()
    return target


def _require_clsact() -> None:
    """clsact and cls_bpf, built in, loaded, or to be loaded by the kernel when first used."""
    for module, config in (
        ("sch_ingress", "CONFIG_NET_SCH_INGRESS"),
        ("cls_bpf", "CONFIG_NET_CLS_BPF"),
    ):
        if not _has_module(module):
            raise Unsupported(
                "attach to traffic control",
                f"{module} is not in this kernel, nor among the modules in /lib/modules",
                f"boot a kernel with {config}, or install its modules package",
            )


def _has_module(name: str) -> bool:
    if os.path.exists(f"/sys/module/{name}"):
        return True
    needle = f"/{name}.ko"
    listed = False
    for index in ("modules.builtin", "modules.dep"):
        try:
            with open(f"/lib/modules/{os.uname().release}/{index}") as file:
                listed = True
                if any(needle in line for line in file):
                    return True
        except OSError:
            continue
    if listed:
        return False
    # No list of modules (a container, or a kernel without any): its init function tells.
    marker = {"sch_ingress": "clsact_init", "cls_bpf": "cls_bpf_classify"}[name]
    return symbols.find_function(marker) is not None


def _probe_kprobe(kind: str, target: str) -> str:
    what = f"attach a {kind}"
    if trials.event_source("kprobe") is None and not _has_kprobe_events():
        raise Unsupported(
            what,
            "this kernel has no kprobes (CONFIG_KPROBE_EVENTS is off)",
            _OTHER_HOOK,
        )
    with _loaded(kind, trials.KPROBE, _TRACING_NEEDS):
        pass
    if trials.event_source("kprobe") is not None:
        error = trials.refuse_probe("kprobe", kind == "kretprobe")
        if error.errno not in (errno.ENOENT, errno.EINVAL):
            raise perf_refusal(what, error, _TRACING_NEEDS) from error
    if security.lockdown() == "confidentiality":
        # Since Linux 6.6 the function is looked up before lockdown is asked, so that a trial
        # with a function that does not exist never hears of it (create_local_trace_kprobe()).
        raise refusal(what, PermissionError(errno.EPERM, os.strerror(errno.EPERM)))
    return _require_function(what, target) if target else target


def _has_kprobe_events() -> bool:
    """Before Linux 4.17 kprobes were made through this file alone."""
    try:
        filesystems.read_tracefs("kprobe_events")
    except (OSError, Unsupported):
        return False
    return True


def _require_function(what: str, target: str) -> str:
    function = symbols.resolve_target(target)
    name, _, _offset = function.partition("+")
    if symbols.find_function(name) is None:
        variants = symbols.find_variants(name) or symbols.find_similar(name)
        raise Unsupported(
            f"{what} to {name}",
            f"no function {name} in this kernel (renamed, or inlined by the compiler)",
            f"use {' or '.join(variants)}"
            if variants
            else f"look: `grep -w {name} /proc/kallsyms`",
        )
    if symbols.is_blacklisted(name):
        raise Unsupported(
            f"{what} to {name}",
            f"the kernel forbids kprobes on {name} (debugfs kprobes/blacklist)",
            "use a caller of the function, or a tracepoint",
        )
    return function


def _probe_uprobe(kind: str, target: str) -> str:
    what = f"attach a {kind}"
    if trials.event_source("uprobe") is None:
        raise Unsupported(
            what,
            "this kernel has no uprobes (CONFIG_UPROBE_EVENTS is off)",
            "boot a kernel with CONFIG_UPROBE_EVENTS=y",
        )
    with _loaded(kind, trials.KPROBE, _TRACING_NEEDS):
        pass
    error = trials.refuse_probe("uprobe", kind == "uretprobe")
    if error.errno not in (errno.ENOENT, errno.EINVAL):
        # CAP_SYS_ADMIN until CAP_PERFMON was made enough (perf_uprobe_event_init())
        raise perf_refusal(what, error, ("CAP_BPF", "CAP_SYS_ADMIN")) from error
    path = target.partition(":")[0]
    if path.startswith("/") and not os.path.isfile(path):
        raise Unsupported(f"{what} to {path}", "no such file", f"look: `ls -l {path}`")
    return target


def _probe_tracepoint(kind: str, target: str) -> str:
    with _loaded(kind, trials.TRACEPOINT, _TRACING_NEEDS):
        pass
    what = "attach to a tracepoint"
    try:
        # The same permission checks as a tracepoint's event, with nothing registered.
        os.close(trials.open_cpu_clock())
    except OSError as error:
        raise perf_refusal(what, error, _TRACING_NEEDS) from error
    tracepoint = target or f"sched:{_RARE_TRACEPOINT}"
    if not filesystems.tracepoint_exists(tracepoint):
        raise Unsupported(
            f"{what} {tracepoint}",
            f"this kernel has no tracepoint {tracepoint}",
            _other_tracepoint(tracepoint),
        )
    return target


def _other_tracepoint(tracepoint: str) -> str:
    """What to do where there is no such tracepoint."""
    close = targets.close_tracepoints(tracepoint)
    if close:
        return f"close to it: {', '.join(close)}"
    category = tracepoint.partition(":")[0]
    if category == "syscalls":
        return "boot a kernel with CONFIG_FTRACE_SYSCALLS=y, or use raw tracepoints"
    return f"look: `sudo ls /sys/kernel/tracing/events/{category}`"


def _other_raw_tracepoint(name: str) -> str:
    close = [each.partition(":")[2] for each in targets.close_tracepoints(name)]
    if close:
        return f"close to it: {', '.join(close)}"
    return "look: `sudo ls /sys/kernel/tracing/events/*`"


def _probe_raw_tracepoint(kind: str, target: str) -> str:
    # A raw tracepoint has no category; "sched:sched_process_exec" means the same one.
    name = (target or _RARE_TRACEPOINT).rpartition(":")[2]
    with _loaded(kind, trials.RAW_TRACEPOINT, _TRACING_NEEDS) as program:
        try:
            os.close(trials.open_raw_tracepoint(name, program))
        except OSError as error:
            if error.errno == errno.ENOENT:
                raise Unsupported(
                    f"attach to raw tracepoint {name}",
                    f"this kernel has no raw tracepoint {name}",
                    _other_raw_tracepoint(name),
                    errno=error.errno,
                ) from error
            raise refusal(f"attach to raw tracepoint {name}", error, _TRACING_NEEDS) from error
    return target


def _attach_by_btf(
    kind: str, prog_type: int, attach_type: int, names: tuple[str, ...], what: str
) -> str:
    """Load for the first of ``names`` in the kernel's BTF, attach, close; give the name."""
    try:
        # Type 1 is never a function: a kernel that refuses all such programs says so at once
        # (EPERM), before 20 ms go into parsing its BTF.
        os.close(trials.load_program(prog_type, attach_type, 1))
    except OSError as error:
        if error.errno in (errno.EPERM, errno.EACCES):
            raise refusal(
                f"load a {kind} program", error, _TRACING_NEEDS, _OTHERWISE[kind]
            ) from error
    for name in names:
        btf_id = kernel_btf.function_btf_id(name)
        if btf_id is not None:
            break
    else:
        raise Unsupported(
            what,
            f"no function {names[0]} in the kernel's BTF (renamed, inlined, or in a module)",
            f"close to it: {', '.join(close)}"
            if (close := symbols.find_similar(names[0]))
            else f"look: `bpftool btf dump file {kernel_btf.btf_path()} | grep {names[0]}`",
        )
    with _loaded(kind, prog_type, _TRACING_NEEDS, attach_type, btf_id) as program:
        try:
            os.close(trials.open_raw_tracepoint(None, program))
        except OSError as error:
            if error.errno == errno.EBUSY:
                return name  # it can be done, and somebody is doing it just now
            raise refusal(what, error, _TRACING_NEEDS, _OTHERWISE[kind]) from error
    return name


def _probe_fentry(kind: str, target: str) -> str:
    prefix, _, call = target.partition(":")
    if prefix == "syscall":
        names = architecture.syscall_functions(call)
    elif prefix == "compat_syscall":
        names = architecture.compat_syscall_functions(call) or (target,)
    else:
        names = (target or _RARE_FUNCTION,)
    attach_type = trials.TRACE_FENTRY if kind == "fentry" else trials.TRACE_FEXIT
    name = _attach_by_btf(kind, trials.TRACING, attach_type, names, f"attach {kind}")
    return name if target else target


def _probe_lsm(kind: str, target: str) -> str:
    hook = (target or _RARE_LSM_HOOK).removeprefix("bpf_lsm_")
    lsms = security.active_lsms()
    if lsms is not None and "bpf" not in lsms:
        raise Unsupported(
            "attach to an LSM hook",
            f"the BPF LSM is not active (active: {', '.join(lsms)})",
            f"boot with `lsm={','.join((*lsms, 'bpf'))}` on the kernel command line",
        )
    _attach_by_btf(kind, trials.LSM, trials.LSM_MAC, (f"bpf_lsm_{hook}",), "attach to an LSM hook")
    return target


def _probe_perf_event(kind: str, target: str) -> str:
    with _loaded(kind, trials.PERF_EVENT, _TRACING_NEEDS) as program:
        try:
            with _descriptor(trials.open_cpu_clock()) as event:
                trials.set_program(event, program)
        except OSError as error:
            raise perf_refusal("attach to a perf event", error, _TRACING_NEEDS) from error
    return target


def _probe_cgroup(kind: str, target: str) -> str:
    what = "attach to a cgroup"
    with _loaded(kind, trials.CGROUP_SKB, _NETWORK_NEEDS):
        pass
    point = target or filesystems.find_mount(filesystems.CGROUP2.magic)
    if point is None:
        raise Unsupported(
            what,
            "no cgroup2 file system is mounted",
            "mount it: `sudo mkdir -p /sys/fs/cgroup/unified && "
            "sudo mount -t cgroup2 cgroup2 /sys/fs/cgroup/unified`",
        )
    try:
        with _descriptor(os.open(point, os.O_RDONLY | os.O_DIRECTORY)) as cgroup:
            trials.query_programs(cgroup, trials.CGROUP_INET_INGRESS)
    except OSError as error:
        if error.errno == errno.EINVAL:
            raise Unsupported(
                what,
                "this kernel runs no programs on cgroups (CONFIG_CGROUP_BPF is off)",
                "boot a kernel with CONFIG_CGROUP_BPF=y",
                errno=error.errno,
            ) from error
        raise refusal(f"{what} ({point})", error, _NETWORK_NEEDS) from error
    return target


_KPROBE = (_probe_kprobe, "program loaded; kprobe event tried; function looked up in kallsyms")
_UPROBE = (_probe_uprobe, "program loaded; uprobe event tried")
_FENTRY = (_probe_fentry, "program loaded for a function of the kernel's BTF, attached, detached")
PROBES: dict[str, tuple[Callable[[str, str], str], str]] = {
    "xdp": (_probe_xdp, "program loaded"),
    "tc": (_probe_tc, "program loaded; TCX queried, else clsact and cls_bpf looked for"),
    "kprobe": _KPROBE,
    "kretprobe": _KPROBE,
    "tracepoint": (_probe_tracepoint, "program loaded; perf event opened; id read from tracefs"),
    "raw_tracepoint": (_probe_raw_tracepoint, "program loaded, attached, detached"),
    "fentry": _FENTRY,
    "fexit": _FENTRY,
    "uprobe": _UPROBE,
    "uretprobe": _UPROBE,
    "usdt": _UPROBE,
    "perf_event": (_probe_perf_event, "program loaded, set on a CPU clock event, closed"),
    "lsm": (_probe_lsm, "active LSMs read; program loaded for an LSM hook, attached, detached"),
    "cgroup": (_probe_cgroup, "program loaded; the cgroup queried for attached programs"),
}
