"""Records of a ring buffer by numpy: found all at once, and cut into columns.

Where all records of a stretch have one size, their headers are a strided view, and so is every
member.  Where sizes are mixed, a header tells where the next one is, and following them one by one
costs 100 times as much.  But a header also holds the number of its page, counted from the start of
the kernel's own structure (``pg_off``), so of the places where one may be - every 8 bytes - almost
none but the true ones have the right number there.  Those few are what is followed, at once: if
each place plus its length gives the next one, all are true, because the first is.  A payload that
happens to look like a header is skipped by what comes before it.  So the number only saves time: if
a kernel counts in another way, the records are followed one by one.

:mod:`hypermesh_ebpf.bpf.ring` has the reasons for the order of loads.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from typing import Any

import numpy as np

from hypermesh_ebpf.bpf.ring_mapping import BUSY, DISCARD, HEADER, LENGTH, RingMapping

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, slots=True)
class Records:
    """Where records begin in a stretch, in units of 8 bytes, and how long they are.

    The discarded ones are left out.  ``lengths`` is one number where all have the same.
    """

    places: slice | Array
    lengths: int | Array
    count: int


def find_records(ring: RingMapping, first: int, length: int) -> tuple[Records, int]:
    """The records of a stretch; a Finder of :mod:`hypermesh_ebpf.bpf.ring_mapping`."""
    words = np.frombuffer(ring.words, np.uint32)
    header = int(words[first >> 2])
    if header & BUSY:
        return Records(slice(0, 0), 0, 0), 0
    size = header & LENGTH
    step = size + 15 >> 3 << 3
    most = -(-length // step)
    headers, same = _look(words, first, min(_FEW, most), size)
    if same == _FEW < most:
        headers, same = _look(words, first, most, size)
    if same == most or same >= max(_FEW, most // 4):
        kept = headers[:same] < DISCARD
        if kept.all():
            return Records(slice(0, same * step >> 3, step >> 3), size, same), same * step
        places = kept.nonzero()[0] * (step >> 3)
        return Records(places, size, len(places)), same * step
    places, headers, end = _follow(ring, words, first, length)
    kept = headers < DISCARD
    if not kept.all():
        places, headers = places[kept], headers[kept]
    return Records(places, headers, len(places)), end


_FEW = 64  # headers: a look at some tells whether to look at all
_MOST_ROUNDS = 32


def _look(words: Array, first: int, count: int, size: int) -> tuple[Array, int]:
    """``count`` headers, if all records have one size; how many of them, from the first on, have.

    Each is loaded once.
    """
    step = size + 15 >> 3 << 1
    headers = words[first >> 2 : (first >> 2) + count * step : step].copy()
    alike = headers & ~np.uint32(DISCARD) == size
    return headers, count if alike.all() else int(alike.argmin())


def _follow(ring: RingMapping, words: Array, first: int, length: int) -> tuple[Array, Array, int]:
    """Records of mixed sizes: places, headers, and how many bytes they take."""
    begin, end = first >> 3, (first + length) >> 3  # in units of 8 bytes
    found = _find_likely(ring, words, begin, end)
    headers = words[2 * found]  # each is loaded once, here
    following = found + ((headers & LENGTH) + 15 >> 3)
    true = _pick_true(found, headers, following, end)
    if true is None:
        return _follow_singly(ring, first, length)
    found, headers, following = true
    busy = headers >= BUSY
    if busy.any():
        count = int(busy.argmax())
        found, headers, following = found[:count], headers[:count], following[:count]
    if not len(found):
        return found, headers, 0
    return found - begin, headers, (int(following[-1]) - begin) * 8


def _find_likely(ring: RingMapping, words: Array, begin: int, end: int) -> Array:
    """Places where a header may be: those that hold their page's number, the first at least."""
    per_page = mmap.PAGESIZE >> 3
    pages = np.arange(begin // per_page, -(-end // per_page))
    numbers = words.reshape(-1, 2 * per_page)[pages[0] : pages[-1] + 1, 1::2]
    base = int(words[2 * begin + 1]) - begin // per_page
    expected = (pages % (ring.size // mmap.PAGESIZE) + base).astype(np.uint32)
    likely = (numbers == expected[:, None]).ravel()
    start = int(pages[0]) * per_page
    found: Array = likely[begin - start : end - start].nonzero()[0] + begin
    return found


def _pick_true(
    found: Array, headers: Array, following: Array, end: int
) -> tuple[Array, Array, Array] | None:
    """Those places, their headers and where they lead, that are on the way from the first.

    What lies between a place and the one it leads to is false.  That holds for the first place that
    does not lead to the next, because it is true; for later ones it is a guess, which is why all is
    checked in the end.  None where the places do not tell, or not soon.
    """
    for _round in range(_MOST_ROUNDS):
        wrong = (following[:-1] != found[1:]).nonzero()[0]
        if not len(wrong):
            return (found, headers, following) if following[-1] >= end else None
        heads = wrong[np.diff(wrong, prepend=-2) > 1]
        targets = found.searchsorted(following[heads])
        if (targets <= heads + 1).any():
            return None
        reached = np.maximum.accumulate(targets)
        apart = np.append(True, heads[1:] >= reached[:-1])
        heads, targets = heads[apart], targets[apart]
        # +1 where a stretch of false places begins, -1 where it ends
        edges = np.zeros(len(found) + 1, np.int8)
        edges[heads + 1] = 1
        edges[targets] -= 1
        true = (np.cumsum(edges[:-1], dtype=np.int8) == 0).nonzero()[0]
        found, headers, following = found.take(true), headers.take(true), following.take(true)
    return None


def _follow_singly(ring: RingMapping, first: int, length: int) -> tuple[Array, Array, int]:
    words, position, end = ring.words, first >> 2, (first + length) >> 2
    places, headers = [], []
    while position < end:
        header = words[position]
        if header & BUSY:
            break
        places.append(position)
        headers.append(header)
        position += (header & LENGTH) + 15 >> 3 << 1
    found = (np.array(places, np.int64) - (first >> 2)) >> 1
    return found, np.array(headers, np.uint32), position * 4 - first


def lay_over(
    raw: bytes, records: Records, dtype: np.dtype[Any]
) -> tuple[Array, slice | Array, int]:
    """A stretch seen through ``dtype`` at every 8 bytes, and the places where records are.

    Third, how many records are too short for it, and therefore not among these.
    """
    places, lengths = records.places, records.lengths
    room = len(raw) - HEADER - dtype.itemsize
    enough = np.asarray(lengths) >= dtype.itemsize
    if room < 0 or not enough.any():
        return np.empty(0, dtype), slice(0, 0), records.count
    view = np.ndarray(room // 8 + 1, dtype, raw, HEADER, (8,))
    if enough.all():
        return view, places, 0
    assert not isinstance(places, slice)
    return view, places[enough], records.count - int(enough.sum())
