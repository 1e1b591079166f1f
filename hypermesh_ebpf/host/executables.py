"""Functions and static probes of programs and libraries: where in the file they are (elf(5)).

A uprobe is a place in a file, not in memory: symbols are looked up in the file's own tables - with
static functions and symbol versions - and in its separate debug information where that is
installed, and their addresses turned into file offsets, so that position-independent programs need
no care.  Static probes (USDT) are notes as systemtap's sys/sdt.h writes them.
"""

from __future__ import annotations

import difflib
import lzma
import mmap
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from hypermesh_ebpf.errors import AttachError, describe_errno

_LD_CACHE = "/etc/ld.so.cache"
_LIBRARY_FOLDERS = ("/lib64", "/usr/lib64", "/lib", "/usr/lib", "/usr/local/lib")
_DEBUG_FOLDER = "/usr/lib/debug"

_PT_LOAD, _PF_X = 1, 1
_SYMTAB, _NOTE, _DYNSYM, _VERDEF, _VERSYM = 2, 7, 11, 0x6FFFFFFD, 0x6FFFFFFF
_NOTYPE, _FUNC, _IFUNC = 0, 2, 10
_HIDDEN = 0x8000
_NAMES_SHOWN = 5


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


class _NotElf(Exception):
    """What is wrong with the file."""


def find_file(name: str, pid: int | None = None) -> str:
    """The path that a program or library is meant by.

    A name with a slash is a path; "c" and "libc.so.6" are libraries that the dynamic linker knows;
    anything else a program in PATH.  With ``pid`` a path is one in that process's root.
    Raises AttachError.
    """
    if "/" in name:
        path = os.path.abspath(name)
        root = f"/proc/{pid}/root"
        if pid is not None and _lives_elsewhere(pid) and os.path.exists(root + path):
            path = root + path
        return path
    found = _find_library(name) or shutil.which(name)
    if found is None:
        raise AttachError(
            f"find {name}",
            "neither a library of this machine nor a program in PATH",
            f"give its path: `find / -name '*{name}*'`",
        )
    return os.path.realpath(found)


def _lives_elsewhere(pid: int) -> bool:
    """Whether the process has another mount namespace."""
    try:
        theirs = os.stat(f"/proc/{pid}/ns/mnt").st_ino
    except OSError:
        return False
    return theirs != os.stat("/proc/self/ns/mnt").st_ino


def _find_library(name: str) -> str | None:
    """The path of "libc.so.6" or "c", of this machine's own kind."""
    stem = f"lib{name}.so"
    with open("/proc/self/exe", "rb") as file:
        own = file.read(20)
    for path in _known_libraries():
        base = os.path.basename(path)
        if base in (name, stem) or base.startswith(stem + "."):
            try:
                with open(path, "rb") as file:
                    head = file.read(20)
            except OSError:
                continue
            if (head[:6], head[18:20]) == (own[:6], own[18:20]):  # class, byte order, machine
                return path
    return None


def _known_libraries() -> Iterator[str]:
    """The dynamic linker's cache (glibc's dl-cache.h), then the usual folders."""
    try:
        with open(_LD_CACHE, "rb") as file:
            data = file.read()
    except OSError:
        data = b""
    start = data.find(b"glibc-ld.so.cache1.1")
    if start >= 0:
        data = data[start:]
        (count,) = struct.unpack_from("=I", data, 20)
        for _flags, _key, value, _version, _hwcap in struct.iter_unpack(
            "=iIIIQ", data[48 : 48 + 24 * count]
        ):
            yield os.fsdecode(data[value : data.index(b"\0", value)])
    for folder in _LIBRARY_FOLDERS:
        try:
            names = sorted(os.listdir(folder))
        except OSError:
            continue
        yield from (os.path.join(folder, name) for name in names)


def find_offset(path: str, place: str) -> int:
    """The file offset of "symbol", "symbol+4", "symbol@VERSION" or "0x1234" in a program.

    Raises AttachError, naming close symbols where there is none of that name.
    """
    what = f"find {place} in {path}"
    with _open(path, what) as file:
        if place[:1].isdigit():
            offset = _number(what, place)
            if not file.is_code(offset):
                raise AttachError(
                    what, "there is no code at this offset", f"see `readelf -lW {path}`"
                )
            return offset
        symbol, _, plus = place.partition("+")
        function = _choose(file, symbol, what, path)
        return file.offset_of(function.address, what) + (_number(what, plus) if plus else 0)


