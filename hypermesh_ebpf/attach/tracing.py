"""kprobes, tracepoints, raw tracepoints, fentry, fexit and LSM hooks.

Each attachment is a descriptor - of a perf event or of a BPF link - and ends with its last copy:
nothing is left in kprobe_events, whatever becomes of the process.

By libbcc where it is not what a monitor's start waits for: fentry, fexit, LSM, and kprobes before
Linux 4.17.  Mapping its 100 MB of LLVM takes 55 ms of a processor, a fifth of a start from the
cache, also in a thread beside the imports; a tracepoint takes two system calls (docs/design.md).
"""

from __future__ import annotations

import ctypes as ct
import errno
from collections.abc import Callable
from typing import Any

from hypermesh_ebpf.bpf.info import read_program
from hypermesh_ebpf.bpf.libbpf import check, libbpf
from hypermesh_ebpf.errors import (
    AttachError,
    HmebpfError,
    HookUnsupported,
    MissingPrivilege,
    describe_errno,
)
from hypermesh_ebpf.host import filesystems, trials
from hypermesh_ebpf.host.symbols import split_offset
from hypermesh_ebpf.libbcc import capture_stderr, libbcc

_ENTRY, _RETURN = 0, 1  # enum bpf_probe_attach_type of libbcc


def attach(kind: str, target: str, prog_fd: int) -> int:
    """Attach a loaded program at a resolved target; the descriptor that keeps it attached.

    ``target`` is a function's name for kprobe and kretprobe, with "+offset" if need be,
    "category:name" for tracepoint, a name for raw_tracepoint; fentry, fexit and lsm have theirs in
    the program.  Raises AttachError, MissingPrivilege.
    """
    if kind == "tracepoint":
        return _attach_tracepoint(target, prog_fd, link=False)
    if kind == "raw_tracepoint":
        return _attach_raw_tracepoint(target, prog_fd)
    source = trials.event_source("kprobe") if kind in ("kprobe", "kretprobe") else None
    if source is not None:
        return _attach_kprobe(kind, target, prog_fd, source, link=False)
    return call(f"attach {kind} to {target}", _CALLS[kind](libbcc(), target, prog_fd))


def call(what: str, attach_it: Callable[[], int]) -> int:
    """What one of libbcc's functions gives: a descriptor.  Raises AttachError, MissingPrivilege."""
    ct.set_errno(0)
    fd, said = capture_stderr(attach_it)
    if fd >= 0:
        return int(fd)
    raise refusal(what, ct.get_errno(), said)


def refusal(what: str, number: int, said: str = "") -> HmebpfError:
    """The kernel's no, in its number and libbcc's words."""
    if "create_probe_event" in said:
        # Refused a perf event, libbcc tried the files of tracefs: the first no is the true one.
        source = "uprobe" if "uprobe_events" in said else "kprobe"
        asked = trials.refuse_probe(source, is_return=False).errno
        number = asked if asked in (errno.EPERM, errno.EACCES) else number
    cause = describe_errno(number) if number else "libbcc gave no reason"
    lines = [line for line in said.strip().splitlines() if line]
    if lines:
        cause += f" ({lines[-1]})"
    if number in (errno.EPERM, errno.EACCES):
        return MissingPrivilege(what, cause, "run as root; see `hmebpf check-system`", errno=number)
    if number == errno.EILSEQ:  # can_probe(): libc's words for it are about characters
        return AttachError(
            what,
            "no instruction begins at this offset (EILSEQ)",
            "take the offset of an instruction, or none",
            errno=number,
        )
    remedy = "see `hmebpf check-system`"
    if number == errno.ESRCH:
        remedy = "name a process that runs: `ps -e`"
    return AttachError(what, cause, remedy, errno=number, details=said or None)


def attach_link(kind: str, target: str, prog_fd: int) -> int:
    """As :func:`attach`, by a link, which can be pinned.

    Raises HookUnsupported before Linux 5.15 where the hook is a perf event.
    """
    if kind not in ("tracepoint", "kprobe", "kretprobe"):
        return attach(kind, target, prog_fd)  # these are links already
    if kind == "tracepoint":
        return _attach_tracepoint(target, prog_fd, link=True)
    source = trials.event_source("kprobe")
    if source is None:
        what = f"attach {kind} to {target}"
        raise HookUnsupported(what, "this kernel has no kprobe events (Linux 4.17)")
    return _attach_kprobe(kind, target, prog_fd, source, link=True)


def _attach_tracepoint(target: str, prog_fd: int, *, link: bool) -> int:
    """By a perf event of the tracepoint's number (perf_event_open(2), PERF_TYPE_TRACEPOINT)."""
    from hypermesh_ebpf.attach import perf_event

    what = f"attach tracepoint to {target}"
    number = filesystems.tracepoint_id(target)
    if number is None:
        raise HookUnsupported(what, f"this kernel has no tracepoint {target}")
    return perf_event.attach_probe(what, prog_fd, perf_event.TRACEPOINT, number, link=link)


def _attach_raw_tracepoint(target: str, prog_fd: int) -> int:
    """BPF_RAW_TRACEPOINT_OPEN; a program with types (tp_btf) knows its tracepoint itself."""
    typed = read_program(prog_fd).type == "tracing"
    name = None if typed else target.rpartition(":")[2].encode()
    try:
        return check(libbpf().bpf_raw_tracepoint_open(name, prog_fd))
    except OSError as error:
        raise refusal(f"attach raw_tracepoint to {target}", error.errno or 0) from error


def _attach_kprobe(kind: str, target: str, prog_fd: int, source: int, *, link: bool) -> int:
    """By an event of the kprobe PMU (Linux 4.17), which goes with its descriptor.

    Not by libbcc: refused an event, it makes an entry in kprobe_events, and leaves it there if that
    does not help.
    """
    from hypermesh_ebpf.attach import perf_event

    function, offset = split_offset(target)
    name = ct.create_string_buffer(function.encode())
    config = 1 << trials.return_bit("kprobe") if kind == "kretprobe" else 0
    what = f"attach {kind} to {target}"
    return perf_event.attach_probe(
        what, prog_fd, source, config, ct.addressof(name), offset, link=link
    )


def _kprobe(lib: Any, target: str, prog_fd: int) -> Callable[[], int]:
    function, offset = split_offset(target)
    name = f"hmebpf_{function}".encode()
    return lambda: lib.bpf_attach_kprobe(prog_fd, _ENTRY, name, function.encode(), offset, 0)


def _kretprobe(lib: Any, target: str, prog_fd: int) -> Callable[[], int]:
    function, offset = split_offset(target)
    name = f"hmebpf_ret_{function}".encode()
    return lambda: lib.bpf_attach_kprobe(prog_fd, _RETURN, name, function.encode(), offset, 0)


def _trampoline(lib: Any, target: str, prog_fd: int) -> Callable[[], int]:
    return lambda: lib.bpf_attach_kfunc(prog_fd)


def _lsm(lib: Any, target: str, prog_fd: int) -> Callable[[], int]:
    return lambda: lib.bpf_attach_lsm(prog_fd)


_CALLS: dict[str, Callable[[Any, str, int], Callable[[], int]]] = {
    "kprobe": _kprobe,
    "kretprobe": _kretprobe,
    "fentry": _trampoline,
    "fexit": _trampoline,
    "lsm": _lsm,
}
