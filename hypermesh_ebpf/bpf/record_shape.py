"""The shape of a type's records as events: see :mod:`hypermesh_ebpf.metrics.event_log`."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from typing import Any

from hypermesh_ebpf.bpf.types import Description, Type, is_text, parse_type, size_of
from hypermesh_ebpf.metrics.event_log import Item, Shape
from hypermesh_ebpf.metrics.sample import Row


def make_shape(type_: Type | None, shared: Row, names: Mapping[str, str]) -> Shape:
    """The shape of records of that type; without one, or of one without a size, they are bytes.

    ``shared`` are fields that all have, ``names`` those of the type's members that are called
    otherwise in events.  A plain value is the field "value".
    """

    def fields(row: tuple[Any, ...] | bytes) -> Row:
        if isinstance(row, tuple) and type_ is not None:
            value = type_.build(iter(row))
        elif type_ is None or type_.size:
            return {**shared, "data": bytes(row).hex()}
        else:
            value = type_.decode(bytes(row))
        if isinstance(value, dict):
            return {**shared, **{names.get(name, name): each for name, each in value.items()}}
        return {**shared, "value": value}

    if type_ is None or not type_.size:
        return Shape(_NEVER, fields)
    layout = struct.Struct("=" + type_.layout)
    try:
        pattern = _Maker().make(type_.description)
    except _Repeated:
        return Shape(layout, fields)
    if "members" in type_.description:
        if not isinstance(pattern, dict):
            return Shape(layout, fields)
        named = {names.get(name, name): each for name, each in pattern.items()}
        if len(named) < len(pattern) or shared.keys() & named.keys():
            return Shape(layout, fields)
        return Shape(layout, fields, {**shared, **named})
    return Shape(layout, fields, {**shared, "value": pattern})


_NEVER = struct.Struct(f"{1 << 31}x")  # no record is as long as that


class _Repeated(Exception):
    """Two members have one name: what a dictionary makes of that is no pattern."""


class _Maker:
    """Counts the struct module's items while it follows a description."""

    def __init__(self) -> None:
        self._count = 0

    def make(self, description: Description) -> Any:
        """The pattern of a value; what is unpacked as one item is one item."""
        type_ = parse_type(description)
        kind = description["kind"]
        if kind == "int" and type_.build is next:
            return self._item("int")
        if kind == "float" and type_.build is next:
            return self._item("float")
        if kind == "pointer":
            return self._item("pointer")
        if not type_.size and not struct.unpack("=" + type_.layout, b""):
            return type_.build(iter(()))
        if not type_.size:  # an array of nothing that is unpacked all the same, as no bytes
            kind = "other" if is_text(description) else "nested"
            return self._item(kind, lambda item: type_.build(iter((item,))))
        if kind == "array" and type_.layout != f"{type_.size}s":
            return [self.make(description["element"]) for _ in range(description["count"])]
        if "members" not in description or not _is_plain(description):
            nested = "members" in description or (kind == "array" and not is_text(description))
            kind = "nested" if nested else "other"
            return self._item(kind, lambda item: type_.build(iter((item,))))
        names = [member["name"] for member in description["members"]]
        if len(set(names)) < len(names):
            raise _Repeated
        return {member["name"]: self.make(member["type"]) for member in description["members"]}

    def _item(self, kind: str, convert: Callable[[Any], Any] | None = None) -> Item:
        self._count += 1
        return Item(self._count - 1, kind, convert)


def _is_plain(description: Description) -> bool:
    """Whether members follow each other, so that each is unpacked for itself."""
    end = 0
    for member in description["members"]:
        at, odd = divmod(member["offset"], 8)
        if odd or at < end or "bits" in member:
            return False
        end = at + size_of(member["type"])
    return True
