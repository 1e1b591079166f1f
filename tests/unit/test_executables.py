"""Functions and static probes of files, against what the dynamic linker and readelf say."""

from __future__ import annotations

import ctypes
import lzma
import os
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from hypermesh_ebpf.errors import AttachError
from hypermesh_ebpf.host import executables
from hypermesh_ebpf.host.executables import find_file, find_offset, find_static_probes

LIBC = find_file("c")
needs_readelf = pytest.mark.skipif(not shutil.which("readelf"), reason="needs readelf (binutils)")


def mapped_offset(name: str) -> tuple[str, int]:
    """(file, offset in it) of a function that the dynamic linker found for this process."""
    address = ctypes.cast(getattr(ctypes.CDLL(None), name), ctypes.c_void_p).value or 0
    for line in Path("/proc/self/maps").read_text().splitlines():
        extent, _flags, offset, _device, _inode, *path = line.split()
        low, high = (int(part, 16) for part in extent.split("-"))
        if low <= address < high:
            return path[0], address - low + int(offset, 16)
    raise AssertionError(f"{name} is not mapped")


@pytest.mark.parametrize("name", ["a64l", "getppid", "realpath", "regexec", "pthread_create"])
def test_offset_is_where_the_linker_maps_it(name: str) -> None:
    path, offset = mapped_offset(name)
    assert os.path.realpath(path) == LIBC
    assert find_offset(LIBC, name) == offset
    assert find_offset(LIBC, f"{name}+4") == offset + 4
    assert find_offset(LIBC, f"{name}+0x10") == offset + 16
    assert find_offset(LIBC, hex(offset)) == offset


def test_library_by_the_names_that_people_use() -> None:
    path, _ = mapped_offset("getppid")
    assert find_file("c") == find_file("libc.so.6") == os.path.realpath(path)
    assert find_file("sh") == os.path.realpath(shutil.which("sh") or "")
    assert find_file("/no/such/../file") == "/no/file"
    with pytest.raises(AttachError) as caught:
        find_file("nosuchlibrary")
    assert "neither a library of this machine nor a program in PATH" in str(caught.value)
    assert "find / -name" in (caught.value.remedy or "")