def find_static_probes(path: str, provider: str, name: str) -> list[StaticProbe]:
    """All locations of a static probe.  Raises AttachError, naming close ones if there is none."""
    what = f"find static probe {provider}:{name} in {path}"
    with _open(path, what) as file:
        probes = list(file.static_probes(what))
    found = [probe for probe in probes if (probe.provider, probe.name) == (provider, name)]
    if found:
        return found
    known = sorted({f"{probe.provider}:{probe.name}" for probe in probes})
    if not known:
        raise AttachError(
            what, "this file has no static probes", f"look: `readelf -n {path}`; use a uprobe"
        )
    raise AttachError(what, "it has no such static probe", _name_close(f"{provider}:{name}", known))


def _number(what: str, text: str) -> int:
    try:
        return int(text, 0)
    except ValueError:
        raise AttachError(
            what, f"{text!r} is no number", "write an offset as 0x1a2b or 12"
        ) from None


def _choose(file: _Elf, symbol: str, what: str, path: str) -> Function:
    """The one function that is meant."""
    name, _, version = symbol.replace("@@", "@").partition("@")
    found = file.functions(name)
    for extra in () if found else _debug_files(file, path):
        with extra:
            found = extra.functions(name)
        if found:
            break
    if version:
        found = [function for function in found if function.version == version]
    elif any(function.is_default for function in found):
        found = [function for function in found if function.is_default]
    places = {function.address: function for function in found}
    if not places:
        known = sorted({function.name for function in file.functions()})
        raise AttachError(what, "it has no such function", _name_close(name, known, path))
    if len(places) > 1:
        versions = sorted({f"{name}@{f.version}" for f in found if f.version})
        offsets = [hex(file.offset_of(address, what)) for address in sorted(places)]
        raise AttachError(
            what,
            f"it has {len(places)} functions of this name",
            f"name one of {', '.join(versions if len(versions) > 1 else offsets)}",
        )
    (function,) = places.values()
    if function.kind == _IFUNC:
        raise AttachError(
            what,
            "it is an indirect function: which of its variants runs is chosen for each CPU",
            f"name the variant: `nm {path} | grep {name}`, or the caller",
        )
    return function


def _name_close(name: str, known: list[str], path: str = "") -> str:
    close = difflib.get_close_matches(name, known, n=_NAMES_SHOWN, cutoff=0.6)
    if close:
        return f"close to it: {', '.join(close)}"
    if len(known) <= _NAMES_SHOWN:
        return f"it has: {', '.join(known)}" if known else "it is stripped: give 0xOFFSET instead"
    return f"look: `nm -D {path}`" if path else f"it has: {', '.join(known[:20])}"


def _open(path: str, what: str) -> _Elf:
    try:
        return _Elf.open(path)
    except OSError as error:
        raise AttachError(
            what, describe_errno(error.errno or 0), f"look: `ls -lL {path}`", errno=error.errno
        ) from error
    except (_NotElf, struct.error, ValueError) as error:
        raise AttachError(
            what, f"it is no ELF program or library ({error})", f"look: `file -L {path}`"
        ) from error


def _debug_files(file: _Elf, path: str) -> Iterator[_Elf]:
    """Separate symbols: by build id, by .gnu_debuglink, and the small table inside (Fedora's)."""
    candidates = []
    if build_id := file.build_id():
        candidates.append(f"{_DEBUG_FOLDER}/.build-id/{build_id[:2]}/{build_id[2:]}.debug")
    if link := file.section(b".gnu_debuglink"):
        name = os.fsdecode(file.bytes_of(link).split(b"\0")[0])
        folder = os.path.dirname(os.path.realpath(path))
        candidates += [
            f"{folder}/{name}",
            f"{folder}/.debug/{name}",
            f"{_DEBUG_FOLDER}{folder}/{name}",
        ]
    for candidate in candidates:
        try:
            yield _Elf.open(candidate)
        except (OSError, _NotElf, struct.error, ValueError):
            continue
    if packed := file.section(b".gnu_debugdata"):
        try:
            yield _Elf(lzma.decompress(file.bytes_of(packed)))
        except (lzma.LZMAError, _NotElf, struct.error):
            return


class _Elf:
    """An ELF file of either class and byte order, read in place."""

    def __init__(self, data: bytes | mmap.mmap) -> None:
        if data[:4] != b"\x7fELF":
            raise _NotElf("no ELF header")
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
    def open(cls, path: str) -> _Elf:
        """Raises OSError, _NotElf, struct.error, ValueError."""
        with open(path, "rb") as file:
            return cls(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ))

    def __enter__(self) -> _Elf:
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
            if not section or not address or kind not in (_NOTYPE, _FUNC, _IFUNC):
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
