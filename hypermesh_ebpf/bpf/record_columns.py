"""Records as columns: one numpy array for each member of their type.

    columns = RecordColumns(parse_type(spec.value_desc))
    found = ring.read_columns(columns)      # {"pid": array([...], dtype=uint32), ...}

Numbers, bools, enums (their numbers) and pointers (addresses) are arrays of the type's own width,
``char`` arrays are bytes without the NULs at their end, other arrays a row for each record.
Members of structures within are "outer.member", of arrays of structures "outer.0.member".  Bit
fields come as 64-bit integers.  What has no such type (16-byte integers, unknown types) is void:
its bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from hypermesh_ebpf.bpf.numpy_types import join_bits, name_dtype
from hypermesh_ebpf.bpf.types import Description, Type, is_text, size_of

Array = np.ndarray[Any, np.dtype[Any]]
Columns = dict[str, Array]

_Bits = tuple[int, int, bool]
"""A bit field's first bit in its bytes, how many it has, and whether it is signed."""


class RecordColumns:
    """How records of one type are taken apart; what is no structure is the column "value".

    ``dtype`` has a field for each column.  ``short`` counts the records that were too short.
    Raises ValueError for a type without a size.
    """

    def __init__(self, type_: Type) -> None:
        if not type_.size:
            raise ValueError("the records' type is not known")
        leaves = list(_leaves(type_.description, "", 0))
        self.dtype: np.dtype[Any] = np.dtype(
            {
                "names": [name for name, *_ in leaves],
                "formats": [format_ for _, format_, *_ in leaves],
                "offsets": [offset for _, _, offset, _ in leaves],
                "itemsize": type_.size,
            }
        )
        self._bits = {name: bits for name, *_, bits in leaves if bits is not None}
        self.short = 0

    def begin(self, most: int) -> Filling:
        """Columns to be filled, for at most so many records."""
        return Filling(self, most)

    def join(self, records: Sequence[bytes]) -> Columns:
        """The columns of records that were read one by one."""
        size = self.dtype.itemsize
        enough = [raw if len(raw) == size else raw[:size] for raw in records if len(raw) >= size]
        found = self.begin(len(enough))
        view = np.frombuffer(b"".join(enough), self.dtype)
        found.add(view, slice(None), len(records) - len(enough))
        return found.finish()

    def convert(self, name: str, column: Array) -> Array:
        """A column as it is shown."""
        bits = self._bits.get(name)
        return column if bits is None else join_bits(column, *bits)


class Filling:
    """Columns on their way: every record is copied once, to its place in the result."""

    def __init__(self, columns: RecordColumns, most: int) -> None:
        self._columns, self._count = columns, 0
        formats = {name: columns.dtype[name] for name in columns.dtype.names or ()}
        self._arrays = {
            name: np.empty((most, *format_.shape), format_.base)
            for name, format_ in formats.items()
        }

    def add(self, view: Array, places: slice | Array, short: int) -> None:
        """The records at these places of ``view``; so many more were too short."""
        self._columns.short += short
        first = self._count
        for name, array in self._arrays.items():
            column = view[name][places]
            self._count = first + len(column)
            array[first : self._count] = column

    def finish(self) -> Columns:
        """The columns, in arrays that are the caller's."""
        found = {name: array[: self._count] for name, array in self._arrays.items()}
        return {
            name: self._columns.convert(name, column if _is_tight(column) else column.copy())
            for name, column in found.items()
        }


def _is_tight(column: Array) -> bool:
    """Whether it takes most of the memory that was set aside for it."""
    return column.base is None or 2 * column.nbytes >= column.base.nbytes


_Leaf = tuple[str, Any, int, _Bits | None]  # name, numpy's format, offset in bytes


def _leaves(description: Description, name: str, offset: int) -> Iterator[_Leaf]:
    """What a value's columns are.  ``offset`` is in bytes."""
    kind = description["kind"]
    if kind in ("struct", "union"):
        for member in description["members"]:
            path = f"{name}.{member['name']}" if name else member["name"]
            if "bits" in member:
                yield _bit_field(member, path, offset)
            else:
                yield from _leaves(member["type"], path, offset + member["offset"] // 8)
        return
    if kind == "array" and not is_text(description):
        element, count = description["element"], description["count"]
        if element["kind"] in ("struct", "union", "array"):
            for index in range(count):
                yield from _leaves(element, f"{name}.{index}", offset + index * size_of(element))
        else:
            yield name or "value", (name_dtype(element), (count,)), offset, None
        return
    yield name or "value", name_dtype(description), offset, None


def _bit_field(member: Description, name: str, offset: int) -> _Leaf:
    """The bytes that it is in, and where in them."""
    first, odd = divmod(member["offset"], 8)
    size = -(-(odd + member["bits"]) // 8)
    signed = bool(member["type"].get("signed", False))
    return name, ("u1", (size,)), offset + first, (odd, member["bits"], signed)
