"""What the kernel tells of its own BPF objects: programs, maps, links, BTF.

Ids come from BPF_*_GET_NEXT_ID, facts from BPF_OBJ_GET_INFO_BY_FD (include/uapi/linux/bpf.h).  An
older kernel knows shorter structures and says how much it wrote: what it did not write is None
here, never 0.  All calls raise OSError with the kernel's errno; EPERM means that CAP_SYS_ADMIN is
missing, ENOENT that the object is gone.
"""

from __future__ import annotations

import ctypes as ct
import errno
import os
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass

from hypermesh_ebpf.bpf.libbpf import check, libbpf
from hypermesh_ebpf.bpf.names import MAP_TYPES, PROGRAM_TYPES, name_type

_MAX_MAPS = 64  # MAX_USED_MAPS, include/linux/bpf.h
_NAME = 16


class _ProgInfo(ct.Structure):
    """struct bpf_prog_info."""

    _fields_ = [
        ("type", ct.c_uint32),
        ("id", ct.c_uint32),
        ("tag", ct.c_uint8 * 8),
        ("jited_prog_len", ct.c_uint32),
        ("xlated_prog_len", ct.c_uint32),
        ("jited_prog_insns", ct.c_uint64),
        ("xlated_prog_insns", ct.c_uint64),
        ("load_time", ct.c_uint64),
        ("created_by_uid", ct.c_uint32),
        ("nr_map_ids", ct.c_uint32),
        ("map_ids", ct.c_uint64),
        ("name", ct.c_char * _NAME),
        ("ifindex", ct.c_uint32),
        ("gpl_compatible", ct.c_uint32),  # one bit
        ("netns_dev", ct.c_uint64),
        ("netns_ino", ct.c_uint64),
        ("nr_jited_ksyms", ct.c_uint32),
        ("nr_jited_func_lens", ct.c_uint32),
        ("jited_ksyms", ct.c_uint64),
        ("jited_func_lens", ct.c_uint64),
        ("btf_id", ct.c_uint32),
        ("func_info_rec_size", ct.c_uint32),
        ("func_info", ct.c_uint64),
        ("nr_func_info", ct.c_uint32),
        ("nr_line_info", ct.c_uint32),
        ("line_info", ct.c_uint64),
        ("jited_line_info", ct.c_uint64),
        ("nr_jited_line_info", ct.c_uint32),
        ("line_info_rec_size", ct.c_uint32),
        ("jited_line_info_rec_size", ct.c_uint32),
        ("nr_prog_tags", ct.c_uint32),
        ("prog_tags", ct.c_uint64),
        ("run_time_ns", ct.c_uint64),
        ("run_cnt", ct.c_uint64),
        ("recursion_misses", ct.c_uint64),
        ("verified_insns", ct.c_uint32),
        ("attach_btf_obj_id", ct.c_uint32),
        ("attach_btf_id", ct.c_uint32),
    ]


class _MapInfo(ct.Structure):
    """struct bpf_map_info."""

    _fields_ = [
        ("type", ct.c_uint32),
        ("id", ct.c_uint32),
        ("key_size", ct.c_uint32),
        ("value_size", ct.c_uint32),
        ("max_entries", ct.c_uint32),
        ("map_flags", ct.c_uint32),
        ("name", ct.c_char * _NAME),
        ("ifindex", ct.c_uint32),
        ("btf_vmlinux_value_type_id", ct.c_uint32),
        ("netns_dev", ct.c_uint64),
        ("netns_ino", ct.c_uint64),
        ("btf_id", ct.c_uint32),
        ("btf_key_type_id", ct.c_uint32),
        ("btf_value_type_id", ct.c_uint32),
        ("btf_vmlinux_id", ct.c_uint32),
        ("map_extra", ct.c_uint64),
    ]


class _BtfInfo(ct.Structure):
    """struct bpf_btf_info."""

    _fields_ = [
        ("btf", ct.c_uint64),
        ("btf_size", ct.c_uint32),
        ("id", ct.c_uint32),
        ("name", ct.c_uint64),
        ("name_len", ct.c_uint32),
        ("kernel_btf", ct.c_uint32),
    ]


