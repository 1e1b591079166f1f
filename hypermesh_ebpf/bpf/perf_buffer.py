"""Perf buffers: the events that programs write by bpf_perf_event_output, out of every CPU's buffer.

Each CPU has a software event of its own (PERF_COUNT_SW_BPF_OUTPUT) with a buffer that is mapped
here: a control page with two positions, ``data_head`` (the kernel's) and ``data_tail`` (ours), and
2^n pages of records that wrap around.  A record has a header of 8 bytes (type, size) and is a
multiple of 8 long.  Ours carry a time (CLOCK_MONOTONIC) besides the program's bytes, so that what
several CPUs wrote can be put in order.
Source: include/uapi/linux/perf_event.h; perf_event_open(2); kernel/events/ring_buffer.c.

Memory ordering: the kernel stores ``data_head`` behind a write barrier after the records, and looks
at ``data_tail`` before it overwrites them.  So we have to load ``data_head`` before the records,
and store ``data_tail`` after the last of them was copied.  x86-64 keeps loads in order and never
moves a store before an earlier load, and CPython reads and writes an aligned 8-byte item with one
instruction, so no barrier is missing.  Weaker machines, arm64 among them, need an acquire load that
Python cannot ask for: there libbpf's reader fetches the records.
"""

from __future__ import annotations

import ctypes as ct
import errno
import mmap
import os
import select
import struct
from collections.abc import Callable
from fcntl import ioctl
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hypermesh_ebpf.bpf.libbpf import BPF_ANY, check, libbpf
from hypermesh_ebpf.bpf.map_types import PERF_EVENT_ARRAY
from hypermesh_ebpf.errors import HmebpfError, MapError, MissingPrivilege, describe_errno
from hypermesh_ebpf.host.architecture import perf_event_open_number

if TYPE_CHECKING:
    from hypermesh_ebpf.bpf.record_columns import Columns, RecordColumns

PAGES = 64
"""Pages of records for each CPU unless told otherwise: 256 KiB where a page has 4."""

_ONLINE = Path("/sys/devices/system/cpu/online")
_TYPE_SOFTWARE, _BPF_OUTPUT = 1, 10
_SAMPLE_TIME, _SAMPLE_RAW = 1 << 2, 1 << 10
_FORMAT_LOST = 1 << 4
_USE_CLOCKID = 1 << 25
_CLOEXEC = 1 << 3  # PERF_FLAG_FD_CLOEXEC
_ENABLE = 0x2400  # PERF_EVENT_IOC_ENABLE
_HEAD, _TAIL = 1024 // 8, 1032 // 8  # in the control page, as items of 8 bytes
_RECORD_LOST, _RECORD_SAMPLE = 2, 9
# type, flags and length; in a sample also the time, the size of the program's bytes, and these
_RECORD = struct.Struct("=IHHQI")

Record = tuple[int, bytes]
"""(time in nanoseconds, the program's bytes)."""


