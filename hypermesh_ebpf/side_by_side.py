"""Calls that spend their time in the kernel, several at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence


def call_side_by_side(calls: Sequence[Callable[[], object]], threads: int) -> None:
    """Make all of these calls in up to so many threads, in their order as threads get free.

    All are made, whatever becomes of the others; then the first one's error is raised that failed.
    """
    if len(calls) < 2 or threads < 2:
        for each in calls:
            each()
        return
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

    workers = [threading.Thread(target=work) for _ in range(min(threads, len(calls)))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if errors:
        raise errors[min(errors)]
