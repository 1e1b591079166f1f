"""C text in, Image out: BCC's compiler, driven through libbcc alone.

``BPF(text=...)`` of the bcc package loads and attaches while it is constructed, and importing it
costs 70 ms.  libbcc's ``bpf_module_create_c_from_string`` compiles and creates the maps, nothing
more; the instructions, the maps and their type descriptions are then read out into an Image.

Runs in the worker process only: it changes the environment, writes to descriptor 2 and maps 100 MB
of LLVM.
"""

from __future__ import annotations

import ctypes as ct
import json
import mmap
import os
import platform
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hypermesh_ebpf.bpf.maps import read_map_spec
from hypermesh_ebpf.bpf.spec import MapSpec, ProgramSpec
from hypermesh_ebpf.errors import CompileError
from hypermesh_ebpf.image.image import Image
from hypermesh_ebpf.image.user_text import LIGHT_HEADERS
from hypermesh_ebpf.libbcc import capture_stderr, compile_module, libbcc

LD_IMM64 = 0x18  # BPF_LD | BPF_IMM | BPF_DW: two slots, the only instruction that names a map
_PSEUDO_MAP_FD = 1
_TELLING_LINES = 6
_MAIN_FILE = "/virtual/main.c"
RECORDS = (4, 27)
"""BPF_MAP_TYPE_PERF_EVENT_ARRAY and _RINGBUF: their records have a type that the map has not."""
_ARRAY = re.compile(r"(.+?) ?\[(\d+)\]")
_C_SCALARS = frozenset(
    f"{sign}{width}"
    for sign in ("", "unsigned ")
    for width in ("char", "short", "int", "long", "long long")
) | {"signed char", "_Bool"}
_TYPEDEFS = {
    **{f"{p}{s}{bits}": f"{'unsigned ' if s == 'u' else ''}{word}" for p in ("", "__") for s in "us"
       for bits, word in ((16, "short"), (32, "int"), (64, "long long"))},
    **{f"__{order}{bits}": f"unsigned {word}" for order in ("be", "le")
       for bits, word in ((16, "short"), (32, "int"), (64, "long long"))},
    "u8": "unsigned char", "__u8": "unsigned char", "s8": "signed char", "__s8": "signed char",
    "bool": "_Bool", "pid_t": "int", "uid_t": "unsigned int", "gid_t": "unsigned int",
    "size_t": "unsigned long", "ssize_t": "long", "dev_t": "unsigned int", "loff_t": "long long",
    "umode_t": "unsigned short", "sector_t": "unsigned long long", "gfp_t": "unsigned int",
}  # fmt: skip
# clang's own; BCC says "could not open bpf map: counts, error: ..." of what the kernel refused.
_ERROR = re.compile(r"(.*:\d+:\d+: )?(fatal )?error: ")
_SUM = re.compile(r"\d+ (errors?|warnings?)( and \d+ errors?)? generated\.$")
_NEXT = re.compile(rf"\S+:\d+:|{_SUM.pattern}")


def kernel_version_code() -> int:
    """LINUX_VERSION_CODE of the running kernel, as its headers would define it."""
    numbers = [int(n) for n in re.findall(r"\d+", platform.release())[:3]] + [0, 0]
    return (numbers[0] << 16) + (numbers[1] << 8) + min(numbers[2], 255)


def compiler_flags(include: Path, defines: Mapping[str, str | int]) -> list[str]:
    """clang's arguments for a source whose own headers are in ``include``."""
    macros = {
        "LINUX_VERSION_CODE": kernel_version_code(),
        "PAGE_SIZE": mmap.PAGESIZE,
        **defines,
    }
    flags = [f"-D{name}={value}" for name, value in macros.items()]
    return [f"-I{include}", "-Wno-unused-value", *flags]


def compile_c(
    name: str,
    text: str,
    flags: Sequence[str],
    *,
    kernel_source: Path = LIGHT_HEADERS.parent,
    by_btf: bool = False,
) -> Image:
    """Compile one C text, all its functions and maps, into an Image.

    ``name`` is used for messages and as the image's name.  ``kernel_source`` is the tree that BCC
    takes kernel headers from.  ``by_btf`` describes keys and values by the BTF that BCC gives its
    maps, which knows enums and bit fields, where the kernel takes it; else, and without, they are
    described as BCC does.  Raises CompileError with clang's words, or with BCC's where it could not
    create the maps.
    """
    lib = libbcc()
    os.environ["BCC_KERNEL_SOURCE"] = str(kernel_source)
    raw, arguments = text.encode(errors="surrogateescape"), [os.fsencode(flag) for flag in flags]
    module, said = capture_stderr(lambda: compile_module(raw, arguments))
    if not module:
        raise _compile_error(name, said)
    try:
        return _read_module(lib, module, name, by_btf)
    finally:
        lib.bpf_module_destroy(module)


