"""Ring buffers: records taken straight out of the shared memory, or by libbpf where that is unsafe.

The kernel maps a consumer page (ours to write), a producer page and the data area twice in a row,
so that a record is contiguous even where it wraps.  A record is an 8-byte header - length with two
flag bits, page offset - and its payload, rounded up to 8 (kernel/bpf/ringbuf.c, since Linux 5.8).

Memory ordering.  The kernel reserves a record under the ring's lock: it stores the header with the
busy bit and then the producer position (smp_store_release).  It commits a record by exchanging the
header for one without that bit (xchg, a full barrier), after the payload.  It reserves only what
lies behind the consumer position (smp_load_acquire).  So a reader has to

1. load the producer position before any header: no header before that position is older than the
   reservation;
2. load each header once, decide by that value alone, and load the payload afterwards: a payload
   that was loaded before its header was seen to be committed may be half written;
3. store the consumer position after the last load of a payload: what lies before it may be
   written over at once.

Both ways of reading (:mod:`hypermesh_ebpf.bpf.ring_mapping` without numpy,
:mod:`hypermesh_ebpf.bpf.ring_columns` with it) work in these phases for each stretch of the ring:
headers are loaded into objects of our own, then all payloads are copied at once, then the position
is stored.  Nothing looks at a header, or at the shared memory at all, after that.  CPython and
numpy do each phase in calls of compiled code of their own, so no compiler can mix them; an aligned
item of 4 or 8 bytes is one load or store (memoryview's ``Q`` and ``I``, numpy's strided copies);
and the order of loads within a copy of payloads does not matter.

- x86-64 keeps loads in order among themselves, those of string and vector instructions against
  earlier and later instructions included, and never moves a store before an earlier load: in
  program order the three rules hold, and no barrier is missing.
- arm64 may satisfy a later load first, even behind a branch that depends on the earlier one, and
  may let a store overtake an earlier load.  Rules 1 and 2 want load-acquire there, rule 3 wants
  store-release, and Python can ask for neither.  So there, and on every other machine,
  libbpf's ``ring_buffer__consume`` reads, for columns, too.

The positions are ``unsigned long``: 64 bits on x86-64, where they never wrap.  A kernel of 32 bits
is not x86-64, and libbpf reads.
"""

from __future__ import annotations

import ctypes as ct
import errno
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from hypermesh_ebpf.bpf.libbpf import check, libbpf
from hypermesh_ebpf.bpf.ring_mapping import HEADER, Piece, RingMapping, find_pieces
from hypermesh_ebpf.errors import MapError, describe_errno

if TYPE_CHECKING:
    from hypermesh_ebpf.bpf.record_columns import Columns, RecordColumns

_SAMPLE_CALLBACK = ct.CFUNCTYPE(ct.c_int, ct.c_void_p, ct.c_void_p, ct.c_size_t)


class RingBuffer:
    """A BPF_MAP_TYPE_RINGBUF map as a source of records; wait for ``fileno()`` to be readable.

    Each read takes what was complete when it began, oldest first, and no more than the ring holds,
    however fast records keep coming; they are thereby consumed.  ``fill`` is the share of the ring,
    0 to 1, that the last read found in use.  Not for several threads at once.  Does not own the
    descriptor; :meth:`close` gives the mappings back.  Raises MapError where the kernel refuses
    the mapping, and on reading a ring that overwrites what was not read.
    """

    def __init__(self, fd: int, size: int, *, in_order: bool | None = None) -> None:
        """``size`` is the map's max_entries, in bytes; ``in_order`` chooses the reader."""
        self._fd = fd
        if in_order is None:
            in_order = os.uname().machine == "x86_64"
        reader = _MappedReader if in_order else _LibbpfReader
        try:
            self._reader: _MappedReader | _LibbpfReader = reader(fd, size)
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

    @property
    def fill(self) -> float:
        return self._reader.fill

    def read(self) -> list[bytes]:
        """The records' payloads."""
        return self._reader.read()

    def unpack(self, layout: struct.Struct) -> list[tuple[Any, ...] | bytes]:
        """The records' items as ``layout`` has them; a record that is too short for it as bytes.

        What a record has behind the layout is left out.
        """
        return self._reader.unpack(layout)

    def read_columns(self, columns: RecordColumns) -> Columns:
        """The records as one numpy array for each member, copied out of the ring.

        Records that are too short are left out, and counted in ``columns.short``; what a record has
        behind its last member is left out.
        """
        return self._reader.read_columns(columns)

    def close(self) -> None:
        self._reader.close()


class _MappedReader:
    """Reads in our own mapping of the ring."""

    def __init__(self, fd: int, size: int) -> None:
        self._mapping = RingMapping(fd, size)

    @property
    def fill(self) -> float:
        return self._mapping.fill

    def read(self) -> list[bytes]:
        records: list[bytes] = []
        for raw, pieces in self._take():
            for piece in pieces:
                records += piece.cut(raw)
        return records

    def unpack(self, layout: struct.Struct) -> list[tuple[Any, ...] | bytes]:
        records: list[tuple[Any, ...] | bytes] = []
        for raw, pieces in self._take():
            for piece in pieces:
                records += piece.unpack(raw, layout)
        return records

    def read_columns(self, columns: RecordColumns) -> Columns:
        from hypermesh_ebpf.bpf.ring_columns import find_records, lay_over

        length = self._mapping.waiting()
        found = columns.begin(length // (HEADER + columns.dtype.itemsize))
        for raw, records in self._mapping.take(find_records, length):
            found.add(*lay_over(raw, records, columns.dtype))
        return found.finish()

    def _take(self) -> Iterator[tuple[bytes, Sequence[Piece]]]:
        return self._mapping.take(find_pieces, self._mapping.waiting())

    def close(self) -> None:
        self._mapping.close()


class _LibbpfReader:
    """libbpf's own reader, with a callback for each record."""

    def __init__(self, fd: int, size: int) -> None:
        self._records: list[bytes] = []
        self._room = 0
        self.fill = 0.0

        def take(_context: Any, data: int, length: int) -> int:
            self._records.append(ct.string_at(data, length))
            self._room -= HEADER + length
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
        self.fill = 1 - max(self._room, 0) / self._size
        records, self._records = self._records, []
        return records

    def unpack(self, layout: struct.Struct) -> list[tuple[Any, ...] | bytes]:
        size, unpack = layout.size, layout.unpack_from
        return [unpack(raw) if len(raw) >= size else raw for raw in self.read()]

    def read_columns(self, columns: RecordColumns) -> Columns:
        return columns.join(self.read())

    def close(self) -> None:
        libbpf().ring_buffer__free(self._ring)
