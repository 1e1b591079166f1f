"""Can a program of this kind be loaded and attached here?  The kernel is asked, not its version.

Answers are kept for the life of the process.  What is asked is in
:mod:`hypermesh_ebpf.host.hook_probes`; versions are words in messages only.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from hypermesh_ebpf.attach_type import KINDS, EbpfAttachType
from hypermesh_ebpf.bpf.programs import CGROUP_ATTACH_TYPES
from hypermesh_ebpf.errors import (
    HmebpfError,
    HookUnsupported,
    MissingDependency,
    MissingPrivilege,
    Unsupported,
    UsageError,
    describe_errno,
)
from hypermesh_ebpf.host import symbols, targets, trials
from hypermesh_ebpf.host.hook_probes import PROBES
from hypermesh_ebpf.host.kernel import read_kernel_release
from hypermesh_ebpf.host.security import perf_refusal

# The first release that has it, none before the project's minimum for eBPF: for words only.
_SINCE = {
    "xdp": "4.8",
    "tc": "4.13",
    "kprobe": "4.4",
    "kretprobe": "4.4",
    "tracepoint": "4.7",
    "raw_tracepoint": "4.17",
    "fentry": "5.5",
    "fexit": "5.5",
    "uprobe": "4.4",
    "uretprobe": "4.4",
    "usdt": "4.4",
    "perf_event": "4.9",
    "lsm": "5.7",
    "cgroup": "4.10",
}


@dataclass(frozen=True, slots=True)
class Availability:
    """Whether something can be done here.

    ``reason`` says why not and ``remedy`` what to type; ``privilege`` is True when only a
    privilege lacks.  ``probed`` says what was tried, ``target`` what the hook's target was
    resolved to ("syscall:execve" to "__x64_sys_execve").
    """

    available: bool
    reason: str | None = None
    remedy: str | None = None
    privilege: bool = False
    probed: str = ""
    target: str = ""


def availability_of(error: HmebpfError, probed: str = "", target: str = "") -> Availability:
    """The Availability that an error stands for."""
    reason = error.cause or error.what
    return Availability(
        False, reason, error.remedy, isinstance(error, MissingPrivilege), probed, target
    )


@lru_cache(maxsize=512)
def probe_hook(kind: str, target: str = "") -> Availability:
    """Whether a program can be loaded and attached at ``target`` of this kind.

    ``kind`` and ``target`` as in :class:`hypermesh_ebpf.monitors.declaration.Hook`; an empty
    target asks for the kind as such.  Never raises: whatever fails is the answer.  To ask again
    (privileges changed), call ``probe_hook.cache_clear()``.
    """
    probe, probed = PROBES.get(kind, (None, ""))
    if probe is None:
        return Availability(
            False, f"there is no attach type {kind!r}", f"use one of {', '.join(KINDS)}"
        )
    try:
        resolved = probe(kind, target)
    except (Unsupported, MissingDependency) as error:
        return availability_of(error, probed, target)
    return Availability(True, probed=probed, target=resolved)


def require_hook(point: EbpfAttachType) -> str:
    """The target of an attach point as this machine knows it; asked before anything is loaded.

    A system call's function by its name ("syscall:execve" is "__x64_sys_execve"), a library by its
    path, a cgroup by its directory; anything else as it is.

    Raises HookUnsupported where the kernel has no such hook (``cause`` tells which release brought
    it), MissingPrivilege, InterfaceNotFound, AttachError for a file, function, probe or cgroup that
    is not there, UsageError for an unknown perf event.
    """
    found = probe_hook(point.kind)
    if not found.available:
        raise _refusal(point, found, f"; {_describe_minimum(point.kind)}")
    return _RESOLVERS.get(point.kind, _resolve_in_kernel)(point)


def _describe_minimum(kind: str) -> str:
    """ "xdp needs Linux 4.8 or newer, this is 6.1.90"."""
    number = read_kernel_release().number
    return f"{kind} needs Linux {_SINCE[kind]} or newer, this is {number}"


def _refusal(point: EbpfAttachType, found: Availability, more: str = "") -> Unsupported:
    what = f"attach to {point}"
    if found.privilege:
        return MissingPrivilege(what, found.reason, found.remedy)
    return HookUnsupported(what, f"{found.reason}{more}", found.remedy)


def _resolve_in_kernel(point: EbpfAttachType) -> str:
    """A function, tracepoint or LSM hook."""
    found = probe_hook(point.kind, point.target)
    if not found.available:
        raise _refusal(point, found)
    return found.target or point.target


def _resolve_kprobe(point: EbpfAttachType) -> str:
    _name, offset = symbols.split_offset(point.target)
    if offset and point.kind == "kretprobe":
        raise UsageError(f"attach to {point}", "a return has no offset", "leave it out")
    return _resolve_in_kernel(point)


def _resolve_interface(point: EbpfAttachType) -> str:
    targets.find_interface(point.target)
    return point.target


def _resolve_place(point: EbpfAttachType) -> str:
    from hypermesh_ebpf.host import executables  # no monitor's start needs it

    name, _, place = point.target.rpartition(":")
    path = executables.find_file(name, point.option("pid"))
    executables.find_offset(path, place)
    return f"{path}:{place}"


def _resolve_static_probe(point: EbpfAttachType) -> str:
    from hypermesh_ebpf.host import executables

    name, provider, probe = point.target.rsplit(":", 2)
    path = executables.find_file(name, point.option("pid"))
    executables.find_static_probes(path, provider, probe)
    return f"{path}:{provider}:{probe}"


def _resolve_perf_event(point: EbpfAttachType) -> str:
    from hypermesh_ebpf.host import perf_events

    event = perf_events.find_perf_event(point.target)
    if event.type != perf_events.SOFTWARE:
        try:  # counts nothing before it is asked to; the machine must have such a counter
            os.close(trials.open_perf_event(event.type, event.config, 10**12))
        except OSError as error:
            what = f"attach to {point}"
            if error.errno in (errno.EPERM, errno.EACCES):
                raise perf_refusal(what, error) from error
            raise HookUnsupported(
                what,
                f"{describe_errno(error.errno or 0)}: this machine has no such hardware counter "
                "(virtual machines often have none)",
                "sample cpu-clock instead",
                errno=error.errno,
            ) from error
    return event.name


def _resolve_cgroup(point: EbpfAttachType) -> str:
    path = targets.find_cgroup(point.target)
    group = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        trials.query_programs(group, CGROUP_ATTACH_TYPES[point.option("attach")])
    except OSError as error:
        if error.errno != errno.EINVAL:  # refused, not unknown: the attach will say why
            return path
        raise HookUnsupported(
            f"attach to {point}",
            f"{describe_errno(errno.EINVAL)}: this kernel has no such attach point on cgroups "
            "(sock_release: Linux 5.9)",
            "see `hmebpf check-system`",
            errno=errno.EINVAL,
        ) from error
    finally:
        os.close(group)
    return path


_RESOLVERS: dict[str, Callable[[EbpfAttachType], str]] = {
    "xdp": _resolve_interface,
    "tc": _resolve_interface,
    "kprobe": _resolve_kprobe,
    "kretprobe": _resolve_kprobe,
    "uprobe": _resolve_place,
    "uretprobe": _resolve_place,
    "usdt": _resolve_static_probe,
    "perf_event": _resolve_perf_event,
    "cgroup": _resolve_cgroup,
}
