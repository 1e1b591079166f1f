"""One run of a monitor, from the command line's options to its exit status."""

from __future__ import annotations

import os
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from types import FrameType
from typing import TYPE_CHECKING, Protocol, TextIO

from hypermesh_ebpf.errors import HmebpfError, LossSeen
from hypermesh_ebpf.metrics.sample import End, Event, Loss, Overhead, Sample, Start
from hypermesh_ebpf.monitors.declaration import Monitor, Options
from hypermesh_ebpf.opening import Opening
from hypermesh_ebpf.output.sink import OutputClosed, Sink, open_sink
from hypermesh_ebpf.pace import Pace

if TYPE_CHECKING:
    from hypermesh_ebpf.guard import Guard
    from hypermesh_ebpf.overhead import Limit

_LONGEST_SECONDS = 3600.0  # poll(2) counts milliseconds in an int: 24 days


@dataclass(frozen=True, slots=True)
class RunOptions:
    """The options that every monitor has: see ``hmebpf MONITOR --help``.  Times in seconds."""

    interval: float = 1.0
    duration: float | None = None
    count: int | None = None
    output: str = "table"
    top: int = 20
    events: bool = False
    fail_on_loss: bool = False
    rung: str | None = None
    use_cache: bool = True
    verbose: int = 0
    max_overhead: float | None = None  # percent of one CPU


class Watched(Protocol):
    """What a run needs of a session."""

    start: Start

    @property
    def monitor(self) -> Monitor: ...

    @property
    def options(self) -> Options: ...

    @property
    def target(self) -> str | list[str]: ...

    @property
    def rings(self) -> Sequence[Buffer]:
        """Buffers that become readable when events come."""
        ...

    @property
    def guard(self) -> Guard | None: ...

    def events(self) -> Sequence[Event]: ...

    def read(self) -> Sample: ...

    def run_time_ns(self) -> int:
        """What its programs have taken of the CPUs, by run statistics."""
        ...

    def sample_one_in(self, number: int) -> bool:
        """Take only one event in so many; False where that cannot be done."""
        ...

    def close(self) -> None: ...


class Buffer(Protocol):
    """Something to poll; ``fill`` is the share of it, 0 to 1, that the last read found in use."""

    @property
    def fill(self) -> float: ...

    def fileno(self) -> int: ...


class Stop:
    """SIGINT and SIGTERM as a state: ``reason`` is None until one came.

    While a session is opened they interrupt (KeyboardInterrupt); while it runs they make
    ``fileno()`` readable, so that the last reading is taken in order.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self.interrupts = True
        self._read, self._write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def fileno(self) -> int:
        return self._read

    def handle(self, number: int, frame: FrameType | None) -> None:
        self.reason = "interrupt" if number == signal.SIGINT else "terminated"
        if self.interrupts:
            raise KeyboardInterrupt
        try:
            os.write(self._write, b"!")
        except BlockingIOError:
            return  # a full pipe is readable enough

    @contextmanager
    def installed(self) -> Iterator[Stop]:
        before = {number: signal.signal(number, self.handle) for number in _SIGNALS}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            os.close(self._read)
            os.close(self._write)


_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def run_monitor(monitor: Monitor, options: Options, run: RunOptions, stream: TextIO) -> None:
    """Open, show until the run is over, close.  Raises any HmebpfError.

    A reader of the output that went away ends the run quietly.  Raises LossSeen at the end when
    something was lost and the user asked to be told.
    """
    with Stop().installed() as stop, _limited(run) as limit:
        try:
            opening = Opening(monitor, options, run.use_cache, run.rung, sampled=limit is not None)
            try:
                sink = _open_sink(monitor, options, run, stream, stop)
            except BaseException:
                opening.cancel()
                raise
            session = opening.finish(lambda kind, text: report(run, kind, text))
        except KeyboardInterrupt:
            return
        lost = _show(session, sink, run, stop, limit)
    _complain(monitor, run, lost)


def run_programs(open_session: Callable[[], Watched], run: RunOptions, stream: TextIO) -> None:
    """The same for what is known when it is opened: a user's own programs, or the whole host."""
    with Stop().installed() as stop, _limited(run) as limit:
        try:
            session = open_session()
            run = replace(run, events=run.events and bool(session.rings))
            try:
                sink = _open_sink(session.monitor, session.options, run, stream, stop)
            except BaseException:
                session.close()
                raise
        except KeyboardInterrupt:
            return
        lost = _show(session, sink, run, stop, limit)
    _complain(session.monitor, run, lost)


@contextmanager
def _limited(run: RunOptions) -> Iterator[Limit | None]:
    """The limit that was asked for: where it cannot be kept, nothing is attached at all."""
    if run.max_overhead is None:
        yield None
        return
    from hypermesh_ebpf.overhead import Limit

    with closing(Limit(run.max_overhead)) as limit:
        yield limit


def _show(
    session: Watched, sink: Sink, run: RunOptions, stop: Stop, limit: Limit | None
) -> str | None:
    """Until the run is over; what was lost.  Raises OverheadExceeded when all is taken off."""
    stop.interrupts = False
    try:
        with closing(session):
            loop = _Loop(session, sink, run, stop, limit)
            lost = loop.run()
    finally:
        sink.close()
    if limit is not None and loop.exceeded:
        raise limit.error()
    return lost


