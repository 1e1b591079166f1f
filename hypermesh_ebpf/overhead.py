"""``--max-overhead``: what a session's programs may cost, and what is done where they cost more.

Cost is the time that the kernel's run statistics count for them, all together, as a share of one
CPU.  :class:`Governor` decides, from shares alone; :class:`Limit` measures them once a second,
however seldom samples are shown, and carries out what was decided.  docs/overhead.md has the why.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

from hypermesh_ebpf.bpf.statistics import Statistics
from hypermesh_ebpf.errors import OverheadExceeded, Unsupported
from hypermesh_ebpf.metrics.sample import Overhead
from hypermesh_ebpf.monitors.declaration import Monitor

WINDOW_S = 1.0
"""Shares are averages over this time."""
LOWEST = 64
"""No less than one event in so many is taken: passing over has its own cost, and below this there
is hardly any to save."""
_OVER, _OVER_TO_STOP = 2, 5  # windows in a row, so that one of them is never enough
_UNDER = 5
_HEADROOM = 0.75  # of the limit: what is expected to be used when more is taken again
_FILTERS = ("pid", "comm", "uid")


class Governor:
    """How many events are to be taken, by what the programs cost in one window after another.

    ``one_in`` is a power of two: 1 for every event.  What ``can_sample`` is False for has to stop
    where something else would pass over events.
    """

    def __init__(self, most: float, *, can_sample: bool) -> None:
        """``most``: percent of one CPU."""
        self.one_in = 1
        self.excess = 0.0  # the average of the last windows that were over the limit
        self._most, self._lowest = most, LOWEST if can_sample else 1
        self._over: list[float] = []
        self._under: deque[float] = deque(maxlen=_UNDER)

    def judge(self, percent: float) -> bool:
        """Take a window into account; False if the programs have to go."""
        if percent > self._most:
            self._under.clear()
            self._over.append(percent)
            self.excess = sum(self._over) / len(self._over)
            if self.one_in < self._lowest:
                if len(self._over) >= _OVER:
                    times = min(self.excess / self._most, float(self._lowest))
                    self._take(self.one_in << math.ceil(math.log2(times)))
                return True
            return len(self._over) < _OVER_TO_STOP
        self._over.clear()
        self._under.append(percent)
        if self.one_in > 1 and len(self._under) == _UNDER:
            # Passing over costs as well, so that twice the events cost less than twice as much.
            room = _HEADROOM * self._most / max(*self._under, 1e-9)
            if room >= 2:
                self._take(max(self.one_in >> int(math.log2(room)), 1))
        return True

    def _take(self, one_in: int) -> None:
        self.one_in = min(one_in, self._lowest)
        self._over.clear()
        self._under.clear()


class Limited(Protocol):
    """What is needed of a session that is to be limited."""

    @property
    def monitor(self) -> Monitor: ...

    def run_time_ns(self) -> int: ...

    def sample_one_in(self, number: int) -> bool: ...


class Limit:
    """The limit of one run: made before anything is attached, then told what to :meth:`watch`.

    Raises MissingPrivilege or Unsupported where run statistics cannot be had.
    """

    def __init__(
        self,
        most: float,
        statistics: Statistics | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.most = most
        self.due = math.inf
        self._statistics = statistics or Statistics(
            f"limit the overhead to {show(most)} %",
            "run it as root, or without --max-overhead; or let statistics be on for good: "
            "`sudo sysctl kernel.bpf_stats_enabled=1`",
        )
        self._clock = clock
        self._percent: float | None = None
        self._estimated = False

    def watch(self, session: Limited, say: Callable[[str], None]) -> None:
        """Begin to measure; ``say`` is told what changes."""
        self._session, self._say = session, say
        self._can_sample = session.sample_one_in(1)
        self._governor = Governor(self.most, can_sample=self._can_sample)
        self._read_at, self._spent_ns = self._clock(), session.run_time_ns()
        self.due = self._read_at + WINDOW_S

    def check(self) -> bool:
        """Measure, at :attr:`due`; False if the session has to stop.

        Raises Unsupported if somebody has switched statistics off; MapError.
        """
        if not self._statistics.are_on():
            raise Unsupported(
                f"limit the overhead to {show(self.most)} %",
                "kernel.bpf_stats_enabled was set to 0, so that nothing is measured any more",
                "let it be on (`sudo sysctl kernel.bpf_stats_enabled=1`), or run hmebpf as root",
            )
        now, spent_ns = self._clock(), self._session.run_time_ns()
        # Less than before where a chain of programs was made anew.
        self._percent = max(spent_ns - self._spent_ns, 0) / (now - self._read_at) / 1e7
        self._read_at, self._spent_ns = now, spent_ns
        self.due = now + WINDOW_S
        before = self._governor.one_in
        goes_on = self._governor.judge(self._percent)
        if self._governor.one_in != before:
            self._sample()
        return goes_on

    def value(self) -> Overhead:
        """What the next sample has to tell."""
        percent = None if self._percent is None else round(self._percent, 3)
        return Overhead(percent, self.most, 1 / self._governor.one_in, self._estimated)

    def error(self) -> OverheadExceeded:
        """Why the session was stopped."""
        took, most = show(self._governor.excess), show(self.most)
        monitor = self._session.monitor
        if self._can_sample:
            how = f"though they looked at 1 event in {self._governor.one_in} only"
            filters = [f"--{each.name}" for each in monitor.options if each.name in _FILTERS]
            less = f"filter ({', '.join(filters)})" if filters else "watch fewer interfaces"
        else:
            how = "and programs of your own cannot be sampled"
            less = "attach them to something that happens less often"
        return OverheadExceeded(
            f"watch with {monitor.name}",
            f"its programs took {took} % of a CPU, more than --max-overhead {most}, {how}",
            f"allow more (`--max-overhead {_round_up(self._governor.excess)}`), or {less}; "
            "a longer --interval does not help",
        )

    def close(self) -> None:
        """Switch statistics off."""
        self._statistics.close()

    def _sample(self) -> None:
        one_in, percent = self._governor.one_in, show(self._percent or 0.0)
        self._session.sample_one_in(one_in)
        self._estimated = True
        taken = "every event is taken again"
        if one_in > 1:
            taken = f"1 event in {one_in} is taken from here on, and counts are estimates"
        self._say(
            f"its programs take {percent} % of a CPU (--max-overhead {show(self.most)}): {taken}"
        )


def show(percent: float) -> str:
    """Three digits of it: "0.0123", "3.21", "123"."""
    return f"{percent:.3g}" if percent < 100 else f"{percent:.0f}"


def _round_up(percent: float) -> str:
    """A limit with some room above what was measured, in one or two digits."""
    step = 10.0 ** math.floor(math.log10(percent))
    return show(math.ceil(percent * 1.2 / step) * step)