@dataclass(frozen=True, slots=True)
class ProgramInfo:
    """A program.  ``loaded_at`` is seconds since the epoch; None is what this kernel does not tell.

    ``run_count`` and ``run_time_ns`` count while statistics are on (:data:`STATS_SYSCTL`).
    ``attach_btf`` is (id of a BTF object, id of the type in it) of a tracing program's target.
    """

    id: int
    type: str
    name: str
    tag: str
    loaded_at: float
    uid: int
    gpl: bool
    map_ids: tuple[int, ...]
    xlated_bytes: int
    jited_bytes: int
    verified_instructions: int | None
    run_count: int
    run_time_ns: int
    missed: int | None
    btf_id: int
    functions: int
    lines: int
    attach_btf: tuple[int, int]
    ifindex: int
    memlock: int | None


@dataclass(frozen=True, slots=True)
class MapInfo:
    """A map: sizes in bytes; ``memlock`` is the memory it is charged for."""

    id: int
    type: str
    name: str
    key_size: int
    value_size: int
    max_entries: int
    flags: int
    btf_id: int
    ifindex: int
    memlock: int | None
    frozen: bool


@dataclass(frozen=True, slots=True)
class BtfInfo:
    """A BTF object: its name ("vmlinux", a module's, or empty for a program's) and size."""

    id: int
    name: str
    size: int
    of_kernel: bool


@dataclass(frozen=True, slots=True)
class Translated:
    """A program's instructions as the kernel runs them, and where they come from.

    ``functions`` is (first instruction, BTF type id), ``lines`` (first instruction, file name's and
    text's offset among BTF's strings, line number).
    """

    instructions: bytes
    functions: tuple[tuple[int, int], ...]
    lines: tuple[tuple[int, int, int, int], ...]


STATS_SYSCTL = "/proc/sys/kernel/bpf_stats_enabled"

_NEXT = {"program": "bpf_prog_get_next_id", "map": "bpf_map_get_next_id"}
_NEXT["link"] = "bpf_link_get_next_id"
_OPEN = {"program": "bpf_prog_get_fd_by_id", "map": "bpf_map_get_fd_by_id"}
_OPEN |= {"link": "bpf_link_get_fd_by_id", "btf": "bpf_btf_get_fd_by_id"}


def each_id(kind: str) -> Iterator[int]:
    """The ids of all objects of a kind ("program", "map", "link"), ascending."""
    following, number = getattr(libbpf(), _NEXT[kind]), ct.c_uint32(0)
    while following(number.value, ct.byref(number)) == 0:
        yield number.value
    if ct.get_errno() != errno.ENOENT:
        raise OSError(ct.get_errno(), os.strerror(ct.get_errno()))


def open_by_id(kind: str, number: int) -> int:
    """A descriptor of an object by its id; the caller closes it."""
    return check(getattr(libbpf(), _OPEN[kind])(number))


def open_pin(path: str) -> int:
    """A descriptor of the object that is pinned at ``path``; the caller closes it."""
    return check(libbpf().bpf_obj_get(os.fsencode(path)))


def read_fdinfo(fd: int) -> dict[str, str]:
    """What /proc says of a descriptor of ours: ``{"prog_id": "12", "memlock": "4096", ...}``."""
    with open(f"/proc/self/fdinfo/{fd}") as file:
        lines = [line.partition(":") for line in file]
    return {name: value.strip() for name, _, value in lines}


def identify(fdinfo: dict[str, str]) -> tuple[str, int] | None:
    """("program", 12): which object a descriptor's fdinfo belongs to, None for no BPF object."""
    # A link's fdinfo names its program, too.
    for name, kind in (("link_id", "link"), ("prog_id", "program"), ("map_id", "map")):
        if name in fdinfo:
            return kind, int(fdinfo[name])
    return None


def fill_info(fd: int, info: ct.Structure) -> int:
    """BPF_OBJ_GET_INFO_BY_FD; how many bytes this kernel knows."""
    length = ct.c_uint32(ct.sizeof(info))
    check(libbpf().bpf_obj_get_info_by_fd(fd, ct.byref(info), ct.byref(length)))
    return length.value