class PerfBuffer:
    """A BPF_MAP_TYPE_PERF_EVENT_ARRAY map as a source of records.

    ``fileno()`` becomes readable once for everything that comes in; :meth:`read` then takes it all.
    Does not own the map's descriptor; :meth:`close` takes the buffers out of the map again.  Who
    read the map's events before does not get them any more: each CPU has one buffer in it.
    """

    def __init__(self, fd: int, *, pages: int = PAGES, in_order: bool | None = None) -> None:
        """``pages`` of records for each CPU, a power of two; ``in_order`` chooses the reader.

        Raises MissingPrivilege, MapError.
        """
        if in_order is None:
            in_order = os.uname().machine == "x86_64"
        reader = _MappedReader if in_order else _LibbpfReader
        try:
            _require_perf_array(fd)
            self._reader: _MappedReader | _LibbpfReader = reader(fd, pages)
        except OSError as error:
            raise _open_error(error) from error

    def fileno(self) -> int:
        """An epoll descriptor that watches every CPU's buffer."""
        return self._reader.fileno()

    def read(self) -> list[bytes]:
        """All records that were written before the call, oldest first; they are thereby consumed.

        The kernel fills a record up to a multiple of 8 bytes, so up to 7 may follow what the
        program wrote.  Raises MissingPrivilege, MapError when a CPU that came online since cannot
        be read.
        """
        try:
            records = self._reader.read()
        except OSError as error:
            raise _open_error(error) from error
        records.sort(key=itemgetter(0))
        return [payload for _time, payload in records]

    def unpack(self, layout: struct.Struct) -> list[tuple[Any, ...] | bytes]:
        """The records' items as ``layout`` has them; a record that is too short for it as bytes."""
        size, unpack = layout.size, layout.unpack_from
        return [unpack(raw) if len(raw) >= size else raw for raw in self.read()]

    def read_columns(self, columns: RecordColumns) -> Columns:
        """The records as one numpy array for each member; too short ones are counted there."""
        return columns.join(self.read())

    @property
    def fill(self) -> float:
        """The share of the fullest CPU's buffer that the last read found in use.

        Where libbpf reads it is not known, and 0.
        """
        return self._reader.fill

    @property
    def lost(self) -> int:
        """How many records found no room.

        Before Linux 6.0, and where libbpf reads, it is told only with the next record for which
        there is room.
        """
        return self._reader.lost

    def close(self) -> None:
        """Give the buffers back; can be called twice."""
        self._reader.close()


def _require_perf_array(fd: int) -> None:
    """EINVAL for another type of map: writing our descriptors into it would destroy its entries."""
    kind, length = ct.c_uint32(), ct.c_uint32(4)  # the first member of struct bpf_map_info
    check(libbpf().bpf_obj_get_info_by_fd(fd, ct.byref(kind), ct.byref(length)))
    if kind.value != PERF_EVENT_ARRAY:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))


def _open_error(error: OSError) -> HmebpfError:
    number = error.errno or 0
    what, cause = "open the perf buffer", describe_errno(number)
    if number in (errno.EACCES, errno.EPERM):
        remedy = (
            "run as root, or with CAP_PERFMON and CAP_BPF; for memory beyond "
            "kernel.perf_event_mlock_kb also CAP_IPC_LOCK"
        )
        return MissingPrivilege(what, cause, remedy, errno=number)
    if number in (errno.EMFILE, errno.ENFILE):
        return MapError(what, cause, "allow more open files: `ulimit -n 4096`", errno=number)
    return MapError(what, cause, "see `hmebpf check-system`", errno=number)


def _attributes(read_format: int) -> bytes:
    """struct perf_event_attr, up to its fifth version (Linux 4.1)."""
    return struct.pack(
        "=IIQQQQQI40xi16x",
        _TYPE_SOFTWARE,
        112,  # size
        _BPF_OUTPUT,
        1,  # sample_period: every record
        _SAMPLE_TIME | _SAMPLE_RAW,
        read_format,
        _USE_CLOCKID,
        1,  # wakeup_events: at every record
        1,  # clockid: CLOCK_MONOTONIC
    )


def read_online_cpus() -> list[int]:
    """The numbers of the CPUs that are switched on."""
    return [
        cpu
        for part in _ONLINE.read_text().strip().split(",")
        for first, _, last in [part.partition("-")]
        for cpu in range(int(first), int(last or first) + 1)
    ]


