"""What stays in memory while a monitor runs, and the most on the way there."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

from benchmarks.jobs import BCC, BPFTRACE, FRAME, JOBS, READING, by_bcc, by_bpftrace, ours
from benchmarks.measure import OURS, Result, Settings, say, take_turns
from benchmarks.peers import environment
from benchmarks.process import peak_to, running

TITLE = "Memory"

_LIMIT_MIB = 45.0
_SETTLED_SECONDS = 2.5  # two more refreshes at an interval of one second; no worker waits any more


def run(settings: Settings) -> Iterator[Result]:
    """For each monitor: PSS and RSS while it shows its table, PSS at the peak of a cold start."""
    with tempfile.TemporaryDirectory() as scratch:
        for job in JOBS:
            yield from _compare_resident(job, settings, environment(Path(scratch) / "warm"))
        for job in JOBS:
            yield _compare_peak(job, settings, Path(scratch) / "cold")


def _compare_resident(job: str, settings: Settings, env: Mapping[str, str]) -> Iterator[Result]:
    say(f"memory: {job}")
    full: dict[str, list[float]] = {}

    def weigh(name: str, command: list[str], until: str, terminal: bool) -> float:
        with running(command, until, env=env, terminal=terminal) as run:
            time.sleep(_SETTLED_SECONDS)
            full.setdefault(name, []).append(run.memory("Rss"))
            return run.memory("Pss")

    contenders: dict[str, Callable[[], float]] = {
        OURS: partial(weigh, OURS, ours(job), FRAME, True),
        BCC: partial(weigh, BCC, by_bcc(job, 1), READING[BCC], False),
    }
    if job != "xdp":
        trace = by_bpftrace(job, 1)
        contenders[BPFTRACE] = partial(weigh, BPFTRACE, trace, READING[BPFTRACE], False)
    rounds = take_turns(settings.rounds, contenders, warm_up=0)
    note = "PSS of all processes that stay, two refreshes after the first; ours draws a live table"
    yield Result(f"resident, {JOBS[job]}", "MiB", rounds, BCC, limit=_LIMIT_MIB, note=note)
    yield Result(f"resident, {JOBS[job]}, RSS", "MiB", full, BCC, note="shared pages in full")


def _compare_peak(job: str, settings: Settings, cache: Path) -> Result:
    say(f"memory: {job}, peak")
    env = environment(cache)

    def start_cold() -> float:
        shutil.rmtree(cache, ignore_errors=True)
        return peak_to(ours(job), FRAME, env=env, terminal=True)

    contenders: dict[str, Callable[[], float]] = {
        OURS: start_cold,
        BCC: partial(peak_to, by_bcc(job, 1), READING[BCC], env=env),
    }
    if job != "xdp":
        contenders[BPFTRACE] = partial(peak_to, by_bpftrace(job, 1), READING[BPFTRACE], env=env)
    rounds = take_turns(settings.rounds, contenders, warm_up=0)
    note = "most PSS of all its processes together, cold start to the first reading"
    return Result(f"peak, {JOBS[job]}", "MiB", rounds, BCC, note=note)
