"""How the bytes of a key or value are laid out: BCC's type description as field names and formats.

BCC describes a type as ``"unsigned int"``, as ``[name, [[field, type], ...], "struct"]``, and a
field's array as a third element ``[field, type, [n]]``.  It writes the padding out as members of
its own and calls such a structure ``struct_packed``.  A :class:`Layout` decodes whole buffers of
such values with the struct module: integers for scalars, named tuples for structures, bytes for
character arrays.
"""

from __future__ import annotations

import struct
from collections import namedtuple
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

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
        """True for an array of characters, which is decoded as bytes."""
        return self.count > 0 and self.code == "s"


@dataclass(frozen=True, slots=True)
class Layout:
    """The members of a type of ``size`` bytes; a scalar has one member without a name."""

    size: int
    fields: tuple[Field, ...]
    _format: str = field(init=False)
    _build: Callable[[Sequence[Any]], Any] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_format", _format(self.fields, self.size))
        object.__setattr__(self, "_build", _builder(self.fields))

    def decode_all(self, raw: bytes | memoryview) -> Iterator[Any]:
        """Every value in ``raw``, one after another without gaps."""
        return map(self._build, struct.iter_unpack(self._format, raw))

    def decode_sums(self, raw: bytes | memoryview, copies: int) -> Iterator[Any]:
        """Per-CPU values: ``copies`` of each, 8-byte aligned, added member by member.

        An array of characters cannot be added: the first CPU's is taken.
        """
        padding = -self.size % 8
        each = struct.iter_unpack(self._format + f"{padding}x" * bool(padding), raw)
        characters = [f.is_bytes for f in _flat(self.fields)]
        for group in zip(*[each] * copies, strict=True):
            columns = zip(zip(*group, strict=True), characters, strict=True)
            yield self._build([_add(column, text) for column, text in columns])


def _add(column: Iterable[Any], is_bytes: bool) -> Any:
    return next(iter(column)) if is_bytes else sum(column)


def _flat(fields: tuple[Field, ...]) -> Iterator[Field]:
    """One item for each value that the struct module yields."""
    for f in fields:
        yield from [f] * (1 if f.is_bytes else max(f.count, 1))


def _format(fields: tuple[Field, ...], size: int) -> str:
    text, at = "=", 0
    for f in fields:
        text += f"{f.offset - at}x" if f.offset > at else ""
        text += f"{f.count or ''}{f.code}"
        at = f.offset + struct.calcsize("=" + f.code) * max(f.count, 1)
    return text + (f"{size - at}x" if size > at else "")


def _builder(fields: tuple[Field, ...]) -> Callable[[Sequence[Any]], Any]:
    """From the struct module's flat values to what the user sees."""
    if len(fields) == 1 and not fields[0].name:
        return lambda values: values[0] if len(values) == 1 else tuple(values)
    kind = namedtuple("Struct", [f.name for f in fields], rename=True)  # type: ignore[misc]
    if all(f.count == 0 or f.is_bytes for f in fields):
        return kind._make

    def build(values: Sequence[Any]) -> Any:
        members, at = [], 0
        for f in fields:
            if f.count and not f.is_bytes:
                members.append(tuple(values[at : at + f.count]))
                at += f.count
            else:
                members.append(values[at])
                at += 1
        return kind._make(members)

    return build


def parse_layout(description: Any, size: int) -> Layout:
    """The layout that BCC's description stands for; opaque bytes where it describes nothing.

    Raises ValueError for a description whose members do not fill ``size`` bytes.
    """
    if description is None:
        return Layout(size, (Field("", "s", size, 0),))
    if isinstance(description, str):
        code = _SCALARS.get(description)
        if code is None or struct.calcsize("=" + code) != size:
            code, count = "s", size
            return Layout(size, (Field("", code, count, 0),))
        return Layout(size, (Field("", code, 0, 0),))
    fields: list[Field] = []
    end = _place(description, "", 0, fields)
    if end > size:
        raise ValueError(f"type description {description} needs {end} bytes, the map has {size}")
    return Layout(size, tuple(f for f in fields if not f.name.startswith("__pad_")))


def _place(description: Any, prefix: str, start: int, fields: list[Field]) -> int:
    """Append the members of a structure at their natural alignment; the offset behind them."""
    at, widest, packed = start, 1, description[2:] == ["struct_packed"]
    for name, kind, *rest in description[1]:
        dims = rest[0] if rest and isinstance(rest[0], list) else []
        count = 1
        for n in dims:
            count *= n
        if isinstance(kind, str):
            code = _SCALARS.get(kind, "Q")  # pointers, and enums are given by their integer
            if dims and code == "b":
                code = "s"
            width = struct.calcsize("=" + code)
            at += 0 if packed else -at % width
            fields.append(Field(prefix + name, code, count if dims else 0, at))
            at += width * count
            widest = max(widest, width)
        else:
            inner: list[Field] = []
            at += 0 if packed else -at % _alignment(kind)
            at = _place(kind, f"{prefix}{name}_", at, inner)
            fields += inner
            widest = max(widest, _alignment(kind))
    return at if packed else at + -(at - start) % widest


def _alignment(description: Any) -> int:
    if isinstance(description, str):
        return struct.calcsize("=" + _SCALARS.get(description, "Q"))
    if description[2:] == ["struct_packed"]:
        return 1
    return max((_alignment(kind) for _name, kind, *_ in description[1]), default=1)
