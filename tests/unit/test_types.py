"""Descriptions to values: BCC's, as BCC 0.26 wrote them, and ours, against ctypes' layouts."""

from __future__ import annotations

import ctypes as ct
import json
import struct
from typing import Any

import pytest

from hypermesh_ebpf.bpf.types import add_values, flatten, parse_type, read_text


class Inner(ct.Structure):
    _fields_ = [("x", ct.c_uint8), ("y", ct.c_uint32)]


class Outer(ct.Structure):
    _fields_ = [("a", ct.c_uint8), ("in", Inner), ("several", Inner * 3), ("b", ct.c_uint8)]


class Arrays(ct.Structure):
    _fields_ = [("mac", ct.c_uint8 * 6), ("text", ct.c_char * 5), ("words", ct.c_uint16 * 3)]


class Anonymous(ct.Structure):
    _anonymous_ = ("inner",)
    _fields_ = [("a", ct.c_uint8), ("inner", Inner)]


class Address(ct.Union):
    _fields_ = [("v4", ct.c_uint32), ("v6", ct.c_uint64 * 2)]


class Peer(ct.Structure):
    _fields_ = [("family", ct.c_uint16), ("u", Address), ("port", ct.c_uint16)]


class Unnamed(ct.Structure):
    _anonymous_ = ("u",)
    _fields_ = [("family", ct.c_uint16), ("u", Address)]


class Packed(ct.Structure):
    _pack_ = 1
    _fields_ = [("a", ct.c_uint8), ("b", ct.c_uint32)]


class Bits(ct.Structure):
    """One type for neighbours: of others, ctypes makes something else than C."""

    _fields_ = [
        ("a", ct.c_uint32, 3),
        ("b", ct.c_uint32, 7),
        ("c", ct.c_uint32, 30),
        ("d", ct.c_uint32, 1),
        ("e", ct.c_uint16),
        ("f", ct.c_int8, 7),
        ("g", ct.c_int8, 7),
    ]


class HoldsBits(ct.Structure):
    _fields_ = [("n", ct.c_uint8), ("bits", Bits), ("t", ct.c_uint8)]


class Matrix(ct.Structure):
    _fields_ = [("m", ct.c_uint32 * 3 * 2), ("t", ct.c_uint8 * 4)]


U8, U16, U32, U64 = "unsigned char", "unsigned short", "unsigned int", "unsigned long long"
PAD = "struct_packed"
INNER = ["inner", [["x", U8], ["__pad_1", "char", [3]], ["y", U32]], PAD]
ADDRESS = [["v4", U32], ["v6", U64, [2]]]
BITS = [
    "bits",
    [
        *(["a", U32, 3], ["b", U32, 7], ["c", U32, 30], ["d", U32, 1]),
        *(["e", U16], ["f", "signed char", 7], ["g", "signed char", 7]),
    ],
    "struct",
]
SOME_BITS = Bits(5, 100, 0x2AAAAAAA, 1, 300, -64, 33)

CASES: dict[str, tuple[Any, Any]] = {
    "padding is no member": (INNER, Inner(2, 3)),
    "structures in structures": (
        [
            "outer",
            [
                *(["a", U8], ["__pad_1", "char", [3]], ["in", INNER], ["several", INNER, [3]]),
                *(["b", U8], ["__pad_end", "char", [3]]),
            ],
            PAD,
        ],
        Outer(1, Inner(2, 3), (Inner(4, 5), Inner(6, 7), Inner(8, 9)), 10),
    ),
    "without padding, as older BCCs": (
        ["outer", [["a", U8], ["in", INNER], ["several", INNER, [3]], ["b", U8]], "struct"],
        Outer(1, Inner(2, 3), (Inner(4, 5), Inner(6, 7), Inner(8, 9)), 10),
    ),
    "arrays": (
        [
            "arrays",
            [
                *(["mac", U8, [6]], ["text", "char", [5]], ["__pad_2", "char", [1]]),
                ["words", U16, [3]],
            ],
            PAD,
        ],
        Arrays((1, 2, 3, 4, 5, 255), b"abc", (7, 8, 65535)),
    ),
    "unnamed structure": (
        ["anonymous", [["a", U8], ["__pad_1", "char", [3]], ["", INNER[1], PAD]], PAD],
        Anonymous(1, Inner(2, 3)),
    ),
    "union": (
        [
            "peer",
            [
                *(["family", U16], ["__pad_1", "char", [6]], ["u", ["", ADDRESS, "union"]]),
                *(["port", U16], ["__pad_end", "char", [6]]),
            ],
            PAD,
        ],
        Peer(2, Address(v6=(1 << 40 | 5, 2)), 443),
    ),
    "unnamed union": (
        ["unnamed", [["family", U16], ["__pad_1", "char", [6]], ["", ADDRESS, "union"]], PAD],
        Unnamed(2, Address(v6=(1 << 40 | 5, 2))),
    ),
    "packed attribute": (["packed", [["a", U8], ["b", U32]], PAD], Packed(1, 0xFFFFFFFF)),
    "bit fields": (BITS, SOME_BITS),
    "structure with bit fields in another": (
        [
            "holds",
            [
                *(["n", U8], ["__pad_1", "char", [3]], ["bits", BITS]),
                *(["t", U8], ["__pad_end", "char", [3]]),
            ],
            PAD,
        ],
        HoldsBits(1, SOME_BITS, 3),
    ),
}


