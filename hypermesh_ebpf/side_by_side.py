"""Calls that spend their time in the kernel, several at a time; and one in a thread of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

Result = TypeVar("Result")


def call_side_by_side(calls: Sequence[Callable[[], object]], threads: int) -> None:
    """Make all of these calls in up to so many threads, in their order as threads get free.

    All are made, whatever becomes of the others, in this thread alone where there can be no others;
    then the first one's error is raised that failed.
    """
    following = iter(enumerate(calls))
    turn = threading.Lock()
    errors: dict[int, BaseException] = {}

    def work() -> None:
        while True:
            with turn:
                number, call = next(following, (-1, None))
            if call is None:
                return
            try:
                call()
            except BaseException as error:  # noqa: BLE001  # raised below, by the caller's thread
                errors[number] = error

    workers: list[threading.Thread] = []
    for _ in range(min(threads, len(calls)) - 1):
        worker = threading.Thread(target=work)
        try:
            worker.start()
        except RuntimeError:  # no more threads for this user or this control group
            break
        workers.append(worker)
    work()
    for worker in workers:
        worker.join()
    if errors:
        raise errors[min(errors)]


def call_apart(call: Callable[[], Result]) -> Result:
    """The result of a call in a thread that ends with it, and so do its mounts; or its error."""
    results: list[Result] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            results.append(call())
        except BaseException as error:  # noqa: BLE001  # raised below, by the caller's thread
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]
