"""What every sink is, and how one is opened.

A sink draws or writes what a session reads.  It imports nothing heavy before it is asked for:
rich comes with the live table alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TextIO

from hypermesh_ebpf.errors import UsageError
from hypermesh_ebpf.metrics.sample import End, Event, Sample, Start
from hypermesh_ebpf.monitors.declaration import Monitor, Options
from hypermesh_ebpf.output.writer import OutputClosed, Writer, require_stream

__all__ = ["KINDS", "OutputClosed", "Sink", "open_sink"]

KINDS = ("table", "json", "csv")


class Sink(Protocol):
    """Takes one Start, any number of Events and Samples, one End; then :meth:`close`.

    ``start``, ``events`` and ``sample`` raise :class:`OutputClosed` when the reader is gone and
    OutputError when the output cannot be written; ``end`` and ``close`` after that are silent, and
    ``close`` may be called at any time, more than once.  ``lost`` counts the events that were
    handed over and could not be written.
    """

    lost: int

    def start(self, start: Start) -> None: ...

    def events(self, events: Sequence[Event]) -> None:
        """Show these.  An empty batch shows what a sink held back to spare the terminal."""
        ...

    def sample(self, sample: Sample) -> None: ...

    def end(self, end: End) -> None: ...

    def close(self) -> None: ...


def open_sink(
    kind: str,
    monitor: Monitor,
    options: Options,
    *,
    interval: float,
    top: int,
    stream: TextIO | None,
    show_events: bool,
    stopping: Callable[[], bool] | None = None,
    limited: bool = False,
) -> Sink:
    """The sink of that ``kind`` (one of :data:`KINDS`) for one run of ``monitor``.

    ``interval`` is the time between samples in seconds, ``top`` the most rows a table shows.
    Events are shown when ``show_events`` says so or when they are what the monitor is for.
    ``stopping`` tells that the user wants the run to end: output that nobody reads is then given
    up (see :class:`Writer`).  ``limited``: samples have an Overhead.

    Raises UsageError for an unknown kind, OutputError if ``stream`` cannot be written to.
    """
    if kind not in KINDS:
        raise UsageError(
            f"--output {kind}", "there is no such output", f"choose one of {', '.join(KINDS)}"
        )
    stream = require_stream(stream)
    show_events = show_events or monitor.events == "always"
    writer = Writer(stream, stopping)
    if kind == "json":
        from hypermesh_ebpf.output.json import JsonSink

        return JsonSink(writer, terminal=stream.isatty())
    if kind == "csv":
        from hypermesh_ebpf.output.csv import CsvSink

        return CsvSink(writer, monitor, options, show_events=show_events, limited=limited)
    from hypermesh_ebpf.output.table import open_table

    return open_table(
        writer, stream, monitor, options, interval=interval, top=top, show_events=show_events
    )