class _CpuBuffer:
    """One CPU's event and the mapping of its buffer."""

    def __init__(self, cpu: int, pages: int) -> None:
        self.cpu = cpu
        self._told = 0  # lost, as the records say
        self._counts = True
        try:
            self.fd = _perf_event_open(_attributes(_FORMAT_LOST), cpu)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self._counts = False  # before Linux 6.0
            self.fd = _perf_event_open(_attributes(0), cpu)
        try:
            self._size = pages * mmap.PAGESIZE
            self._map = mmap.mmap(self.fd, mmap.PAGESIZE + self._size)
            ioctl(self.fd, _ENABLE, 0)
        except OSError:
            os.close(self.fd)
            raise
        # One aligned load or store for each item.
        self._control = memoryview(self._map)[: mmap.PAGESIZE].cast("Q")
        self._data = memoryview(self._map)[mmap.PAGESIZE :]

    @property
    def head(self) -> int:
        """Where the kernel will write next."""
        return int(self._control[_HEAD])

    def fill(self, head: int) -> float:
        """The share of the buffer that records before ``head`` take."""
        return (head - int(self._control[_TAIL])) / self._size

    def take(self, head: int) -> list[Record]:
        """The records before ``head``, which are thereby consumed."""
        tail = int(self._control[_TAIL])
        begin, end = tail % self._size, tail % self._size + head - tail
        raw = bytes(self._data[begin : min(end, self._size)])
        if end > self._size:
            raw += bytes(self._data[: end - self._size])
        self._control[_TAIL] = head
        if (alike := _take_alike(raw)) is not None:
            return alike
        records: list[Record] = []
        at, start = 0, _RECORD.size
        while at < len(raw):
            kind, _misc, length, time, size = _RECORD.unpack_from(raw, at)
            if kind == _RECORD_SAMPLE:
                records.append((time, raw[at + start : at + start + size]))
            elif kind == _RECORD_LOST:
                self._told += read_lost(raw, at)
            at += length
        return records

    @property
    def lost(self) -> int:
        if not self._counts:
            return self._told
        _value, lost = struct.unpack("=QQ", os.read(self.fd, 16))
        return int(lost)

    def close(self) -> None:
        self._control.release()
        self._data.release()
        self._map.close()
        os.close(self.fd)


def _take_alike(raw: bytes) -> list[Record] | None:
    """Samples of one length, all at once; None where there is anything else among them."""
    if not raw:
        return []
    _kind, _misc, length, _time, _size = _RECORD.unpack_from(raw)
    room = length - _RECORD.size
    if len(raw) % length or room < 0:
        return None
    items = struct.iter_unpack(f"{_RECORD.format}{room}s", raw)
    kinds, _miscs, lengths, times, sizes, payloads = zip(*items, strict=True)
    # If the first is so long, the next header is where it was looked for, and so on.
    if set(kinds) != {_RECORD_SAMPLE} or set(lengths) != {length}:
        return None
    if set(sizes) != {room}:
        payloads = tuple(p[:size] for p, size in zip(payloads, sizes, strict=True))
    return list(zip(times, payloads, strict=True))


def read_lost(raw: bytes, at: int = 0) -> int:
    """How many records the record of type PERF_RECORD_LOST at an offset stands for."""
    (lost,) = struct.unpack_from("=Q", raw, at + 16)  # behind the header and an id
    return int(lost)