def test_library_without_the_linkers_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on musl: the usual folders are searched."""
    folder = os.path.dirname(LIBC)
    monkeypatch.setattr(executables, "_LD_CACHE", "/nonexistent")
    monkeypatch.setattr(executables, "_LIBRARY_FOLDERS", (folder,))
    assert os.path.samefile(find_file("c"), LIBC)


@needs_readelf
def test_versions_of_a_symbol() -> None:
    shown = subprocess.check_output(["readelf", "-W", "--dyn-syms", LIBC], text=True)
    found = dict(re.findall(r"(\w+) +\d+ FUNC +GLOBAL DEFAULT +\d+ realpath@@?(\S+)", shown))
    addresses = {version: int(address, 16) for address, version in found.items()}
    if len(addresses) < 2:
        pytest.skip("this libc has one version of realpath only")
    for version, address in addresses.items():
        # In glibc's code segment addresses and offsets are alike.
        assert find_offset(LIBC, f"realpath@{version}") == address
    with pytest.raises(AttachError, match="no such function"):
        find_offset(LIBC, "realpath@GLIBC_99")


def test_function_that_is_not_there_names_close_ones() -> None:
    with pytest.raises(AttachError) as caught:
        find_offset(LIBC, "regexecc")
    assert "find regexecc in" in str(caught.value)
    assert "it has no such function" in str(caught.value)
    assert "regexec" in (caught.value.remedy or "")


def test_indirect_function_is_no_place_for_a_uprobe() -> None:
    with pytest.raises(AttachError, match="indirect function") as caught:
        find_offset(LIBC, "strlen")
    assert "name the variant" in (caught.value.remedy or "")


@pytest.mark.parametrize(
    ("path", "place", "cause"),
    [
        ("/nonexistent/program", "main", "No such file or directory (ENOENT)"),
        ("/", "main", "Is a directory (EISDIR)"),
        ("/etc/passwd", "main", "it is no ELF program or library"),
        (LIBC, "0x1", "there is no code at this offset"),
        (LIBC, "0xzz", "is no number"),
        (LIBC, "getppid+x", "is no number"),
    ],
)
def test_what_is_no_place(path: str, place: str, cause: str) -> None:
    with pytest.raises(AttachError) as caught:
        find_offset(path, place)
    assert cause in str(caught.value)
    assert caught.value.remedy


@pytest.mark.parametrize("keep", [0, 3, 4, 20, 63, 64, 200, 5000])
def test_file_that_is_cut_short_is_told_as_such(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "cut"
    path.write_bytes(Path(LIBC).read_bytes()[:keep])
    with pytest.raises(AttachError):
        find_offset(str(path), "getppid")


def test_file_of_nonsense_ends_as_an_error(tmp_path: Path) -> None:
    path = tmp_path / "nonsense"
    for seed in range(300):
        body = bytes((seed * 37 + i * i * (seed | 1)) & 0xFF for i in range(600))
        path.write_bytes(b"\x7fELF\x02\x01\x01" + body)
        with pytest.raises(AttachError):
            find_offset(str(path), "x")
        with pytest.raises(AttachError):
            find_static_probes(str(path), "a", "b")


def make_elf(
    symbols: list[tuple[str, int, int]],
    *,
    build_id: bytes = b"",
    debugdata: bytes = b"",
    notes: bytes = b"",
    with_symbols: bool = True,
    segment: tuple[int, int] = (0x1000, 0x401000),
) -> bytes:
    """A 64-bit file: one code segment (offset, address), .symtab of (name, address, type)."""
    strings, table = b"\0", bytes(24)
    for name, address, kind in symbols if with_symbols else []:
        table += struct.pack("<IBBHQQ", len(strings), kind, 0, 1, address, 16)
        strings += name.encode() + b"\0"
    if build_id:
        notes = struct.pack("<III", 4, len(build_id), 3) + b"GNU\0" + build_id + notes
    sections = [
        (b".text", 1, 0x1000, bytes(16), 0),
        (b".symtab", 2, 0, table, 3),
        (b".strtab", 3, 0, strings, 0),
        (b".note", 7, 0, notes, 0),
        (b".gnu_debugdata", 1, 0, debugdata, 0),
        (b".stapsdt.base", 1, 0x402000, b"\0", 0),
    ]
    names = b"\0" + b"\0".join(name for name, *_ in sections) + b"\0.shstrtab\0"
    body, headers = b"", bytes(64)
    start = 64 + 56
    for name, kind, address, data, link in [*sections, (b".shstrtab", 3, 0, names, 0)]:
        headers += struct.pack(
            "<IIQQQQIIQQ", names.index(name), kind, 0, address, start + len(body), len(data), link,
            0, 1, 0,
        )  # fmt: skip
        body += data
    offset, address = segment
    program = struct.pack("<IIQQQQQQ", 1, 5, offset, address, address, 0x2000, 0x2000, 0x1000)
    head = b"\x7fELF\x02\x01\x01".ljust(16, b"\0") + struct.pack(
        "<HHIQQQIHHHHHH", 2, 62, 1, 0, 64, start + len(body), 0, 64, 56, 1, 64, len(sections) + 2,
        len(sections) + 1,
    )  # fmt: skip
    return head + program + body + headers


FUNC, NOTYPE = 2, 0


def test_static_function_at_a_fixed_address(tmp_path: Path) -> None:
    """Not position-independent: the address in memory is not the place in the file."""
    path = tmp_path / "fixed"
    path.write_bytes(make_elf([("prefix_helper", 0x401100, FUNC), ("helper", 0x401200, FUNC)]))
    assert find_offset(str(path), "helper") == 0x1200
    assert find_offset(str(path), "prefix_helper") == 0x1100
    with pytest.raises(AttachError):
        find_offset(str(path), "prefix")


def test_label_of_assembly_counts_where_there_is_code(tmp_path: Path) -> None:
    path = tmp_path / "assembly"
    path.write_bytes(make_elf([("entry", 0x401008, NOTYPE), ("datum", 0x500000, NOTYPE)]))
    assert find_offset(str(path), "entry") == 0x1008
    with pytest.raises(AttachError):
        find_offset(str(path), "datum")


def test_two_static_functions_of_one_name(tmp_path: Path) -> None:
    path = tmp_path / "two"
    path.write_bytes(make_elf([("init", 0x401100, FUNC), ("init", 0x401200, FUNC)]))
    with pytest.raises(AttachError, match="2 functions of this name") as caught:
        find_offset(str(path), "init")
    assert caught.value.remedy == "name one of 0x1100, 0x1200"


def test_separate_debug_information_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(executables, "_DEBUG_FOLDER", str(tmp_path / "debug"))
    symbols = [("hidden", 0x401300, FUNC)]
    path = tmp_path / "stripped"
    path.write_bytes(make_elf(symbols, build_id=b"\xab\xcd\xef", with_symbols=False))
    with pytest.raises(AttachError) as caught:
        find_offset(str(path), "hidden")
    assert caught.value.remedy == "it is stripped: give 0xOFFSET instead"
    debug = tmp_path / "debug/.build-id/ab/cdef.debug"
    debug.parent.mkdir(parents=True)
    debug.write_bytes(make_elf(symbols, segment=(0, 0)))
    assert find_offset(str(path), "hidden") == 0x1300


def test_small_table_inside_is_read(tmp_path: Path) -> None:
    """As Fedora packs it (MiniDebugInfo)."""
    symbols = [("hidden", 0x401400, FUNC)]
    path = tmp_path / "packed"
    path.write_bytes(make_elf([], debugdata=lzma.compress(make_elf(symbols, segment=(0, 0)))))
    assert find_offset(str(path), "hidden") == 0x1400


def probe_note(location: int, base: int, semaphore: int, words: bytes) -> bytes:
    text = struct.pack("<QQQ", location, base, semaphore) + words
    note = struct.pack("<III", 8, len(text), 3) + b"stapsdt\0" + text
    return note + bytes(-len(note) % 4)


def test_every_location_of_a_static_probe(tmp_path: Path) -> None:
    notes = (
        probe_note(0x401010, 0x402000, 0x402100, b"app\0query\0-4@%edi\0")
        + probe_note(0x401020, 0x402000, 0x402100, b"app\0query\0-4@%esi\0")
        + probe_note(0x301030, 0x302000, 0, b"app\0other\0\0")  # prelinked: moved by 0x100000
    )
    path = tmp_path / "probed"
    path.write_bytes(make_elf([], notes=notes))
    found = find_static_probes(str(path), "app", "query")
    assert [(p.offset, p.semaphore, p.arguments) for p in found] == [
        (0x1010, 0x2100, "-4@%edi"),
        (0x1020, 0x2100, "-4@%esi"),
    ]
    (other,) = find_static_probes(str(path), "app", "other")
    assert (other.offset, other.semaphore) == (0x1030, 0)
    with pytest.raises(AttachError, match="no such static probe") as caught:
        find_static_probes(str(path), "app", "querry")
    assert (caught.value.remedy or "").startswith("close to it: app:query")


def test_file_without_static_probes() -> None:
    with pytest.raises(AttachError, match="this file has no static probes"):
        find_static_probes(os.path.realpath("/bin/true"), "a", "b")


@needs_readelf
def test_static_probes_as_readelf_sees_them() -> None:
    path = os.path.realpath("/usr/bin/python3")
    shown = subprocess.check_output(["readelf", "-n", path], text=True)
    if "stapsdt" not in shown:
        pytest.skip("this Python was built without static probes")
    match = re.search(
        r"Provider: python\s+Name: gc__start\s+Location: (\w+), Base: \w+, Semaphore: (\w+)", shown
    )
    assert match
    (probe,) = find_static_probes(path, "python", "gc__start")
    segments = subprocess.check_output(["readelf", "-lW", path], text=True)
    for address, offset in (
        (int(match[1], 16), probe.offset),
        (int(match[2], 16), probe.semaphore),
    ):
        places = [
            address - int(start, 16) + int(at, 16)
            for at, start, size in re.findall(r"LOAD +(\w+) (\w+) \w+ (\w+)", segments)
            if int(start, 16) <= address < int(start, 16) + int(size, 16)
        ]
        assert places == [offset]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to look into another root")
def test_path_of_a_process_with_a_root_of_its_own(tmp_path: Path) -> None:
    shell = 'mount -t tmpfs none "$0" && cp /bin/true "$0/own" && echo ready && exec sleep 1000'
    process = subprocess.Popen(
        ["unshare", "--mount", "sh", "-c", shell, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout
        if process.stdout.readline() != "ready\n":
            pytest.skip("no mount namespace of its own can be had here")
        path = f"{tmp_path}/own"
        assert find_file(path, process.pid) == f"/proc/{process.pid}/root{path}"
        assert find_file(path) == path
        assert find_file(sys.executable, os.getpid()) == sys.executable
    finally:
        process.kill()
        process.wait()
        if process.stdout:
            process.stdout.close()
