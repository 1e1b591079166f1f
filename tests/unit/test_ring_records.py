"""Both ways to find a ring's records agree with following them one by one, whatever is in it."""

from __future__ import annotations

import mmap
import random
import struct
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from hypermesh_ebpf.bpf.record_columns import RecordColumns
from hypermesh_ebpf.bpf.ring_columns import find_records, lay_over
from hypermesh_ebpf.bpf.ring_mapping import BUSY, DISCARD, HEADER, find_pieces
from hypermesh_ebpf.bpf.types import parse_type

SIZE = 4 * mmap.PAGESIZE
FIRST_PAGE = 3  # of the data area, in the kernel's structure
NUMBER = struct.Struct("=Q")
TYPE = parse_type(["record", [["number", "unsigned long long"]], "struct"], 8)


class Memory:
    """A ring's data area, twice in a row, that a test writes as the kernel would."""

    def __init__(self, at: int) -> None:
        self.size = SIZE
        self.first = self.end = at
        self._bytes = bytearray(SIZE)

    def litter(self, source: random.Random) -> None:
        """What a ring has everywhere once it was full: old payloads, and old headers."""
        for at in range(0, SIZE, 8):
            page = FIRST_PAGE + at // mmap.PAGESIZE
            header = source.choice([8, 24, 32 | DISCARD, 40 | BUSY, 0xFFFFFFFF])
            old = struct.pack("=II", header, page) if source.random() < 0.2 else source.randbytes(8)
            self._bytes[at : at + 8] = old

    def add(self, payload: bytes, flags: int = 0, page: int | None = None) -> None:
        at = self.end % SIZE
        if page is None:
            page = FIRST_PAGE + at // mmap.PAGESIZE
        raw = struct.pack("=II", len(payload) | flags, page) + payload
        for index, byte in enumerate(raw):
            self._bytes[(at + index) % SIZE] = byte
        self.end += len(raw) + -len(raw) % 8

    @property
    def length(self) -> int:
        return self.end - self.first

    @property
    def data(self) -> memoryview:
        return memoryview(bytes(self._bytes) * 2)

    @property
    def words(self) -> memoryview:
        return self.data.cast("I")


def read_pieces(memory: Any, most: int) -> list[bytes]:
    """As :meth:`RingMapping.take` does it, in stretches of ``most`` bytes."""
    records: list[bytes] = []
    at, end = memory.first, memory.end
    while at < end:
        pieces, length = find_pieces(memory, at % SIZE, min(end - at, most))
        if not length:
            break
        raw = bytes(memory.data[at % SIZE : at % SIZE + length])
        got = [record for piece in pieces for record in piece.cut(raw)]
        layout = struct.Struct("=Q")
        unpacked = [item for piece in pieces for item in piece.unpack(raw, layout)]
        assert unpacked == [NUMBER.unpack_from(r) if len(r) >= 8 else r for r in got]
        records += got
        at += length
    return records


def read_numbers(memory: Any, most: int) -> tuple[list[int], int]:
    """The first 8 bytes of each record by numpy; how many records have fewer."""
    columns = RecordColumns(TYPE)
    filling = columns.begin(SIZE // 8)
    at, end = memory.first, memory.end
    while at < end:
        found, length = find_records(memory, at % SIZE, min(end - at, most))
        if not length:
            break
        raw = bytes(memory.data[at % SIZE : at % SIZE + length])
        filling.add(*lay_over(raw, found, columns.dtype))
        at += length
    return filling.finish()["number"].tolist(), columns.short


@dataclass(frozen=True)
class Shape:
    """Lengths to choose from, how often a record is discarded, and whether one is not done."""

    lengths: tuple[int, ...]
    discarded: float = 0.0
    busy: bool = False


SHAPES = {
    "one size": Shape((32,)),
    "one size, half discarded": Shape((32,), 0.5),
    "one size, all discarded": Shape((16,), 1.0),
    "one size that is no multiple of 8": Shape((13,)),
    "one size, one busy": Shape((32,), busy=True),
    "empty records": Shape((0,)),
    "too short": Shape((4,)),
    "two sizes": Shape((8, 24)),
    "mixed": Shape(tuple(range(100))),
    "mixed, some discarded": Shape(tuple(range(100)), 0.3),
    "mixed, one busy": Shape(tuple(range(1, 60)), 0.1, busy=True),
    "long among short": Shape((8, 8, 8, 8, 8, 2000)),
    "longer than a page": Shape((5000, 8, 9000)),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))
@pytest.mark.parametrize("most", [SIZE, 4096], ids=["at once", "in stretches"])
@pytest.mark.parametrize("page_known", [True, False], ids=["pages told", "pages told otherwise"])
def test_the_records_are_those_that_were_written(shape: Shape, most: int, page_known: bool) -> None:
    source = random.Random(f"{shape} {most}")
    for start in (0, 8, SIZE - 8, 5 * SIZE + 4096, SIZE - 4096 + 16, 3 * SIZE + 1000):
        memory = Memory(start)
        memory.litter(source)
        wanted: list[bytes] = []
        busy_after = source.randrange(50) if shape.busy else None
        seen_busy, number = False, 0
        while True:
            length = source.choice(shape.lengths)
            if memory.length + HEADER + length + 8 >= SIZE:
                break
            payload = (NUMBER.pack(number) + source.randbytes(length))[:length]
            if source.random() < 0.3 and length >= 24:  # it looks like a header of its page
                page = FIRST_PAGE + (memory.end + HEADER + 8) % SIZE // mmap.PAGESIZE
                payload = payload[:8] + struct.pack("=II", 16, page) + payload[16:]
            flags = DISCARD if source.random() < shape.discarded else 0
            if number == busy_after:
                flags, seen_busy = BUSY, True
            memory.add(payload, flags, None if page_known else source.getrandbits(32))
            if not flags and not seen_busy:
                wanted.append(payload)
            number += 1
        assert read_pieces(memory, most) == wanted
        numbers, short = read_numbers(memory, most)
        assert numbers == [NUMBER.unpack_from(raw)[0] for raw in wanted if len(raw) >= 8]
        assert short == sum(len(raw) < 8 for raw in wanted)


