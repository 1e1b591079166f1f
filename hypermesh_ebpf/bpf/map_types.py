"""The kinds of maps: numbers, and what user space sees of each (include/uapi/linux/bpf.h)."""

from __future__ import annotations

from typing import Any

from hypermesh_ebpf.bpf.spec import MapSpec

# BPF_MAP_TYPE_*
_UNSPEC, HASH, ARRAY, PROG_ARRAY, PERF_EVENT_ARRAY, PERCPU_HASH, PERCPU_ARRAY = range(7)
STACK_TRACE, CGROUP_ARRAY, LRU_HASH, LRU_PERCPU_HASH, LPM_TRIE, ARRAY_OF_MAPS = range(7, 13)
HASH_OF_MAPS, DEVMAP, SOCKMAP, CPUMAP, XSKMAP, SOCKHASH, CGROUP_STORAGE = range(13, 20)
REUSEPORT_SOCKARRAY, PERCPU_CGROUP_STORAGE, QUEUE, STACK, SK_STORAGE = range(20, 25)
DEVMAP_HASH, STRUCT_OPS, RINGBUF, INODE_STORAGE, TASK_STORAGE, BLOOM_FILTER = range(25, 31)
USER_RINGBUF, CGRP_STORAGE, ARENA = range(31, 34)

PER_CPU = (PERCPU_HASH, PERCPU_ARRAY, LRU_PERCPU_HASH, PERCPU_CGROUP_STORAGE)
"""A look-up gives a value for every possible CPU."""
INDEXED = (
    *(ARRAY, PERCPU_ARRAY, PROG_ARRAY, ARRAY_OF_MAPS, DEVMAP, CPUMAP, SOCKMAP),
    *(REUSEPORT_SOCKARRAY, STRUCT_OPS),
)
"""Keys are the numbers below max_entries."""
FULL = (ARRAY, PERCPU_ARRAY)
"""Every one of these keys has a value, always."""
BATCHED = (HASH, ARRAY, PERCPU_HASH, PERCPU_ARRAY, LRU_HASH, LRU_PERCPU_HASH, LPM_TRIE)
"""Read many entries at a time (Linux 5.6; per-CPU arrays and LPM tries 5.13)."""

STREAMS = (RINGBUF, PERF_EVENT_ARRAY)
"""They hold events, which readers of their own take out."""

RDONLY_PROG, BUILD_ID = 1 << 7, 1 << 5  # BPF_F_RDONLY_PROG, BPF_F_STACK_BUILD_ID

UNREADABLE = {
    RINGBUF: "it holds events, not entries",
    PERF_EVENT_ARRAY: "it holds events, not entries",
    USER_RINGBUF: "it carries messages from user space to the program",
    QUEUE: "reading an element would take it from the program",
    STACK: "reading an element would take it from the program",
    BLOOM_FILTER: "it tells whether a value may be in it, not which ones are",
    CGROUP_ARRAY: "the kernel does not tell which cgroups are in it",
    XSKMAP: "the kernel does not tell which sockets are in it",
    SK_STORAGE: "its values belong to sockets, and only a socket's descriptor finds one",
    INODE_STORAGE: "its values belong to inodes, and only a file's descriptor finds one",
    TASK_STORAGE: "its values belong to tasks, and only a task's descriptor finds one",
    CGRP_STORAGE: "its values belong to cgroups, and only a cgroup's descriptor finds one",
    ARENA: "it is memory that the program lays out as it likes",
}
"""Why a map of that type has no entries to show."""

REFERS_TO = {
    PROG_ARRAY: "program",
    ARRAY_OF_MAPS: "map",
    HASH_OF_MAPS: "map",
    SOCKMAP: "socket",
    SOCKHASH: "socket",
    REUSEPORT_SOCKARRAY: "socket",
}
"""The values are the kernel's ids of these (a socket's is its cookie), not the program's data."""

_U32 = {"kind": "int", "name": "unsigned int", "size": 4, "signed": False}
_U64 = {"kind": "int", "name": "unsigned long long", "size": 8, "signed": False}
_BYTE = {"kind": "int", "name": "unsigned char", "size": 1, "signed": False}
_ADDRESS = {"kind": "pointer", "size": 8}


def describe_key(spec: MapSpec) -> Any:
    """The description of a map's keys: the source's, or what the map's type tells."""
    if spec.key_desc is not None:
        return spec.key_desc
    if spec.type in INDEXED or spec.type in (DEVMAP_HASH, STACK_TRACE):
        return _U32
    if spec.type == LPM_TRIE:
        data = {"kind": "array", "element": _BYTE, "count": spec.key_size - 4}
        return _struct("bpf_lpm_trie_key", prefixlen=_U32, data=data)
    if spec.type in (CGROUP_STORAGE, PERCPU_CGROUP_STORAGE):
        if spec.key_size == 8:  # of all attach points together (Linux 5.9)
            return _U64
        return {**_struct("bpf_cgroup_storage_key", cgroup=_U64, attach_type=_U32), "size": 16}
    return None


def describe_value(spec: MapSpec) -> Any:
    """The description of what a look-up gives: for some types not what the program puts in."""
    if spec.type in REFERS_TO:
        return _U64 if REFERS_TO[spec.type] == "socket" else _U32
    if spec.type == STACK_TRACE:
        if spec.flags & BUILD_ID:
            build_id = {"kind": "array", "element": _BYTE, "count": 20}
            frame = _struct("bpf_stack_build_id", status=_U32, build_id=build_id, offset=_U64)
        else:
            frame = _ADDRESS
        return {"kind": "array", "element": frame, "count": spec.value_size // _size(frame)}
    if spec.type in (DEVMAP, DEVMAP_HASH):
        return _struct("bpf_devmap_val", ifindex=_U32, program=_U32) if _pair(spec) else _U32
    if spec.type == CPUMAP:
        return _struct("bpf_cpumap_val", queue_size=_U32, program=_U32) if _pair(spec) else _U32
    return spec.value_desc


def _pair(spec: MapSpec) -> bool:
    return spec.value_size == 8  # with a program's id (Linux 5.8)


def _struct(name: str, **types: dict[str, Any]) -> dict[str, Any]:
    """A structure of these members without gaps."""
    members, at = [], 0
    for member, type_ in types.items():
        members.append({"name": member, "type": type_, "offset": 8 * at})
        at += _size(type_)
    return {"kind": "struct", "name": name, "size": at, "members": members}


def _size(type_: dict[str, Any]) -> int:
    if type_["kind"] == "array":
        return int(type_["count"]) * _size(type_["element"])
    return int(type_["size"])
