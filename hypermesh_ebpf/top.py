"""``hmebpf top``: which programs of the host take how much CPU, live.

The kernel counts runs and their time while statistics are on
(:mod:`hypermesh_ebpf.bpf.statistics`).
"""

from __future__ import annotations

import errno
import os
import time
from dataclasses import dataclass
from typing import Any

from hypermesh_ebpf.bpf import info
from hypermesh_ebpf.bpf.statistics import Statistics
from hypermesh_ebpf.errors import HmebpfError, MissingPrivilege, describe_errno
from hypermesh_ebpf.host.object_names import name_program
from hypermesh_ebpf.host.objects import Objects, read_objects
from hypermesh_ebpf.metrics.sample import Event, Loss, Row, Sample, Start
from hypermesh_ebpf.monitors.declaration import Column, Monitor, Options

_WHAT, _REMEDY = "count the runs of this host's programs", "run it as root: `sudo hmebpf top`"
_SHORT_S = 0.05  # the last reading of a run may follow the one before within milliseconds
_ATTACHED_EVERY_S = 5.0  # what programs are attached to changes seldom and costs 20 ms to find


def _columns(options: Options) -> tuple[Column, ...]:
    return (
        Column("id", "id"),
        Column("type", "type"),
        Column("name", "name"),
        Column("cpu_percent", "cpu", "percent"),
        Column("runs_per_s", "runs/s", "rate"),
        Column("mean_ns", "mean", "ns"),
        Column("runs", "runs", "count"),
        Column("run_time_ns", "run time", "ns"),
        Column("attached", "attached to"),
    )


def _collector(options: Options, maps: Any) -> Any:
    raise NotImplementedError("top has no maps")  # it is no monitor of the ladder: see TopSession


MONITOR = Monitor(
    name="top",
    summary="CPU share, runs and mean run time of every BPF program of this host.",
    source="",
    rungs=(),
    collector=_collector,
    columns=_columns,
    key=lambda options: ("id", "type", "name"),
    headline="runs",  # no counters: rows come in their order, and rates are made here
)


@dataclass(frozen=True, slots=True)
class _Reading:
    """What a program had counted at a moment of the monotonic clock."""

    runs: int
    run_time_ns: int


class TopSession:
    """Statistics switched on, all programs read; for :func:`hypermesh_ebpf.run.run_programs`.

    Counts are from when it began.  A program that is unloaded meanwhile keeps what it had in the
    totals.  Raises MissingPrivilege, Unsupported.
    """

    def __init__(self, *, idle: bool = False) -> None:
        """``idle``: show programs that did not run, too."""
        self.monitor, self.options = MONITOR, {"events": False}
        self.rings: tuple[Any, ...] = ()
        self.guard = None
        self.target = "system"
        self._idle = idle
        self._statistics = Statistics(_WHAT, _REMEDY)
        try:
            self._begin: dict[int, _Reading] = {}
            self._last: dict[int, _Reading] = {}
            self._about: dict[int, tuple[str, str]] = {}
            self._attached: dict[int, str] = {}
            self._looked_at = float("-inf")
            self._ended = _Reading(0, 0)  # of programs that are gone
            self._began = self._read_at = time.monotonic()
            self._last = self._read_all()
            self._begin = dict(self._last)
        except BaseException:
            self.close()
            raise
        self.start = Start(time.time(), "top", self.target, ("statistics",), None, ())
        self._rows: list[dict[str, Any]] = []

    def events(self) -> list[Event]:
        """None ever."""
        return []

    def read(self) -> Sample:
        """A reading: rates and means are those of the last interval."""
        now = time.monotonic()
        span = now - self._read_at
        if span < _SHORT_S and self._rows:
            return self._sample(now)
        current = self._read_all()
        for number, last in self._last.items():
            if number not in current:
                begin = self._begin.pop(number, _Reading(0, 0))
                self._ended = _Reading(
                    self._ended.runs + last.runs - begin.runs,
                    self._ended.run_time_ns + last.run_time_ns - begin.run_time_ns,
                )
        self._look_again(now)
        self._rows = [
            self._make_row(number, reading, self._last.get(number), span)
            for number, reading in current.items()
        ]
        self._last, self._read_at = current, now
        return self._sample(now)

    def _make_row(
        self, number: int, reading: _Reading, last: _Reading | None, span: float
    ) -> dict[str, Any]:
        begin = self._begin.get(number, _Reading(0, 0))
        last = last or begin
        runs, spent = reading.runs - last.runs, reading.run_time_ns - last.run_time_ns
        kind, name = self._about[number]
        return {
            "id": number,
            "type": kind,
            "name": name,
            "cpu_percent": round(spent / span / 1e7, 3) if span else None,
            "runs_per_s": round(runs / span, 3) if span else None,
            "mean_ns": round(spent / runs, 1) if runs else None,
            "runs": reading.runs - begin.runs,
            "run_time_ns": reading.run_time_ns - begin.run_time_ns,
            "run_time_ns_per_s": round(spent / span, 3) if span else None,
            "attached": self._attached.get(number),
        }

    def _sample(self, now: float) -> Sample:
        rows = self._rows
        shown = [*rows] if self._idle else [row for row in rows if row["runs"]]
        shown.sort(key=lambda row: (-(row["run_time_ns_per_s"] or 0), -row["runs"], row["id"]))
        totals: Row = {
            "programs": len(rows),
            "cpu_percent": round(sum(row["cpu_percent"] or 0 for row in rows), 3),
            "runs": sum(row["runs"] for row in rows) + self._ended.runs,
            "runs_per_s": round(sum(row["runs_per_s"] or 0 for row in rows), 3),
            "run_time_ns": sum(row["run_time_ns"] for row in rows) + self._ended.run_time_ns,
            "run_time_ns_per_s": round(sum(row["run_time_ns_per_s"] or 0 for row in rows), 3),
        }
        return Sample(
            time.time(),
            "top",
            self.target,
            round(now - self._began, 3),
            totals,
            shown,
            Loss(0, 0, None),
        )

    def run_time_ns(self) -> int:
        """None: it runs no programs of its own."""
        return 0

    def sample_one_in(self, number: int) -> bool:
        """False: there is nothing to sample."""
        return False

    def _read_all(self) -> dict[int, _Reading]:
        """Every program's counters; none is held longer than that takes."""
        found = {}
        try:
            ids = list(info.each_id("program"))
        except PermissionError as error:
            raise _refused(error) from error
        for number in ids:
            try:
                fd = info.open_by_id("program", number)
            except FileNotFoundError:  # gone since the list was read
                continue
            try:
                found[number] = _Reading(*info.read_run_statistics(fd))
                if number not in self._about:
                    about = info.read_program(fd)
                    self._about[number] = (about.type, name_program(fd, about))
            finally:
                os.close(fd)
        return found

    def _look_again(self, now: float) -> None:
        """What the programs are attached to, from time to time and when new ones are there."""
        known = self._attached.keys() >= self._last.keys()
        if now - self._looked_at < _ATTACHED_EVERY_S and known:
            return
        self._looked_at = now
        objects: Objects = read_objects()
        self._attached = {
            each.id: " ".join(map(str, each.attachments)) for each in objects.programs or ()
        }

    def close(self) -> None:
        """Switch statistics off, if nobody else has them on."""
        self._statistics.close()

    def __enter__(self) -> TopSession:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _refused(error: OSError) -> HmebpfError:
    return MissingPrivilege(
        _WHAT,
        f"{describe_errno(error.errno or errno.EPERM)}: needs CAP_SYS_ADMIN",
        _REMEDY,
        errno=error.errno,
    )