def _complain(monitor: Monitor, run: RunOptions, lost: str | None) -> None:
    if lost and run.fail_on_loss:
        raise LossSeen(
            f"watch with {monitor.name}: {lost}",
            "--fail-on-loss was given",
            "watch less (filters), or read faster (a pipe to a file instead of a terminal)",
        )


def _open_sink(
    monitor: Monitor, options: Options, run: RunOptions, stream: TextIO, stop: Stop
) -> Sink:
    return open_sink(
        run.output,
        monitor,
        options,
        interval=run.interval,
        top=run.top,
        stream=stream,
        show_events=run.events,
        stopping=lambda: stop.reason is not None,
        limited=run.max_overhead is not None,
    )


def report(run: RunOptions, kind: str, text: str) -> None:
    """Progress is for a person who waits; what degrades is for everybody."""
    if sys.stderr is None:  # closed by the shell; print() would take stdout instead
        return
    if kind == "note" or run.verbose or sys.stderr.isatty():
        print(f"hmebpf: {text}", file=sys.stderr, flush=True)


class _Loop:
    """Samples at fixed times, events as they come, until something ends the run."""

    def __init__(
        self, session: Watched, sink: Sink, run: RunOptions, stop: Stop, limit: Limit | None
    ) -> None:
        self._session, self._sink, self._run, self._stop = session, sink, run, stop
        self._limit, self.exceeded = limit, False
        self._shows_events = session.monitor.events == "always" or run.events
        self._pace = Pace()
        self._counted = Loss(None, None, None)  # by the kernel, as of the last reading
        if limit is not None:
            limit.watch(session, self._note)

    def run(self) -> str | None:
        """Run to the end; what was lost, in words, or None."""
        try:
            self._sink.start(self._session.start)
            self._end(self._watch())
        except OutputClosed:
            pass  # nobody reads any more, which is no failure of ours
        except HmebpfError:
            with suppress(OutputClosed):
                self._end("error")
            raise
        return self._lost()

    def _watch(self) -> str:
        """Until the run is over; why it is."""
        run, begin = self._run, time.monotonic()
        finish = begin + run.duration if run.duration is not None else None
        due, shown = begin + run.interval, 0
        while True:
            wake = due if finish is None else min(due, finish)
            reason = self._wait(wake)
            over = reason or ("duration" if finish is not None and wake == finish else None)
            self._take_events()
            self._show()
            shown += 1
            if over is None and run.count is not None and shown >= run.count:
                over = "count"
            if over:
                return over
            # A machine that slept, or an output that blocked, skips refreshes, it does not catch
            # up.
            due = max(due + run.interval, time.monotonic())

    def _wait(self, wake: float) -> str | None:
        """As :meth:`_await`, and meanwhile see to it that the programs keep to their limit."""
        while self._limit is not None and self._limit.due < wake:
            if reason := self._await(self._limit.due):
                return reason
            if not self._limit.check():
                self.exceeded = True
                return "overhead"
        return self._await(wake)

    def _await(self, wake: float) -> str | None:
        """Hand events on until it is time to wake; why the run is over, if it is."""
        poll = select.poll()
        poll.register(self._stop.fileno(), select.POLLIN)
        for ring in self._session.rings:
            poll.register(ring.fileno(), select.POLLIN)
        guard = self._session.guard
        if guard is not None:
            poll.register(guard.fileno(), select.POLLIN)
        pace = self._pace
        while (left := wake - time.monotonic()) > 0:
            ready = {fd for fd, _event in poll.poll(min(left, _LONGEST_SECONDS) * 1000)}
            if self._stop.reason:
                return self._stop.reason
            if guard is not None and guard.fileno() in ready:
                poll.unregister(guard.fileno())
                guard.replace_if_dead()
                poll.register(guard.fileno(), select.POLLIN)
            elif ready:
                began = time.monotonic()
                self._take_events()
                fill = max((ring.fill for ring in self._session.rings), default=0.0)
                if seconds := pace.pause(began, fill, time.monotonic()):
                    pause = select.poll()
                    pause.register(self._stop.fileno(), select.POLLIN)
                    pause.poll(seconds * 1000)
        return self._stop.reason

    def _take_events(self) -> None:
        events = self._session.events()
        if events and self._shows_events:
            self._sink.events(events)

    def _show(self) -> None:
        sample = self._session.read()
        self._counted = sample.loss
        self._sink.sample(replace(sample, loss=self._loss(), overhead=self._overhead()))

    def _end(self, reason: str) -> None:
        name, target = self._session.monitor.name, self._session.target
        self._sink.end(End(time.time(), name, target, reason, self._loss(), self._overhead()))

    def _overhead(self) -> Overhead | None:
        return None if self._limit is None else self._limit.value()

    def _note(self, text: str) -> None:
        """Say it on stderr, unless that would tear a live table, which shows it anyway."""
        live = self._run.output == "table" and sys.stdout is not None and sys.stdout.isatty()
        if not (live and sys.stderr is not None and sys.stderr.isatty()):
            report(self._run, "note", text)

    def _loss(self) -> Loss:
        """What the kernel could not hand to us, and what the sink could not hand on."""
        counted, unwritten = self._counted, self._sink.lost
        if not unwritten:
            return counted
        return replace(counted, events_lost=(counted.events_lost or 0) + unwritten)

    def _lost(self) -> str | None:
        """The losses in words; None if nothing is known to be lost."""
        counts = self._loss().as_dict()
        lost = [f"{name.replace('_', ' ')} {n}" for name, n in counts.items() if n]
        return ", ".join(lost) or None
