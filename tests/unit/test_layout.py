"""Decoding keys and values: BCC's descriptions, as BCC 0.26 wrote them, against ctypes' layouts."""

from __future__ import annotations

import ctypes as ct
from typing import Any

import pytest

from hypermesh_ebpf.bpf.layout import parse_layout


class Padded(ct.Structure):
    _fields_ = [("a", ct.c_uint8), ("b", ct.c_uint32), ("c", ct.c_uint16)]


class Arrays(ct.Structure):
    _fields_ = [("mac", ct.c_uint8 * 6), ("text", ct.c_char * 5), ("words", ct.c_uint16 * 3)]


class Signed(ct.Structure):
    _fields_ = [("b", ct.c_int8 * 4), ("f", ct.c_bool), ("h", ct.c_int16), ("q", ct.c_int64)]


class Inner(ct.Structure):
    _fields_ = [("x", ct.c_uint8), ("y", ct.c_uint32)]


class Outer(ct.Structure):
    _fields_ = [("a", ct.c_uint8), ("in", Inner), ("b", ct.c_uint8)]


class Several(ct.Structure):
    _fields_ = [("in", Inner * 3), ("z", ct.c_uint8)]


class Anonymous(ct.Structure):
    _anonymous_ = ("inner",)
    _fields_ = [("a", ct.c_uint8), ("inner", Inner)]


class Address(ct.Union):
    _fields_ = [("v4", ct.c_uint32), ("v6", ct.c_uint64 * 2)]


class Peer(ct.Structure):
    _fields_ = [("family", ct.c_uint16), ("u", Address), ("port", ct.c_uint16)]


class Packed(ct.Structure):
    _pack_ = 1
    _fields_ = [("a", ct.c_uint8), ("b", ct.c_uint32)]


class Bits(ct.Structure):
    _fields_ = [("a", ct.c_uint8, 4), ("b", ct.c_uint8, 4), ("c", ct.c_uint16)]


class Matrix(ct.Structure):
    _fields_ = [("m", ct.c_uint32 * 3 * 2), ("t", ct.c_uint8 * 4)]


PAD = "struct_packed"
INNER = ["inner", [["x", "unsigned char"], ["__pad_1", "char", [3]], ["y", "unsigned int"]], PAD]
PADDED = [
    "padded",
    [
        ["a", "unsigned char"],
        ["__pad_1", "char", [3]],
        ["b", "unsigned int"],
        ["c", "unsigned short"],
        ["__pad_end", "char", [2]],
    ],
    PAD,
]

# Where bit fields are is the compiler's choice.
BITS = [
    "bits",
    [["a", "unsigned char", 4], ["b", "unsigned char", 4], ["c", "unsigned short"]],
    "struct",
]
# Of m[2][3] BCC tells the first dimension only.
MATRIX = ["matrix", [["m", "unsigned int", [2]], ["t", "unsigned char", [4]]], PAD]

# description, the value as C has it, the value as it is decoded (namedtuples are tuples)
STRUCTURES: dict[str, tuple[Any, ct.Structure, tuple[Any, ...]]] = {
    "padding": (PADDED, Padded(1, 2, 3), (1, 2, 3)),
    "no padding written, as older BCCs do": (
        [
            "padded",
            [["a", "unsigned char"], ["b", "unsigned int"], ["c", "unsigned short"]],
            "struct",
        ],
        Padded(1, 2, 3),
        (1, 2, 3),
    ),
    "arrays": (
        [
            "arr",
            [
                ["mac", "unsigned char", [6]],
                ["text", "char", [5]],
                ["__pad_2", "char", [1]],
                ["words", "unsigned short", [3]],
            ],
            PAD,
        ],
        Arrays((1, 2, 3, 4, 5, 255), b"abc", (7, 8, 65535)),
        ((1, 2, 3, 4, 5, 255), b"abc\0\0", (7, 8, 65535)),
    ),
    "signed": (
        [
            "signed",
            [
                ["b", "signed char", [4]],
                ["f", "_Bool"],
                ["__pad_2", "char", [1]],
                ["h", "short"],
                ["q", "long long"],
            ],
            PAD,
        ],
        Signed((-1, 2, -128, 127), True, -300, -(1 << 62)),
        ((-1, 2, -128, 127), True, -300, -(1 << 62)),
    ),
    "structure in a structure": (
        [
            "outer",
            [
                ["a", "unsigned char"],
                ["__pad_1", "char", [3]],
                ["in", INNER],
                ["b", "unsigned char"],
                ["__pad_end", "char", [3]],
            ],
            PAD,
        ],
        Outer(1, Inner(2, 3), 4),
        (1, 2, 3, 4),
    ),
    "array of structures": (
        [
            "several",
            [["in", INNER, [3]], ["z", "unsigned char"], ["__pad_end", "char", [3]]],
            PAD,
        ],
        Several((Inner(1, 2), Inner(3, 4), Inner(5, 6)), 7),
        (1, 2, 3, 4, 5, 6, 7),
    ),
    "structure without a name": (
        ["anon", [["a", "unsigned char"], ["__pad_1", "char", [3]], ["", INNER[1], PAD]], PAD],
        Anonymous(1, Inner(2, 3)),
        (1, 2, 3),
    ),
    "union": (
        [
            "peer",
            [
                ["family", "unsigned short"],
                ["__pad_1", "char", [6]],
                ["u", ["un", [["v4", "unsigned int"], ["v6", "unsigned long long", [2]]], "union"]],
                ["port", "unsigned short"],
                ["__pad_end", "char", [6]],
            ],
            PAD,
        ],
        Peer(2, Address(v6=(1, 2)), 443),
        (2, bytes(ct.c_uint64(1)) + bytes(ct.c_uint64(2)), 443),
    ),
    "packed attribute": (
        ["packed", [["a", "unsigned char"], ["b", "unsigned int"]], PAD],
        Packed(1, 0xFFFFFFFF),
        (1, 0xFFFFFFFF),
    ),
}


