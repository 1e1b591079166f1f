"""BCC's notation for types, as a description of :mod:`hypermesh_ebpf.bpf.types`.

BCC describes a type as ``"unsigned int"``, as ``[name, [[field, type], ...], "struct"]``, a field's
array as a third element ``[field, type, [n]]`` and a bit field's width as ``[field, type, bits]``.
It writes the padding out as members of its own and calls such a structure ``struct_packed``; where
there are bit fields it does not, and where they are follows from the C compilers' rule: a bit
field takes the next bits unless it would cross a boundary of its type's size (System V and AArch64
ABIs).  An unnamed structure or union is a member without a name: ``["", [...], "union"]``.

Not told: names of enums (they are integers), and more than the first dimension of an array.  What
does not add up to the size that a value has is opaque.  The maps that BCC itself makes have BTF,
which tells all: :func:`hypermesh_ebpf.bpf.maps.read_map_spec` reads it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

# name: (kind, size, signed)
_SCALARS = {
    "_Bool": ("bool", 1, False),
    "char": ("int", 1, True),
    "signed char": ("int", 1, True),
    "unsigned char": ("int", 1, False),
    "short": ("int", 2, True),
    "unsigned short": ("int", 2, False),
    "int": ("int", 4, True),
    "unsigned int": ("int", 4, False),
    "long": ("int", 8, True),
    "unsigned long": ("int", 8, False),
    "long long": ("int", 8, True),
    "unsigned long long": ("int", 8, False),
    "__int128": ("int", 16, True),
    "unsigned __int128": ("int", 16, False),
    "float": ("float", 4, True),
    "double": ("float", 8, True),
}


class _Untold(Exception):
    """The description does not say where every member is."""


def describe_bcc(description: Any, size: int | None = None) -> dict[str, Any] | None:
    """The description of what BCC describes; None where it does not say where every member is.

    ``size`` is how many bytes a value has.  An array by a typedef is described as one element.
    """
    try:
        found = _describe(description)
        width = _size(found)
        if isinstance(description, str) and size and size > width and size % width == 0:
            return {"kind": "array", "element": found, "count": size // width}
        return found if size in (None, width) else None
    except (_Untold, LookupError, TypeError, ValueError):
        return None


def _describe(type_: Any) -> dict[str, Any]:
    if isinstance(type_, str):
        if type_ not in _SCALARS:
            raise _Untold
        kind, size, signed = _SCALARS[type_]
        return {"kind": kind, "name": type_, "size": size, "signed": signed}
    name, _members_of, kind = type_
    if kind == "union":
        return _describe_union(name, type_)
    return _describe_struct(name, type_, kind == "struct_packed")


def _describe_union(name: str, type_: Any) -> dict[str, Any]:
    parts = list(_members(type_))
    members = [each for part in parts for each in _place(part, 0)]
    size = max((_size(member) for _name, member, _bits in parts), default=0)
    size += -size % max((_alignment(member) for _name, member, _bits in parts), default=1)
    return {"kind": "union", "name": name, "size": size, "members": members}


def _describe_struct(name: str, type_: Any, packed: bool) -> dict[str, Any]:
    """Places follow from the order: with the padding told if packed, else by the C rules."""
    members: list[dict[str, Any]] = []
    at = 0  # in bits
    alignment = 1
    for part in _members(type_):
        member_name, member, bits = part
        width = 8 * _size(member)
        if not packed:
            alignment = max(alignment, _alignment(member))
            if bits is None or bits == 0 or at // width != (at + bits - 1) // width:
                at += -at % (8 * _alignment(member))
        if not (packed and member_name.startswith("__pad_")):
            members.extend(_place(part, at))
        at += width if bits is None else bits
    size = -(-at // 8)
    size += -size % alignment
    return {"kind": "struct", "name": name, "size": size, "members": members}


def _place(part: tuple[str, dict[str, Any], int | None], at: int) -> Iterator[dict[str, Any]]:
    """The member at its place; the members of a structure or union without a name at theirs."""
    name, member, bits = part
    if name:
        found = {"name": name, "type": member, "offset": at}
        yield found if bits is None else {**found, "bits": bits}
    else:
        for inner in member.get("members", ()):
            yield {**inner, "offset": at + inner["offset"]}


def _members(type_: Any) -> Iterator[tuple[str, dict[str, Any], int | None]]:
    """(name, description, bits of a bit field or None) of each member as it is declared."""
    for member in type_[1]:
        name, inner, *rest = member
        if not rest:
            yield name, _describe(inner), None
        elif isinstance(rest[0], str):  # a structure or union without a name: only its type is told
            yield "", _describe(member), None
        elif isinstance(rest[0], list):
            count = int(rest[0][0])
            yield name, {"kind": "array", "element": _describe(inner), "count": count}, None
        else:
            yield name, _describe(inner), int(rest[0])


def _size(description: dict[str, Any]) -> int:
    if description["kind"] == "array":
        return int(description["count"]) * _size(description["element"])
    return int(description["size"])


def _alignment(description: dict[str, Any]) -> int:
    if description["kind"] == "array":
        return _alignment(description["element"])
    if "members" in description:
        return max((_alignment(m["type"]) for m in description["members"]), default=1)
    return int(description["size"])
