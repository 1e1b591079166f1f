"""A map as numpy arrays: one for each member of its keys and of its values.

numpy is imported when somebody asks for columns.  Arrays of a map that is not per CPU are views of
the memory that the kernel wrote to; a per-CPU map is added up part by part, so that no more of it
than the sums is held.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from hypermesh_ebpf.bpf import map_types
from hypermesh_ebpf.bpf.map_reader import MapReader
from hypermesh_ebpf.bpf.numpy_types import join_bits, name_dtype
from hypermesh_ebpf.bpf.types import Description, is_text, size_of

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class MapColumns:
    """All entries of a map: ``keys`` and ``values`` have an array for each member, by its name.

    Entry n is at place n of every array.  Members of structures inside are called
    "outer.member"; a key or value that has no members is called "key", "value".  Arrays of C are
    further dimensions: ``u64 slots[32]`` has the shape (entries, 32).  Types are those of C:
    integers, floats, bool; enums and pointers are integers, arrays of ``char`` bytes ("S16",
    which numpy shows without the zeros at the end), anything else raw bytes ("V16").  Bit fields
    are integers of 64 bits.

    Values of per-CPU maps are added up, as 64-bit integers that wrap as the kernel's do, or
    doubles.  What cannot be added - bool, enum, pointer, text, raw bytes, bit fields - keeps every
    CPU's, as the second dimension.  Arrays are read-only.
    """

    name: str
    count: int
    keys: Mapping[str, NDArray[Any]]
    values: Mapping[str, NDArray[Any]]

    def __len__(self) -> int:
        return self.count


def read_columns(reader: MapReader, key: Description, value: Description) -> MapColumns:
    """The map's entries now, by the descriptions of its types.  Raises MapError."""
    key_leaves, value_leaves = list(_leaves("key", key)), list(_leaves("value", value))
    name, key_size, stride = reader.spec.name, reader.spec.key_size, reader.stride
    if reader.spec.type not in map_types.PER_CPU:
        raw = reader.read()
        keys = {leaf.name: leaf.view(raw.keys, key_size) for leaf in key_leaves}
        values = {leaf.name: leaf.view(raw.values, stride) for leaf in value_leaves}
        return _freeze(name, len(raw.keys) // key_size, keys, values)

    count = 0
    key_parts: list[list[NDArray[Any]]] = [[] for _leaf in key_leaves]
    value_parts: list[list[NDArray[Any]]] = [[] for _leaf in value_leaves]
    for raw in reader.chunks():
        count += len(raw.keys) // key_size
        for parts, leaf in zip(key_parts, key_leaves, strict=True):
            parts.append(leaf.view(raw.keys, key_size).copy())
        for parts, leaf in zip(value_parts, value_leaves, strict=True):
            parts.append(leaf.add(raw.values, stride, reader.copies))
    return _freeze(
        name,
        count,
        _join(key_leaves, key_parts),
        _join(value_leaves, value_parts),
    )


def _join(leaves: list[_Leaf], parts: list[list[NDArray[Any]]]) -> dict[str, NDArray[Any]]:
    import numpy as np

    return {leaf.name: np.concatenate(each) for leaf, each in zip(leaves, parts, strict=True)}


def _freeze(
    name: str, count: int, keys: dict[str, NDArray[Any]], values: dict[str, NDArray[Any]]
) -> MapColumns:
    for column in (*keys.values(), *values.values()):
        column.flags.writeable = False
    return MapColumns(name, count, MappingProxyType(keys), MappingProxyType(values))


@dataclass(frozen=True, slots=True)
class _Leaf:
    """A member without members: numpy's ``dtype``, and where in each value it is.

    ``shape`` and ``strides`` are those of the arrays it is in.  ``bits`` are (the first, from the
    beginning of the byte at ``offset``, how many, signed) of a bit field.
    """

    name: str
    dtype: str
    offset: int
    shape: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()
    addable: bool = False
    bits: tuple[int, int, bool] | None = None

    def view(self, raw: memoryview, stride: int, copies: int = 1) -> NDArray[Any]:
        """The member of every value in ``raw``; where there are ``copies``, by CPU."""
        import numpy as np

        count = len(raw) // (stride * copies)
        shape, strides = (count, *self.shape), (stride * copies, *self.strides)
        if copies > 1:
            shape, strides = (count, copies, *self.shape), (*strides[:1], stride, *self.strides)
        if not math.prod(shape):
            return np.empty(shape, "u8" if self.bits else self.dtype)
        if self.bits is None:
            found: NDArray[Any] = np.ndarray(shape, self.dtype, raw, self.offset, strides)
            return found
        first, width, signed = self.bits
        size = -(-(first + width) // 8)
        octets = np.ndarray((*shape, size), "u1", raw, self.offset, (*strides, 1))
        return join_bits(octets, first, width, signed)

    def add(self, raw: memoryview, stride: int, copies: int) -> NDArray[Any]:
        """The member of every value, all CPUs' added where that can be; a copy."""
        import numpy as np

        each = self.view(raw, stride, copies)
        if not self.addable:
            all_of_them: NDArray[Any] = each.reshape((len(each), copies, *self.shape)).copy()
            return all_of_them
        wide = {"f": "f8", "u": "u8", "i": "i8"}[self.dtype[0]]
        if copies == 1:
            total: NDArray[Any] = each.astype(wide)
        else:
            total = np.add.reduce(each, axis=1, dtype=wide)
        return total


def _leaves(
    name: str,
    description: Description,
    offset: int = 0,
    shape: tuple[int, ...] = (),
    strides: tuple[int, ...] = (),
    inside: bool = False,
) -> Iterator[_Leaf]:
    """The members of a type that have none themselves; ``name`` is what one without names gets."""
    kind = description["kind"]
    if kind in ("struct", "union"):
        for member in description["members"]:
            inner = f"{name}.{member['name']}" if inside else member["name"]
            at, odd = divmod(member["offset"], 8)
            if "bits" in member:
                bits = (odd, member["bits"], bool(member["type"].get("signed")))
                yield _Leaf(inner, "u8", offset + at, shape, strides, bits=bits)
            else:
                yield from _leaves(inner, member["type"], offset + at, shape, strides, True)
    elif kind == "array" and not is_text(description):
        element, count = description["element"], description["count"]
        strides = (*strides, size_of(element))
        yield from _leaves(name, element, offset, (*shape, count), strides, inside)
    elif size_of(description):
        dtype = name_dtype(description)
        addable = kind in ("int", "float") and dtype[0] != "V"
        yield _Leaf(name, dtype, offset, shape, strides, addable)
