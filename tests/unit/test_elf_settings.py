"""VAR=VALUE: texts into a variable's bytes, by its type."""

from __future__ import annotations

import struct
from typing import Any

import pytest

from hypermesh_ebpf.errors import UsageError
from hypermesh_ebpf.image.settings import split_path, unknown_variable, write_setting


def integer(size: int, signed: bool, name: str = "int") -> dict[str, Any]:
    return {"kind": "int", "name": name, "size": size, "signed": signed}


BOOL = {"kind": "bool", "name": "_Bool", "size": 1, "signed": False}
CHAR = integer(1, True, "char")
MODE = {"kind": "enum", "name": "mode", "size": 4, "signed": True, "values": {"OFF": 0, "ON": -5}}
NAME = {"kind": "array", "element": CHAR, "count": 8}
PORTS = {"kind": "array", "element": integer(2, False), "count": 3}
INNER = {
    "kind": "struct",
    "name": "inner",
    "size": 4,
    "members": [
        {"name": "a", "type": integer(2, False), "offset": 0},
        {"name": "bits", "type": integer(2, False), "offset": 16, "bits": 3},
    ],
}
CONFIG = {
    "kind": "struct",
    "name": "config",
    "size": 16,
    "members": [
        {"name": "limit", "type": integer(4, False), "offset": 0},
        {"name": "ports", "type": PORTS, "offset": 32},
        {"name": "inner", "type": INNER, "offset": 96},
    ],
}


def written(type_: dict[str, Any], text: str, path: str = "v", size: int = 16) -> bytes:
    value = memoryview(bytearray(b"\xee" * size))
    write_setting(value, type_, path, text)
    return bytes(value)


def refusal(type_: dict[str, Any], text: str, path: str = "v") -> UsageError:
    with pytest.raises(UsageError) as caught:
        written(type_, text, path)
    assert caught.value.what == f"set {path}={text}"
    assert caught.value.remedy
    return caught.value


@pytest.mark.parametrize(
    ("size", "signed", "text", "code", "number"),
    [
        (1, False, "255", "B", 255),
        (1, True, "-128", "b", -128),
        (2, False, "0xffff", "H", 65535),
        (2, True, "-1", "h", -1),
        (4, False, "4294967295", "I", 4294967295),
        (4, True, "-2147483648", "i", -2147483648),
        (8, False, "0xffffffffffffffff", "Q", 2**64 - 1),
        (8, True, "-9223372036854775808", "q", -(2**63)),
        (4, True, "0b101", "i", 5),
    ],
)
def test_integers(size: int, signed: bool, text: str, code: str, number: int) -> None:
    raw = written(integer(size, signed), text)
    assert struct.unpack_from(f"={code}", raw) == (number,)
    assert raw[size:] == b"\xee" * (16 - size)  # nothing behind it was touched


@pytest.mark.parametrize(
    ("size", "signed", "text", "words"),
    [
        (1, False, "256", "0 to 255"),
        (1, False, "-1", "0 to 255"),
        (1, True, "128", "-128 to 127"),
        (4, True, "2147483648", "-2147483648 to 2147483647"),
        (8, False, "18446744073709551616", "0 to 18446744073709551615"),
    ],
)
def test_out_of_range(size: int, signed: bool, text: str, words: str) -> None:
    assert words in str(refusal(integer(size, signed), text))


@pytest.mark.parametrize("text", ["", "abc", "1.5", "1 2"])
def test_no_number(text: str) -> None:
    assert "no number" in str(refusal(integer(4, False), text))


@pytest.mark.parametrize(("text", "byte"), [("true", 1), ("ON", 1), ("0", 0), ("no", 0)])
def test_bool(text: str, byte: int) -> None:
    assert written(BOOL, text)[0] == byte


def test_no_bool() -> None:
    assert "neither true nor false" in str(refusal(BOOL, "2"))


def test_char() -> None:
    assert written(CHAR, "x")[0] == ord("x")
    assert written(CHAR, "7")[0] == 7


@pytest.mark.parametrize(("text", "number"), [("ON", -5), ("-5", -5), ("7", 7), ("OFF", 0)])
def test_enum(text: str, number: int) -> None:
    assert struct.unpack_from("=i", written(MODE, text)) == (number,)


def test_enum_names_are_listed() -> None:
    assert "but OFF, ON" in str(refusal(MODE, "FAST"))


def test_text() -> None:
    assert written(NAME, "eth0")[:8] == b"eth0\0\0\0\0"
    assert written(NAME, "eth0:42")[:8] == b"eth0:42\0"
    assert written(NAME, "")[:8] == bytes(8)
    assert "9 bytes" in str(refusal(NAME, "123456789"))
    assert "8 bytes and a NUL" in str(refusal(NAME, "12345678"))


def test_arrays() -> None:
    assert struct.unpack_from("=HHH", written(PORTS, "80,443,8080")) == (80, 443, 8080)
    partly = written(PORTS, "80")
    assert struct.unpack_from("=H", partly) == (80,)
    assert partly[2:6] == b"\xee" * 4  # what is not given keeps its value
    assert struct.unpack_from("=H", written(PORTS, "443", "v[2]"), 4) == (443,)
    assert "4 are given" in str(refusal(PORTS, "1,2,3,4"))
    assert "elements 0 to 2" in str(refusal(PORTS, "1", "v[3]"))


def test_members() -> None:
    assert struct.unpack_from("=I", written(CONFIG, "5", "v.limit")) == (5,)
    assert struct.unpack_from("=H", written(CONFIG, "5", "v.ports[1]"), 6) == (5,)
    assert struct.unpack_from("=H", written(CONFIG, "5", "v.inner.a"), 12) == (5,)


def test_structure_as_a_whole_is_refused() -> None:
    error = refusal(CONFIG, "5")
    assert "struct config" in str(error)
    assert "v.limit=VALUE" in (error.remedy or "")
    assert "limit, ports, inner" in (error.remedy or "")


def test_unknown_member() -> None:
    assert "but limit, ports, inner" in str(refusal(CONFIG, "5", "v.speed"))
    assert "v has no member limit" in str(refusal(integer(4, False), "5", "v.limit"))


def test_bit_field() -> None:
    assert "bit field" in str(refusal(CONFIG, "5", "v.inner.bits"))


@pytest.mark.parametrize("kind", ["pointer", "opaque", "float"])
def test_other_types(kind: str) -> None:
    assert "cannot be set" in str(refusal({"kind": kind, "size": 8}, "5"))


def test_paths() -> None:
    assert split_path("a.b[3].c") == ("a", ["b", "3", "c"])
    for path in ("", "a.", "a[x]", "a b", ".a"):
        with pytest.raises(UsageError):
            split_path(path)


def test_unknown_variable() -> None:
    error = unknown_variable("limt", ["limit", "mode"])
    assert "but limit, mode" in str(error)
    assert "--set limit=" in (error.remedy or "")
    assert "no global variables" in str(unknown_variable("x", []))