def _read_module(lib: Any, module: int, name: str, by_btf: bool) -> Image:
    """Everything that a loader needs, out of a compiled module."""
    tables = range(lib.bpf_num_tables(module))
    maps = tuple(_read_table(lib, module, index, by_btf) for index in tables)
    places = {lib.bpf_table_fd_id(module, index): index for index in tables}
    programs = tuple(
        _read_function(lib, module, index, places) for index in range(lib.bpf_num_functions(module))
    )
    return Image(name, (lib.bpf_module_license(module) or b"").decode(), maps, programs)


def _read_table(lib: Any, module: int, index: int, by_btf: bool) -> MapSpec:
    name = lib.bpf_table_name(module, index)
    key_desc = _description(lib.bpf_table_key_desc_id(module, index))
    value_desc = _description(lib.bpf_table_leaf_desc_id(module, index))
    if by_btf:
        known = read_map_spec(lib.bpf_table_fd_id(module, index))
        key_desc, value_desc = known.key_desc or key_desc, known.value_desc or value_desc
    type_ = lib.bpf_table_type_id(module, index)
    if type_ in RECORDS:
        value_desc = _record_description(lib, module, name)
    return MapSpec(
        name=name.decode(),
        type=type_,
        key_size=lib.bpf_table_key_size_id(module, index),
        value_size=lib.bpf_table_leaf_size_id(module, index),
        max_entries=lib.bpf_table_max_entries_id(module, index),
        flags=lib.bpf_table_flags_id(module, index),
        key_desc=key_desc,
        value_desc=value_desc,
    )


def _description(text: bytes | None) -> Any:
    """BCC's JSON description of a type; None where it has none (ring buffers), or writes none that
    is JSON (of members with types that it does not know)."""
    try:
        return json.loads(text) if text else None
    except ValueError:
        return None


def _record_description(lib: Any, module: int, name: bytes) -> Any:
    """What BCC saw handed to a ring or perf buffer, as it describes a structure; None for nothing,
    or for members of types that it tells by their name alone."""
    members = []
    for index in range(lib.bpf_perf_event_fields(module, name)):
        told = lib.bpf_perf_event_field(module, name, index).decode()
        member, _, type_ = told.partition("#")
        found = _ARRAY.fullmatch(type_)
        scalar = _scalar(found[1] if found else type_)
        if not member or scalar is None:
            return None
        members.append([member, scalar, [int(found[2])]] if found else [member, scalar])
    return [name.decode(), members, "struct"] if members else None


def _scalar(type_: str) -> str | None:
    """BCC's word for a type in a description of one of C's or the kernel's; None if unknown."""
    if type_.endswith("*"):
        return "unsigned long long"
    if type_.startswith("enum "):
        return "unsigned int"
    return type_ if type_ in _C_SCALARS else _TYPEDEFS.get(type_)


def _read_function(lib: Any, module: int, index: int, places: Mapping[int, int]) -> ProgramSpec:
    name = lib.bpf_function_name(module, index)
    size = lib.bpf_function_size(module, name)
    code = ct.string_at(lib.bpf_function_start(module, name), size)
    return ProgramSpec(name.decode(), code, find_map_refs(code, places))


def find_map_refs(code: bytes, places: Mapping[int, int]) -> tuple[tuple[int, int], ...]:
    """(byte offset, map index) of each instruction that loads a map; ``places``: fd to index."""
    return tuple(
        (offset, places[immediate])
        for offset, opcode, registers, immediate, _high in instructions(code)
        if opcode == LD_IMM64 and registers >> 4 == _PSEUDO_MAP_FD
    )


def instructions(code: bytes) -> Iterator[tuple[int, int, int, int, int]]:
    """(byte offset, opcode, registers, immediate, its upper half if it has one) of each."""
    offset = 0
    while offset < len(code):
        opcode, registers, _jump, immediate = struct.unpack_from("=BBhi", code, offset)
        wide = opcode == LD_IMM64
        high = struct.unpack_from("=i", code, offset + 12)[0] if wide else 0
        yield offset, opcode, registers, immediate, high
        offset += 16 if wide else 8


def _compile_error(name: str, said: str) -> CompileError:
    """clang's output as one error: its first error line is the cause, the rest are details."""
    said = said.replace(_MAIN_FILE, name).strip()
    lines = said.splitlines()
    errors = [i for i, line in enumerate(lines) if _ERROR.match(line)]
    if not errors:
        return CompileError(
            f"compile {name}",
            lines[-1] if lines else "BCC gave no reason",
            "see all that was said with -v",
            details=said,
        )
    first = errors[0]
    telling = lines[first : first + _TELLING_LINES]
    following = (i for i, line in enumerate(telling[1:], 1) if _NEXT.match(line))
    telling = telling[: next(following, None)]
    omitted = sum(not _SUM.match(line) for line in lines) - len(telling)
    cause = "\n  ".join(telling)
    if omitted > 0:
        cause += f"\n  ({omitted} more lines; see them with -v)"
    return CompileError(
        f"compile {name}", cause, "correct the source at the line given", details=said
    )
