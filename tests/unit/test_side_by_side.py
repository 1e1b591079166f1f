"""Calls made side by side: all of them, and the first error of those that failed."""

from __future__ import annotations

import threading
from functools import partial

import pytest

from hypermesh_ebpf.side_by_side import call_apart, call_side_by_side


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


@pytest.mark.parametrize("allowed", [0, 1])
def test_calls_are_made_where_there_are_no_more_threads(
    monkeypatch: pytest.MonkeyPatch, allowed: int
) -> None:
    start, started = threading.Thread.start, []

    def start_some(thread: threading.Thread) -> None:
        if len(started) == allowed:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_some)
    made: list[int] = []
    call_side_by_side([partial(made.append, each) for each in range(7)], 4)
    assert sorted(made) == list(range(7))


def test_apart_is_another_thread() -> None:
    assert call_apart(threading.get_ident) != threading.get_ident()
    with pytest.raises(ZeroDivisionError):
        call_apart(lambda: 1 // 0)
