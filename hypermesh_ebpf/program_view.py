"""What a user's program has to show: every map as a table, every ring or perf buffer as events.

    monitor, collector = make_view(maps, "count.o")

The declaration and the reading are those of a monitor, so that all sinks show them.  Which columns
there are is known from the maps' types alone, before anything is counted.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, cast

from hypermesh_ebpf.bpf import map_types
from hypermesh_ebpf.bpf.maps import TypedMap
from hypermesh_ebpf.bpf.perf_buffer import PerfBuffer
from hypermesh_ebpf.bpf.record_shape import make_shape
from hypermesh_ebpf.bpf.ring import RingBuffer
from hypermesh_ebpf.bpf.spec import PERF_COUNTERS, MapSpec
from hypermesh_ebpf.bpf.types import flatten, parse_type
from hypermesh_ebpf.metrics.counted import Chained
from hypermesh_ebpf.metrics.event_log import EventLog, Records
from hypermesh_ebpf.metrics.sample import Histogram, Row, Table
from hypermesh_ebpf.monitors.declaration import Column, Monitor, Reading
from hypermesh_ebpf.program_tables import ShownMap, column_kind

_PENDING = 100_000
_NOT_FOR_EVENTS = ("type", "time", "monitor", "map")


def make_view(
    maps: Sequence[tuple[MapSpec, int]], name: str, *, events: bool = True
) -> tuple[Monitor, ProgramCollector]:
    """A declaration for these maps (by descriptor, which stay the caller's), and what reads them.

    ``name`` is what the program is called in the output.  With ``events`` its ring and perf buffers
    are opened, and their records shown; without they are left to whoever else reads them.
    Raises MapError.
    """
    collector = ProgramCollector(maps, name, events=events)
    monitor = Monitor(
        name=name,
        summary=f"The maps and events of {name}.",
        source=name,
        rungs=(),
        collector=lambda options, targets: cast(Any, collector),  # reads several buffers
        columns=lambda options: (),
        key=lambda options: (),
        event_columns=collector.event_columns(),
        event_fields=collector.event_fields(),
        events="always" if collector.rings else "never",
        tables=tuple(shown.layout for shown in collector.maps),
        flatten_event=lambda fields: flatten("", fields),
    )
    return monitor, collector


class ProgramCollector:
    """Reads the maps, and takes events out of the buffers; :meth:`close` gives those back.

    ``rings`` have a ``fileno()`` to wait for.
    """

    def __init__(
        self, maps: Sequence[tuple[MapSpec, int]], name: str, *, events: bool = True
    ) -> None:
        self.maps: list[ShownMap] = []
        self.rings: list[_Stream] = []
        self._name = name
        self._pending: list[Records] = []
        self._read_at = time.monotonic()
        try:
            for spec, fd in maps:
                if _is_stream(spec):
                    if events:
                        self.rings.append(_Stream(spec, fd))
                elif not spec.flags & map_types.RDONLY_PROG:  # the program's constants
                    self.maps.append(ShownMap(TypedMap(spec, fd)))
            for shown in self.maps:
                shown.begin()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Give the buffers' mappings back."""
        while self.rings:
            self.rings.pop().close()

    def events(self) -> EventLog:
        """What came since the last call, each buffer's oldest first."""
        self._take()
        found, self._pending = self._pending, []
        return EventLog(found)

    def drain(self) -> None:
        """Take what is in the buffers; the last events are kept for a caller of events()."""
        # Only what an earlier call took: who reads events after each sample gets all of them.
        while sum(len(part.rows) for part in self._pending) > _PENDING:
            del self._pending[0]
        self._take()

    def _take(self) -> None:
        for ring in self.rings:
            if rows := ring.read():
                self._pending.append(Records(time.time(), self._name, ring.shape, rows))

    def collect(self) -> Reading:
        """What is in the maps now, with rates since the last call."""
        now = time.monotonic()
        elapsed, self._read_at = now - self._read_at, now
        rows: list[Sequence[Row]] = []
        tables: list[Table] = []
        histograms: list[Histogram] = []
        for shown in self.maps:
            table = shown.read(elapsed)
            rows.append(table.rows)
            drawn = list(shown.histograms(table.rows))
            histograms += drawn
            if not drawn or shown.has_more:
                tables.append(table)
        perf = [ring.lost for ring in self.rings]
        return Reading(
            totals={},
            rows=Chained(tuple(rows)),
            histograms=tuple(histograms),
            map_full=None,
            events_lost=None if None in perf else sum(each or 0 for each in perf),
            tables=tuple(tables),
        )

    def event_columns(self) -> tuple[Column, ...]:
        """One buffer's members as columns, several buffers' as a text behind the buffer's name."""
        if not self.rings:
            return ()
        when = Column("time", "time", "time")
        if len(self.rings) == 1:
            fields = self.rings[0].fields
            return (when, *(Column(field, field, column_kind(field)) for field in fields))
        return (when, Column("map", "map"), Column("fields", "fields", "rest"))

    def event_fields(self) -> tuple[str, ...]:
        """All fields that an event can have, flat."""
        fields = [field for ring in self.rings for field in ring.fields]
        return tuple(dict.fromkeys(["map", *fields])) if self.rings else ()


def _is_stream(spec: MapSpec) -> bool:
    return spec.type in map_types.STREAMS and spec.value_desc != PERF_COUNTERS


class _Stream:
    """A ring or perf buffer whose records are taken apart; ``shape`` makes events of them."""

    def __init__(self, spec: MapSpec, fd: int) -> None:
        type_ = parse_type(spec.value_desc) if spec.value_desc is not None else None
        names = {name: name + "_" for name in _NOT_FOR_EVENTS}
        self.shape = make_shape(type_, {"map": spec.name}, names)
        self._size = type_.size if type_ else 0
        self._counts_lost = spec.type == map_types.PERF_EVENT_ARRAY
        self._buffer: RingBuffer | PerfBuffer
        self._buffer = PerfBuffer(fd) if self._counts_lost else RingBuffer(fd, spec.max_entries)

    @property
    def fields(self) -> list[str]:
        """The fields of an event, flat, without the buffer's name."""
        empty = bytes(self._size)
        row = self.shape.layout.unpack(empty) if self._size else empty
        return [name for name in flatten("", {**self.shape.fields(row)}) if name != "map"]

    @property
    def lost(self) -> int | None:
        """Records that found no room; None where the kernel does not count them (ring buffers)."""
        return cast(PerfBuffer, self._buffer).lost if self._counts_lost else None

    @property
    def fill(self) -> float:
        """The share of the buffer that the last read found in use."""
        return self._buffer.fill

    def fileno(self) -> int:
        return int(self._buffer.fileno())

    def read(self) -> list[tuple[Any, ...] | bytes]:
        return self._buffer.unpack(self.shape.layout)

    def close(self) -> None:
        self._buffer.close()
