"""What is attached where: XDP, traffic control, cgroups, probes, and everything a link holds.

No single call tells.  Interfaces tell of XDP and TC (rtnetlink(7)), BPF_PROG_QUERY of TCX, netkit,
cgroups, network namespaces and sockmaps, BPF_TASK_FD_QUERY of perf events, the links' info
structures of the rest; the same attachment seen from two sides is one here.
"""

from __future__ import annotations

import errno
import os
import struct
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

from hypermesh_ebpf.bpf.link_info import LinkInfo, PerfEvent, query_attached, query_perf_event
from hypermesh_ebpf.host import filesystems, netlink
from hypermesh_ebpf.host.attachment import (
    Attachment,
    ResolveBtf,
    describe_link,
    describe_perf_link,
    name_place,
)
from hypermesh_ebpf.host.holders import Holders
from hypermesh_ebpf.host.interfaces import Carrier, list_carriers

# include/uapi/linux/pkt_cls.h, pkt_sched.h, rtnetlink.h
_TCA_KIND, _TCA_OPTIONS, _TCA_BPF_ID = 1, 2, 11
_CLSACT: dict[str | None, int] = {"ingress": 0xFFFFFFF2, "egress": 0xFFFFFFF3}
_CLONE_NEWNET = 0x40000000

# Attach types by the type of program that can be there: nothing is asked that cannot be.
_CGROUP_POINTS: dict[str, tuple[str, ...]] = {
    "cgroup_skb": ("cgroup_inet_ingress", "cgroup_inet_egress"),
    "cgroup_sock": (
        "cgroup_inet_sock_create",
        "cgroup_inet_sock_release",
        "cgroup_inet4_post_bind",
        "cgroup_inet6_post_bind",
    ),
    "sock_ops": ("cgroup_sock_ops",),
    "cgroup_device": ("cgroup_device",),
    "cgroup_sysctl": ("cgroup_sysctl",),
    "cgroup_sockopt": ("cgroup_getsockopt", "cgroup_setsockopt"),
    "lsm": ("lsm_cgroup",),
    "cgroup_sock_addr": (
        *(f"cgroup_inet{v}_{call}" for v in "46" for call in ("bind", "connect", "getpeername")),
        *(f"cgroup_inet{v}_getsockname" for v in "46"),
        *(f"cgroup_udp{v}_{call}" for v in "46" for call in ("sendmsg", "recvmsg")),
        *(
            f"cgroup_unix_{call}"
            for call in ("connect", "sendmsg", "recvmsg", "getpeername", "getsockname")
        ),
    ),
}
_INTERFACE_POINTS = (
    ("tcx_ingress", "ingress", None),
    ("tcx_egress", "egress", None),
    ("netkit_primary", None, "netkit"),
    ("netkit_peer", None, "netkit"),
)
_NETNS_POINTS = ("flow_dissector", "sk_lookup")
_SOCKMAP_POINTS = (
    "sk_skb_stream_parser",
    "sk_skb_stream_verdict",
    "sk_msg_verdict",
    "sk_skb_verdict",
)


def read_attachments(
    links: Iterable[LinkInfo],
    holders: Holders,
    program_types: Mapping[int, str] | None,
    sockmaps: Mapping[int, int],
    resolve: ResolveBtf,
    targets: Mapping[int, tuple[int, int]],
) -> list[Attachment]:
    """Everything that is attached, as far as this process may see.

    ``program_types`` are the programs by id (None where they cannot be seen): what no program is
    for is not looked at.  ``sockmaps`` are descriptors of the sockmaps by map id, ``targets`` the
    BTF (object, type) that a tracing program is for, by program id.
    """
    types = None if program_types is None else set(program_types.values())
    seen = list(_read_network(types))
    seen += _read_other_namespaces(holders, types)
    seen += _read_cgroups(types)
    seen += _read_sockmaps(sockmaps, types)
    probes = _read_perf_events(holders)
    for link in links:
        _merge_link(link, seen, probes, resolve, targets, program_types or {})
    return sorted([*seen, *probes], key=lambda a: (a.kind, a.target, a.position or 0, a.program_id))


