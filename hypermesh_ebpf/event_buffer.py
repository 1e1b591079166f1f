"""A program's ring or perf buffer, for callers of the library: values, bytes or numpy arrays.

with os_.open_ebpf_events(handle, "events") as events:
    poll.register(events.fileno(), select.POLLIN)
    ...
    columns = events.read_columns()      # {"pid": array([...]), "comm": array([...]), ...}
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hypermesh_ebpf.bpf import map_types
from hypermesh_ebpf.bpf.perf_buffer import PerfBuffer
from hypermesh_ebpf.bpf.ring import RingBuffer
from hypermesh_ebpf.bpf.spec import PERF_COUNTERS, MapSpec
from hypermesh_ebpf.bpf.types import parse_type
from hypermesh_ebpf.errors import InvalidHandle, UsageError

if TYPE_CHECKING:
    from hypermesh_ebpf.bpf.record_columns import Columns, RecordColumns


class EventBuffer:
    """What a program writes for user space; made by ``open_ebpf_events``, a context manager.

    ``fileno()`` is readable while there are records.  Each read takes what is there, oldest first,
    and no more than the buffer holds; it is gone from the buffer then, so one reader gets all.
    Not for several threads at once.  Closed with its handle, if not before.
    """

    def __init__(self, spec: MapSpec, fd: int) -> None:
        """Raises MapError, MissingPrivilege."""
        self.name = spec.name
        self._spec = spec
        self._type = parse_type(spec.value_desc) if spec.value_desc is not None else None
        self._columns: RecordColumns | None = None
        self._closed = False
        self._perf: PerfBuffer | None = None
        if spec.type == map_types.PERF_EVENT_ARRAY:
            self._perf = PerfBuffer(fd)
        self._buffer: RingBuffer | PerfBuffer = self._perf or RingBuffer(fd, spec.max_entries)

    def fileno(self) -> int:
        """Something to poll for readability.  Raises InvalidHandle when it is closed."""
        return self._open().fileno()

    @property
    def fill(self) -> float:
        """The share of the buffer, 0 to 1, that the last read found in use."""
        return self._open().fill

    @property
    def lost(self) -> int | None:
        """Records that found no room; None for ring buffers: only the program can count these."""
        self._open()
        return self._perf.lost if self._perf is not None else None

    @property
    def short(self) -> int:
        """How many records :meth:`read_columns` left out: too short for their type."""
        return self._columns.short if self._columns is not None else 0

    def read_bytes(self) -> list[bytes]:
        """The records as they are.  In perf buffers up to 7 bytes may follow what was written."""
        return self._open().read()

    def read(self) -> list[Any]:
        """The records' values: dictionaries of a structure's members, else numbers or text.

        A record of unknown type, or one that is too short for it, is hexadecimal digits.
        """
        records = self._open().read()
        return [raw.hex() if self._type is None else self._type.decode(raw) for raw in records]

    def read_columns(self) -> Columns:
        """The records as numpy arrays, one for each member: {"pid": array([...]), ...}.

        Of the members' own widths; ``char`` arrays as bytes, enums as their numbers, pointers as
        addresses; "outer.member" of structures within; a plain number is the column "value".
        Several million records a second.  Raises UsageError for records of unknown type.
        """
        buffer = self._open()
        if self._columns is None:
            from hypermesh_ebpf.bpf.record_columns import RecordColumns

            if self._type is None or not self._type.size:
                raise UsageError(
                    f"read columns of {self.name}",
                    "the type of its records is not known",
                    "name a structure like the buffer (`struct events`), or use read_bytes()",
                )
            self._columns = RecordColumns(self._type)
        return buffer.read_columns(self._columns)

    def close(self) -> None:
        """Give the buffer back; can be called twice."""
        if not self._closed:
            self._closed = True
            self._buffer.close()

    def __enter__(self) -> EventBuffer:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _open(self) -> RingBuffer | PerfBuffer:
        if self._closed:
            raise InvalidHandle(
                f"read {self.name}",
                "it was closed, or its program unloaded",
                "open it again with open_ebpf_events",
            )
        return self._buffer


def choose_buffer(
    maps: Sequence[tuple[MapSpec, int]], name: str | None, program: str
) -> tuple[MapSpec, int]:
    """The buffer of that name, or the only one.  Raises UsageError."""
    buffers = [
        (spec, fd)
        for spec, fd in maps
        if spec.type in map_types.STREAMS and spec.value_desc != PERF_COUNTERS
    ]
    fitting = [(spec, fd) for spec, fd in buffers if name in (None, spec.name)]
    if len(fitting) == 1:
        return fitting[0]
    known = ", ".join(spec.name for spec, _fd in buffers)
    what = f"open the events of {program}"
    if not buffers:
        raise UsageError(what, "it has no ring or perf buffer", "declare one in its source")
    if name is None:
        raise UsageError(what, f"it has several buffers: {known}", "name one of them")
    raise UsageError(f"{what}: {name!r}", "there is no such buffer", f"known: {known}")
