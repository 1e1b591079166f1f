"""Loading: an Image's maps and programs become descriptors of the kernel."""

from __future__ import annotations

import ctypes as ct
import errno
import os
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from hypermesh_ebpf.attach_type import EbpfAttachType
from hypermesh_ebpf.bpf.libbpf import MapCreateOpts, ProgLoadOpts, check, libbpf
from hypermesh_ebpf.bpf.spec import MapSpec, ProgramSpec
from hypermesh_ebpf.bpf.verifier import explain_refusal
from hypermesh_ebpf.errors import (
    HmebpfError,
    LoadError,
    MissingPrivilege,
    PinError,
    Unsupported,
    describe_errno,
)
from hypermesh_ebpf.side_by_side import call_side_by_side

# cgroup's attach points: enum bpf_attach_type (include/uapi/linux/bpf.h)
CGROUP_ATTACH_TYPES = {
    "ingress": 0,
    "egress": 1,
    "sock_create": 2,
    "post_bind4": 12,
    "post_bind6": 13,
    "sock_release": 34,
}
_CGROUP_SKB, _CGROUP_SOCK = 8, 9

# kind of hook: (BPF_PROG_TYPE_*, expected attach type or 0); for a cgroup its ingress, as the other
# points have types of their own (:func:`program_type`)
PROGRAM_TYPES = {
    "kprobe": (2, 0),
    "kretprobe": (2, 0),
    "uprobe": (2, 0),
    "uretprobe": (2, 0),
    "usdt": (2, 0),
    "tc": (3, 0),
    "tracepoint": (5, 0),
    "xdp": (6, 37),
    "perf_event": (7, 0),
    "raw_tracepoint": (17, 0),
    "fentry": (26, 24),
    "fexit": (26, 25),
    "lsm": (29, 27),
    "cgroup": (_CGROUP_SKB, 0),
}

# BPF_MAP_TYPE_SK_STORAGE, _INODE_STORAGE, _TASK_STORAGE, _CGRP_STORAGE
_STORAGES = (24, 28, 29, 32)
_BTF_INT, _BTF_ARRAY = 1, 3

_CLOSERS = 32  # threads
_LOG_SIZE = 1 << 24
_CAPABILITY_REMEDY = (
    "run as root, or with CAP_BPF, CAP_PERFMON and CAP_NET_ADMIN; see `hmebpf check-system`"
)


@dataclass(frozen=True, slots=True)
class ProgramInfo:
    """What the kernel says of a loaded program (struct bpf_prog_info)."""

    id: int
    tag: str
    missed: int | None
    run_count: int
    run_time_ns: int


def kernel_name(name: str) -> bytes:
    """A name as the kernel takes it: 15 characters of which others than these are refused
    (bpf_obj_name_cpy() in kernel/bpf/syscall.c)."""
    return re.sub(r"[^A-Za-z0-9_.]", "_", name).encode()[:15]


def create_map(spec: MapSpec, inner_fd: int = 0) -> int:
    """Make a map; its descriptor.  ``inner_fd`` is the pattern for those in a map of maps.

    Raises LoadError or MissingPrivilege.
    """
    options = MapCreateOpts(sz=ct.sizeof(MapCreateOpts), map_flags=spec.flags)
    options.inner_map_fd = inner_fd
    try:
        if spec.type in _STORAGES:
            options.btf_fd = check(_load_storage_btf(spec.value_size))
            options.btf_key_type_id, options.btf_value_type_id = 1, 3
        return check(
            libbpf().bpf_map_create(
                spec.type,
                kernel_name(spec.name),
                spec.key_size,
                spec.value_size,
                spec.max_entries,
                ct.byref(options),
            )
        )
    except OSError as error:
        raise _load_error(f"make map {spec.name}", error) from error
    finally:
        if options.btf_fd:
            os.close(options.btf_fd)


