"""Functions and static probes of programs and libraries: where in the file they are (elf(5)).

A uprobe is a place in a file, not in memory: symbols are looked up in the file's own tables - with
static functions and symbol versions - and in its separate debug information where that is
installed, and their addresses turned into file offsets, so that position-independent programs need
no care.  Static probes (USDT) are notes as systemtap's sys/sdt.h writes them.
"""

from __future__ import annotations

import lzma
import os
import shutil
import struct
from collections.abc import Iterator
from contextlib import contextmanager

from hypermesh_ebpf.errors import AttachError, describe_errno
from hypermesh_ebpf.host.elf_file import DAMAGED, IFUNC, ElfFile, Function, StaticProbe
from hypermesh_ebpf.spelling import find_close

_LD_CACHE = "/etc/ld.so.cache"
_LIBRARY_FOLDERS = ("/lib64", "/usr/lib64", "/lib", "/usr/lib", "/usr/local/lib")
_DEBUG_FOLDER = "/usr/lib/debug"
_NAMES_SHOWN = 5


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


def _choose(file: ElfFile, symbol: str, what: str, path: str) -> Function:
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
    if function.kind == IFUNC:
        raise AttachError(
            what,
            "it is an indirect function: which of its variants runs is chosen for each CPU",
            f"name the variant: `nm {path} | grep {name}`, or the caller",
        )
    return function


def _name_close(name: str, known: list[str], path: str = "") -> str:
    close = find_close(name, known, _NAMES_SHOWN, 0.6)
    if close:
        return f"close to it: {', '.join(close)}"
    if len(known) <= _NAMES_SHOWN:
        return f"it has: {', '.join(known)}" if known else "it is stripped: give 0xOFFSET instead"
    return f"look: `nm -D {path}`" if path else f"it has: {', '.join(known[:20])}"


@contextmanager
def _open(path: str, what: str) -> Iterator[ElfFile]:
    """The file, and the boundary at which what is wrong with it becomes AttachError."""
    try:
        with ElfFile.open(path) as file:
            yield file
    except OSError as error:
        raise AttachError(
            what, describe_errno(error.errno or 0), f"look: `ls -lL {path}`", errno=error.errno
        ) from error
    except DAMAGED as error:
        raise AttachError(
            what, f"it is no ELF program or library ({error})", f"look: `file -L {path}`"
        ) from error


def _debug_files(file: ElfFile, path: str) -> Iterator[ElfFile]:
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
            yield ElfFile.open(candidate)
        except (OSError, *DAMAGED):
            continue
    if packed := file.section(b".gnu_debugdata"):
        try:
            yield ElfFile(lzma.decompress(file.bytes_of(packed)))
        except (lzma.LZMAError, *DAMAGED):
            return
