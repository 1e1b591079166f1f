"""Events that are not taken apart before somebody wants them.

Under a storm most of the time would go into making an :class:`Event` of each record, with a
dictionary that a sink takes apart again.  So records stay as the struct module unpacked them, all
of one shape together; a sink that knows shapes writes them as they are, every other sees
events.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

from hypermesh_ebpf.metrics.sample import Event, Row


@dataclass(frozen=True, slots=True)
class Item:
    """A place for one unpacked item in a :class:`Shape`: the ``index``-th.

    ``kind``: "int"; "pointer", an integer shown as hexadecimal text; "float"; "other", of which
    ``convert`` makes the value; "nested", the same where that is a dictionary or a list.
    """

    index: int
    kind: str
    convert: Callable[[Any], Any] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Shape:
    """How the items of a record become an event's fields.

    ``layout`` unpacks a record, ``fields`` makes the fields of what it gave.  ``pattern`` says the
    same as a value: the fields, with an :class:`Item` in place of each leaf and lists of items for
    arrays; None where there is no such value.
    """

    layout: struct.Struct
    fields: Callable[[tuple[Any, ...] | bytes], Row]
    pattern: Row | None = None


@dataclass(frozen=True, slots=True)
class Records:
    """Records of one buffer, read together: each as its items, or its bytes if it is too short."""

    time: float
    monitor: str
    shape: Shape
    rows: Sequence[tuple[Any, ...] | bytes]
    regular: bool = field(init=False)

    def __post_init__(self) -> None:
        regular = self.shape.pattern is not None and bytes not in set(map(type, self.rows))
        object.__setattr__(self, "regular", regular)

    def events(self) -> Iterator[Event]:
        """Each as an event."""
        make = self.shape.fields
        for row in self.rows:
            yield Event(self.time, self.monitor, make(row))


class EventLog(Sequence[Event]):
    """Events in the order in which they were read; ``parts`` are those that were read together."""

    def __init__(self, parts: Iterable[Records]) -> None:
        self.parts = tuple(part for part in parts if part.rows)
        self._events: list[Event] | None = None

    def __len__(self) -> int:
        return sum(len(part.rows) for part in self.parts)

    def __iter__(self) -> Iterator[Event]:
        return iter(self._all())

    @overload
    def __getitem__(self, index: int) -> Event: ...

    @overload
    def __getitem__(self, index: slice) -> list[Event]: ...

    def __getitem__(self, index: int | slice) -> Event | list[Event]:
        return self._all()[index]

    def _all(self) -> list[Event]:
        if self._events is None:
            self._events = [event for part in self.parts for event in part.events()]
        return self._events
