"""Our own mapping of a ring buffer, and how its records are found without numpy.

:mod:`hypermesh_ebpf.bpf.ring` has the memory's layout and the reasons for the order of everything
here: headers first, then a copy of all payloads, then the consumer position.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Any, Protocol, TypeVar

from hypermesh_ebpf.errors import MapError

HEADER = 8
BUSY, DISCARD = 1 << 31, 1 << 30
LENGTH = DISCARD - 1

# The ring is emptied in stretches of this size: a producer that is short of room gets some before
# all is read, what is copied is still in the cache when it is taken apart, and the C library hands
# the same memory out again for the next.
_STRETCH = 1 << 20

_ALIKE = 8  # so many records of one size in a row: look at the headers of the following at once
_FEWEST, _MOST = 64, 16384  # at once

Found = TypeVar("Found")
Finder = Callable[["RingMapping", int, int], tuple[Found, int]]
"""Called with the mapping, the offset of the first record in it and how many bytes of records there
are at least; what it found, and how many bytes of records that are, 0 if the first is not done."""


class Piece(Protocol):
    """Some records of a stretch, which are cut out of its copy."""

    def cut(self, raw: bytes) -> list[bytes]: ...

    def unpack(self, raw: bytes, layout: struct.Struct) -> list[tuple[Any, ...] | bytes]: ...


class RingMapping:
    """The memory that the kernel shares: two positions, and the data area twice in a row.

    ``words`` are the data's items of 4 bytes, ``data`` their bytes.  Does not own the descriptor.
    Raises OSError.
    """

    def __init__(self, fd: int, size: int) -> None:
        page = mmap.PAGESIZE
        self.size = size
        self.fill = 0.0
        self._consumer = mmap.mmap(fd, page, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        self._producer = mmap.mmap(
            fd, page + 2 * size, mmap.MAP_SHARED, mmap.PROT_READ, offset=page
        )
        # Views of 8-byte and 4-byte items: one aligned load or store each.
        self._taken = memoryview(self._consumer).cast("Q")
        self._made = memoryview(self._producer).cast("Q")
        self.data = memoryview(self._producer)[page:]
        self.words = self.data.cast("I")

    def waiting(self) -> int:
        """How many bytes of records there are, those that are not submitted yet included.

        Raises MapError for a ring that overwrites what was not read (BPF_F_RB_OVERWRITE, Linux
        6.19): where its records begin cannot be told without a race.
        """
        length: int = self._made[0] - self._taken[0]
        if length > self.size:
            raise MapError(
                "read the ring buffer",
                "records were overwritten before they were read",
                "create the map without BPF_F_RB_OVERWRITE",
            )
        self.fill = length / self.size
        return length

    def take(self, find: Finder[Found], length: int) -> Iterator[tuple[bytes, Found]]:
        """The first ``length`` bytes of records (what :meth:`waiting` said), copied and freed.

        Comes in stretches: their bytes, and what was found in them.  Ends before a record that is
        not submitted yet: what comes behind that one has to wait.
        """
        position: int = self._taken[0]
        end = position + length
        while position < end:
            at = position & (self.size - 1)
            found, length = find(self, at, min(end - position, _STRETCH))
            if not length:
                break
            raw = bytes(self.data[at : at + length])
            position += length
            self._taken[0] = position
            yield raw, found

    def close(self) -> None:
        for view in (self._taken, self._made, self.words, self.data):
            view.release()
        self._consumer.close()
        self._producer.close()


def find_pieces(ring: RingMapping, first: int, length: int) -> tuple[Sequence[Piece], int]:
    """The records of a stretch: see :data:`Finder`.  Runs of one size are found at once."""
    words, end = ring.words, (first + length) >> 2
    position = begin = first >> 2  # in words
    pieces: list[Piece] = []
    spans: list[tuple[int, int]] = []
    last, alike = -1, 0
    while position < end:
        header = words[position]
        if header & BUSY:
            break
        size = header & LENGTH
        if size == last:
            alike += 1
            if alike >= _ALIKE:
                if spans:
                    pieces.append(_Singles(spans))
                    spans = []
                alike = 0
                for run in _find_runs(words, position, end, begin, size):
                    pieces.append(run)
                    position += run.count * run.step >> 2
                continue
        else:
            last, alike = size, 0
        at = (position - begin << 2) + HEADER
        if not header & DISCARD:
            spans.append((at, at + size))
        position += size + 15 >> 3 << 1
    if spans:
        pieces.append(_Singles(spans))
    return pieces, position - begin << 2


def _find_runs(words: memoryview, position: int, end: int, begin: int, size: int) -> Iterator[_Run]:
    """Records of one size from ``position`` on, of which there is one at least.

    More and more are looked at at once, so that a short run does not cost a long look.
    """
    step = size + 15 >> 3 << 1
    kept, discarded = size, size | DISCARD
    several = _FEWEST
    while position < end:
        several = min(several, -(-(end - position) // step))
        headers: list[int] = words[position : position + several * step : step].tolist()
        count = headers.count(kept)
        if count == several:
            yield _Run(position - begin << 2, step << 2, size, several, None)
        else:
            if count + headers.count(discarded) < several:
                others = (n for n, header in enumerate(headers) if header | DISCARD != discarded)
                del headers[next(others) :]
            if headers:
                keep = [header == kept for header in headers]
                yield _Run(position - begin << 2, step << 2, size, len(headers), keep)
            if len(headers) < several:
                return
        position += several * step
        several = min(several * 4, _MOST)


@dataclass(frozen=True, slots=True)
class _Singles:
    """Records of any size, by where each begins and ends."""

    spans: list[tuple[int, int]]

    def cut(self, raw: bytes) -> list[bytes]:
        return [raw[begin:end] for begin, end in self.spans]

    def unpack(self, raw: bytes, layout: struct.Struct) -> list[tuple[Any, ...] | bytes]:
        unpack, size = layout.unpack_from, layout.size
        return [
            unpack(raw, begin) if end - begin >= size else raw[begin:end]
            for begin, end in self.spans
        ]


@dataclass(frozen=True, slots=True)
class _Run:
    """``count`` records of ``size`` bytes, one each ``step`` bytes; ``keep``: not discarded."""

    first: int
    step: int
    size: int
    count: int
    keep: list[bool] | None

    def cut(self, raw: bytes) -> list[bytes]:
        return [record for (record,) in self._items(raw, f"{self.size}s", self.size)]

    def unpack(self, raw: bytes, layout: struct.Struct) -> list[tuple[Any, ...] | bytes]:
        if layout.size > self.size:
            return [*self.cut(raw)]
        return [*self._items(raw, layout.format.removeprefix("="), layout.size)]

    def _items(self, raw: bytes, layout: str, size: int) -> Iterator[tuple[Any, ...]]:
        padded = f"={HEADER}x{layout}{self.step - HEADER - size}x"
        items = struct.iter_unpack(padded, raw[self.first : self.first + self.count * self.step])
        return items if self.keep is None else compress(items, self.keep)
