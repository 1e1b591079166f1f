"""Events as lines, one each, under a heading that comes again before it has scrolled away."""

from __future__ import annotations

from collections.abc import Sequence

from hypermesh_ebpf.metrics.sample import Event
from hypermesh_ebpf.monitors.declaration import Column, Monitor
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
        self._grid = Grid(columns, ("time",), exact=exact, ascii=ascii, flowing=True)
        self._since_heading: int | None = None

    def lines(self, events: Sequence[Event], width: int | None, heading_every: int) -> list[Line]:
        """A line for each event, none wider than ``width`` (None: any), with headings between."""
        rows = [{"time": event.time, **event.fields} for event in events]
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

    def repeat_heading(self) -> None:
        """Begin the next lines with the heading: those before are not on the screen any more."""
        self._since_heading = None
