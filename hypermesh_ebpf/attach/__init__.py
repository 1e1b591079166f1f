"""Hooks: how a loaded program gets to the place where it runs, one file for each way.

:func:`attach` is the one door.  For the worker process: it loads libbcc or pyroute2.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hypermesh_ebpf.attach.hold import Hold, TcFilter
from hypermesh_ebpf.attach_type import EbpfAttachType
from hypermesh_ebpf.errors import UsageError

__all__ = ["Attachment", "Hold", "TcFilter", "attach"]

_TRACING = ("kprobe", "kretprobe", "tracepoint", "raw_tracepoint", "fentry", "fexit", "lsm")


@dataclass(frozen=True, slots=True)
class Attachment:
    """A program at its hook.

    ``hook`` names it ("xdp:generic", "tc:ingress", else "kind:target").  Closing the last copy of
    each of ``descriptors`` detaches; there are none where ``held``: the guard then takes it off.
    ``note`` is what the user should know (why native XDP was refused), ``ifindex`` that of its
    interface, ``filter`` where on it a filter is.
    """

    hook: str
    descriptors: tuple[int, ...] = ()
    held: bool = False
    note: str | None = None
    ifindex: int | None = None
    filter: TcFilter | None = None


def attach(
    point: EbpfAttachType,
    prog_fd: int,
    prog_id: int,
    hold: Callable[[Hold], None],
    *,
    pinnable: bool = False,
) -> Attachment:
    """Attach a loaded program.

    ``hold`` is called before anything is made that its maker's end would not undo.  ``pinnable``:
    by kernel links only, so that every descriptor can be pinned; HookUnsupported where the kernel
    has no such link.  Raises AttachError and below it InterfaceNotFound and InterfaceBusy,
    HookUnsupported, MissingPrivilege, TargetGone, UsageError, MissingDependency.
    """
    if point.kind == "xdp":
        return _attach_xdp(point, prog_fd, prog_id, hold, pinnable)
    if point.kind == "tc":
        return _attach_tc(point, prog_fd, prog_id, hold, pinnable)
    hook = f"{point.kind}:{point.target}"
    if point.kind in _TRACING:
        from hypermesh_ebpf.attach import tracing
        from hypermesh_ebpf.host.symbols import resolve_target

        by = tracing.attach_link if pinnable else tracing.attach
        target = resolve_target(point.target)
        return Attachment(f"{point.kind}:{target}", (by(point.kind, target, prog_fd),))
    if point.kind == "cgroup":
        from hypermesh_ebpf.attach import cgroup

        side = point.option("attach")
        return Attachment(f"{hook}:{side}", (cgroup.attach(prog_fd, point.target, side),))
    if point.kind == "perf_event":
        from hypermesh_ebpf.attach import perf_event

        made = perf_event.attach(
            prog_fd, point.target, pinnable=pinnable, **{n: point.option(n) for n in _SAMPLING}
        )
        return Attachment(f"perf_event:{point.target or 'cpu-clock'}", made)
    from hypermesh_ebpf.attach import uprobe

    pid = point.option("pid")
    if point.kind == "usdt":
        return Attachment(
            hook, uprobe.attach_static(point.target, prog_fd, pid=pid, pinnable=pinnable)
        )
    made_one = uprobe.attach(point.kind, point.target, prog_fd, pid=pid, pinnable=pinnable)
    return Attachment(hook, (made_one,))


_SAMPLING = ("frequency", "period", "pid", "cpu")


def _attach_xdp(
    point: EbpfAttachType,
    prog_fd: int,
    prog_id: int,
    hold: Callable[[Hold], None],
    pinnable: bool,
) -> Attachment:
    from hypermesh_ebpf.attach import xdp

    iface, link = point.target, pinnable or point.option("link")
    ifindex = xdp.find_interface(iface)
    if not link:
        hold(Hold(ifindex, iface, prog_id, prog_fd))
    made = xdp.attach(
        prog_fd,
        prog_id,
        iface,
        point.option("mode"),
        point.option("replace"),
        ifindex=ifindex,
        link=link,
    )
    note = None
    if made.fallback:
        note = f"{iface}: native XDP refused ({made.fallback}), generic taken"
    descriptors = (made.link,) if link else ()
    return Attachment(f"xdp:{made.mode}", descriptors, not link, note, ifindex)


def _attach_tc(
    point: EbpfAttachType,
    prog_fd: int,
    prog_id: int,
    hold: Callable[[Hold], None],
    pinnable: bool,
) -> Attachment:
    from hypermesh_ebpf.attach import tc
    from hypermesh_ebpf.host.targets import find_interface

    iface, direction = point.target, point.option("direction")
    priority = point.option("priority")
    ifindex = find_interface(iface)
    if pinnable or point.option("link"):
        if priority is not None:
            raise UsageError(
                f"attach {point}",
                "programs attached by links have no priority: they run in the order of attaching",
                "leave out priority, or the link",
            )
        fd = tc.attach_link(prog_fd, iface, ifindex, direction)
        return Attachment(f"tc:{direction}", (fd,), ifindex=ifindex)
    place, note = tc.attach(prog_fd, prog_id, iface, ifindex, direction, priority, hold)
    return Attachment(f"tc:{direction}", (), True, note, ifindex, place)
