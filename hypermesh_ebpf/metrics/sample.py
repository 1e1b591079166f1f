"""The values that travel from a session to the sinks.

Every sink takes the same four: one :class:`Start`, any number of :class:`Event` and
:class:`Sample`, one :class:`End`.  Times are seconds since the epoch (float); sinks write them as
RFC 3339.  Counters are cumulative since attach; fields named ``*_per_s`` are rates over the last
interval.  ``None`` means unknown and is never written as 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from hypermesh_ebpf.metrics import Row as Row
from hypermesh_ebpf.metrics import Value as Value


@dataclass(frozen=True, slots=True)
class Loss:
    """What was lost since attach: each a count, or None where the kernel does not tell.

    ``events_lost``: ring buffer reservations that failed and records that no sink could write.
    ``map_full``: map updates that failed, so that something was not counted under its own key.
    ``missed``: runs that the kernel skipped (``recursion_misses`` of the program's info, 5.12).
    """

    events_lost: int | None = 0
    map_full: int | None = 0
    missed: int | None = None

    def any(self) -> bool:
        """True if anything at all is known to be lost."""
        return bool(self.events_lost or self.map_full or self.missed)

    def as_dict(self) -> dict[str, int | None]:
        return {
            "events_lost": self.events_lost,
            "map_full": self.map_full,
            "missed": self.missed,
        }


@dataclass(frozen=True, slots=True)
class Degraded:
    """A rung below the first was taken: its place (from 1), its name, what is lost and why."""

    rung: int
    hook: str
    lost: tuple[str, ...]
    reason: str | None = None

    def as_dict(self) -> dict[str, Any]:
        return {
            "rung": self.rung,
            "hook": self.hook,
            "lost": list(self.lost),
            "reason": self.reason,
        }


@dataclass(frozen=True, slots=True)
class Overhead:
    """What the programs cost, where ``--max-overhead`` limits that.

    ``percent`` of one CPU is what they took lately, None before it was measured; ``limit`` is the
    most that they may take.  ``sampled`` is the share of events that are taken now: 1.0, 0.5,
    0.25, ...; the others are passed over.  ``estimated``: some were, at any time, so that counters
    are estimates.
    """

    percent: float | None
    limit: float
    sampled: float
    estimated: bool

    def as_dict(self) -> dict[str, Any]:
        return {
            "percent": self.percent,
            "limit": self.limit,
            "sampled": self.sampled,
            "estimated": self.estimated,
        }


@dataclass(frozen=True, slots=True)
class Histogram:
    """Counts by size: ``buckets`` holds (low, high, count), both ends inclusive, ascending.

    Of a user's program ``name`` is the map's, ``key`` tells its histograms apart where it has
    several, and ``title`` is what is written over it in tables.
    """

    name: str
    unit: str
    buckets: tuple[tuple[int, int, int], ...]
    title: str = ""
    key: Any = None


@dataclass(frozen=True, slots=True)
class Table:
    """What is in one map of a user's program.

    ``rows`` are ``{"map", "key", "value", "value_per_s"}``, the last where there is a rate, keys
    and values as their types have them: numbers, text, or dictionaries.  ``left_out`` entries were
    not read, None for an unknown number of them; ``zeros`` are entries of an array in which nothing
    is set.  ``reason`` says why a map cannot be read.
    """

    name: str
    rows: Sequence[Row] = ()
    left_out: int | None = 0
    zeros: int = 0
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class Start:
    """The last hook is attached.  ``hooks`` as "kind:detail", ``prog_ids`` are the kernel's."""

    time: float
    monitor: str
    target: str | list[str]
    hooks: tuple[str, ...]
    degraded: Degraded | None
    prog_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Sample:
    """One timestamped reading: totals, rows and loss, cumulative since attach, with rates.

    Of a user's program ``rows`` are those of all its maps, and ``tables`` what of them is drawn in
    tables.
    """

    time: float
    monitor: str
    target: str | list[str]
    elapsed_s: float
    totals: Row
    rows: Sequence[Row]
    loss: Loss
    histograms: tuple[Histogram, ...] = ()
    tables: tuple[Table, ...] = ()
    overhead: Overhead | None = None


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that happened, with the monitor's own fields."""

    time: float
    monitor: str
    fields: Row = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class End:
    """The run is over.

    ``reason`` is duration, count, interrupt, terminated, output, overhead or error.
    """

    time: float
    monitor: str
    target: str | list[str]
    reason: str
    loss: Loss
    overhead: Overhead | None = None
