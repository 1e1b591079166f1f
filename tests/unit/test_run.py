"""The loop between a session and a sink, with a session that reads nothing."""

from __future__ import annotations

import os
import time
from typing import Any

import pytest

from hypermesh_ebpf import monitors
from hypermesh_ebpf.errors import MapError
from hypermesh_ebpf.metrics.sample import Event, Loss, Sample, Start
from hypermesh_ebpf.run import RunOptions, run_programs

MONITOR = monitors.load("xdp")


class Idle:
    """A session of which every reading is empty; ``failure`` is what the second one raises."""

    monitor, options, target = MONITOR, {"events": False, "by": "protocol"}, "lo"
    rings: tuple[Any, ...] = ()
    guard = None

    def __init__(self, failure: Exception | None = None, before_reading: Any = None) -> None:
        self.start = Start(time.time(), "xdp", "lo", ("xdp:generic",), None, (1,))
        self.failure, self.before_reading = failure, before_reading
        self.readings, self.closed = 0, False

    def events(self) -> list[Event]:
        return []

    def read(self) -> Sample:
        if self.before_reading:
            self.before_reading()
        self.readings += 1
        if self.failure and self.readings == 2:
            raise self.failure
        return Sample(time.time(), "xdp", "lo", 1.0, {}, [], Loss())

    def close(self) -> None:
        self.closed = True


def test_reader_that_leaves_before_the_end_line() -> None:
    """``hmebpf ... | head -2``: the pipe breaks at the last line, which is no failure."""
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb", buffering=0) as reader, os.fdopen(writing, "w") as stream:

        def leave() -> None:
            assert reader.readline().startswith(b'{"type":"start"')

        session = Idle(before_reading=leave)
        real_read = session.read

        def read_and_close() -> Sample:
            sample = real_read()
            reader.close()
            return sample

        session.read = read_and_close  # type: ignore[method-assign]
        run_programs(lambda: session, RunOptions(interval=0.01, count=1, output="json"), stream)
    assert session.closed


def test_failure_is_told_though_nobody_reads() -> None:
    """The error that ended the run, not the broken pipe that came after it."""
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb", buffering=0) as reader, os.fdopen(writing, "w") as stream:
        failure = MapError("read map counts", "No such file or directory")
        session = Idle(failure)
        real_read = session.read

        def read() -> Sample:
            if session.readings == 1:
                reader.close()
            return real_read()

        session.read = read  # type: ignore[method-assign]
        with pytest.raises(MapError):
            run_programs(lambda: session, RunOptions(interval=0.01, output="json"), stream)
    assert session.closed
