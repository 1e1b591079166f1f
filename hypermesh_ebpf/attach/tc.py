"""Traffic control: a filter of cls_bpf with direct action on clsact, by pyroute2, or a TCX link.

cls_bpf(8), tc-bpf(8); net/sched/cls_bpf.c.  Needs Linux 4.13 (a filter tells its program's id,
commit e86283071fc0) and CAP_NET_ADMIN; TCX links came with 6.6.

A filter belongs to nobody and outlives its owner: the guard holds it before it is made and takes
off exactly this one.  A clsact that is there is shared and stays; one that hmebpf made goes with
the last filter in it.  Nobody else's filter is touched: without a priority of the user's own,
ours runs behind all others.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from hypermesh_ebpf import guard_process as raw
from hypermesh_ebpf import ledger
from hypermesh_ebpf.attach import links
from hypermesh_ebpf.attach.hold import Hold, TcFilter
from hypermesh_ebpf.attach.route import Refused, ask, common_refusal, open_route
from hypermesh_ebpf.errors import (
    AttachError,
    HmebpfError,
    HookUnsupported,
    InterfaceBusy,
    UsageError,
    describe_errno,
)
from hypermesh_ebpf.host import trials

PARENTS = {"ingress": 0xFFFFFFF2, "egress": 0xFFFFFFF3}  # TC_H_CLSACT with TC_H_MIN_INGRESS, ...
_CLSACT = 0xFFFFFFF1
_TCX = {"ingress": links.TCX_INGRESS, "egress": links.TCX_EGRESS}
_FIRST_PRIORITY, _LAST_PRIORITY = 49152, 65535  # the first that the kernel itself would give


def attach(
    prog_fd: int,
    prog_id: int,
    iface: str,
    ifindex: int,
    direction: str,
    priority: int | None,
    hold: Callable[[Hold], None],
) -> tuple[TcFilter, str | None]:
    """Attach through netlink; where the filter is, and what there is to know about it.

    ``hold`` is told before anything is made.  Raises InterfaceBusy where another filter has the
    priority, HookUnsupported, MissingPrivilege, TargetGone, AttachError, UsageError.
    """
    what = f"attach tc to {iface} {direction}"
    if priority is not None and not 1 <= priority <= _LAST_PRIORITY:
        raise UsageError(what, f"priority is {priority}", f"1 to {_LAST_PRIORITY}")
    parent = PARENTS[direction]
    with open_route(what) as route, _listing() as netlink:
        present = raw.find_qdisc(netlink, ifindex)
        if present == b"ingress" and direction == "egress":
            raise InterfaceBusy(
                what,
                "its ingress qdisc takes the place of clsact, and has no egress side",
                "use link (TCX, Linux 6.6), or have its owner replace it: "
                f"`tc qdisc show dev {iface}`",
            )
        others = [each[0] for each in raw.list_filters(netlink, ifindex, parent) if not each[3]]
        if priority in others:
            raise InterfaceBusy(
                what,
                f"priority {priority} is taken by another filter",
                f"give another, or none to run behind all others (taken: {_join(others)})",
            )
        place = TcFilter(
            parent,
            priority or _free_priority(what, others),
            prog_id,  # unique among ours, and not the 1 that everybody else has
            not present or ledger.is_clsact_ours(ifindex),
        )
        hold(Hold(ifindex, iface, prog_id, prog_fd, place))
        try:
            if not present:
                _make_clsact(route, ifindex)
            _put(route, "add-filter", ifindex, prog_fd, place)
        except Refused as refused:
            if not present:
                raw.remove_empty_clsact(netlink, ifindex)
            raise _refusal(what, refused) from refused
    note = None
    if priority is None and others:
        note = (
            f"{iface} {direction}: runs behind {len(others)} other filter"
            f"{'s' if len(others) > 1 else ''} (priority {_join(others)}), which may end before it"
        )
    return place, note


def attach_link(prog_fd: int, iface: str, ifindex: int, direction: str) -> int:
    """Attach by a TCX link, behind those that are there; the link's descriptor.

    Raises HookUnsupported before Linux 6.6, MissingPrivilege, TargetGone, AttachError.
    """
    what = f"attach tc to {iface} {direction} by a link"
    try:
        return links.create_link(prog_fd, ifindex, _TCX[direction])
    except OSError as error:
        number = error.errno or 0
        refused = Refused(number, "")
        if common := common_refusal(what, refused):
            raise common from error
        if links.is_unknown(error) and not _has_tcx(ifindex, direction):
            raise HookUnsupported(
                what,
                f"{refused.words}: this kernel has no TCX links (Linux 6.6)",
                "attach without a link (and without --pin)",
                errno=number,
            ) from error
        raise AttachError(what, refused.words, "see `hmebpf list`", errno=number) from error


def swap(iface: str, ifindex: int, place: TcFilter, old_id: int, new_fd: int) -> None:
    """Put another program in our filter's place, with no packet in between.

    The kernel cannot compare: that the filter is still ours is looked up just before.  Raises
    AttachError where it is not, MissingPrivilege, TargetGone.
    """
    what = f"swap tc program {old_id} on {iface}"
    with open_route(what) as route, _listing() as netlink:
        if (place.priority, place.handle, old_id) not in [
            (priority, handle, program)
            for priority, handle, program, _ in raw.list_filters(netlink, ifindex, place.parent)
        ]:
            raise AttachError(
                what,
                "our filter was taken off or replaced by somebody else",
                f"see what is there with `hmebpf list --iface {iface}`",
            )
        try:
            _put(route, "replace-filter", ifindex, new_fd, place)
        except Refused as refused:
            raise _refusal(what, refused) from refused


@contextmanager
def _listing() -> Iterator[Any]:
    """A socket for what pyroute2 does not decode: the ids of the filters' programs."""
    netlink = raw.netlink_socket()
    try:
        yield netlink
    finally:
        netlink.close()


