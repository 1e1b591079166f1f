"""ELF files as uprobes need them (elf(5)): symbols with versions, notes, and where code is.

Either class and byte order, read in place; image/elf.py is for objects of eBPF.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from hypermesh_ebpf.errors import AttachError

_PT_LOAD, _PF_X = 1, 1
_SYMTAB, _NOTE, _DYNSYM, _VERDEF, _VERSYM = 2, 7, 11, 0x6FFFFFFD, 0x6FFFFFFF
_NOTYPE, _FUNC, IFUNC = 0, 2, 10
_HIDDEN = 0x8000


@dataclass(frozen=True, slots=True)
class Function:
    """A function's symbol: ``address`` as the file counts, ``version`` as "GLIBC_2.2.5" or ""."""

    name: str
    address: int
    kind: int
    version: str
    is_default: bool


@dataclass(frozen=True, slots=True)
class StaticProbe:
    """One location of a static probe; ``semaphore`` is the file offset of its counter, or 0."""

    provider: str
    name: str
    offset: int
    semaphore: int
    arguments: str


@dataclass(frozen=True, slots=True)
class _Section:
    name: bytes
    type: int
    address: int
    offset: int
    size: int
    link: int


class NotElf(Exception):
    """What is wrong with the file."""


# What reading a file of nonsense ends with, wherever its numbers lead.
DAMAGED = (NotElf, struct.error, ValueError, IndexError, OverflowError)