def create_maps(specs: Sequence[MapSpec]) -> list[int]:
    """Make the maps of one image, or open those that are pinned already; their descriptors.

    Raises LoadError, MissingPrivilege, PinError; what was made until then is closed.
    """
    made: dict[str, int] = {}
    try:
        for spec in sorted(specs, key=lambda each: bool(each.inner)):
            if spec.inner and spec.inner not in made:
                raise LoadError(
                    f"make map {spec.name}",
                    f"there is no map {spec.inner!r} that could be the pattern of its maps",
                    "name a map of the same source",
                )
            made[spec.name] = _open_or_create(spec, made.get(spec.inner, 0))
    except BaseException:
        close_all(list(made.values()))
        raise
    return [made[spec.name] for spec in specs]


def _open_or_create(spec: MapSpec, inner_fd: int) -> int:
    """A map that is to be pinned is the one that is pinned there, if it is of the same shape."""
    if not spec.pinned:
        return create_map(spec, inner_fd)
    what, path = f"pin map {spec.name} at {spec.pinned}", spec.pinned.encode()
    fd = libbpf().bpf_obj_get(path)
    if fd >= 0:
        found, wanted = read_map_shape(fd), (spec.type, spec.key_size, spec.value_size)
        if found[:3] != wanted:
            os.close(fd)
            raise PinError(
                what,
                f"another map is pinned there: its type and sizes are {found[:3]}, not {wanted}",
                f"pin to another path, or remove it: `sudo rm {spec.pinned}`",
            )
        return int(fd)
    fd = create_map(spec, inner_fd)
    if libbpf().bpf_obj_pin(fd, path) < 0:
        number = ct.get_errno()
        os.close(fd)
        raise PinError(
            what,
            describe_errno(number),
            "the directory must exist, in a BPF file system: "
            "`sudo mount -t bpf bpf /sys/fs/bpf` where none is mounted",
            errno=number,
        )
    return fd


def read_map_shape(fd: int) -> tuple[int, int, int, int]:
    """(type, key size, value size, entries) of a map.  Raises OSError."""
    raw, length = ct.create_string_buffer(96), ct.c_uint32(96)
    check(libbpf().bpf_obj_get_info_by_fd(fd, raw, ct.byref(length)))
    type_, _id, key_size, value_size, entries = struct.unpack_from("=IIIII", raw.raw, 0)
    return type_, key_size, value_size, entries


def _load_storage_btf(value_size: int) -> int:
    """Type information for a storage map, which the kernel makes with one only.

    Type 1 is int, the key; 3 an array of ``value_size`` characters.  A negative number on failure.
    """
    names = b"\0int\0char\0"
    types = struct.pack("=IIII", 1, _BTF_INT << 24, 4, 1 << 24 | 32)
    types += struct.pack("=IIII", 5, _BTF_INT << 24, 1, 8)
    types += struct.pack("=IIIIII", 0, _BTF_ARRAY << 24, 0, 2, 1, value_size)
    head = struct.pack("=HBBIIIII", 0xEB9F, 1, 0, 24, 0, len(types), len(types), len(names))
    raw = head + types + names
    return int(libbpf().bpf_btf_load(raw, len(raw), None))


def program_type(where: str | EbpfAttachType) -> tuple[int, int]:
    """(BPF_PROG_TYPE_*, expected attach type) for a kind of hook or an attach point."""
    if isinstance(where, str):
        return PROGRAM_TYPES[where]
    if where.kind != "cgroup":
        return PROGRAM_TYPES[where.kind]
    point = where.option("attach")
    is_packet = point in ("ingress", "egress")
    return _CGROUP_SKB if is_packet else _CGROUP_SOCK, CGROUP_ATTACH_TYPES[point]