def test_runs_of_one_size_between_others() -> None:
    """Long enough to be looked at at once, ended by every kind of record."""
    for ending in (0, DISCARD, BUSY):
        memory = Memory(SIZE - 800)
        wanted = []
        for run, length in enumerate((16, 8, 24, 16)):
            for n in range(70 + run):
                payload = NUMBER.pack(n).ljust(length, b"\1")
                memory.add(payload)
                wanted.append(payload)
        memory.add(b"another!", ending)
        memory.add(b"the last")
        wanted += {0: [b"another!", b"the last"], DISCARD: [b"the last"], BUSY: []}[ending]
        assert read_pieces(memory, SIZE) == wanted
        assert read_numbers(memory, SIZE)[0] == [NUMBER.unpack_from(raw)[0] for raw in wanted]


def test_columns_have_every_member_of_a_structure() -> None:
    members = [
        ("a", {"kind": "int", "name": "char", "size": 1, "signed": True}, 0, None),
        ("flag", {"kind": "bool", "name": "_Bool", "size": 1}, 8, None),
        ("low", {"kind": "int", "name": "int", "size": 4, "signed": False}, 16, 3),
        ("high", {"kind": "int", "name": "int", "size": 4, "signed": True}, 19, 13),
        (
            "kind",
            {"kind": "enum", "name": "k", "size": 4, "signed": False, "values": {"A": 1}},
            32,
            None,
        ),
        ("at", {"kind": "pointer", "size": 8}, 64, None),
        ("part", {"kind": "float", "name": "double", "size": 8}, 128, None),
        (
            "comm",
            {
                "kind": "array",
                "count": 8,
                "element": {"kind": "int", "name": "char", "size": 1, "signed": True},
            },
            192,
            None,
        ),
        (
            "pair",
            {
                "kind": "array",
                "count": 2,
                "element": {"kind": "int", "name": "short", "size": 2, "signed": True},
            },
            256,
            None,
        ),
        (
            "inner",
            {
                "kind": "struct",
                "name": "i",
                "size": 4,
                "members": [
                    {
                        "name": "x",
                        "type": {"kind": "int", "name": "int", "size": 4, "signed": True},
                        "offset": 0,
                    }
                ],
            },
            288,
            None,
        ),
        (
            "both",
            {
                "kind": "array",
                "count": 2,
                "element": {
                    "kind": "struct",
                    "name": "b",
                    "size": 2,
                    "members": [
                        {
                            "name": "y",
                            "type": {"kind": "int", "name": "u8", "size": 1, "signed": False},
                            "offset": 8,
                        }
                    ],
                },
            },
            320,
            None,
        ),
        ("big", {"kind": "int", "name": "__int128", "size": 16, "signed": True}, 384, None),
    ]
    description = {
        "kind": "struct",
        "name": "all",
        "size": 64,
        "members": [
            {"name": n, "type": t, "offset": o} | ({} if bits is None else {"bits": bits})
            for n, t, o, bits in members
        ],
    }
    type_ = parse_type(description)
    source = random.Random(5)
    records = [source.randbytes(1) + bytes([n & 1]) + source.randbytes(62) for n in range(50)]
    columns = RecordColumns(type_)
    found = columns.join([*records, b"short", records[0] + b"more than that"])
    assert columns.short == 1
    assert {len(column) for column in found.values()} == {51}
    for index, raw in enumerate([*records, records[0]]):
        value = type_.decode(raw)
        for name in ("a", "flag", "low", "high", "pair"):
            assert found[name][index].tolist() == value[name]
        assert found["kind"][index] == struct.unpack_from("=I", raw, 4)[0]
        assert hex(found["at"][index]) == value["at"]
        assert repr(float(found["part"][index])) == repr(value["part"])
        assert found["comm"][index] == raw[24:32].rstrip(b"\0")
        assert found["inner.x"][index] == value["inner"]["x"]
        assert [found[f"both.{n}.y"][index] for n in (0, 1)] == [b["y"] for b in value["both"]]
        assert found["big"][index].tobytes() == raw[48:64]
    assert all(column.flags.c_contiguous and column.flags.writeable for column in found.values())


def test_a_plain_number_is_the_column_value() -> None:
    columns = RecordColumns(parse_type("unsigned int", 4))
    (column,) = columns.join([b"\1\0\0\0", b"\2\0\0\0"]).values()
    assert column.tolist() == [1, 2]
    assert column.dtype == np.dtype("u4")


def test_a_type_that_is_not_known_has_no_columns() -> None:
    with pytest.raises(ValueError, match="not known"):
        RecordColumns(parse_type(None, 0))


def test_numpy_is_imported_for_columns_alone() -> None:
    """It takes 0.1 s and 20 MB, which a run that writes JSON has no use for."""
    modules = ("bpf.ring", "bpf.perf_buffer", "event_buffer", "program_session", "output.json")
    imports = "; ".join(f"import hypermesh_ebpf.{name}" for name in modules)
    code = f"import sys; {imports}; sys.exit('numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
