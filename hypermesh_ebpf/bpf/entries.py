"""One reading of a map: bytes, of which only what is looked at becomes values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hypermesh_ebpf.bpf.layout import Layout
from hypermesh_ebpf.bpf.map_reader import RawEntries
from hypermesh_ebpf.bpf.strided import take_sums
from hypermesh_ebpf.bpf.types import Type


@dataclass(frozen=True, slots=True)
class Entries:
    """A map's entries as they were read, per-CPU values summed when decoded.

    ``copies`` is the number of values in an entry of a per-CPU map, 0 in others.
    """

    raw: RawEntries
    key: Layout
    value: Layout
    copies: int

    def __len__(self) -> int:
        return len(self.raw.keys) // self.key.size

    @property
    def identities(self) -> Identities:
        """What tells the entries apart from one reading to the next."""
        return Identities(bytes(self.raw.keys), self.key.size)

    def keys(self, member: str = "") -> list[Any]:
        """A member of every key; all of it where it has none.  Raises KeyError."""
        return self.key.column(member, self.raw.keys)

    def values(self, member: str = "") -> list[Any]:
        """The same of every value."""
        return self.value.column(member, self.raw.values, self.copies)

    def items(self) -> Iterator[tuple[Any, Any]]:
        """All (key, value) pairs; structures as named tuples."""
        values = self.raw.values
        if self.copies:
            decoded = self.value.decode_sums(values, self.copies)
        else:
            decoded = self.value.decode_all(values)
        return zip(self.key.decode_all(self.raw.keys), decoded, strict=True)

    def rows(self) -> Iterator[tuple[Any, ...]]:
        """All entries as plain tuples: what the key consists of, then the value's, arrays spread.

        The fastest way past every number: two thirds of it are the kernel's own time.
        """
        columns = self.key.columns(self.raw.keys)
        return zip(*columns, *self.value.columns(self.raw.values, self.copies), strict=True)

    def select(self, places: Sequence[int]) -> Entries:
        """Some of the entries, told by their places, in this order."""
        return replace(self, raw=_select(self.raw, self.key.size, places))


@dataclass(frozen=True, slots=True)
class TypedEntries:
    """The same of any map, by its types.

    ``copies`` is the number of values in an entry of a per-CPU map, 0 in others; they are
    ``stride`` bytes apart.
    """

    raw: RawEntries
    key: Type
    value: Type
    stride: int
    copies: int

    def __len__(self) -> int:
        return len(self.raw.keys) // self.key.size

    @property
    def identities(self) -> Identities:
        """What tells the entries apart from one reading to the next."""
        return Identities(bytes(self.raw.keys), self.key.size)

    def values(self, member: str = "") -> list[int]:
        """An integer of 1, 2, 4 or 8 bytes of every value: a member, or all of it."""
        code, offset = self.value.find_integer(member)
        return take_sums(self.raw.values, code, offset, self.stride, self.copies or 1)

    def items(self) -> Iterator[tuple[Any, Any]]:
        """All (key, value) pairs, per-CPU values added up where they can be."""
        if self.copies:
            values = self.value.decode_sums(self.raw.values, self.stride, self.copies)
        else:
            values = self.value.decode_all(self.raw.values, self.stride)
        return zip(self.key.decode_all(self.raw.keys), values, strict=True)

    def places_of_set(self) -> list[int]:
        """Where any byte of the value is not zero."""
        raw, size = bytes(self.raw.values), self.stride * (self.copies or 1)
        zero = bytes(size)
        return [at // size for at in range(0, len(raw), size) if raw[at : at + size] != zero]

    def select(self, places: Sequence[int]) -> TypedEntries:
        """Some of the entries, told by their places, in this order."""
        return replace(self, raw=_select(self.raw, self.key.size, places))


def _select(raw: RawEntries, key_size: int, places: Sequence[int]) -> RawEntries:
    keys, values = raw.keys, raw.values
    count = len(keys) // key_size
    if places == range(count):
        return raw
    size = len(values) // (count or 1)
    return RawEntries(
        memoryview(b"".join([keys[at * key_size : (at + 1) * key_size] for at in places])),
        memoryview(b"".join([values[at * size : (at + 1) * size] for at in places])),
    )


@dataclass(frozen=True, slots=True)
class Identities:
    """Keys as bytes.  Those of two readings of a map that kept its entries are compared at once."""

    raw: bytes
    size: int

    def __len__(self) -> int:
        return len(self.raw) // self.size

    def __iter__(self) -> Iterator[bytes]:
        raw, size = self.raw, self.size
        return iter([raw[at : at + size] for at in range(0, len(raw), size)])
