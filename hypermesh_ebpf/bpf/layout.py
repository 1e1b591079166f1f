"""How the bytes of a key or value are laid out: BCC's type description as field names and formats.

BCC describes a type as ``"unsigned int"``, as ``[name, [[field, type], ...], "struct"]``, and a
field's array as a third element ``[field, type, [n]]``.  It writes the padding out as members of
its own and calls such a structure ``struct_packed``.  A :class:`Layout` decodes whole buffers of
such values with the struct module: integers for scalars, named tuples for structures (those inside
them flattened: ``outer_inner``, ``outer_0_inner`` in an array), bytes for character arrays and for
unions.
"""

from __future__ import annotations

import struct
from collections import namedtuple
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from operator import itemgetter
from typing import Any

from hypermesh_ebpf.bpf.strided import take, take_sums

_SCALARS = {
    "_Bool": "?",
    "char": "b",
    "signed char": "b",
    "unsigned char": "B",
    "short": "h",
    "unsigned short": "H",
    "int": "i",
    "unsigned int": "I",
    "long": "q",
    "unsigned long": "Q",
    "long long": "q",
    "unsigned long long": "Q",
}


@dataclass(frozen=True, slots=True)
class Field:
    """A member: its name, struct-module code, number of elements (0: no array) and byte offset."""

    name: str
    code: str
    count: int
    offset: int

    @property
    def is_bytes(self) -> bool:
        """True for an array of characters, a union or what is opaque: it is decoded as bytes."""
        return self.count > 0 and self.code == "s"


@dataclass(frozen=True, slots=True)
class Layout:
    """The members of a type of ``size`` bytes; a scalar has one member without a name."""

    size: int
    fields: tuple[Field, ...]
    _format: str = field(init=False)
    _build: Callable[[Iterable[Sequence[Any]]], Iterator[Any]] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_format", _format(self.fields, self.size))
        object.__setattr__(self, "_build", _builder(self.fields))

    def decode_all(self, raw: bytes | memoryview) -> Iterator[Any]:
        """Every value in ``raw``, one after another without gaps."""
        return self._build(struct.iter_unpack(self._format, raw))

    def decode_sums(self, raw: bytes | memoryview, copies: int) -> Iterator[Any]:
        """Per-CPU values: ``copies`` of each, 8-byte aligned, added member by member.

        Bytes cannot be added: the first CPU's are taken.
        """
        items = list(_items(self.fields))
        stride = self.size + -self.size % 8
        if len(items) < len(raw) // (stride * copies):  # more rows than items: by item
            return self._build(zip(*self.columns(raw, copies), strict=True))
        each = struct.iter_unpack(f"{self._format}{stride - self.size}x", raw)
        characters = [code.endswith("s") for code, _offset in items]
        return self._build(
            [_add_group(group, characters) for group in zip(*[each] * copies, strict=True)]
        )

    def columns(self, raw: bytes | memoryview, copies: int = 0) -> list[list[Any]]:
        """Each item of every value in ``raw``, one after another; the items of arrays singly.

        ``copies`` is the number of a per-CPU map's values, which are added up; 0 of other maps.
        """
        return [_take(raw, code, at, self.size, copies) for code, at in _items(self.fields)]

    def column(self, name: str, raw: bytes | memoryview, copies: int = 0) -> list[Any]:
        """The same of one member.  Raises KeyError if there is none, or it is an array."""
        found = {f.name: f for f in self.fields if f.is_bytes or not f.count}[name]
        code = f"{found.count}s" if found.is_bytes else found.code
        return _take(raw, code, found.offset, self.size, copies)


def _items(fields: tuple[Field, ...]) -> Iterator[tuple[str, int]]:
    """(struct-module code, byte offset) of each value that the struct module yields."""
    for f in fields:
        if f.is_bytes:
            yield f"{f.count}s", f.offset
        else:
            width = struct.calcsize("=" + f.code)
            for index in range(max(f.count, 1)):
                yield f.code, f.offset + index * width


def _take(raw: bytes | memoryview, code: str, offset: int, size: int, copies: int) -> list[Any]:
    """One item of all values of ``size`` bytes; per-CPU values' first where it is bytes."""
    if not copies:
        return take(raw, code, offset, size)
    stride = size + -size % 8
    if code.endswith("s"):
        return take(raw, code, offset, stride * copies)
    return take_sums(raw, code, offset, stride, copies)


def _add_group(group: Sequence[Sequence[Any]], characters: Sequence[bool]) -> Sequence[Any]:
    """All CPUs' items of one value as one's."""
    if True not in characters:
        return list(map(sum, zip(*group, strict=True)))
    columns = zip(zip(*group, strict=True), characters, strict=True)
    return [column[0] if text else sum(column) for column, text in columns]


