"""uprobes, uretprobes and static probes (USDT): places in a program's or library's file."""

from __future__ import annotations

import ctypes as ct
import os

from hypermesh_ebpf.attach import perf_event, tracing
from hypermesh_ebpf.errors import HmebpfError, HookUnsupported
from hypermesh_ebpf.host import executables, trials
from hypermesh_ebpf.libbcc import libbcc

_ENTRY, _RETURN = 0, 1  # enum bpf_probe_attach_type of libbcc
_COUNTER_SHIFT = 32  # /sys/bus/event_source/devices/uprobe/format/ref_ctr_offset
_COUNTER_FORMAT = "/sys/bus/event_source/devices/uprobe/format/ref_ctr_offset"


def attach(
    kind: str, target: str, prog_fd: int, *, pid: int | None = None, pinnable: bool = False
) -> int:
    """Attach at the entry or return of a function; the descriptor that keeps it attached.

    ``target`` is PATH:SYMBOL[+OFFSET] or PATH:0xOFFSET, of all processes or of ``pid``.
    Raises AttachError, MissingPrivilege, HookUnsupported.
    """
    name, _, place = target.rpartition(":")
    path = executables.find_file(name, pid)
    offset = executables.find_offset(path, place)
    what = f"attach {kind} to {path}:{place}"
    return _attach(what, kind == "uretprobe", path, offset, 0, prog_fd, pid, pinnable)


def attach_static(
    target: str, prog_fd: int, *, pid: int | None = None, pinnable: bool = False
) -> tuple[int, ...]:
    """Attach at every location of a static probe, PATH:PROVIDER:NAME; a descriptor for each.

    A probe with a semaphore runs only while somebody counts it up: the kernel does so in every
    process that maps the file (reference counter, Linux 4.20), and down again at the end.
    Raises AttachError, MissingPrivilege, HookUnsupported.
    """
    name, provider, probe = target.rsplit(":", 2)
    path = executables.find_file(name, pid)
    what = f"attach usdt to {path}:{provider}:{probe}"
    found = executables.find_static_probes(path, provider, probe)
    if any(each.semaphore for each in found) and not os.path.exists(_COUNTER_FORMAT):
        raise HookUnsupported(
            what,
            "the probe has a semaphore, which this kernel cannot count up (Linux 4.20)",
            "use a uprobe on the function that has the probe",
        )
    made: list[int] = []
    try:
        for each in found:
            made.append(
                _attach(what, False, path, each.offset, each.semaphore, prog_fd, pid, pinnable)
            )
    except HmebpfError:
        for fd in made:
            os.close(fd)
        raise
    return tuple(made)


def _attach(
    what: str,
    is_return: bool,
    path: str,
    offset: int,
    counter: int,
    prog_fd: int,
    pid: int | None,
    pinnable: bool,
) -> int:
    source = trials.event_source("uprobe")
    if source is not None:
        # Not by libbcc: refused an event, it makes an entry in uprobe_events and leaves it there.
        file = ct.create_string_buffer(os.fsencode(path))
        config = counter << _COUNTER_SHIFT
        config |= 1 << trials.return_bit("uprobe") if is_return else 0
        return perf_event.attach_probe(
            what, prog_fd, source, config, ct.addressof(file), offset, pid=pid, link=pinnable
        )
    if pinnable or counter:
        raise HookUnsupported(what, "this kernel has no uprobe events (Linux 4.17)")
    lib = libbcc()
    process = -1 if pid is None else pid
    event = f"hmebpf_{offset:x}".encode()
    binary = os.fsencode(path)
    side = _RETURN if is_return else _ENTRY
    return tracing.call(
        what,
        lambda: lib.bpf_attach_uprobe(prog_fd, side, event, binary, offset, process, 0),
    )