def plain(value: Any) -> Any:
    """A ctypes value as it should be decoded."""
    if isinstance(value, (ct.Structure, ct.Union)):
        found: dict[str, Any] = {}
        for name, *_type in value._fields_:
            inner = plain(getattr(value, name))
            unnamed = name in getattr(value, "_anonymous_", ())
            found.update(inner if unnamed else {name: inner})
        return found
    if isinstance(value, ct.Array):
        return [plain(element) for element in value]
    return value.decode() if isinstance(value, bytes) else value


@pytest.mark.parametrize("case", CASES)
def test_members_are_found_where_c_puts_them(case: str) -> None:
    description, value = CASES[case]
    type_ = parse_type(json.loads(json.dumps(description)), ct.sizeof(value))
    assert type_.decode(bytes(value)) == plain(value)
    assert list(type_.decode_all(bytes(value) + bytes(value))) == [plain(value)] * 2
    assert type_.members == tuple(plain(value))
    kept = parse_type(json.loads(json.dumps(type_.description)), ct.sizeof(value))
    assert kept.decode(bytes(value)) == plain(value), "a description survives JSON"


@pytest.mark.parametrize(
    ("name", "kind", "number"),
    [
        ("_Bool", ct.c_bool, True),
        ("char", ct.c_int8, -5),
        ("signed char", ct.c_int8, -5),
        ("unsigned char", ct.c_uint8, 250),
        ("short", ct.c_int16, -300),
        ("unsigned short", ct.c_uint16, 65535),
        ("int", ct.c_int32, -1),
        ("unsigned int", ct.c_uint32, 1 << 31),
        ("long", ct.c_int64, -1),
        ("unsigned long", ct.c_uint64, 1 << 63),
        ("long long", ct.c_int64, -(1 << 63)),
        ("unsigned long long", ct.c_uint64, (1 << 64) - 1),
        ("float", ct.c_float, 0.25),
        ("double", ct.c_double, -1e300),
    ],
)
def test_scalars(name: str, kind: Any, number: Any) -> None:
    type_ = parse_type(name, ct.sizeof(kind))
    assert type_.decode(bytes(kind(number))) == number
    assert type(type_.decode(bytes(kind(number)))) is type(number)
    assert parse_type(name).size == ct.sizeof(kind), "the size need not be told"


def test_integers_of_16_bytes() -> None:
    assert parse_type("__int128", 16).decode((-7).to_bytes(16, "little", signed=True)) == -7
    assert parse_type("unsigned __int128", 16).decode(b"\xff" * 16) == (1 << 128) - 1


def test_array_behind_a_typedef_is_described_as_its_element() -> None:
    assert parse_type("char", 16).decode(b"name".ljust(16, b"\0")) == "name"
    assert parse_type(U64, 32).decode(struct.pack("<4Q", 1, 2, 3, 4)) == [1, 2, 3, 4]


@pytest.mark.parametrize(
    "description",
    [
        None,
        "unsigned __int256",
        ["matrix", [["m", U32, [2]], ["t", U8, [4]]], PAD],  # m[2][3]: the 3 is not told
        ["s"],
        ["s", [["a"]], PAD],
        [],
        7,
        {},
        {"kind": "unknown", "size": 28},
        {"kind": "struct", "size": 28},
        {"kind": "struct", "size": 28, "name": "s", "members": [{"name": "a"}]},
        {"kind": "int", "size": "28"},
        {"kind": "int", "size": 4, "signed": False},
        {"kind": "enum", "size": 28, "signed": False, "values": {}},
        {
            "kind": "struct",
            "size": 28,
            "members": [
                {"name": "a", "offset": 224, "type": {"kind": "int", "size": 4, "signed": False}}
            ],
        },
    ],
)
def test_what_makes_no_sense_stays_bytes(description: Any) -> None:
    """Better no number than a wrong one, and no failure: the other maps can still be read."""
    raw = bytes(Matrix(((1, 2, 3), (4, 5, 6)), (7, 8, 9, 10)))
    type_ = parse_type(description, len(raw))
    assert type_.decode(raw) == raw.hex()
    assert list(type_.decode_all(raw * 2)) == [raw.hex()] * 2


def test_bytes_without_a_known_size_or_type() -> None:
    assert parse_type(None).decode(b"\1\2\3") == "010203"
    assert parse_type(None).decode(b"") == ""