class ElfFile:
    """An ELF file of either class and byte order, read in place."""

    def __init__(self, data: bytes | mmap.mmap) -> None:
        if data[:4] != b"\x7fELF":
            raise NotElf("no ELF header")
        self._data = data
        self._wide = data[4] == 2
        self._order = "<" if data[5] == 1 else ">"
        word = "Q" if self._wide else "I"
        header = self._unpack(f"HHI{word}{word}{word}IHHHHHH", 16)
        segments, sections = header[4:6]
        segment_size, segment_count, section_size, section_count, names = header[8:]
        self._segments = [
            self._segment(segments + index * segment_size) for index in range(segment_count)
        ]
        found = [self._section(sections + index * section_size) for index in range(section_count)]
        strings = found[names][1].offset if names < len(found) else 0
        self._sections = [
            replace(section, name=self._string(strings + name)) for name, section in found
        ]

    @classmethod
    def open(cls, path: str) -> ElfFile:
        """Raises OSError, and what is in DAMAGED."""
        with open(path, "rb") as file:
            return cls(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ))

    def __enter__(self) -> ElfFile:
        return self

    def __exit__(self, *exc: object) -> None:
        if isinstance(self._data, mmap.mmap):
            self._data.close()

    def _unpack(self, layout: str, at: int) -> tuple[Any, ...]:
        return struct.unpack_from(self._order + layout, self._data, at)

    def _string(self, at: int) -> bytes:
        end = self._data.find(b"\0", at)
        return self._data[at : max(end, at)]

    def _segment(self, at: int) -> tuple[bool, int, int, int]:
        """(is code, file offset, address, size in the file); size 0 for what is not loaded."""
        if self._wide:
            kind, flags, offset, address, _physical, size = self._unpack("IIQQQQ", at)
        else:
            kind, offset, address, _physical, size, _memory, flags = self._unpack("IIIIIII", at)
        return bool(flags & _PF_X), offset, address, size if kind == _PT_LOAD else 0

    def _section(self, at: int) -> tuple[int, _Section]:
        """The offset of its name, and the section without it."""
        layout = "IIQQQQII" if self._wide else "IIIIIIII"
        name, kind, _flags, address, offset, size, link, _info = self._unpack(layout, at)
        return name, _Section(b"", kind, address, offset, size, link)

    def section(self, name: bytes) -> _Section | None:
        return next((section for section in self._sections if section.name == name), None)

    def bytes_of(self, section: _Section) -> bytes:
        return self._data[section.offset : section.offset + section.size]

    def is_code(self, offset: int) -> bool:
        return any(code and start <= offset < start + size
                   for code, start, _address, size in self._segments)  # fmt: skip

    def offset_of(self, address: int, what: str) -> int:
        """The place in the file of an address as the file counts.  Raises AttachError."""
        for _code, offset, start, size in self._segments:
            if start <= address < start + size:
                return int(address - start + offset)
        raise AttachError(
            what, f"address {address:#x} is not in the file", "give the offset: PATH:0xOFFSET"
        )

    def functions(self, name: str | None = None) -> list[Function]:
        """The functions of that name, else all, from both symbol tables."""
        wanted = None if name is None else os.fsencode(name)
        return [
            function
            for section in self._sections
            if section.type in (_SYMTAB, _DYNSYM) and section.link < len(self._sections)
            for function in self._functions_in(section, wanted)
        ]

    def _functions_in(self, table: _Section, wanted: bytes | None) -> Iterator[Function]:
        strings = self.bytes_of(self._sections[table.link])
        layout = "IBBHQQ" if self._wide else "IIIBBH"
        size = struct.calcsize("=" + layout)
        names = None if wanted is None else _places_of(strings, wanted)
        if names is not None and not names:
            return
        versions = self._versions() if table.type == _DYNSYM else None
        data = self.bytes_of(table)
        entries = struct.iter_unpack(self._order + layout, data[: len(data) // size * size])
        for index, entry in enumerate(entries):
            if names is not None and entry[0] not in names:
                continue
            if self._wide:
                at, info, _other, section, address, _size = entry
            else:
                at, address, _size, info, _other, section = entry
            kind = info & 15
            if not section or not address or kind not in (_NOTYPE, _FUNC, IFUNC):
                continue
            if kind == _NOTYPE and (wanted is None or not self._is_in_code(address)):
                continue
            text = strings[at : strings.index(b"\0", at)].decode(errors="replace")
            # .symtab has versions in its names, .dynsym in a section beside it.
            text, _, version = text.partition("@")
            is_default = not version or version.startswith("@")
            version = version.lstrip("@")
            if versions:
                version, is_default = versions(index)
            yield Function(text, address, kind, version, is_default)

    def _is_in_code(self, address: int) -> bool:
        return any(code and start <= address < start + size
                   for code, _offset, start, size in self._segments)  # fmt: skip

    def _versions(self) -> Callable[[int], tuple[str, bool]] | None:
        """From a dynamic symbol's index to (version, whether it is the default one)."""
        numbers = next((s for s in self._sections if s.type == _VERSYM), None)
        definitions = next((s for s in self._sections if s.type == _VERDEF), None)
        if numbers is None or definitions is None:
            return None
        names: dict[int, str] = {}
        strings = self._sections[definitions.link].offset
        at = definitions.offset
        while True:
            _version, _flags, index, _count, _hash, auxiliary, following = self._unpack(
                "HHHHIII", at
            )
            (name,) = self._unpack("I", at + auxiliary)
            names[index] = self._string(strings + name).decode(errors="replace")
            if not following:
                break
            at += following
        every = memoryview(self.bytes_of(numbers))

        def version(index: int) -> tuple[str, bool]:
            (number,) = struct.unpack_from(self._order + "H", every, 2 * index)
            return names.get(number & ~_HIDDEN, ""), not number & _HIDDEN

        return version

    def notes(self) -> Iterator[tuple[bytes, int, bytes]]:
        """(owner, type, description) of every note."""
        for section in self._sections:
            if section.type != _NOTE:
                continue
            data = self.bytes_of(section)
            while len(data) >= 12:
                name_size, size, kind = struct.unpack_from(self._order + "III", data)
                start = 12 + ((name_size + 3) & ~3)
                yield data[12 : 12 + name_size].rstrip(b"\0"), kind, data[start : start + size]
                data = data[start + ((size + 3) & ~3) :]

    def build_id(self) -> str:
        """The identity that separate debug information is found by (NT_GNU_BUILD_ID), or ""."""
        found = (text.hex() for owner, kind, text in self.notes() if (owner, kind) == (b"GNU", 3))
        return next(found, "")

    def static_probes(self, what: str) -> Iterator[StaticProbe]:
        """The notes of sys/sdt.h: location, base, semaphore; then provider, name, arguments.

        Prelinked files have moved: the difference is that of .stapsdt.base's address to ``base``.
        """
        base_section = self.section(b".stapsdt.base")
        layout = "QQQ" if self._wide else "III"
        size = struct.calcsize("=" + layout)
        for owner, kind, text in self.notes():
            if (owner, kind) != (b"stapsdt", 3) or len(text) < size:
                continue
            location, base, semaphore = struct.unpack_from(self._order + layout, text)
            provider, name, arguments = [
                word.decode(errors="replace") for word in (text[size:].split(b"\0") + [b""] * 3)[:3]
            ]
            moved = base_section.address - base if base_section else 0
            yield StaticProbe(
                provider,
                name,
                self.offset_of(location + moved, what),
                self.offset_of(semaphore + moved, what) if semaphore else 0,
                arguments,
            )


def _places_of(strings: bytes, wanted: bytes) -> set[int]:
    """Every offset in a string table at which a symbol of that name may begin: with a version
    behind it or not, and also in the midst of a longer string that it ends."""
    found: set[int] = set()
    for ending in (b"\0", b"@"):
        at = strings.find(wanted + ending)
        while at >= 0:
            found.add(at)
            at = strings.find(wanted + ending, at + 1)
    return found
