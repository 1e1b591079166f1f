"""Types by BTF: what clang wrote into an object, decoded with the types it wrote beside it."""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path
from typing import Any

import pytest

from hypermesh_ebpf.bpf.btf import DATASEC, ENUM, FUNC, STRUCT, TYPEDEF, UNION, Btf
from hypermesh_ebpf.bpf.types import describe, parse_type
from hypermesh_ebpf.errors import MissingBtf

SOURCE = """
typedef unsigned char u8; typedef unsigned short u16; typedef unsigned int u32;
typedef unsigned long long u64; typedef int s32; typedef long long s64;
enum color { RED = 1, GREEN, BLUE = 40 };
enum sign { MINUS = -1, PLUS = 1 };
enum small { TINY = 3, HUGE = 200 } __attribute__((packed));
enum wide { FAR = 0x123456789aULL };
typedef char name_t[8];
typedef u8 mac_t[6];

struct ints { signed char a; u8 b; short c; u16 d; s32 e; u32 f; s64 g; u64 h; _Bool i; char j; };
struct ints ints = { -5, 250, -300, 65000, -70000, 4000000000u, -5000000000ll,
                     0xfedcba9876543210ull, 1, -1 };

struct wide_ints { __int128 a; unsigned __int128 b; };
struct wide_ints wide_ints = { -3, (unsigned __int128)7 << 100 };

struct floats { float a; double b; };
struct floats floats = { 1.5f, -2.25 };

struct enums { enum color a; enum sign b; enum small c; enum color unknown; };
struct enums enums = { BLUE, MINUS, HUGE, 77 };

struct texts { char a[8]; name_t b; mac_t c; u8 d[4]; char e[4]; signed char f[3]; char g[2][4]; };
struct texts texts = { "abc", "full 8.", { 1, 2, 3, 4, 5, 255 }, { 127, 0, 0, 1 }, "\\x01\\xff",
                       { -1, 0, 1 }, { "one", "two" } };

struct arrays { u16 a[2][3]; struct { u8 x; u32 y; } b[2]; u32 none[0]; enum color c[2]; };
struct arrays arrays = { { { 1, 2, 3 }, { 4, 5, 6 } }, { { 7, 8 }, { 9, 10 } }, {}, { RED, 5 } };

struct nested {
	u8 a;
	struct { u32 b; union { u32 c; u8 d[4]; }; };
	union { u64 e; struct { u16 f, g; }; } h;
	struct nested *next;
	void (*call)(int);
	const volatile u16 i;
};
struct nested nested = { 1, { 2, { 0x04030201 } }, { 0x70006 }, 0, 0, 9 };

struct bits {
	u32 a : 3, b : 7;
	u64 c : 40;
	s32 d : 5;
	u8 e : 1;
	enum color f : 6;
	enum sign g : 2;
	_Bool h : 1;
	u32 : 0;
	u16 i;
	u64 j : 64;
};
struct bits bits = { 5, 100, 0x123456789a, -3, 1, BLUE, MINUS, 1, 300, 0xffffffffffffffff };

struct packed { u8 a; u32 b; u64 c : 33; u8 d; } __attribute__((packed));
struct packed packed = { 1, 0xdeadbeef, 0x1ffffffff, 7 };

union either { u32 number; u8 bytes[4]; struct { u16 low, high; } halves; };
union either either = { 0x00020001 };

struct declared;
struct pointers { struct declared *a; int (*b)(void); char *c; };
struct pointers pointers = { (struct declared *)0xffff888012345678, 0, (char *)16 };

volatile u64 counter = 7;
struct empty {};
struct with_empty { struct empty a; u32 b; };
struct with_empty with_empty = { {}, 3 };
"""

EXPECTED: dict[str, Any] = {
    "ints": {
        "a": -5,
        "b": 250,
        "c": -300,
        "d": 65000,
        "e": -70000,
        "f": 4000000000,
        "g": -5000000000,
        "h": 0xFEDCBA9876543210,
        "i": True,
        "j": -1,
    },
    "wide_ints": {"a": -3, "b": 7 << 100},
    "floats": {"a": 1.5, "b": -2.25},
    "enums": {"a": "BLUE", "b": "MINUS", "c": "HUGE", "unknown": 77},
    "texts": {
        "a": "abc",
        "b": "full 8.",
        "c": [1, 2, 3, 4, 5, 255],
        "d": [127, 0, 0, 1],
        "e": "01ff0000",
        "f": [-1, 0, 1],
        "g": ["one", "two"],
    },
    "arrays": {
        "a": [[1, 2, 3], [4, 5, 6]],
        "b": [{"x": 7, "y": 8}, {"x": 9, "y": 10}],
        "none": [],
        "c": ["RED", 5],
    },
    "nested": {
        "a": 1,
        "b": 2,
        "c": 0x04030201,
        "d": [1, 2, 3, 4],
        "h": {"e": 0x70006, "f": 6, "g": 7},
        "next": "0x0",
        "call": "0x0",
        "i": 9,
    },
    "bits": {
        "a": 5,
        "b": 100,
        "c": 0x123456789A,
        "d": -3,
        "e": 1,
        "f": "BLUE",
        "g": "MINUS",
        "h": True,
        "i": 300,
        "j": (1 << 64) - 1,
    },
    "packed": {"a": 1, "b": 0xDEADBEEF, "c": 0x1FFFFFFFF, "d": 7},
    "either": {"number": 0x20001, "bytes": [1, 0, 2, 0], "halves": {"low": 1, "high": 2}},
    "pointers": {"a": "0xffff888012345678", "b": "0x0", "c": "0x10"},
    "counter": 7,
    "with_empty": {"a": {}, "b": 3},
}