def _read_network(types: set[str] | None) -> Iterator[Attachment]:
    """XDP, TC, TCX and netkit of the interfaces of this thread's network namespace."""
    with suppress(OSError):  # a namespace without rtnetlink: nothing to see
        carriers = list_carriers()
        for carrier in carriers:
            for each in carrier.attached:
                yield Attachment(
                    "xdp",
                    carrier.name,
                    each.prog_id,
                    iface=carrier.name,
                    ifindex=carrier.ifindex,
                    mode=each.mode,
                )
        if types is None or "sched_cls" in types:
            yield from _read_filters({carrier.ifindex: carrier for carrier in carriers})
            yield from _read_interface_points(carriers)
    if types is None or types & set(_NETNS_POINTS):
        yield from _read_namespace()


def _read_filters(carriers: Mapping[int, Carrier]) -> Iterator[Attachment]:
    """cls_bpf filters: of clsact by direction, of other qdiscs below their handle."""
    for ifindex, handle, attributes in list(netlink.dump_qdiscs()):
        carrier = carriers.get(ifindex)
        kind = attributes.get(_TCA_KIND, b"").rstrip(b"\0").decode()
        parents: dict[str | None, int] = {None: handle}
        if kind == "clsact":
            parents = dict(_CLSACT)
        elif kind == "ingress":
            parents = {"ingress": _CLSACT["ingress"]}
        if carrier is None or not (handle or kind in ("clsact", "ingress")):
            continue  # the default qdisc has no handle, and takes no filters
        for direction, parent in parents.items():
            with suppress(OSError):  # a class of qdisc that has no filters
                for priority, number, found in netlink.dump_filters(ifindex, parent):
                    options = netlink.parse_attributes(found.get(_TCA_OPTIONS, b""))
                    if _TCA_BPF_ID in options:
                        (prog_id,) = struct.unpack("=I", options[_TCA_BPF_ID])
                        yield Attachment(
                            "tc",
                            carrier.name,
                            prog_id,
                            iface=carrier.name,
                            ifindex=ifindex,
                            direction=direction or "egress",
                            priority=priority,
                            parent=parent,
                            handle=number,
                        )


def _read_interface_points(carriers: Iterable[Carrier]) -> Iterator[Attachment]:
    """TCX (Linux 6.6) and netkit (6.7), in the order they run."""
    for attach_type, direction, only in _INTERFACE_POINTS:
        for carrier in carriers:
            if only and carrier.kind != only:
                continue
            try:
                ids = query_attached(carrier.ifindex, attach_type)
            except OSError as error:
                if error.errno == errno.EINVAL and not only:
                    break  # before Linux 6.6
                continue
            for position, prog_id in enumerate(ids):
                yield Attachment(
                    "netkit" if only else "tc",
                    carrier.name,
                    prog_id,
                    attach_type=attach_type,
                    iface=carrier.name,
                    ifindex=carrier.ifindex,
                    direction=direction,
                    position=position,
                )


def _read_namespace() -> Iterator[Attachment]:
    """Programs of the network namespace itself (flow dissector 4.20, socket lookup 5.9)."""
    fd = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        inode = os.fstat(fd).st_ino
        for attach_type in _NETNS_POINTS:
            with suppress(OSError):
                for prog_id in query_attached(fd, attach_type):
                    yield Attachment("netns", str(inode), prog_id, attach_type=attach_type)
    finally:
        os.close(fd)


def _read_other_namespaces(holders: Holders, types: set[str] | None) -> list[Attachment]:
    """The same in the network namespaces of other processes (containers), where we may enter.

    A thread of its own goes there: this one, and its program, stay where they are.
    """
    wanted = types is None or types & {"xdp", "sched_cls", *_NETNS_POINTS}
    ours = os.stat("/proc/thread-self/ns/net").st_ino
    others = {inode: pid for inode, pid in holders.namespaces.items() if inode != ours}
    if not wanted or not others:
        return []
    found: list[Attachment] = []

    def visit() -> None:
        import ctypes

        libc = ctypes.CDLL(None, use_errno=True)
        for inode, pid in others.items():
            try:
                fd = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
            except OSError:
                continue
            try:
                if os.fstat(fd).st_ino == inode and libc.setns(fd, _CLONE_NEWNET) == 0:
                    found.extend(replace(each, netns=inode) for each in _read_network(types))
            finally:
                os.close(fd)

    thread = threading.Thread(target=visit, name="hmebpf-netns")
    thread.start()
    thread.join()
    return found


