"""Global variables of an object set before it is loaded: ``VAR=VALUE`` by the variable's type.

``limit=100``, ``verbose=true``, ``name=eth0``, ``mode=SLOW`` (an enum), ``ports=80,443`` (an
array), ``ports[1]=443``, ``config.limit=5`` (a member).  Types are descriptions
(:mod:`hypermesh_ebpf.bpf.types`).
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from typing import Any

from hypermesh_ebpf.errors import UsageError
from hypermesh_ebpf.spelling import find_close

Description = Mapping[str, Any]
_PATH = re.compile(r"(\w+)((?:\.\w+|\[\d+\])*)")
_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


def split_path(path: str) -> tuple[str, list[str]]:
    """The variable of ``config.ports[1]``, and the steps into it.  Raises UsageError."""
    found = _PATH.fullmatch(path)
    if not found:
        raise UsageError(f"set {path}", "this is no variable's name", "--set VAR=VALUE")
    return found[1], re.findall(r"\w+", found[2])


def unknown_variable(name: str, known: list[str]) -> UsageError:
    """There is no such variable; tells those that there are."""
    if not known:
        return UsageError(
            f"set {name}",
            "the object has no global variables with type information",
            "declare it in the source: const volatile int NAME = 0; and compile with -g",
        )
    close = find_close(name, known, 1)
    remedy = f"--set {close[0]}=VALUE" if close else f"--set {known[0]}=VALUE, for instance"
    return UsageError(
        f"set {name}",
        f"the object has no global variable of that name, but {', '.join(known)}",
        remedy,
    )


def write_setting(value: memoryview, type_: Description, path: str, text: str) -> None:
    """Write a text into a variable's bytes by its type.  Raises UsageError.

    ``path`` leads from the variable (``value``, ``type_``) to what is set.
    """
    what = f"set {path}={text}"
    name, steps = split_path(path)
    start, place = 0, name
    for step in steps:
        offset, type_ = _enter(what, place, type_, step)
        start += offset
        place += f"[{step}]" if step.isdigit() else f".{step}"
    raw = _encode(what, place, type_, text)
    value[start : start + len(raw)] = raw


def _enter(what: str, place: str, type_: Description, step: str) -> tuple[int, Description]:
    """(offset in bytes, type) of a member or element."""
    if type_["kind"] == "array" and step.isdigit():
        if int(step) >= type_["count"]:
            last = type_["count"] - 1
            raise UsageError(what, f"{place} has elements 0 to {last}", f"--set {place}[0]=VALUE")
        return int(step) * _size(type_["element"]), type_["element"]
    members = {member["name"]: member for member in type_.get("members", ())}
    if step not in members:
        known = f", but {', '.join(members)}" if members else ""
        first = f"{place}.{next(iter(members))}" if members else place
        raise UsageError(what, f"{place} has no member {step}{known}", f"--set {first}=VALUE")
    member = members[step]
    if "bits" in member:
        raise UsageError(
            what,
            f"{place}.{step} is a bit field, which cannot be set",
            "set its default in the source, and compile it again",
        )
    return member["offset"] // 8, member["type"]


def _size(type_: Description) -> int:
    if type_["kind"] == "array":
        return int(type_["count"]) * _size(type_["element"])
    return int(type_["size"])


def _encode(what: str, place: str, type_: Description, text: str) -> bytes:
    kind = type_["kind"]
    if kind == "bool":
        return _encode_bool(what, place, type_, text)
    if kind == "int":
        return _encode_integer(what, place, type_, text)
    if kind == "enum":
        return _encode_enum(what, place, type_, text)
    if kind == "array":
        return _encode_array(what, place, type_, text)
    if kind in ("struct", "union"):
        names = [member["name"] for member in type_["members"]] or ["MEMBER"]
        raise UsageError(
            what,
            f"{place} is a {kind} {type_['name']}, which has no text of its own".replace("  ", " "),
            f"set its members one by one: --set {place}.{names[0]}=VALUE "
            f"(members: {', '.join(names)})",
        )
    raise UsageError(
        what,
        f"{place} is of a type that cannot be set ({kind})",
        "integers, bool, enums, char arrays, and members and elements of these can be set",
    )


def _encode_bool(what: str, place: str, type_: Description, text: str) -> bytes:
    if text.lower() not in _TRUE + _FALSE:
        raise UsageError(what, f"{text!r} is neither true nor false", f"--set {place}=true")
    return int(text.lower() in _TRUE).to_bytes(type_["size"], sys.byteorder)


def _encode_integer(what: str, place: str, type_: Description, text: str) -> bytes:
    size, signed = type_["size"], type_["signed"]
    try:
        number = int(text, 0)
    except ValueError:
        if type_["name"] == "char" and len(text) == 1 and text.isascii():
            number = ord(text)
        else:
            raise UsageError(
                what, f"{place} is of type {type_['name']}, {text!r} is no number", f"{place}=1"
            ) from None
    low = -(1 << 8 * size - 1) if signed else 0
    high = (1 << 8 * size - signed) - 1
    if not low <= number <= high:
        raise UsageError(
            what,
            f"{text} is out of the range of {type_['name']}, {low} to {high}",
            f"--set {place}={min(max(number, low), high)}",
        )
    return number.to_bytes(size, sys.byteorder, signed=signed)


def _encode_enum(what: str, place: str, type_: Description, text: str) -> bytes:
    values: Mapping[str, int] = type_["values"]
    if text in values:
        number = values[text]
    else:
        try:
            number = int(text, 0)
        except ValueError:
            raise UsageError(
                what,
                f"enum {type_['name']} has no {text}, but {', '.join(values)}",
                f"--set {place}={next(iter(values), 0)}",
            ) from None
    return _encode_integer(
        what, place, {**type_, "kind": "int", "name": f"enum {type_['name']}"}, str(number)
    )


def _encode_array(what: str, place: str, type_: Description, text: str) -> bytes:
    element, count = type_["element"], type_["count"]
    if element["kind"] == "int" and element["name"] in ("char", "signed char"):
        raw = text.encode(errors="surrogateescape")
        if len(raw) >= count:  # with its terminating NUL
            raise UsageError(
                what,
                f"{len(raw)} bytes and a NUL are more than the {count} of {place}",
                f"use at most {count - 1} bytes",
            )
        return raw.ljust(count, b"\0")
    words = text.split(",") if text else []
    if len(words) > count:
        raise UsageError(
            what, f"{place} has {count} elements, {len(words)} are given", f"give {count} at most"
        )
    if element["kind"] in ("struct", "union", "array"):
        _encode(what, f"{place}[0]", element, text)
    return b"".join(_encode(what, f"{place}[{i}]", element, word) for i, word in enumerate(words))
