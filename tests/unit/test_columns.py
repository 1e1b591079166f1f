"""Columns of every shape of type, against numbers packed by the struct module."""

from __future__ import annotations

import struct
import subprocess
import sys
from collections.abc import Iterator
from typing import Any, cast

import pytest

from hypermesh_ebpf.bpf import columns, map_types
from hypermesh_ebpf.bpf.map_reader import MapReader, RawEntries
from hypermesh_ebpf.bpf.spec import MapSpec
from hypermesh_ebpf.bpf.types import parse_type

np = pytest.importorskip("numpy")

U8 = {"kind": "int", "name": "unsigned char", "size": 1, "signed": False}
U32 = {"kind": "int", "name": "unsigned int", "size": 4, "signed": False}
S32 = {"kind": "int", "name": "int", "size": 4, "signed": True}
U64 = {"kind": "int", "name": "unsigned long long", "size": 8, "signed": False}
S64 = {"kind": "int", "name": "long long", "size": 8, "signed": True}
CHAR = {"kind": "int", "name": "char", "size": 1, "signed": True}
BOOL = {"kind": "bool", "name": "_Bool", "size": 1}
DOUBLE = {"kind": "float", "name": "double", "size": 8}
POINTER = {"kind": "pointer", "size": 8}
COLOR = {"kind": "enum", "name": "color", "size": 4, "signed": False, "values": {"RED": 1}}
WIDE = {"kind": "int", "name": "__int128", "size": 16, "signed": False}


def array(element: Any, count: int) -> dict[str, Any]:
    return {"kind": "array", "element": element, "count": count}


def struct_of(size: int, **members: tuple[Any, int]) -> dict[str, Any]:
    """A structure of members, each told by its type and byte offset."""
    told = [{"name": n, "type": t, "offset": 8 * at} for n, (t, at) in members.items()]
    return {"kind": "struct", "name": "s", "size": size, "members": told}