def _read_cgroups(types: set[str] | None) -> Iterator[Attachment]:
    """Programs attached to control groups themselves (not those that they inherit)."""
    points = [
        point for kind, points in _CGROUP_POINTS.items() if types and kind in types
        for point in points
    ]  # fmt: skip
    root = filesystems.find_mount(filesystems.CGROUP2.magic) if points else None
    if root is None:
        return
    for path, _directories, _files in os.walk(root):
        try:
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:  # removed while we walk
            continue
        try:
            cgroup_id = os.fstat(fd).st_ino
            for attach_type in list(points):
                try:
                    ids = query_attached(fd, attach_type)
                except PermissionError:
                    return  # CAP_NET_ADMIN is missing
                except OSError as error:
                    if error.errno == errno.EINVAL:  # newer than this kernel
                        points.remove(attach_type)
                    continue
                for position, prog_id in enumerate(ids):
                    yield Attachment(
                        "cgroup",
                        path,
                        prog_id,
                        attach_type=attach_type,
                        position=position,
                        cgroup=path[len(root) :] or "/",
                        cgroup_id=cgroup_id,
                    )
        finally:
            os.close(fd)


def _read_sockmaps(sockmaps: Mapping[int, int], types: set[str] | None) -> Iterator[Attachment]:
    """Programs of sockmaps (BPF_PROG_QUERY knows them since Linux 5.19)."""
    if types is not None and not types & {"sk_skb", "sk_msg"}:
        return
    for map_id, fd in sockmaps.items():
        for attach_type in _SOCKMAP_POINTS:
            with suppress(OSError):
                for prog_id in query_attached(fd, attach_type):
                    yield Attachment("sockmap", f"map:{map_id}", prog_id, attach_type=attach_type)


def _read_perf_events(holders: Holders) -> list[Attachment]:
    """Tracepoints, kprobes and uprobes on perf events, one for all CPUs and holders of one."""
    found: dict[PerfEvent, list[int]] = {}
    for holder, fd in holders.perf_events:
        with suppress(OSError):
            event = query_perf_event(holder.pid, fd)
            if event is not None:
                pids = found.setdefault(event, [])
                if holder.pid not in pids:
                    pids.append(holder.pid)
    return [
        Attachment(
            event.kind,
            name_place(event.kind, event.name, event.offset),
            event.prog_id,
            pids=tuple(sorted(pids)),
        )
        for event, pids in found.items()
    ]


def _merge_link(
    link: LinkInfo,
    seen: list[Attachment],
    probes: list[Attachment],
    resolve: ResolveBtf,
    targets: Mapping[int, tuple[int, int]],
    program_types: Mapping[int, str],
) -> None:
    """Give the link to the attachment that it holds; where that was not seen otherwise, add it."""
    details = link.details
    if link.type in ("xdp", "tcx", "netkit", "cgroup", "netns", "sockmap"):
        for index, each in enumerate(seen):
            if each.link_id is None and _is_held_by(each, link):
                seen[index] = replace(each, link_id=link.id)
                return
    if link.type == "perf_event":
        mine = [each for each in probes if each.program_id == link.prog_id]
        if details.get("kind"):
            event = describe_perf_link(link)
            pids = {pid for each in mine if each.target == event.target for pid in each.pids}
            probes[:] = [each for each in probes if each not in mine or each.target != event.target]
            seen.append(replace(event, pids=tuple(sorted(pids))))
            return
        for each in mine:  # before Linux 6.6 the link says nothing, its perf event does
            if each.link_id is None:
                probes[probes.index(each)] = replace(each, link_id=link.id)
                return
    seen.append(describe_link(link, resolve, targets, program_types))


def _is_held_by(each: Attachment, link: LinkInfo) -> bool:
    details: dict[str, Any] = link.details
    if each.program_id != link.prog_id:
        return False
    if link.type == "xdp":
        return each.kind == "xdp" and bool(each.ifindex == details["ifindex"])
    if each.attach_type != details.get("attach_type"):
        return False
    if link.type in ("tcx", "netkit"):
        return bool(each.ifindex == details["ifindex"])
    if link.type == "cgroup":
        return bool(each.cgroup_id == details["cgroup_id"])
    if link.type == "netns":
        return each.target == str(details["netns_ino"])
    return each.target == f"map:{details['map_id']}"
