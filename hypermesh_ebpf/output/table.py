"""Tables for people: live on a terminal, plain lines everywhere else.

The live table is in live.py, so that a pipe does not pay for rich.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TextIO

from hypermesh_ebpf.errors import OutputError
from hypermesh_ebpf.metrics.sample import End, Event, Loss, Sample, Start
from hypermesh_ebpf.monitors.declaration import Monitor, Options
from hypermesh_ebpf.output.events import EventLines
from hypermesh_ebpf.output.frame import Frame
from hypermesh_ebpf.output.grid import Line
from hypermesh_ebpf.output.sink import Sink
from hypermesh_ebpf.output.writer import OutputClosed, Writer

_HEADING_EVERY = 40


def open_table(
    writer: Writer,
    stream: TextIO,
    monitor: Monitor,
    options: Options,
    *,
    interval: float,
    top: int,
    show_events: bool,
) -> Sink:
    """A live table if ``stream`` is a terminal that can move its cursor, else a plain one."""
    terminal = os.environ.get("TERM", "")
    live = stream.isatty() and terminal not in ("", "dumb", "unknown")
    encoding = (stream.encoding or "utf-8").lower().replace("-", "")
    # The kernel's own console has no font for blocks.
    ascii = encoding != "utf8" or (live and terminal == "linux")
    frame = Frame(monitor, options, interval=interval, top=top, exact=not live, ascii=ascii)
    events = EventLines(monitor, exact=not live, ascii=ascii) if show_events else None
    if live:
        from hypermesh_ebpf.output.live import LiveTable

        return LiveTable(writer, stream, frame, events)
    return PlainTable(writer, frame, events)


class PlainTable:
    """No escape codes, nothing cut, numbers in full: for pipes, files and dumb terminals.

    Without ``events`` the whole table is printed at every sample.  With them every event is a line,
    a sample shows only that something was lost since the one before, or that events are sampled,
    and the table of counts comes once, at the end, where it does not come between the lines that
    somebody greps.
    """

    def __init__(self, writer: Writer, frame: Frame, events: EventLines | None) -> None:
        self.lost = 0
        self._writer = writer
        self._frame = frame
        self._events = events
        self._loss = Loss()
        self._sampled = 1.0

    def start(self, start: Start) -> None:
        self._frame.start(start)
        if self._events is not None:
            self._print(self._frame.title())

    def events(self, events: Sequence[Event]) -> None:
        if self._events is None or not events:
            return
        try:
            self._print(self._events.lines(events, None, _HEADING_EVERY))
        except (OutputClosed, OutputError):
            self.lost += len(events)
            raise

    def sample(self, sample: Sample) -> None:
        self._frame.sample(sample)
        if self._events is None:
            self._print([*self._frame.lines(None, None), []])
        else:
            news: list[Line] = []
            if sample.overhead is not None and sample.overhead.sampled != self._sampled:
                self._sampled = sample.overhead.sampled
                news += self._frame.overhead(sample)
            if sample.loss != self._loss and sample.loss.any():
                news.append(self._frame.loss(sample.loss))
            if news:
                self._print(news)
        self._loss = sample.loss

    def end(self, end: End) -> None:
        if self._writer.gone:
            return
        counts = [[], *self._frame.lines(None, None), []] if self._events is not None else []
        self._print([*counts, [(self._frame.summary(end), "")]])

    def close(self) -> None:
        """Nothing is held back, so there is nothing to do."""

    def _print(self, lines: Sequence[Line]) -> None:
        text = "".join(["".join([part for part, _ in line]).rstrip(" ") + "\n" for line in lines])
        self._writer.write(text.encode())