class _MappedReader:
    """Reads all CPUs' buffers in our own mappings."""

    def __init__(self, fd: int, pages: int) -> None:
        self._fd, self._pages = fd, pages
        self._buffers: dict[int, _CpuBuffer] = {}
        self._online: list[int] = []
        self._gone: list[Record] = []  # of CPUs that were switched off
        self._lost_before = 0
        self.fill = 0.0
        self._epoll = select.epoll()
        try:
            self._follow_cpus()
        except BaseException:
            self.close()
            raise

    def fileno(self) -> int:
        return self._epoll.fileno()

    def read(self) -> list[Record]:
        self._follow_cpus()
        records, self._gone = self._gone, []
        # All positions first, so that reading one CPU's does not favour another's later records.
        heads = [(buffer, buffer.head) for buffer in self._buffers.values()]
        self.fill = max((buffer.fill(head) for buffer, head in heads), default=0.0)
        for buffer, head in heads:
            records.extend(buffer.take(head))
        return records

    @property
    def lost(self) -> int:
        return self._lost_before + sum(buffer.lost for buffer in self._buffers.values())

    def close(self) -> None:
        for cpu in list(self._buffers):
            self._lost_before += self._buffers[cpu].lost
            self._remove(cpu)
        self._epoll.close()

    def _follow_cpus(self) -> None:
        """Open what came online and close what went: an event does not survive its CPU's absence.

        What a CPU wrote before it went is kept for the next :meth:`read`.
        """
        online = read_online_cpus()
        if online == self._online:
            return
        for cpu in self._buffers.keys() - set(online):
            buffer = self._buffers[cpu]
            self._gone.extend(buffer.take(buffer.head))
            self._lost_before += buffer.lost
            self._remove(cpu)
        for cpu in online:
            if cpu not in self._buffers:
                self._add(cpu)
        self._online = online

    def _add(self, cpu: int) -> None:
        try:
            buffer = _CpuBuffer(cpu, self._pages)
        except OSError as error:
            if error.errno == errno.ENODEV:
                return  # gone since we looked
            raise
        self._buffers[cpu] = buffer
        key, value = struct.pack("=I", cpu), struct.pack("=i", buffer.fd)
        try:
            check(libbpf().bpf_map_update_elem(self._fd, key, value, BPF_ANY))
        except OSError as error:
            self._remove(cpu)
            if error.errno == errno.E2BIG and cpu:
                return  # the map was made for fewer CPUs: the program cannot write from this one
            raise
        self._epoll.register(buffer.fd, select.EPOLLIN)

    def _remove(self, cpu: int) -> None:
        libbpf().bpf_map_delete_elem(self._fd, struct.pack("=I", cpu))
        self._buffers.pop(cpu).close()  # and epoll forgets a descriptor that is closed


class _LibbpfReader:
    """libbpf's own reader, with a callback for each record.

    CPUs that come online later are not seen.
    """

    def __init__(self, fd: int, pages: int) -> None:
        self._records: list[Record] = []
        self.lost, self.fill = 0, 0.0

        def take(_context: Any, _cpu: int, address: int) -> int:
            head = ct.string_at(address, _RECORD.size)
            kind, _misc, length, time, size = _RECORD.unpack(head)
            if kind == _RECORD_SAMPLE:
                self._records.append((time, ct.string_at(address + _RECORD.size, size)))
            elif kind == _RECORD_LOST:
                self.lost += read_lost(ct.string_at(address, length))
            return _CONTINUE

        self._callback: Callable[..., int] = _EVENT_CALLBACK(take)
        new = libbpf().perf_buffer__new_raw
        self._buffer = new(fd, pages, _attributes(0), self._callback, None, None)
        if not self._buffer:
            raise OSError(ct.get_errno(), os.strerror(ct.get_errno()))

    def fileno(self) -> int:
        return check(libbpf().perf_buffer__epoll_fd(self._buffer))

    def read(self) -> list[Record]:
        check(libbpf().perf_buffer__consume(self._buffer))
        records, self._records = self._records, []
        return records

    def close(self) -> None:
        libbpf().perf_buffer__free(self._buffer)  # which takes NULL, too
        self._buffer = None


_CONTINUE = -2  # LIBBPF_PERF_EVENT_CONT
_EVENT_CALLBACK = ct.CFUNCTYPE(ct.c_int, ct.c_void_p, ct.c_int, ct.c_void_p)


def _perf_event_open(attributes: bytes, cpu: int) -> int:
    """perf_event_open(2) for all processes on one CPU; a descriptor.  Raises OSError."""
    libc = ct.CDLL(None, use_errno=True)
    fd: int = libc.syscall(
        ct.c_long(perf_event_open_number()),
        attributes,
        ct.c_long(-1),
        ct.c_long(cpu),
        ct.c_long(-1),
        ct.c_ulong(_CLOEXEC),
    )
    if fd < 0:
        raise OSError(ct.get_errno(), os.strerror(ct.get_errno()))
    return fd
