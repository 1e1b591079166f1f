"""kprobes, tracepoints, raw tracepoints, fentry and fexit: attach through libbcc; close to detach.

Each attachment is a descriptor - of a perf event or of a BPF link - and ends with its last copy:
nothing is left in kprobe_events, whatever becomes of the process.  libbcc makes perf events through
the kprobe PMU (Linux 4.17), so no name has to be invented either.
"""

from __future__ import annotations

import ctypes as ct
import errno
from collections.abc import Callable
from typing import Any

from hypermesh_ebpf.errors import AttachError, MissingPrivilege, describe_errno
from hypermesh_ebpf.libbcc import capture_stderr, libbcc

_ENTRY, _RETURN = 0, 1  # enum bpf_probe_attach_type of libbcc


def attach(kind: str, target: str, prog_fd: int) -> int:
    """Attach a loaded program at a resolved target; the descriptor that keeps it attached.

    ``target`` is a function's name for kprobe and kretprobe, "category:name" for tracepoint, a name
    for raw_tracepoint; fentry and fexit have theirs in the program.  Raises AttachError,
    MissingPrivilege.
    """
    what = f"attach {kind} to {target}"
    fd, said = capture_stderr(_CALLS[kind](libbcc(), target, prog_fd))
    if fd >= 0:
        return int(fd)
    number = ct.get_errno()
    cause = describe_errno(number) if number else "libbcc gave no reason"
    lines = [line for line in said.strip().splitlines() if line]
    if lines:
        cause += f" ({lines[-1]})"
    if number in (errno.EPERM, errno.EACCES):
        raise MissingPrivilege(what, cause, "run as root; see `hmebpf check-system`", errno=number)
    raise AttachError(what, cause, "see `hmebpf check-system`", errno=number, details=said or None)


def _tracepoint(lib: Any, target: str, prog_fd: int) -> Callable[[], int]:
    category, _, name = target.partition(":")
    return lambda: lib.bpf_attach_tracepoint(prog_fd, category.encode(), name.encode())


def _raw_tracepoint(lib: Any, target: str, prog_fd: int) -> Callable[[], int]:
    return lambda: lib.bpf_attach_raw_tracepoint(prog_fd, target.encode())


def _kprobe(lib: Any, target: str, prog_fd: int) -> Callable[[], int]:
    name = f"hmebpf_{target}".encode()
    return lambda: lib.bpf_attach_kprobe(prog_fd, _ENTRY, name, target.encode(), 0, 0)


def _kretprobe(lib: Any, target: str, prog_fd: int) -> Callable[[], int]:
    name = f"hmebpf_ret_{target}".encode()
    return lambda: lib.bpf_attach_kprobe(prog_fd, _RETURN, name, target.encode(), 0, 0)


def _trampoline(lib: Any, target: str, prog_fd: int) -> Callable[[], int]:
    return lambda: lib.bpf_attach_kfunc(prog_fd)


_CALLS: dict[str, Callable[[Any, str, int], Callable[[], int]]] = {
    "tracepoint": _tracepoint,
    "raw_tracepoint": _raw_tracepoint,
    "kprobe": _kprobe,
    "kretprobe": _kretprobe,
    "fentry": _trampoline,
    "fexit": _trampoline,
}
