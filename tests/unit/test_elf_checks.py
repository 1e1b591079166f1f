"""ELF files that are none of ours: told apart before libbpf is asked."""

from __future__ import annotations

import struct
import sys
from pathlib import Path

import pytest

from hypermesh_ebpf.errors import ForeignObject, InvalidProgram, MalformedObject
from hypermesh_ebpf.image.elf_file import check_object, is_elf, read_sections

_HEADER = "=16sHHIQQQIHHHHHH"
_IDENTITY = b"\x7fELF\x02\x01\x01" + bytes(9)


def make_object(
    *,
    identity: bytes = _IDENTITY,
    kind: int = 1,
    machine: int = 247,
    entry_size: int = 64,
    count: int | None = None,
    names_index: int = 2,
) -> bytes:
    """A whole object by elf(5): no section, "license", and the sections' names."""
    names = b"\0license\0.names\0"
    content = b"GPL\0" + names
    table = 64 + len(content)
    sections = [
        (0, 0, 0, 0),
        (1, 1, 64, 4),
        (9, 3, 68, len(names)),
    ]
    header = struct.pack(
        _HEADER, identity, kind, machine, 1, 0, 0, table, 0, 64, 0, 0,
        entry_size, len(sections) if count is None else count, names_index,
    )  # fmt: skip
    raw = [
        struct.pack("=IIQQQQIIQQ", name, type_, 0, 0, offset, size, 0, 0, 1, 0)
        for name, type_, offset, size in sections
    ]
    return header + content + b"".join(raw)


def refusal(data: bytes) -> InvalidProgram:
    with pytest.raises(InvalidProgram) as caught:
        check_object(data)
    assert "clang -target bpf" in (caught.value.remedy or "")
    return caught.value


def test_whole_object() -> None:
    data = make_object()
    assert is_elf(data)
    assert [(each.name, each.content) for each in read_sections(data)][1] == ("license", b"GPL\0")


def test_object_of_the_time_before_bpf_had_a_number() -> None:
    check_object(make_object(machine=0))


@pytest.mark.parametrize("length", range(3, len(make_object())))
def test_every_truncation_is_an_error(length: int) -> None:
    error = refusal(make_object()[:length])
    assert type(error) is MalformedObject


def test_cut_short_is_said_so() -> None:
    data = make_object()
    assert f"the file at {len(data) - 1}: it was cut short" in str(refusal(data[:-1]))


@pytest.mark.skipif(sys.byteorder == "big", reason="this machine is big-endian")
def test_other_byte_order() -> None:
    error = refusal(make_object(identity=_IDENTITY[:5] + b"\x02" + _IDENTITY[6:]))
    assert type(error) is ForeignObject
    assert "big-endian" in str(error)


@pytest.mark.parametrize(
    ("machine", "name"),
    [(62, "x86-64"), (183, "arm64"), (3, "x86 (32 bits)"), (9999, "machine 9999")],
)
def test_other_machine(machine: int, name: str) -> None:
    error = refusal(make_object(machine=machine))
    assert type(error) is ForeignObject
    assert f"for {name}" in str(error)


def test_the_interpreter_itself_is_foreign() -> None:
    assert type(refusal(Path(sys.executable).read_bytes())) is ForeignObject


def test_32_bits() -> None:
    error = refusal(make_object(identity=_IDENTITY[:4] + b"\x01" + _IDENTITY[5:]))
    assert type(error) is ForeignObject
    assert "32-bit" in str(error)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kind": 2}, "a linked program"),
        ({"kind": 3}, "a shared library"),
        ({"kind": 77}, "of type 77"),
        ({"count": 0}, "no section table"),
        ({"entry_size": 40}, "40 bytes, not 64"),
        ({"count": 5000}, "it was cut short"),
        ({"names_index": 3}, "in section 3, of which there are 3"),
        ({"names_index": 1, "machine": 247}, "begins at byte"),
        ({"identity": _IDENTITY[:5] + b"\x07" + _IDENTITY[6:]}, "byte order is 7"),
    ],
)
def test_malformed(changes: dict[str, int], words: str) -> None:
    error = refusal(make_object(**changes))  # type: ignore[arg-type]
    assert type(error) is MalformedObject
    assert words in str(error)


def test_section_outside_the_file() -> None:
    data = bytearray(make_object())
    struct.pack_into("=Q", data, len(data) - 128 + 32, 1 << 60)  # the licence's size
    assert "section 1 ends at byte" in str(refusal(bytes(data)))


def test_names_without_end() -> None:
    data = bytearray(make_object())
    struct.pack_into("=Q", data, len(data) - 64 + 32, 14)  # the names' size, without the last NUL
    assert "do not end" in str(refusal(bytes(data)))


@pytest.mark.parametrize("data", [b"", b"\x7fEL", b"#!/bin/sh\n", b"\0" * 64])
def test_no_elf(data: bytes) -> None:
    assert not is_elf(data)
    assert type(refusal(data)) is MalformedObject
