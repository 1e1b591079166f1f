"""Calls made side by side: all of them, and the first error of those that failed."""

from __future__ import annotations

import threading
from functools import partial

import pytest

from hypermesh_ebpf.side_by_side import call_side_by_side


@pytest.mark.parametrize("threads", [1, 2, 40])
@pytest.mark.parametrize("number", [0, 1, 2, 97])
def test_every_call_is_made_once(number: int, threads: int) -> None:
    made: list[int] = []
    call_side_by_side([partial(made.append, each) for each in range(number)], threads)
    assert sorted(made) == list(range(number))


def test_two_are_under_way_at_once() -> None:
    meeting = threading.Barrier(2)
    call_side_by_side([partial(meeting.wait, 60)] * 2, 2)


def test_the_first_error_is_raised_when_all_are_over() -> None:
    made: list[int] = []

    def fail(number: int) -> None:
        raise ValueError(number)

    calls = [partial(made.append, 0), partial(fail, 1), partial(fail, 2), partial(made.append, 3)]
    with pytest.raises(ValueError, match="1"):
        call_side_by_side(calls, 2)
    assert sorted(made) == [0, 3]
