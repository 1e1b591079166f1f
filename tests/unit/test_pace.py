"""The pauses between two readings of a buffer follow the speed at which it fills."""

from __future__ import annotations

import pytest

from hypermesh_ebpf.pace import LONGEST_S, Pace


def fills_met(seconds_to_fill: float, *, work: float = 0.0, times: int = 60) -> list[float]:
    """How full a reader finds a buffer that is full after so many seconds, from silence on.

    ``work`` is how long it takes to deal with a full one.
    """
    pace, now, emptied, found = Pace(), 100.0, 100.0, []
    for _ in range(times):
        began = now
        fill = min((now - emptied) / seconds_to_fill, 1.0)
        emptied = began
        now += work * fill + 1e-5
        found.append(fill)
        now += pace.pause(began, fill, now)
    return found


@pytest.mark.parametrize("seconds_to_fill", [0.004, 0.01, 0.03, 0.1, 1.0])
def test_a_buffer_that_fills_fast_is_never_full(seconds_to_fill: float) -> None:
    assert max(fills_met(seconds_to_fill)) <= 0.5


def test_time_spent_on_events_is_part_of_the_pause() -> None:
    """A reader that needs half the time itself keeps up, without pausing in between."""
    assert max(fills_met(0.01, work=0.005)) <= 0.75


def test_a_steady_trickle_is_read_every_20_ms() -> None:
    gaps = [fill * 1e6 for fill in fills_met(1e6)]
    assert gaps[-1] == pytest.approx(LONGEST_S, abs=1e-4)
    assert max(gaps) <= LONGEST_S + 1e-4


def test_after_a_silence_the_reader_comes_back_soon() -> None:
    pace = Pace()
    now = 0.0
    for _ in range(20):
        now += pace.pause(now, 1e-6, now)
    assert pace.pause(now, 1e-6, now) == pytest.approx(LONGEST_S)
    now += 5
    assert pace.pause(now, 1e-6, now) <= 0.002


def test_a_full_buffer_is_read_again_at_once() -> None:
    pace = Pace()
    pace.pause(0.0, 0.1, 0.0)
    assert pace.pause(0.003, 1.0, 0.003) == 0.0
