"""Rounds, medians, and the values that a line of the table is made of."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

OURS = "hmebpf"


@dataclass(frozen=True, slots=True)
class Settings:
    """How thoroughly to measure: ``rounds`` of each contender, the median of which counts."""

    rounds: int = 5


@dataclass(frozen=True, slots=True)
class Result:
    """One line: what was measured in which unit, every round of every contender.

    ``against`` is the contender that ours is compared with.  ``budget`` is what ours divided by
    that one may be at most - at least, where more is better; ``limit`` is the same for our figure
    itself, in its unit.  ``ours`` is the name of our contender where one line has several of ours.
    """

    what: str
    unit: str
    rounds: Mapping[str, Sequence[float]]
    against: str | None = None
    budget: float | None = None
    limit: float | None = None
    more_is_better: bool = False
    note: str = ""
    ours: str = OURS

    def median(self, contender: str) -> float:
        """The middle one of a contender's rounds."""
        return statistics.median(self.rounds[contender])

    @property
    def ratio(self) -> float | None:
        """Ours divided by the contender's that it is compared with; None where there is none."""
        if self.against is None or self.ours not in self.rounds:
            return None
        other = self.median(self.against)
        return self.median(self.ours) / other if other else None

    @property
    def met(self) -> bool | None:
        """Whether the line's budgets are met; None where it has none."""
        checks = []
        if self.budget is not None:
            ratio = self.ratio
            checks.append(ratio is not None and self._within(ratio, self.budget))
        if self.limit is not None:
            checks.append(self._within(self.median(self.ours), self.limit))
        return all(checks) if checks else None

    def _within(self, figure: float, bound: float) -> bool:
        return figure >= bound if self.more_is_better else figure <= bound


@dataclass(frozen=True, slots=True)
class Growth:
    """A table of its own: how figures of ours grow with a number.

    ``steps`` are the numbers, of ``counted`` ("interfaces"); ``columns`` give for each figure its
    unit and one value a step, None where there is none.  ``note`` says what is linear in the number
    and what is constant.
    """

    what: str
    counted: str
    steps: Sequence[int]
    columns: Mapping[str, tuple[str, Sequence[float | None]]]
    note: str

    @property
    def met(self) -> bool | None:
        """It has no budget."""
        return None


@dataclass(slots=True)
class Rounds:
    """Contenders that take turns: each is called once a round and returns its figure."""

    contenders: Mapping[str, Callable[[], float]]
    figures: dict[str, list[float]] = field(default_factory=dict)

    def run(self, rounds: int, *, warm_up: int = 1) -> dict[str, list[float]]:
        """Every contender's figures.  The first ``warm_up`` rounds do not count."""
        for number in range(warm_up + rounds):
            for name, measure in self.contenders.items():
                figure = measure()
                if number >= warm_up:
                    self.figures.setdefault(name, []).append(figure)
        return self.figures


def take_turns(
    rounds: int, contenders: Mapping[str, Callable[[], float]], *, warm_up: int = 1
) -> dict[str, list[float]]:
    """Figures of contenders called alternately, ``rounds`` times each after ``warm_up`` more."""
    return Rounds(contenders).run(rounds, warm_up=warm_up)


def seconds(action: Callable[[], object]) -> float:
    """How long a call takes."""
    begin = time.perf_counter()
    action()
    return time.perf_counter() - begin


def say(text: str) -> None:
    """Progress, on stderr: the table is stdout's."""
    print(f"bench: {text}", file=sys.stderr, flush=True)
