"""Rows that are written out only where somebody looks at them.

A table shows 40 rows of a map's 10,000: these 40 get their text, and the others are numbers in
lists.  To whoever reads all of them they are rows like any others.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Protocol, overload

from hypermesh_ebpf.metrics import Row, Value

Places = Sequence[int]
"""Which rows, by their numbers from 0."""


class Identities(Protocol):
    """What tells rows apart from one reading to the next, in the order of the rows."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Hashable]: ...


@dataclass(frozen=True, slots=True, eq=False)
class Counted(Sequence[Row]):
    """A reading's rows: a column of numbers for each counter, ``write`` for all their fields.

    ``counters`` are what rates are made of.  ``write`` makes rows as they are shown, new ones each
    time, of what was read then.  ``rates`` make the column of a field, for some of the rows;
    ``add_rates`` puts a row's into what ``write`` made.
    """

    identities: Identities
    counters: Mapping[str, Sequence[Any]]
    write: Callable[[Places], list[dict[str, Value]]]
    rates: Mapping[str, Callable[[Places], list[Value]]] = field(default_factory=dict)
    add_rates: Callable[[dict[str, Any], dict[str, Value]], None] = dict.update

    def __len__(self) -> int:
        return len(self.identities)

    @overload
    def __getitem__(self, place: int) -> Row: ...
    @overload
    def __getitem__(self, place: slice) -> list[Row]: ...
    def __getitem__(self, place: int | slice) -> Row | list[Row]:
        if isinstance(place, slice):
            return self.pick(range(*place.indices(len(self))))
        return self.pick([range(len(self))[place]])[0]

    def __iter__(self) -> Iterator[Row]:
        return iter(self.pick(range(len(self))))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def pick(self, places: Places) -> list[Row]:
        """Some of the rows, in this order."""
        rows: list[Any] = self.write(places)
        if self.rates:
            rates = zip(*[column(places) for column in self.rates.values()], strict=True)
            for row, values in zip(rows, rates, strict=True):
                self.add_rates(row, dict(zip(self.rates, values, strict=True)))
        return rows

    def column(self, name: str) -> Sequence[Any]:
        """A counter or a rate of all rows; None in each where there is no such field."""
        if name in self.counters:
            return self.counters[name]
        if name in self.rates:
            return self.rates[name](range(len(self)))
        return [row.get(name) for row in self]


def pick(rows: Sequence[Row], places: Places) -> list[Row]:
    """Some of any rows."""
    return rows.pick(places) if isinstance(rows, Counted) else [rows[place] for place in places]


def column(rows: Sequence[Row], name: str) -> Sequence[Any]:
    """One field of any rows; None where a row does not have it."""
    return rows.column(name) if isinstance(rows, Counted) else [row.get(name) for row in rows]


def busiest(rows: Sequence[Row], counter: str, limit: int) -> list[int]:
    """Where the rows are that counted most: by the counter's rate, then by its count.

    The first comes first of equals.
    """
    rates, counts = column(rows, counter + "_per_s"), column(rows, counter)
    places = range(0, -len(rows), -1)
    busy = zip([r or 0 for r in rates], [c or 0 for c in counts], places, strict=True)
    chosen = sorted(busy, reverse=True) if limit >= len(rows) else heapq.nlargest(limit, busy)
    return [-place for _rate, _count, place in chosen]


def join(parts: Mapping[str, Counted], field: str) -> Counted:
    """Several readings' rows as one's, each with ``field`` in front: the name of its part."""
    starts: dict[str, int] = {}
    identities: list[tuple[str, Hashable]] = []
    for name, part in parts.items():
        starts[name] = len(identities)
        identities += [(name, identity) for identity in part.identities]

    def write(places: Places) -> list[dict[str, Value]]:
        rows: dict[int, dict[str, Value]] = {}
        for name, part in parts.items():
            start, end = starts[name], starts[name] + len(part)
            here = [place for place in places if start <= place < end]
            written = part.write([place - start for place in here])
            rows.update((at, {field: name, **row}) for at, row in zip(here, written, strict=True))
        return [rows[place] for place in places]

    names = {name for part in parts.values() for name in part.counters}
    counters = {name: _chain(part.counters[name] for part in parts.values()) for name in names}
    return Counted(identities, counters, write)


@dataclass(frozen=True, slots=True)
class Chained(Sequence[Row]):
    """The rows of several tables, one table after another."""

    parts: tuple[Sequence[Row], ...]

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    @overload
    def __getitem__(self, place: int) -> Row: ...
    @overload
    def __getitem__(self, place: slice) -> list[Row]: ...
    def __getitem__(self, place: int | slice) -> Row | list[Row]:
        return list(self)[place]

    def __iter__(self) -> Iterator[Row]:
        return chain.from_iterable(self.parts)


def _chain(columns: Iterable[Sequence[Any]]) -> list[Any]:
    return list(chain.from_iterable(columns))
