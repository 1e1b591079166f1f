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
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hypermesh_ebpf.bpf.spec import MapSpec, ProgramSpec
from hypermesh_ebpf.errors import CompileError
from hypermesh_ebpf.image.image import Image
from hypermesh_ebpf.libbcc import capture_stderr, libbcc

# What BCC asks for of a kernel source tree is here: kconfig.h and a few stand-ins.
HEADERS = Path(__file__).parent / "include"

_LD_IMM64 = 0x18  # BPF_LD | BPF_IMM | BPF_DW: two slots, the only instruction that names a map
_PSEUDO_MAP_FD = 1
_TELLING_LINES = 6
_MAIN_FILE = "/virtual/main.c"
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


def compile_c(name: str, text: str, flags: list[str]) -> Image:
    """Compile one C text, all its functions and maps, into an Image.

    ``name`` is used for messages and as the image's name.  Raises CompileError with clang's words,
    or with BCC's where it could not create the maps.
    """
    lib = libbcc()
    os.environ["BCC_KERNEL_SOURCE"] = str(HEADERS.parent)
    arguments = (ct.c_char_p * len(flags))(*(os.fsencode(flag) for flag in flags))
    module, said = capture_stderr(
        lambda: lib.bpf_module_create_c_from_string(
            text.encode(), 0, arguments, len(flags), True, None
        )
    )
    if not module:
        raise _compile_error(name, said)
    try:
        return _read_module(lib, module, name)
    finally:
        lib.bpf_module_destroy(module)


def _read_module(lib: Any, module: int, name: str) -> Image:
    """Everything that a loader needs, out of a compiled module."""
    tables = range(lib.bpf_num_tables(module))
    maps = tuple(_read_table(lib, module, index) for index in tables)
    places = {lib.bpf_table_fd_id(module, index): index for index in tables}
    programs = tuple(
        _read_function(lib, module, index, places) for index in range(lib.bpf_num_functions(module))
    )
    return Image(name, (lib.bpf_module_license(module) or b"").decode(), maps, programs)


def _read_table(lib: Any, module: int, index: int) -> MapSpec:
    return MapSpec(
        name=lib.bpf_table_name(module, index).decode(),
        type=lib.bpf_table_type_id(module, index),
        key_size=lib.bpf_table_key_size_id(module, index),
        value_size=lib.bpf_table_leaf_size_id(module, index),
        max_entries=lib.bpf_table_max_entries_id(module, index),
        flags=lib.bpf_table_flags_id(module, index),
        key_desc=_description(lib.bpf_table_key_desc_id(module, index)),
        value_desc=_description(lib.bpf_table_leaf_desc_id(module, index)),
    )


def _description(text: bytes | None) -> Any:
    """BCC's JSON description of a type; None where it has none (ring buffers)."""
    return json.loads(text) if text else None


def _read_function(lib: Any, module: int, index: int, places: Mapping[int, int]) -> ProgramSpec:
    name = lib.bpf_function_name(module, index)
    size = lib.bpf_function_size(module, name)
    code = ct.string_at(lib.bpf_function_start(module, name), size)
    return ProgramSpec(name.decode(), code, find_map_refs(code, places))


def find_map_refs(code: bytes, places: Mapping[int, int]) -> tuple[tuple[int, int], ...]:
    """(byte offset, map index) of each instruction that loads a map; ``places``: fd to index."""
    refs, offset = [], 0
    while offset < len(code):
        opcode, registers, _offset, immediate = struct.unpack_from("=BBhi", code, offset)
        if opcode == _LD_IMM64:
            if registers >> 4 == _PSEUDO_MAP_FD:
                refs.append((offset, places[immediate]))
            offset += 8
        offset += 8
    return tuple(refs)


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
