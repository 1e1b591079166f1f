"""Ring buffers: records taken straight out of the shared memory, or by libbpf where that is unsafe.

The kernel maps a consumer page (ours to write), a producer page and the data area twice in a row,
so that a record is contiguous even where it wraps.  A record is an 8-byte header - length with two
flag bits, page offset - and its payload, rounded up to 8 (kernel/bpf/ringbuf.c, since Linux 5.8).

Memory ordering: the producer publishes a record by storing its header after the payload, and space
by advancing the producer position after the header's busy bit was set (smp_store_release, xchg).
We read the position before headers and a header before its payload, and store our own position
after all copies.  x86-64 keeps loads in order among themselves and never moves a store before an
earlier load, and CPython reads and writes an aligned 8-byte item with one instruction, so no
barrier is missing. Weaker machines, arm64 among them, need an acquire load that Python cannot ask
for: there libbpf's ``ring_buffer__consume`` reads.
"""

from __future__ import annotations

import ctypes as ct
import errno
import mmap
import os
import platform
import struct
from collections.abc import Callable
from typing import Any

from hypermesh_ebpf.bpf.libbpf import check, libbpf
from hypermesh_ebpf.errors import MapError, describe_errno

_BUSY, _DISCARD = 1 << 31, 1 << 30
_LENGTH = _DISCARD - 1
_HEADER = 8
_SAMPLE_CALLBACK = ct.CFUNCTYPE(ct.c_int, ct.c_void_p, ct.c_void_p, ct.c_size_t)


class RingBuffer:
    """A BPF_MAP_TYPE_RINGBUF map as a source of records; wait for ``fileno()`` to be readable.

    Does not own the descriptor; :meth:`close` gives the mappings back.  Raises MapError where the
    kernel refuses the mapping.
    """

    def __init__(self, fd: int, size: int, *, in_order: bool | None = None) -> None:
        """``size`` is the map's max_entries, in bytes; ``in_order`` chooses the reader."""
        self._fd = fd
        if in_order is None:
            in_order = platform.machine() in ("x86_64", "AMD64")
        reader = _MappedReader if in_order else _LibbpfReader
        try:
            self._reader = reader(fd, size)
        except OSError as error:
            number = error.errno or 0
            raise MapError(
                "map the ring buffer into memory",
                describe_errno(number),
                "see `hmebpf check-system`",
                errno=number,
            ) from error

    def fileno(self) -> int:
        return self._fd

    def read(self) -> list[bytes]:
        """The payloads of all complete records, oldest first, which are thereby consumed."""
        return self._reader.read()

    def close(self) -> None:
        self._reader.close()


class _MappedReader:
    """Walks the records in our own mapping of the ring."""

    def __init__(self, fd: int, size: int) -> None:
        page = mmap.PAGESIZE
        self._size = size
        self._consumer = mmap.mmap(fd, page, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        self._producer = mmap.mmap(
            fd, page + 2 * size, mmap.MAP_SHARED, mmap.PROT_READ, offset=page
        )
        # Views of 8-byte items: one aligned load or store each.
        self._taken = memoryview(self._consumer).cast("Q")
        self._made = memoryview(self._producer).cast("Q")
        self._data = memoryview(self._producer)[page:]

    def read(self) -> list[bytes]:
        records: list[bytes] = []
        data, mask = self._data, self._size - 1
        position, end = self._taken[0], self._made[0]
        while position < end:
            at = position & mask
            (header,) = struct.unpack_from("=I", data, at)
            if header & _BUSY:
                break  # reserved and not yet submitted; what comes behind it has to wait
            length = header & _LENGTH
            if not header & _DISCARD:
                records.append(bytes(data[at + _HEADER : at + _HEADER + length]))
            position += (_HEADER + length + 7) & ~7
        self._taken[0] = position
        return records

    def close(self) -> None:
        for view in (self._taken, self._made, self._data):
            view.release()
        self._consumer.close()
        self._producer.close()


class _LibbpfReader:
    """libbpf's own reader, with a callback for each record."""

    def __init__(self, fd: int, size: int) -> None:
        self._records: list[bytes] = []
        self._room = 0

        def take(_context: Any, data: int, length: int) -> int:
            self._records.append(ct.string_at(data, length))
            self._room -= _HEADER + length
            # libbpf goes on while records come: as many as fit into the ring are enough for once,
            # or a program that makes them faster than we take them would never let us go.
            return 0 if self._room > 0 else -errno.ECANCELED

        self._size = size
        self._callback: Callable[..., int] = _SAMPLE_CALLBACK(take)
        self._ring = libbpf().ring_buffer__new(fd, self._callback, None, None)
        if not self._ring:
            raise OSError(ct.get_errno(), os.strerror(ct.get_errno()))

    def read(self) -> list[bytes]:
        self._room = self._size
        try:
            check(libbpf().ring_buffer__consume(self._ring))
        except OSError as error:
            if error.errno != errno.ECANCELED:
                raise
        records, self._records = self._records, []
        return records

    def close(self) -> None:
        libbpf().ring_buffer__free(self._ring)
