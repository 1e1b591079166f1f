"""Comma-separated values (RFC 4180, lines ended by LF): samples, or events where they are shown.

The header is written once, at the start, and depends on the monitor and its options alone: not on
what was seen, nor on the rung that was taken.  Every record is one line: control characters in
names are escaped as the tables escape them.  Unknown is empty.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from io import StringIO
from itertools import chain
from typing import Any

from hypermesh_ebpf.errors import OutputError
from hypermesh_ebpf.metrics.event_log import EventLog, Records
from hypermesh_ebpf.metrics.sample import End, Event, Sample, Start
from hypermesh_ebpf.monitors.declaration import Monitor, Options
from hypermesh_ebpf.output.draw import format_text
from hypermesh_ebpf.output.json import format_time
from hypermesh_ebpf.output.record_lines import CsvRows
from hypermesh_ebpf.output.writer import OutputClosed, Writer


def row_fields(monitor: Monitor, options: Options) -> list[str]:
    """The fields of a row, in order: what names it, then its columns, counters and rates.

    Of a user's program: the map, and the columns of all its maps.
    """
    if monitor.tables:
        columns = [column.field for layout in monitor.tables for column in layout.columns]
        return list(dict.fromkeys(["map", *columns]))
    fields = [*monitor.key(options), *(column.field for column in monitor.columns(options))]
    for counter in monitor.counters:
        fields += [counter, counter + "_per_s"]
    return list(dict.fromkeys(fields))


def event_fields(monitor: Monitor) -> list[str]:
    """The fields of an event, in order: those of the tables, then what else any rung gives."""
    fields = [column.field for column in monitor.event_columns if column.kind != "rest"]
    fields += monitor.event_fields
    for rung in monitor.rungs:
        fields += rung.fields
    return list(dict.fromkeys(fields))


class CsvSink:
    """Samples: ``time,target`` and the row's fields.  Events: ``time`` and the event's fields.

    ``target`` is the row's own interface where there are several.  Where overhead is ``limited``
    the last column tells the share of events taken (``sampled``), or how many events one stands
    for (``stands_for``).
    """

    def __init__(
        self,
        writer: Writer,
        monitor: Monitor,
        options: Options,
        *,
        show_events: bool,
        limited: bool = False,
    ) -> None:
        self.lost = 0
        self._writer = writer
        self._show_events = show_events
        self._flatten = {layout.name: layout.flatten for layout in monitor.tables}
        self._flat_event = monitor.flatten_event
        if show_events:
            self._fields = [name for name in event_fields(monitor) if name != "time"]
            self._records = CsvRows(self._fields, self._flat_event or dict, _cell)
        else:
            self._fields = [
                name for name in row_fields(monitor, options) if name not in ("time", "target")
            ]
        self._limited = limited

    def start(self, start: Start) -> None:
        first = ["time"] if self._show_events else ["time", "target"]
        last = ["stands_for" if self._show_events else "sampled"] if self._limited else []
        self._write([first + self._fields + last])

    def events(self, events: Sequence[Event]) -> None:
        if not self._show_events or not events:
            return
        parts = events.parts if isinstance(events, EventLog) else [events]
        try:
            self._write(list(chain.from_iterable(map(self._cells, parts))))
        except (OutputClosed, OutputError):
            self.lost += len(events)
            raise

    def _cells(self, part: Records | Sequence[Event]) -> Iterable[Sequence[Any]]:
        if isinstance(part, Records):
            cells = self._records.rows(part, format_time(part.time)) if part.regular else None
            if cells is not None:
                # A user's programs are not sampled: each record stands for itself.
                return ([*row, 1] for row in cells) if self._limited else cells
        fields, flat = self._fields, self._flat_event
        return (
            [
                format_time(event.time),
                *[_cell(row.get(name)) for name in fields],
                *([event.fields.get("stands_for", 1)] if self._limited else ()),
            ]
            for event in (part.events() if isinstance(part, Records) else part)
            for row in [flat(event.fields) if flat else event.fields]
        )

    def sample(self, sample: Sample) -> None:
        if self._show_events:
            return
        time, fields = format_time(sample.time), self._fields
        target = sample.target if isinstance(sample.target, str) else " ".join(sample.target)
        last = [sample.overhead.sampled] if self._limited and sample.overhead else []
        rows = sample.rows
        if self._flatten:
            rows = [{**self._flatten[str(row["map"])](row), "map": row["map"]} for row in rows]
        self._write(
            [
                [
                    time,
                    _cell(row.get("iface", target)),
                    *[_cell(row.get(name)) for name in fields],
                    *last,
                ]
                for row in rows
            ]
        )

    def end(self, end: End) -> None:
        """Nothing: a CSV file holds records alone."""

    def close(self) -> None:
        """Nothing is held back, so there is nothing to do."""

    def _write(self, records: Sequence[Sequence[Any]]) -> None:
        if records:
            text = StringIO()
            csv.writer(text, lineterminator="\n").writerows(records)
            self._writer.write(text.getvalue().encode())


def _cell(value: Any) -> Any:
    """Numbers as they are; None empty; true and false as in JSON; the rest as safe text."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    return value if isinstance(value, (int, float)) else format_text(value)