def read_program(fd: int) -> ProgramInfo:
    """What the kernel says of a program."""
    info, maps = _ProgInfo(), (ct.c_uint32 * _MAX_MAPS)()
    info.nr_map_ids, info.map_ids = _MAX_MAPS, ct.addressof(maps)
    known = fill_info(fd, info)
    memlock = read_fdinfo(fd).get("memlock")
    age_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME) - info.load_time
    return ProgramInfo(
        id=info.id,
        type=name_type(PROGRAM_TYPES, info.type),
        name=info.name.decode(errors="replace"),
        tag=bytes(info.tag).hex(),
        loaded_at=time.time() - age_ns / 1e9,
        uid=info.created_by_uid,
        gpl=bool(info.gpl_compatible & 1),
        map_ids=tuple(maps[: min(info.nr_map_ids, _MAX_MAPS)]),
        xlated_bytes=info.xlated_prog_len,
        jited_bytes=info.jited_prog_len,
        verified_instructions=info.verified_insns if _told(known, "verified_insns") else None,
        run_count=info.run_cnt,
        run_time_ns=info.run_time_ns,
        missed=info.recursion_misses if _told(known, "recursion_misses") else None,
        btf_id=info.btf_id,
        functions=info.nr_func_info,
        lines=info.nr_line_info,
        attach_btf=(info.attach_btf_obj_id, info.attach_btf_id),
        ifindex=info.ifindex,
        memlock=int(memlock) if memlock else None,
    )


def _told(known: int, member: str) -> bool:
    """Whether a kernel that wrote ``known`` bytes knows a member of struct bpf_prog_info."""
    place = getattr(_ProgInfo, member)
    return bool(known >= place.offset + place.size)


def read_run_statistics(fd: int) -> tuple[int, int]:
    """(runs, nanoseconds) of a program so far."""
    info = _ProgInfo()
    fill_info(fd, info)
    return info.run_cnt, info.run_time_ns


def read_translated(fd: int) -> Translated:
    """A program's translated instructions, with its function and line information.

    ``instructions`` is empty where the kernel does not show them (lacking CAP_BPF and CAP_PERFMON,
    or under lockdown=confidentiality).
    """
    sizes = _ProgInfo()
    fill_info(fd, sizes)
    info = _ProgInfo()
    code = ct.create_string_buffer(max(sizes.xlated_prog_len, 1))
    functions = ct.create_string_buffer(8 * sizes.nr_func_info + 1)
    lines = ct.create_string_buffer(16 * sizes.nr_line_info + 1)
    info.xlated_prog_len, info.xlated_prog_insns = sizes.xlated_prog_len, ct.addressof(code)
    info.nr_func_info, info.func_info_rec_size = sizes.nr_func_info, 8
    info.nr_line_info, info.line_info_rec_size = sizes.nr_line_info, 16
    info.func_info, info.line_info = ct.addressof(functions), ct.addressof(lines)
    fill_info(fd, info)
    shown = sizes.xlated_prog_len if info.xlated_prog_insns else 0
    return Translated(
        code.raw[:shown],
        tuple(struct.iter_unpack("=II", functions.raw[: 8 * info.nr_func_info])),
        tuple(
            (at, file, text, place >> 10)  # the column is in the lower ten bits
            for at, file, text, place in struct.iter_unpack(
                "=IIII", lines.raw[: 16 * info.nr_line_info]
            )
        ),
    )


def read_first_function(fd: int) -> int | None:
    """The BTF type id of a program's main function, None if it has no function information."""
    info, record = _ProgInfo(), (ct.c_uint32 * 2)()
    info.nr_func_info, info.func_info_rec_size, info.func_info = 1, 8, ct.addressof(record)
    fill_info(fd, info)
    return record[1] if info.nr_func_info else None


def read_map(fd: int) -> MapInfo:
    """What the kernel says of a map."""
    info = _MapInfo()
    fill_info(fd, info)
    fdinfo = read_fdinfo(fd)
    memlock = fdinfo.get("memlock")
    return MapInfo(
        id=info.id,
        type=name_type(MAP_TYPES, info.type),
        name=info.name.decode(errors="replace"),
        key_size=info.key_size,
        value_size=info.value_size,
        max_entries=info.max_entries,
        flags=info.map_flags,
        btf_id=info.btf_id,
        ifindex=info.ifindex,
        memlock=int(memlock) if memlock else None,
        frozen=fdinfo.get("frozen") == "1",
    )


def read_btf(fd: int) -> BtfInfo:
    """What the kernel says of a BTF object (its name since Linux 5.11)."""
    info, name = _BtfInfo(), ct.create_string_buffer(64)
    info.name, info.name_len = ct.addressof(name), len(name)
    fill_info(fd, info)
    return BtfInfo(
        info.id, name.value.decode(errors="replace"), info.btf_size, bool(info.kernel_btf)
    )