@pytest.mark.parametrize("case", STRUCTURES)
def test_members_are_found_where_c_puts_them(case: str) -> None:
    description, value, expected = STRUCTURES[case]
    layout = parse_layout(description, ct.sizeof(value))
    first, second = layout.decode_all(bytes(value) + bytes(ct.sizeof(value)))
    assert first == expected
    assert not any(any(item) if isinstance(item, (tuple, bytes)) else item for item in second)


def test_members_have_their_names() -> None:
    def fields(case: str) -> tuple[str, ...]:
        description, value, _expected = STRUCTURES[case]
        (decoded,) = parse_layout(description, ct.sizeof(value)).decode_all(bytes(value))
        names: tuple[str, ...] = decoded._fields
        return names

    assert fields("padding") == ("a", "b", "c")
    assert fields("structure in a structure") == ("a", "in_x", "in_y", "b")
    assert fields("array of structures")[:4] == ("in_0_x", "in_0_y", "in_1_x", "in_1_y")
    assert fields("structure without a name") == ("a", "x", "y")
    assert fields("union") == ("family", "u", "port")


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
    ],
)
def test_scalars(name: str, kind: Any, number: int) -> None:
    layout = parse_layout(name, ct.sizeof(kind))
    assert list(layout.decode_all(bytes(kind(number)) * 2)) == [number, number]


def test_array_behind_a_typedef_is_described_as_its_element() -> None:
    assert list(parse_layout("char", 16).decode_all(b"name".ljust(16, b"\0"))) == [
        b"name".ljust(16, b"\0")
    ]
    four = bytes((ct.c_uint64 * 4)(1, 2, 3, 4))
    assert list(parse_layout("unsigned long long", 32).decode_all(four)) == [(1, 2, 3, 4)]


@pytest.mark.parametrize(
    ("description", "value"),
    [
        (None, Padded(1, 2, 3)),
        ("unsigned __int128", Address(v6=(1, 2))),
        (BITS, Bits(1, 2, 3)),
        (MATRIX, Matrix()),
        (["wide", [["a", "__int128"], ["b", "unsigned char"]], PAD], Peer()),
    ],
    ids=["nothing", "16-byte integer", "bit fields", "array of arrays", "16-byte member"],
)
def test_what_is_not_told_stays_bytes(description: Any, value: ct.Structure) -> None:
    """Better no number than a wrong one, and no failure: the other maps can still be read."""
    layout = parse_layout(description, ct.sizeof(value))
    assert list(layout.decode_all(bytes(value))) == [bytes(value)]


@pytest.mark.parametrize("cpus", [1, 2, 5])
@pytest.mark.parametrize(("name", "kind"), [("unsigned int", ct.c_uint32), ("short", ct.c_int16)])
def test_sums_over_cpus_where_the_size_is_no_multiple_of_8(name: str, kind: Any, cpus: int) -> None:
    """The kernel puts each CPU's value at a multiple of 8, on a machine with one CPU, too."""
    values = [[7 * key + cpu for cpu in range(cpus)] for key in range(3)]
    raw = b"".join(
        bytes(kind(number)).ljust(8, b"\xee") for numbers in values for number in numbers
    )
    layout = parse_layout(name, ct.sizeof(kind))
    assert list(layout.decode_sums(raw, cpus)) == [sum(numbers) for numbers in values]


def test_sums_of_structures_add_member_by_member() -> None:
    first, second = Padded(1, 20, 300), Padded(2, 30, 400)
    raw = b"".join(bytes(value).ljust(16, b"\xee") for value in (first, second))
    (total,) = parse_layout(PADDED, ct.sizeof(Padded)).decode_sums(raw, 2)
    assert total == (3, 50, 700)
    assert total.c == 700


def test_sums_of_arrays_add_element_by_element_and_keep_text() -> None:
    description, value, _expected = STRUCTURES["arrays"]
    other = Arrays((1,) * 6, b"other", (1, 1, 1))
    raw = b"".join(bytes(each).ljust(24, b"\xee") for each in (value, other))
    (total,) = parse_layout(description, ct.sizeof(Arrays)).decode_sums(raw, 2)
    assert total == ((2, 3, 4, 5, 6, 256), b"abc\0\0", (8, 9, 65536))