def load_program(
    spec: ProgramSpec,
    where: str | EbpfAttachType,
    license: str,
    maps: Sequence[int],
    attach_btf_id: int = 0,
) -> int:
    """Load one program for a kind of hook or an attach point, with the descriptors of its image's
    maps; its descriptor.

    ``attach_btf_id`` is the BTF id of a fentry, fexit or LSM target in the running kernel.
    Raises VerifierError with the telling end of the verifier's log, LoadError or MissingPrivilege.
    """
    type_, expected = program_type(where)
    code = bytearray(spec.instructions)
    for offset, index in spec.map_refs:
        struct.pack_into("=i", code, offset + 4, maps[index])
    options = ProgLoadOpts(sz=ct.sizeof(ProgLoadOpts), expected_attach_type=expected)
    options.attach_btf_id = attach_btf_id
    options.attempts = 5
    try:
        return _load(spec, type_, license, code, options)
    except OSError as first:
        if first.errno not in (errno.EINVAL, errno.EACCES, errno.E2BIG, errno.ENOSPC):
            raise _load_error(f"load program {spec.name}", first) from first
    # Only a refused program is loaded again with a log: writing one costs many times the load.
    log = ct.create_string_buffer(_LOG_SIZE)
    options.log_level, options.log_size = 1, _LOG_SIZE
    options.log_buf = ct.addressof(log)
    try:
        return _load(spec, type_, license, code, options)
    except OSError as error:
        said = log.value.decode(errors="replace").strip()
        if not said:
            raise _load_error(f"load program {spec.name}", error) from error
        raise explain_refusal(spec.name, error.errno, said) from error


def _load(
    spec: ProgramSpec, type_: int, license: str, code: bytearray, options: ProgLoadOpts
) -> int:
    buffer = (ct.c_char * len(code)).from_buffer(code)
    return check(
        libbpf().bpf_prog_load(
            type_,
            kernel_name(spec.name),
            license.encode(),
            buffer,
            len(code) // 8,
            ct.byref(options),
        )
    )


def _load_error(what: str, error: OSError) -> HmebpfError:
    number = error.errno or errno.EINVAL
    cause = describe_errno(number)
    if number in (errno.EPERM, errno.EACCES):
        return MissingPrivilege(what, cause, _CAPABILITY_REMEDY, errno=number)
    if number in (errno.EINVAL, 524):  # 524: ENOTSUPP, which libc has no name for
        return Unsupported(
            what,
            f"this kernel does not know it: {cause}",
            "see `hmebpf check-system`",
            errno=number,
        )
    if number == errno.ENOMEM:
        remedy = "free memory, or raise `ulimit -l` on kernels before 5.11"
        return LoadError(what, cause, remedy, errno=number)
    if number in (errno.EMFILE, errno.ENFILE):
        return LoadError(what, cause, "allow more open files: `ulimit -n 4096`", errno=number)
    return LoadError(what, cause, "see `hmebpf check-system`", errno=number)


def read_program_info(fd: int) -> ProgramInfo:
    """Id, tag, and run statistics of a program (BPF_OBJ_GET_INFO_BY_FD).

    ``missed`` is ``recursion_misses``, None before Linux 5.12, which does not report it.
    Raises OSError.
    """
    raw, length = ct.create_string_buffer(256), ct.c_uint32(256)
    check(libbpf().bpf_obj_get_info_by_fd(fd, raw, ct.byref(length)))
    _type, number, tag = struct.unpack_from("=II8s", raw.raw, 0)
    run_time, run_count = struct.unpack_from("=QQ", raw.raw, 192)
    missed = None
    if length.value >= 216:
        (missed,) = struct.unpack_from("=Q", raw.raw, 208)
    return ProgramInfo(number, tag.hex(), missed, run_count, run_time)


def close_all(descriptors: Sequence[int]) -> None:
    """Close descriptors; the kernel frees what nothing else refers to."""
    for fd in descriptors:
        os.close(fd)


def close_attachments(descriptors: Sequence[int]) -> None:
    """Close descriptors that keep programs attached, several at a time.

    A perf event's end waits 50 to 100 ms for RCU grace periods (tracepoint_synchronize_unregister()
    in kernel/trace/trace_event_perf.c); waits that overlap share them.
    """
    call_side_by_side([partial(os.close, fd) for fd in descriptors], _CLOSERS)