def test_records_may_be_longer_than_their_type_but_not_shorter() -> None:
    """The kernel fills perf records up to a multiple of 8."""
    type_ = parse_type(["pair", [["a", U32], ["b", U32]], PAD])
    assert type_.decode(struct.pack("<III", 1, 2, 99)) == {"a": 1, "b": 2}
    assert type_.decode(memoryview(struct.pack("<II", 1, 2))) == {"a": 1, "b": 2}
    assert type_.decode(b"\1\0\0") == "010000"


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (b"comm\0\0\0\0", "comm"),
        (b"bash\0old", "bash"),  # what an older name left behind
        (b"12345678", "12345678"),
        (b"\0\0\0\0", ""),
        ("größe\0".encode(), "größe"),
        ("größe".encode()[:3], "gr"),  # cut within a character
        (b"two\nlines", "two\nlines"),
        (b"\x01\x02\0\0", "01020000"),
        (b"\x1b[31mred", "1b5b33316d726564"),  # nothing that steers a terminal
        (b"\xff\xfe\0", "fffe00"),
    ],
)
def test_text(raw: bytes, text: str) -> None:
    assert read_text(raw) == text
    if len(raw) > 1:
        assert parse_type(["s", [["t", "char", [len(raw)]]], PAD]).decode(raw) == {"t": text}


def test_enums() -> None:
    enum = {"kind": "enum", "name": "e", "size": 4, "signed": False, "values": {"A": 0, "B": 5}}
    assert [parse_type(enum).decode(struct.pack("<I", n)) for n in (0, 5, 6)] == ["A", "B", 6]
    signed = {**enum, "signed": True, "values": {"LOW": -2, "SAME": -2}}
    assert parse_type(signed).decode(struct.pack("<i", -2)) == "LOW"
    # Before Linux 6.0 BTF told enumerators as signed, whatever they were.
    high = {**enum, "values": {"HIGH": -1}}
    assert parse_type(high).decode(b"\xff" * 4) == "HIGH"
    small = {**enum, "size": 1, "values": {"ALL": 255}}
    assert parse_type(small).decode(b"\xff") == "ALL"


@pytest.mark.parametrize("cpus", [1, 2, 5])
@pytest.mark.parametrize(("name", "kind"), [(U32, ct.c_uint32), ("short", ct.c_int16)])
def test_sums_over_cpus(name: str, kind: Any, cpus: int) -> None:
    values = [[7 * key + cpu for cpu in range(cpus)] for key in range(3)]
    raw = b"".join(
        bytes(kind(number)).ljust(8, b"\xee") for numbers in values for number in numbers
    )
    type_ = parse_type(name, ct.sizeof(kind))
    assert list(type_.decode_sums(raw, 8, cpus)) == [sum(numbers) for numbers in values]


@pytest.mark.parametrize("case", CASES)
def test_sums_of_structures_add_member_by_member(case: str) -> None:
    description, value = CASES[case]
    size = ct.sizeof(value)
    stride = size + -size % 8

    def triple(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: triple(inner) for name, inner in value.items()}
        if isinstance(value, list):
            return [triple(inner) for inner in value]
        return value if isinstance(value, str) else 3 * value

    raw = bytes(value).ljust(stride, b"\xee") * 3
    type_ = parse_type(description, size)
    assert list(type_.decode_sums(raw * 2, stride, 3)) == [triple(plain(value))] * 2


def test_what_cannot_be_added_is_a_list_unless_it_is_the_same() -> None:
    assert add_values([{"n": 1, "who": "a"}, {"n": 2, "who": "a"}]) == {"n": 3, "who": "a"}
    assert add_values([{"n": 1, "who": "a"}, {"n": 2, "who": "b"}]) == {"n": 3, "who": ["a", "b"]}
    assert add_values([True, True]) is True
    assert add_values([True, False]) == [True, False]
    assert add_values([[1, "x"], [2, "x"]]) == [3, "x"]
    assert add_values([1.5, 2]) == 3.5
    assert add_values(["00", "01"]) == ["00", "01"]


def test_flatten_gives_a_column_to_each_leaf() -> None:
    value = {"a": 1, "in": {"x": 2, "y": {"z": 3}}, "mac": [1, 2], "pairs": [{"p": 4}, {"p": 5}]}
    assert flatten("v", value) == {
        "v.a": 1,
        "v.in.x": 2,
        "v.in.y.z": 3,
        "v.mac": [1, 2],
        "v.pairs.0.p": 4,
        "v.pairs.1.p": 5,
    }
    assert flatten("", value)["in.y.z"] == 3
    assert flatten("v", value, arrays=True)["v.mac.1"] == 2
    assert flatten("v", [[1, 2], [3]]) == {"v.0": [1, 2], "v.1": [3]}
    assert flatten("v", 7) == {"v": 7}
    assert flatten("v", {}) == {}
