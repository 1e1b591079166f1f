"""What tells a session that it does not see everything: runs skipped, a program taken off."""

from __future__ import annotations

import os
from collections.abc import Sequence

from hypermesh_ebpf.attach.hold import Hold
from hypermesh_ebpf.bpf.programs import read_program_info
from hypermesh_ebpf.errors import TargetGone
from hypermesh_ebpf.host.kernel import read_kernel_release

_COUNTED_SINCE_6_7 = (
    "kprobe",
    "kretprobe",
    "tracepoint",
    "perf_event",
    "uprobe",
    "uretprobe",
    "usdt",
)


def count_missed(programs: Sequence[tuple[str, int]]) -> int | None:
    """Runs that the kernel skipped, over (kind of hook, descriptor) of all programs; None where it
    does not tell of all.

    ``recursion_misses`` came with Linux 5.12; kprobes, tracepoints and perf events have counted
    into it since 6.7 (commit dd8657894c11), which nothing but the version shows.
    """
    old = read_kernel_release().version < (6, 7)
    if old and any(kind in _COUNTED_SINCE_6_7 for kind, _fd in programs):
        return None
    counts = [read_program_info(fd).missed for _kind, fd in programs]
    known = [count for count in counts if count is not None]
    return sum(known) if len(known) == len(counts) else None


def require_attached(hold: Hold) -> None:
    """Look whether a program is still where it was attached by netlink.

    In the network namespace of the interface.  Raises TargetGone.
    """
    try:
        there = _programs_at(hold)
    except OSError as error:
        raise TargetGone(
            f"watch {hold.iface}",
            f"the interface is gone: {os.strerror(error.errno or 0)}",
            "start again when it is back",
            errno=error.errno,
        ) from error
    if hold.prog_id not in there:
        raise TargetGone(
            f"watch {hold.iface}",
            f"our program (id {hold.prog_id}) was taken off or replaced by somebody else",
            f"see what is there with `hmebpf list --iface {hold.iface}`",
        )


def _programs_at(hold: Hold) -> list[int]:
    """The ids of the programs at that place.  Raises OSError."""
    if hold.filter is None:
        from hypermesh_ebpf.host.interfaces import read_attached

        return [each.prog_id for each in read_attached(hold.ifindex)]
    from hypermesh_ebpf import guard_process as raw

    netlink = raw.netlink_socket()
    try:
        filters = raw.list_filters(netlink, hold.ifindex, hold.filter.parent)
        return [program for _priority, _handle, program, _chain in filters]
    finally:
        netlink.close()