class FakeReader:
    """A map with these bytes, read in two parts."""

    def __init__(self, keys: bytes, key_size: int, values: bytes, size: int, copies: int) -> None:
        type_ = map_types.PERCPU_HASH if copies else map_types.HASH
        self.spec = MapSpec("hm_test", type_, key_size, size, 16, 0, None, None)
        self.copies = copies or 1
        self.stride = size + (-size % 8 if copies else 0)
        self._keys, self._values = keys, values

    def read(self) -> RawEntries:
        return RawEntries(memoryview(self._keys), memoryview(self._values))

    def chunks(self) -> Iterator[RawEntries]:
        count = len(self._keys) // self.spec.key_size
        for first, end in ((0, count // 2), (count // 2, count)):
            size = self.stride * self.copies
            keys = self._keys[first * self.spec.key_size : end * self.spec.key_size]
            values = memoryview(bytearray(self._values[first * size : end * size]))
            yield RawEntries(memoryview(keys), values)
            values[:] = bytes(len(values))  # the memory is used again


def read(value: Any, values: list[bytes], copies: int = 0) -> columns.MapColumns:
    """The columns of a map with keys 0, 1, ... and these values, all CPUs' one after another."""
    keys = struct.pack(f"={len(values) // (copies or 1)}I", *range(len(values) // (copies or 1)))
    size = parse_type(value).size
    padded = b"".join(each.ljust(size + (-size % 8 if copies else 0), b"\xee") for each in values)
    reader = cast(MapReader, FakeReader(keys, 4, padded, size, copies))
    return columns.read_columns(reader, U32, value)


def test_scalars_are_called_key_and_value() -> None:
    found = read(U64, [struct.pack("=Q", number) for number in (3, 1 << 63, 7)])
    assert (found.name, found.count, len(found)) == ("hm_test", 3, 3)
    assert found.keys["key"].tolist() == [0, 1, 2]
    assert found.values["value"].tolist() == [3, 1 << 63, 7]
    assert found.values["value"].dtype == np.dtype("u8")


def test_members_arrays_and_structures_inside() -> None:
    pair = struct_of(8, a=(U32, 0), b=(S32, 4))
    value = struct_of(
        64,
        flag=(BOOL, 0),
        comm=(array(CHAR, 5), 1),
        pair=(pair, 8),
        pairs=(array(array(pair, 2), 2), 16),
        ratio=(DOUBLE, 48),
        at=(POINTER, 56),
    )
    packed = [
        struct.pack("=?5s2x Ii 8i d Q", n == 1, b"ab", n, -n, *range(n, n + 8), n / 4, 1 << 40 | n)
        for n in range(3)
    ]
    found = read(value, packed).values
    assert list(found) == ["flag", "comm", "pair.a", "pair.b", "pairs.a", "pairs.b", "ratio", "at"]
    assert found["flag"].tolist() == [False, True, False]
    assert found["comm"].tolist() == [b"ab"] * 3
    assert found["pair.a"].tolist() == [0, 1, 2]
    assert found["pair.b"].tolist() == [0, -1, -2]
    assert found["pairs.a"].shape == (3, 2, 2)
    assert found["pairs.a"].tolist() == [[[n, n + 2], [n + 4, n + 6]] for n in range(3)]
    assert found["pairs.b"].tolist() == [[[n + 1, n + 3], [n + 5, n + 7]] for n in range(3)]
    assert found["ratio"].tolist() == [0.0, 0.25, 0.5]
    assert found["at"].tolist() == [1 << 40, 1 << 40 | 1, 1 << 40 | 2]


def test_bit_fields_across_bytes_signed_and_not() -> None:
    """The C compiler's places on a little-endian machine; 62 bits that lie in nine bytes."""
    members = [("low", 0, 3, U32), ("minus", 3, 5, S32), ("far", 13, 62, U64), ("top", 75, 53, U64)]
    told = [{"name": n, "type": t, "offset": at, "bits": bits} for n, at, bits, t in members]
    value = {"kind": "struct", "name": "bits", "size": 16, "members": told}
    numbers = [(5, -3, (1 << 62) - 7, 12345), (0, 15, 1 << 61, (1 << 53) - 1), (7, -16, 1, 0)]
    packed = []
    for row in numbers:
        whole = 0
        for (_name, at, bits, _type), number in zip(members, row, strict=True):
            whole |= (number & (1 << bits) - 1) << at
        packed.append(whole.to_bytes(16, "little"))
    if sys.byteorder == "big":
        pytest.skip("another order of bits")
    found = read(value, packed).values
    for place, (name, *_rest) in enumerate(members):
        assert found[name].tolist() == [row[place] for row in numbers], name


def test_what_numpy_has_no_type_for_is_raw_bytes() -> None:
    union = {
        **struct_of(16, wide=(WIDE, 0), low=(U64, 0), color=(COLOR, 8)),
        "kind": "union",
    }
    found = read(union, [struct.pack("=QQ", 9, 1)]).values
    assert found["wide"].dtype == np.dtype("V16")
    assert bytes(found["wide"][0]) == struct.pack("=QQ", 9, 1)
    assert found["low"].tolist() == [9]
    assert found["color"].tolist() == [1]
    assert read({"kind": "opaque", "size": 3}, [b"abc"]).values["value"].dtype == np.dtype("V3")


@pytest.mark.parametrize("copies", [1, 2, 5])
def test_cpus_are_added_and_what_cannot_be_keeps_a_dimension(copies: int) -> None:
    value = struct_of(
        28, hits=(U32, 0), delta=(S32, 4), comm=(array(CHAR, 4), 8), slots=(array(U32, 4), 12)
    )
    rows = [
        [(0xFFFFFFFF - row, -row - cpu, f"c{cpu}".encode(), row + cpu) for cpu in range(copies)]
        for row in range(3)
    ]
    packed = [
        struct.pack("=Ii4s4I", hits, delta, comm, slot, 2 * slot, 0, 1)
        for row in rows
        for hits, delta, comm, slot in row
    ]
    found = read(value, packed, copies)
    assert found.keys["key"].tolist() == [0, 1, 2]
    values = found.values
    assert values["hits"].tolist() == [copies * (0xFFFFFFFF - row) for row in range(3)]
    assert values["delta"].tolist() == [sum(delta for _h, delta, *_r in row) for row in rows]
    assert values["comm"].shape == (3, copies)
    assert values["comm"].tolist() == [[f"c{cpu}".encode() for cpu in range(copies)]] * 3
    sums = [sum(slot for *_r, slot in row) for row in rows]
    assert values["slots"].tolist() == [[total, 2 * total, 0, copies] for total in sums]


@pytest.mark.parametrize("copies", [0, 1, 2])
def test_no_entries(copies: int) -> None:
    value = struct_of(28, hits=(U32, 0), comm=(array(CHAR, 4), 8), slots=(array(U32, 4), 12))
    found = read(value, [], copies)
    assert len(found) == 0
    assert found.keys["key"].tolist() == []
    assert found.values["slots"].shape == (0, 4)


@pytest.mark.parametrize("copies", [0, 2])
def test_columns_cannot_be_changed(copies: int) -> None:
    found = read(U64, [bytes(8)] * 4, copies)
    for mapping in (found.keys, found.values):
        for column in mapping.values():
            with pytest.raises(ValueError, match="read-only"):
                column[0] = 1
    with pytest.raises(TypeError):
        found.values["more"] = 1  # type: ignore[index]


def test_a_run_without_columns_does_not_import_numpy() -> None:
    program = """
import sys
from hypermesh_ebpf import monitors, os_abstraction, session, program_session
from hypermesh_ebpf.output import frame, json, live, table
for name in monitors.names():
    monitors.load(name)
sys.exit("numpy" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
