"""One member of many values at a time: lists of numbers out of bytes, without a loop in Python.

A number costs 10 ns to take out, and 30 ns to add to another CPU's.  That is as fast as numpy makes
lists (the integers themselves are what takes the time), so numpy is not imported for rows; what it
is better at, arrays, is in :mod:`hypermesh_ebpf.bpf.columns`.
"""

from __future__ import annotations

import gc
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from operator import add
from typing import Any

_NUMBERS = frozenset("bBhHiIqQfd?")
MANY = 1000
"""From so many rows on, making them goes on without the garbage collector."""


def take(raw: bytes | memoryview, code: str, offset: int, stride: int) -> list[Any]:
    """What the struct module's ``code`` finds at ``offset`` of each ``stride`` bytes of ``raw``."""
    size = struct.calcsize("=" + code)
    if code in _NUMBERS and not offset % size and not stride % size:
        view: Any = memoryview(raw)
        numbers: list[Any] = view.cast(code)[offset // size :: stride // size].tolist()
        return numbers
    each = struct.iter_unpack(f"={offset}x{code}{stride - offset - size}x", raw)
    return [item for (item,) in each]


def take_sums(
    raw: bytes | memoryview, code: str, offset: int, stride: int, copies: int
) -> list[Any]:
    """The same of per-CPU values, ``copies`` in a row of ``stride`` bytes each, added up."""
    whole = stride * copies
    each = [take(raw, code, offset + at, whole) for at in range(0, whole, stride)]
    if copies == 1:
        return each[0]
    return list(map(add, *each)) if copies == 2 else list(map(sum, zip(*each, strict=True)))


@contextmanager
def uncollected(rows: int) -> Iterator[None]:
    """No garbage collection inside, where many rows are made.

    They hold no cycles, and the collector would walk over all that are made already, again and
    again: three quarters of the time that 100,000 take.
    """
    if rows < MANY or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
