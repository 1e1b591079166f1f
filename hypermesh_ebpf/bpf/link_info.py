"""Links and attach points: what the kernel tells of how programs are attached.

A link is a kernel object that holds an attachment (Linux 5.7); its info structure has a part for
each type, which grew from release to release (struct bpf_link_info, include/uapi/linux/bpf.h).
Calls raise OSError as those of :mod:`hypermesh_ebpf.bpf.info`.
"""

from __future__ import annotations

import ctypes as ct
import errno
import struct
from dataclasses import dataclass, field
from typing import Any

from hypermesh_ebpf.bpf.libbpf import check, libbpf
from hypermesh_ebpf.bpf.names import (
    ATTACH_TYPES,
    FD_KINDS,
    LINK_TYPES,
    PERF_EVENT_KINDS,
    name_type,
)

_PATH = 4096


def _layout(*members: tuple[str, Any]) -> type[ct.Structure]:
    return type("_Details", (ct.Structure,), {"_fields_": [*members]})


_U32, _U64, _S32 = ct.c_uint32, ct.c_uint64, ct.c_int32
_TARGET = (("attach_type", _U32), ("target_obj_id", _U32), ("target_btf_id", _U32))
_PERF = (("kind", _U32), ("_pad", _U32), ("name", _U64), ("name_len", _U32))
# The union of struct bpf_link_info by link type; it begins at offset 16.
_LINK_DETAILS: dict[str, type[ct.Structure]] = {
    "raw_tracepoint": _layout(("name", _U64), ("name_len", _U32)),
    "tracing": _layout(*_TARGET),
    "cgroup": _layout(("cgroup_id", _U64), ("attach_type", _U32)),
    "iter": _layout(("name", _U64), ("name_len", _U32), ("map_id", _U32)),
    "netns": _layout(("netns_ino", _U32), ("attach_type", _U32)),
    "xdp": _layout(("ifindex", _U32)),
    "perf_event": _layout(*_PERF, ("offset", _U32)),
    "kprobe_multi": _layout(("addrs", _U64), ("count", _U32), ("flags", _U32), ("missed", _U64)),
    "struct_ops": _layout(("map_id", _U32)),
    "netfilter": _layout(("pf", _U32), ("hooknum", _U32), ("priority", _S32), ("flags", _U32)),
    "tcx": _layout(("ifindex", _U32), ("attach_type", _U32)),
    "uprobe_multi": _layout(
        ("path", _U64),
        ("offsets", _U64),
        ("ref_ctr_offsets", _U64),
        ("cookies", _U64),
        ("path_size", _U32),
        ("count", _U32),
        ("flags", _U32),
        ("pid", _U32),
    ),
    "netkit": _layout(("ifindex", _U32), ("attach_type", _U32)),
    "sockmap": _layout(("map_id", _U32), ("attach_type", _U32)),
}
_LINK_HEAD = 16
_EVENT = _layout(("kind", _U32), ("_pad", _U32), ("config", _U64), ("type", _U32))


@dataclass(frozen=True, slots=True)
class LinkInfo:
    """A link.  ``details`` are the members of its type's part of struct bpf_link_info."""

    id: int
    type: str
    prog_id: int
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PerfEvent:
    """A perf event of a process that runs a program (BPF_TASK_FD_QUERY).

    ``kind`` is an attach type's; ``name`` a tracepoint, function or file; ``offset`` bytes into it.
    """

    prog_id: int
    kind: str
    name: str
    offset: int


