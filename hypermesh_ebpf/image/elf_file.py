"""An ELF object looked at before libbpf sees it: is it whole, and is it for eBPF on this machine?

Pure Python, and quick: the headers alone are read.  What is inside the sections is libbpf's affair
(:mod:`hypermesh_ebpf.image.elf`).  Format: elf(5); EM_BPF is 247 (include/uapi/linux/elf-em.h).
"""

from __future__ import annotations

import struct
import sys
from dataclasses import dataclass

from hypermesh_ebpf.errors import ForeignObject, MalformedObject

_MAGIC = b"\x7fELF"
_HEADER = struct.Struct("=16sHHIQQQIHHHHHH")
_SECTION = struct.Struct("=IIQQQQIIQQ")
_CLASS_64, _RELOCATABLE, _NO_BITS = 2, 1, 8
_EM_NONE, _EM_BPF = 0, 247  # libbpf takes 0, too: clang wrote it before there was a number
_BYTE_ORDERS = {1: "little", 2: "big"}
_TYPES = {2: "a linked program", 3: "a shared library or linked program", 4: "a core dump"}
_MACHINES = {
    3: "x86 (32 bits)",
    8: "MIPS",
    20: "PowerPC",
    21: "PowerPC (64 bits)",
    22: "s390",
    40: "ARM (32 bits)",
    62: "x86-64",
    183: "arm64",
    243: "RISC-V",
    258: "LoongArch",
}
_COMPILE = "compile it for eBPF: `clang -target bpf -O2 -g -c FILE.c -o FILE.o`"
_WHOLE = f"copy or build it again; {_COMPILE}"


@dataclass(frozen=True, slots=True)
class Section:
    """A section of an object: its name, and its bytes (empty for .bss, which has none)."""

    name: str
    content: bytes


def is_elf(data: bytes) -> bool:
    """Whether the bytes begin like an ELF file."""
    return data[:4] == _MAGIC


def check_object(data: bytes) -> None:
    """Raise MalformedObject or ForeignObject for what cannot be an eBPF object for this machine."""
    read_sections(data)


def read_sections(data: bytes) -> list[Section]:
    """All sections of an object.  Raises MalformedObject, ForeignObject."""
    if not is_elf(data):
        raise _malformed("it does not begin like an ELF file", _COMPILE)
    if len(data) < _HEADER.size:
        raise _malformed(
            f"{len(data)} bytes are fewer than the {_HEADER.size} of an ELF header", _WHOLE
        )
    _check_identity(data)
    fields = _HEADER.unpack_from(data)
    kind, machine, table, entry_size, count, names_index = (
        fields[1],
        fields[2],
        fields[6],
        *fields[11:14],
    )
    if machine not in (_EM_BPF, _EM_NONE):
        name = _MACHINES.get(machine, f"machine {machine}")
        raise ForeignObject("check the object", f"it is for {name}, not for eBPF", _COMPILE)
    if kind != _RELOCATABLE:
        found = _TYPES.get(kind, f"of type {kind}")
        raise _malformed(f"it is {found}, no relocatable object", _COMPILE)
    headers = _read_headers(data, table, entry_size, count)
    return _name_sections(data, headers, names_index)


def _check_identity(data: bytes) -> None:
    """The 16 bytes that tell how to read all others."""
    if data[4] != _CLASS_64:
        raise ForeignObject("check the object", "it has 32-bit addresses; eBPF has 64", _COMPILE)
    order = _BYTE_ORDERS.get(data[5])
    if order is None:
        raise _malformed(f"its byte order is {data[5]}, which does not exist", _WHOLE)
    if order != sys.byteorder:
        raise ForeignObject(
            "check the object",
            f"its byte order is {order}-endian, this machine's is {sys.byteorder}-endian",
            f"`-target bpf` takes the byte order of the machine it runs on; {_COMPILE}",
        )


def _read_headers(
    data: bytes, table: int, entry_size: int, count: int
) -> list[tuple[int, int, int, int]]:
    """(name, type, offset, size) of each section, all of them inside the file."""
    if not table or not count:
        raise _malformed("it has no section table", _WHOLE)
    if entry_size != _SECTION.size:
        raise _malformed(f"its section headers have {entry_size} bytes, not 64", _WHOLE)
    end = table + count * _SECTION.size
    if end > len(data):
        raise _malformed(
            f"its section table ends at byte {end}, the file at {len(data)}: it was cut short",
            _WHOLE,
        )
    headers = []
    for index in range(count):
        name, kind, _flags, _address, offset, size, *_rest = _SECTION.unpack_from(
            data, table + index * _SECTION.size
        )
        if kind not in (0, _NO_BITS) and offset + size > len(data):
            raise _malformed(
                f"section {index} ends at byte {offset + size}, the file at {len(data)}", _WHOLE
            )
        headers.append((name, kind, offset, size))
    return headers


def _name_sections(
    data: bytes, headers: list[tuple[int, int, int, int]], names_index: int
) -> list[Section]:
    if names_index >= len(headers):
        raise _malformed(
            f"the names of its sections are in section {names_index}, of which there "
            f"are {len(headers)}",
            _WHOLE,
        )
    _name, _kind, start, size = headers[names_index]
    names = data[start : start + size]
    if not names.endswith(b"\0"):
        raise _malformed("the names of its sections do not end", _WHOLE)
    sections = []
    for name, kind, offset, length in headers:
        if name >= len(names):
            raise _malformed(f"a section's name begins at byte {name} of {len(names)}", _WHOLE)
        text = names[name : names.index(b"\0", name)].decode(errors="replace")
        content = b"" if kind in (0, _NO_BITS) else data[offset : offset + length]
        sections.append(Section(text, content))
    return sections


def _malformed(cause: str, remedy: str) -> MalformedObject:
    return MalformedObject("check the object", cause, remedy)
