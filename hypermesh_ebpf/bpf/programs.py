"""Loading: an Image's maps and programs become descriptors of the kernel."""

from __future__ import annotations

import ctypes as ct
import errno
import os
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from hypermesh_ebpf.bpf.libbpf import MapCreateOpts, ProgLoadOpts, check, libbpf
from hypermesh_ebpf.bpf.spec import MapSpec, ProgramSpec
from hypermesh_ebpf.errors import (
    HmebpfError,
    LoadError,
    MissingPrivilege,
    Unsupported,
    VerifierError,
    describe_errno,
)

# kind of hook: (BPF_PROG_TYPE_*, expected attach type BPF_TRACE_* or 0) (include/uapi/linux/bpf.h)
PROGRAM_TYPES = {
    "kprobe": (2, 0),
    "kretprobe": (2, 0),
    "uprobe": (2, 0),
    "uretprobe": (2, 0),
    "tc": (3, 0),
    "tracepoint": (5, 0),
    "xdp": (6, 37),
    "perf_event": (7, 0),
    "raw_tracepoint": (17, 0),
    "fentry": (26, 24),
    "fexit": (26, 25),
    "lsm": (29, 27),
}

_LOG_SIZE = 1 << 24
_TELLING_LINES = 5
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


def create_map(spec: MapSpec) -> int:
    """Make a map; its descriptor.  Raises LoadError or MissingPrivilege."""
    options = MapCreateOpts(sz=ct.sizeof(MapCreateOpts), map_flags=spec.flags)
    try:
        return check(
            libbpf().bpf_map_create(
                spec.type,
                spec.name.encode()[:15],
                spec.key_size,
                spec.value_size,
                spec.max_entries,
                ct.byref(options),
            )
        )
    except OSError as error:
        raise _load_error(f"make map {spec.name}", error) from error


def load_program(
    spec: ProgramSpec, kind: str, license: str, maps: Sequence[int], attach_btf_id: int = 0
) -> int:
    """Load one program for a kind of hook, with the descriptors of its image's maps; its
    descriptor.

    ``attach_btf_id`` is the BTF id of a fentry, fexit or LSM target in the running kernel.
    Raises VerifierError with the telling end of the verifier's log, LoadError or MissingPrivilege.
    """
    type_, expected = PROGRAM_TYPES[kind]
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
        raise _verifier_error(spec.name, error, said) from error


def _load(
    spec: ProgramSpec, type_: int, license: str, code: bytearray, options: ProgLoadOpts
) -> int:
    buffer = (ct.c_char * len(code)).from_buffer(code)
    return check(
        libbpf().bpf_prog_load(
            type_,
            spec.name.encode()[:15],
            license.encode(),
            ct.addressof(buffer),
            len(code) // 8,
            ct.byref(options),
        )
    )


def _verifier_error(name: str, error: OSError, said: str) -> VerifierError:
    """The last lines of the log before its statistics say what was wrong.

    Newer kernels (seen on 7.3) explain it once more behind them, and end with a suggestion.
    """
    lines = said.splitlines()
    explained = [n for n, line in enumerate(lines) if line.startswith("Verification failed: ")]
    telling = [
        line
        for line in (lines[: explained[-1]] if explained else lines)
        if line and not re.match(r"(processed|verification time|stack depth) ", line)
    ]
    shown = telling[-_TELLING_LINES:]
    suggestion = re.search(r"^Suggestion:\n((?:  .*\n?)+)", said, re.M) if explained else None
    cause = "\n  ".join(shown)
    if len(lines) > len(shown):
        cause += (
            f"\n  ({len(lines) - len(shown)} lines of the verifier's log omitted; see them with -v)"
        )
    return VerifierError(
        f"load program {name}: refused by the kernel's verifier",
        cause,
        " ".join(suggestion[1].split())
        if suggestion
        else "correct the program at the instruction named last",
        errno=error.errno,
        details=said,
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