def _make_clsact(route: Any, ifindex: int) -> None:
    try:
        ask(route.tc, "add", "clsact", ifindex)
    except Refused as refused:
        if refused.errno != errno.EEXIST:  # somebody else just made it
            raise


def _put(route: Any, command: str, ifindex: int, prog_fd: int, place: TcFilter) -> None:
    """ "add-filter" refuses a place that is taken, "replace-filter" takes it over."""
    ask(
        route.tc,
        command,
        "bpf",
        ifindex,
        place.handle,
        fd=prog_fd,
        name="hmebpf",
        parent=place.parent,
        prio=place.priority,
        direct_action=True,
    )


def _free_priority(what: str, others: list[int]) -> int:
    """One behind all others if there is room, else the last that is free."""
    if not others:
        return _FIRST_PRIORITY
    if max(others) < _LAST_PRIORITY:
        return max(max(others) + 1, _FIRST_PRIORITY)
    for priority in range(_LAST_PRIORITY, 0, -1):
        if priority not in others:
            return priority
    raise InterfaceBusy(what, "all 65535 priorities are taken", "take a filter off")


def _join(priorities: list[int]) -> str:
    return ", ".join(map(str, sorted(set(priorities))))


def _has_tcx(ifindex: int, direction: str) -> bool:
    try:
        trials.query_programs(ifindex, _TCX[direction])
    except OSError:
        return False
    return True


def _refusal(what: str, refused: Refused) -> HmebpfError:
    """The kernel's no, as an error that says what to do."""
    if common := common_refusal(what, refused):
        return common
    if refused.errno == errno.ENOENT:
        return HookUnsupported(
            what,
            f"{refused.words}: this kernel has no clsact or no cls_bpf",
            "boot a kernel with CONFIG_NET_SCH_INGRESS and CONFIG_NET_CLS_BPF, or install its "
            "modules package",
            errno=refused.errno,
        )
    if refused.errno == errno.EINVAL and refused.words == describe_errno(errno.EINVAL):
        return AttachError(
            what,
            f"{refused.words}: the program is not of type sched_cls, or the kernel too old",
            'load it as a tc program (section "tc" or "classifier")',
            errno=refused.errno,
        )
    return AttachError(what, refused.words, "see `hmebpf list`", errno=refused.errno)