def read_sections(elf: bytes) -> dict[str, bytes]:
    """The sections of a 64-bit little-endian ELF file by name (elf(5))."""
    (at,) = struct.unpack_from("<Q", elf, 40)
    size, count, names_index = struct.unpack_from("<HHH", elf, 58)
    headers = [struct.unpack_from("<IIQQQQ", elf, at + n * size) for n in range(count)]
    names = elf[headers[names_index][4] :]
    return {
        names[name : names.index(b"\0", name)].decode(): elf[offset : offset + length]
        for name, _type, _flags, _address, offset, length in headers
    }


def compile_c(text: str, folder: Path, *flags: str) -> dict[str, bytes]:
    """The sections of what clang makes of a text for eBPF."""
    clang = shutil.which("clang")
    if clang is None:
        pytest.skip("needs clang")
    target = folder / "types.o"
    argv = [clang, "-target", "bpf", "-g", "-O2", *flags, "-x", "c", "-", "-c", "-o", str(target)]
    subprocess.run(argv, input=text.encode(), check=True, timeout=300)
    return read_sections(target.read_bytes())


@pytest.fixture(scope="module")
def sections(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return compile_c(SOURCE, tmp_path_factory.mktemp("types"))


@pytest.fixture(scope="module")
def btf(sections: dict[str, bytes]) -> Btf:
    return Btf.from_bytes(sections[".BTF"])


def find(btf: Btf, name: str, *kinds: int) -> int:
    found = btf.find(name, kinds)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def data(sections: dict[str, bytes], btf: Btf) -> dict[str, Any]:
    """All initialised variables, decoded.  libbpf fills the offsets in; here, sizes give them."""
    section = btf.type(find(btf, ".data", DATASEC))
    found = {}
    symbols = read_symbols(sections)
    for variable in btf.variables(section):
        description = describe(btf, variable.type)
        start = symbols[variable.name]
        found[variable.name] = parse_type(description).decode(sections[".data"][start:])
    return found


def read_symbols(sections: dict[str, bytes]) -> dict[str, int]:
    """Where the variables are in their section (elf(5))."""
    names = sections[".strtab"]
    return {
        names[name : names.index(b"\0", name)].decode(): value
        for name, _info, _other, _index, value, _size in struct.iter_unpack(
            "<IBBHQQ", sections[".symtab"]
        )
    }


@pytest.mark.parametrize("name", EXPECTED)
def test_values_are_what_the_source_says(data: dict[str, Any], name: str) -> None:
    assert data[name] == EXPECTED[name]


def test_nothing_is_left_out(data: dict[str, Any]) -> None:
    assert data.keys() == EXPECTED.keys()


def pack_btf(types: bytes, names: bytes) -> Btf:
    """Types in BTF's own bytes."""
    raw = struct.pack("<HBBIIIII", 0xEB9F, 1, 0, 24, 0, len(types), len(types), len(names))
    return Btf.from_bytes(raw + types + names)


def test_enum_of_64_bits() -> None:
    """As clang 15 and Linux 6.0 have it; written by hand, for older ones do not know it."""
    names = b"\0wide\0FAR\0NEAR\0"
    wide = struct.pack("<III", 1, 19 << 24 | 1 << 31 | 2, 8)
    wide += struct.pack("<III", 6, 0x3456789A, 0x12) + struct.pack("<IiI", 10, -2, 0xFFFFFFFF)
    btf = pack_btf(wide, names)
    type_ = parse_type(describe(btf, 1), 8)
    assert type_.decode(struct.pack("<q", 0x123456789A)) == "FAR"
    assert type_.decode(struct.pack("<q", -2)) == "NEAR"
    assert type_.decode(struct.pack("<q", 5)) == 5


def test_bit_fields_in_the_encoding_before_linux_4_20() -> None:
    """struct { unsigned int a : 3, b : 7; }: each of them has an integer type of its own."""
    names = b"\0s\0a\0b\0unsigned int\0"
    types = struct.pack("<IIII", 7, 1 << 24, 4, 3)  # 3 bits at 0
    types += struct.pack("<IIII", 7, 1 << 24, 4, 3 << 16 | 7)  # 7 bits at 3
    types += struct.pack("<III", 1, 4 << 24 | 2, 4)
    types += struct.pack("<IIIIII", 3, 1, 0, 5, 2, 0)
    btf = pack_btf(types, names)
    value = parse_type(describe(btf, 3), 4).decode(struct.pack("<I", 5 | 100 << 3 | 0xFFFF << 10))
    assert value == {"a": 5, "b": 100}


def test_data_section_is_a_structure_of_its_variables() -> None:
    """As the kernel has it: the offsets filled in."""
    names = b"\0.bss\0hits\0last\0unsigned int\0"
    types = struct.pack("<IIII", 16, 1 << 24, 4, 32)
    types += struct.pack("<IIII", 6, 14 << 24, 1, 1) + struct.pack("<IIII", 11, 14 << 24, 1, 1)
    types += struct.pack("<III", 1, 15 << 24 | 2, 12)
    types += struct.pack("<IIIIII", 2, 0, 4, 3, 8, 4)
    btf = pack_btf(types, names)
    value = parse_type(describe(btf, 4), 12).decode(struct.pack("<III", 7, 99, 8))
    assert value == {"hits": 7, "last": 8}


def test_pointers_are_not_followed(btf: Btf) -> None:
    """Or a list's nodes would have no end."""
    description = describe(btf, find(btf, "nested", STRUCT))
    (following,) = [m for m in description["members"] if m["name"] == "next"]
    assert following["type"] == {"kind": "pointer", "size": 8}


def test_functions_and_declarations_are_opaque(tmp_path: Path) -> None:
    text = """
    struct declared; struct holder { struct declared *p; };
    __attribute__((section("x"))) int run(struct holder *h) { return (long)h->p; }
    """
    btf = Btf.from_bytes(compile_c(text, tmp_path)[".BTF"])
    assert describe(btf, find(btf, "run", FUNC)) == {"kind": "opaque", "size": 0}
    assert btf.find("declared", (STRUCT, UNION)) is None
    forward = next(n for n in range(1, len(btf)) if btf.type(n).name == "declared")
    assert describe(btf, forward) == {"kind": "opaque", "size": 0}
    assert parse_type(describe(btf, forward)).decode(b"\1\2") == "0102"


def test_find_takes_the_first_kind_that_is_there(btf: Btf) -> None:
    assert btf.find("color", (STRUCT, ENUM)) == find(btf, "color", ENUM)
    assert btf.find("color", (STRUCT, UNION)) is None
    assert btf.type(btf.resolve(find(btf, "name_t", TYPEDEF))).kind == 3  # an array


@pytest.mark.parametrize("raw", [b"", b"\x9f\xeb", b"no type information" * 100])
def test_what_is_no_btf(raw: bytes) -> None:
    with pytest.raises(MissingBtf, match="read type information") as caught:
        Btf.from_bytes(raw)
    assert caught.value.remedy


def test_type_that_does_not_exist(btf: Btf) -> None:
    with pytest.raises(MissingBtf, match="no such type"):
        btf.type(len(btf) + 1000)
    assert describe(btf, len(btf) + 1000) == {"kind": "opaque", "size": 0}


def test_typedefs_in_a_circle() -> None:
    types = struct.pack("<III", 1, 8 << 24, 2) + struct.pack("<III", 1, 8 << 24, 1)
    assert describe(pack_btf(types, b"\0t\0"), 1) == {"kind": "opaque", "size": 0}


def test_structure_within_itself() -> None:
    types = struct.pack("<IIIIII", 1, 4 << 24 | 1, 8, 1, 1, 0)
    assert describe(pack_btf(types, b"\0s\0"), 1) == {"kind": "opaque", "size": 0}


def test_few_types_that_stand_for_billions() -> None:
    """Thirty structures, each with the next one twice: no description is made of them."""
    types = b"".join(
        struct.pack("<III", 1, 4 << 24 | 2, 0) + struct.pack("<IIIIII", 1, n + 1, 0, 3, n + 1, 0)
        for n in range(1, 30)
    )
    types += struct.pack("<III", 1, 4 << 24, 0)
    assert describe(pack_btf(types, b"\0s\0t\0"), 1) == {"kind": "opaque", "size": 0}


def test_sizes_that_do_not_match_are_opaque(btf: Btf) -> None:
    description = describe(btf, find(btf, "floats", STRUCT))
    assert parse_type(description, 16).decode(bytes(16)) == {"a": 0.0, "b": 0.0}
    assert parse_type(description, 24).decode(bytes(24)) == "00" * 24
