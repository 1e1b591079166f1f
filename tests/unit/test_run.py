"""The loop between a session and a sink, with a session that reads nothing."""

from __future__ import annotations

import io
import itertools
import json
import os
import time
from typing import Any

import pytest

from hypermesh_ebpf import monitors
from hypermesh_ebpf.bpf.statistics import Statistics
from hypermesh_ebpf.errors import MapError, MissingPrivilege, OverheadExceeded
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

    def run_time_ns(self) -> int:
        return 0

    def sample_one_in(self, number: int) -> bool:
        return False

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


class Off(Statistics):
    """Statistics that nobody had to switch on."""

    def __init__(self, what: str, remedy: str) -> None:
        pass

    def are_on(self) -> bool:
        return True

    def close(self) -> None:
        pass


def test_overhead_is_looked_at_however_long_the_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    """It stops with a last sample, an end line and an error, long before the first refresh."""
    monkeypatch.setattr("hypermesh_ebpf.overhead.Statistics", Off)
    monkeypatch.setattr("hypermesh_ebpf.overhead.WINDOW_S", 0.01)
    session, stream = Idle(), io.StringIO()
    spent = itertools.count(0, 10**12)
    session.run_time_ns = lambda: next(spent)  # type: ignore[method-assign]
    run = RunOptions(interval=3600, output="json", max_overhead=1)
    with pytest.raises(OverheadExceeded, match="programs of your own cannot be sampled"):
        run_programs(lambda: session, run, stream)
    assert session.closed
    start, sample, end = (json.loads(line) for line in stream.getvalue().splitlines())
    assert [each["type"] for each in (start, sample, end)] == ["start", "sample", "end"]
    assert end["reason"] == "overhead"
    assert sample["overhead"] == end["overhead"]


def test_what_cannot_be_limited_is_not_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(what: str, remedy: str) -> None:
        raise MissingPrivilege(what, "needs CAP_SYS_ADMIN", remedy)

    monkeypatch.setattr("hypermesh_ebpf.overhead.Statistics", refuse)
    with pytest.raises(MissingPrivilege, match="limit the overhead to 1 %"):
        run_programs(pytest.fail, RunOptions(max_overhead=1), io.StringIO())  # type: ignore


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
