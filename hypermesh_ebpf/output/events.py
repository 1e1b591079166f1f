"""Events as lines, one each, under a heading that comes again before it has scrolled away."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from hypermesh_ebpf.metrics.sample import Event, Row
from hypermesh_ebpf.monitors.declaration import Column, Monitor
from hypermesh_ebpf.output.draw import format_text
from hypermesh_ebpf.output.grid import Grid, Line, crop_line


class EventLines:
    """The events of one run of ``monitor``.

    On a narrow terminal its event columns go from the right, but for a text that comes last.
    """

    def __init__(self, monitor: Monitor, *, exact: bool, ascii: bool) -> None:
        columns = monitor.event_columns
        if all(column.field != "time" for column in columns):
            upper = all(column.heading.isupper() for column in columns)
            columns = (Column("time", "TIME" if upper else "time", "time"), *columns)
        self._ascii = ascii
        self._flatten = monitor.flatten_event
        self._rest = next((column.field for column in columns if column.kind == "rest"), None)
        self._named = frozenset(column.field for column in columns)
        columns = tuple(replace(c, kind="text") if c.kind == "rest" else c for c in columns)
        self._grid = Grid(columns, ("time",), exact=exact, ascii=ascii, flowing=True)
        self._since_heading: int | None = None

    def lines(self, events: Sequence[Event], width: int | None, heading_every: int) -> list[Line]:
        """A line for each event, none wider than ``width`` (None: any), with headings between."""
        rows: list[Row] = [{"time": event.time, **self._fields(event.fields)} for event in events]
        heading, lines = self._grid.lines(rows, width)
        if width is not None:
            heading = crop_line(heading, width, self._ascii)
        shown: list[Line] = []
        for line in lines:
            if self._since_heading is None or self._since_heading >= heading_every:
                shown.append(heading)
                self._since_heading = 0
            shown.append(line)
            self._since_heading += 1
        return shown

    def _fields(self, fields: Row) -> Row:
        """The fields as the columns have them: flat, and those without a column as one text."""
        if self._flatten is None:
            return fields
        flat = self._flatten(fields)
        if self._rest is None:
            return flat
        rest = [
            f"{name}={format_text(value, self._ascii)}"
            for name, value in flat.items()
            if name not in self._named
        ]
        return {**flat, self._rest: " ".join(rest)}

    def repeat_heading(self) -> None:
        """Begin the next lines with the heading: those before are not on the screen any more."""
        self._since_heading = None