def _format(fields: tuple[Field, ...], size: int) -> str:
    text, at = "=", 0
    for f in fields:
        text += f"{f.offset - at}x" if f.offset > at else ""
        text += f"{f.count or ''}{f.code}"
        at = f.offset + struct.calcsize("=" + f.code) * max(f.count, 1)
    return text + (f"{size - at}x" if size > at else "")


def _builder(
    fields: tuple[Field, ...],
) -> Callable[[Iterable[Sequence[Any]]], Iterator[Any]]:
    """From the struct module's flat values to what the user sees."""
    if len(fields) == 1 and not fields[0].name:
        if fields[0].count and not fields[0].is_bytes and fields[0].count > 1:
            return lambda rows: map(tuple, rows)
        return lambda rows: map(itemgetter(0), rows)
    kind = namedtuple("Struct", [f.name for f in fields], rename=True)  # type: ignore[misc]
    if all(f.count == 0 or f.is_bytes for f in fields):
        # As kind._make does it, without a call of a function of Python's for each row.
        return lambda rows: map(tuple.__new__, repeat(kind), rows)

    def build(values: Sequence[Any]) -> Any:
        members, at = [], 0
        for f in fields:
            if f.count and not f.is_bytes:
                members.append(tuple(values[at : at + f.count]))
                at += f.count
            else:
                members.append(values[at])
                at += 1
        return tuple.__new__(kind, members)

    return lambda rows: map(build, rows)


class _Untold(Exception):
    """The description does not say where every member is."""


def parse_layout(description: Any, size: int) -> Layout:
    """The layout that BCC's description stands for, for a type of ``size`` bytes.

    Opaque bytes where the description does not tell where every member is: with bit fields, types
    of 16 bytes, or arrays of arrays, of which BCC names the first dimension only.
    """
    fields: list[Field] = []
    try:
        if description is None:
            raise _Untold
        # An array by a typedef is described as one element.
        count = size // _width(description) if isinstance(description, str) else 0
        end = _place(description, "", count if count > 1 else 0, 0, fields)
        if end != size:
            raise _Untold
    except _Untold:
        fields = [Field("", "s", size, 0)]
    return Layout(size, tuple(fields))


def _place_members(description: Any, prefix: str, start: int, fields: list[Field]) -> int:
    """Append a structure's members; the offset behind it.

    ``struct_packed`` has padding of its own; older BCCs leave it out, and alignment gives it.
    """
    at, packed = start, description[2] == "struct_packed"
    for name, type_, count in _members(description):
        at += 0 if packed else -at % _alignment(type_)
        if count == 0:
            continue  # an array of nothing
        if packed and name.startswith("__pad_"):
            at += count or 1
        else:
            at = _place(type_, prefix + name, count or 0, at, fields)
    return at if packed else at + -(at - start) % _alignment(description)


def _members(description: Any) -> Iterator[tuple[str, Any, int | None]]:
    """(name, type, elements or None) of each member."""
    for member in description[1]:
        name, type_, *rest = member
        if not rest:
            yield name, type_, None
        elif isinstance(rest[0], str):  # a structure or union without a name: only its type is told
            yield "", member, None
        elif isinstance(rest[0], list):
            yield name, type_, rest[0][0]
        else:
            raise _Untold  # a bit field: its width is told, its place is the compiler's choice


def _place(type_: Any, name: str, count: int, at: int, fields: list[Field]) -> int:
    """Append a member, ``count`` of them if it is an array (0: it is none); the offset behind."""
    if isinstance(type_, str):
        end = at + _width(type_) * max(count, 1)
        fields.append(Field(name, "s" if count and type_ == "char" else _SCALARS[type_], count, at))
        return end
    if type_[2] == "union":  # which of its members is meant, the description cannot know
        size = _union_size(type_) * max(count, 1)
        fields.append(Field(name, "s", size, at))
        return at + size
    for index in range(max(count, 1)):
        place = f"{name}_{index}" if count else name
        at = _place_members(type_, f"{place}_" if place else "", at, fields)
    return at


def _union_size(description: Any) -> int:
    ends = [_place(type_, "", count or 0, 0, []) for _name, type_, count in _members(description)]
    return max(ends) + -max(ends) % _alignment(description)


def _width(scalar: str) -> int:
    if scalar not in _SCALARS:
        raise _Untold
    return struct.calcsize("=" + _SCALARS[scalar])


def _alignment(type_: Any) -> int:
    if isinstance(type_, str):
        return _width(type_)
    return max((_alignment(inner) for _name, inner, _count in _members(type_)), default=1)