def read_link(fd: int) -> LinkInfo:
    """What the kernel says of a link, of any type up to Linux 7.0."""
    raw = _link_info(fd, b"")
    type_number, number, prog_id = struct.unpack_from("=III", raw)
    type_ = name_type(LINK_TYPES, type_number)
    layout = _LINK_DETAILS.get(type_)
    if layout is None:
        return LinkInfo(number, type_, prog_id)
    details = layout.from_buffer_copy(raw, _LINK_HEAD)
    values = {n: getattr(details, n) for n, _type in layout._fields_ if n != "_pad"}  # type: ignore[misc]
    if "name" in values:
        values["name"] = _link_name(fd, details, "name", "name_len")
        del values["name_len"]
    if type_ == "perf_event":
        kind = name_type(PERF_EVENT_KINDS, details.kind)
        values["kind"] = kind if details.kind else None
        if kind == "perf_event":
            event = _EVENT.from_buffer_copy(raw, _LINK_HEAD)
            values = {"kind": kind, "name": None, "event_type": event.type, "config": event.config}
    elif type_ == "uprobe_multi":
        values = {
            "path": _link_name(fd, details, "path", "path_size"),
            "count": details.count,
            "offsets": _link_array(fd, details, "offsets"),
            "flags": details.flags,
            "pid": details.pid,
        }
    elif type_ == "kprobe_multi":
        values["addrs"] = _link_array(fd, details, "addrs")
    elif "attach_type" in values:
        values["attach_type"] = name_type(ATTACH_TYPES, values["attach_type"])
    return LinkInfo(number, type_, prog_id, values)


def _link_info(fd: int, details: bytes) -> bytes:
    """struct bpf_link_info as bytes; ``details`` are the request's, at the union's place."""
    request = ct.create_string_buffer(bytes(_LINK_HEAD) + details, 128)
    length = ct.c_uint32(len(request))
    check(libbpf().bpf_obj_get_info_by_fd(fd, request, ct.byref(length)))
    return request.raw


def _link_name(fd: int, details: ct.Structure, pointer: str, size: str) -> str | None:
    """A name that the kernel writes into a buffer of ours; None where it has none to give."""
    text = ct.create_string_buffer(_PATH)
    request = type(details)()
    setattr(request, pointer, ct.addressof(text))
    setattr(request, size, len(text))
    try:
        _link_info(fd, bytes(request))
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise
    return text.value.decode(errors="surrogateescape") or None


def _link_array(fd: int, details: Any, pointer: str) -> tuple[int, ...]:
    """Addresses or offsets, ``count`` of them."""
    numbers = (ct.c_uint64 * details.count)()
    request: Any = type(details)()
    setattr(request, pointer, ct.addressof(numbers))
    request.count = details.count
    _link_info(fd, bytes(request))
    return tuple(numbers)


def query_perf_event(pid: int, fd: int) -> PerfEvent | None:
    """The program that runs on a perf event of a process; None if none does, or it is a sampling
    event, of which the kernel does not tell."""
    name, length = ct.create_string_buffer(_PATH), ct.c_uint32(_PATH)
    prog_id, kind = ct.c_uint32(), ct.c_uint32()
    offset, address = ct.c_uint64(), ct.c_uint64()
    values = (ct.byref(each) for each in (length, prog_id, kind, offset, address))
    length_at, *rest = values
    try:
        check(libbpf().bpf_task_fd_query(pid, fd, 0, name, length_at, *rest))
    except OSError as error:
        if error.errno in (errno.EOPNOTSUPP, errno.ENOENT, errno.EINVAL, errno.EBADF, errno.ENOTTY):
            return None
        raise
    text = name.value.decode(errors="surrogateescape") or f"0x{address.value:x}"
    return PerfEvent(prog_id.value, name_type(FD_KINDS, kind.value), text, offset.value)


def query_attached(target: int, attach_type: str) -> tuple[int, ...]:
    """The ids of the programs at an attach point, in the order they run (BPF_PROG_QUERY).

    ``target`` is a descriptor (cgroup, network namespace, sockmap) or, for TCX and netkit, an
    ifindex.  Raises OSError, EINVAL where the kernel has no such attach point.
    """
    number = ATTACH_TYPES.index(attach_type)
    room = 64
    while True:
        ids, count, flags = (ct.c_uint32 * room)(), ct.c_uint32(room), ct.c_uint32()
        try:
            check(libbpf().bpf_prog_query(target, number, 0, ct.byref(flags), ids, ct.byref(count)))
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            room *= 4
            continue
        return tuple(ids[: count.value])
