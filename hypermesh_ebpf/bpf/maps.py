"""Maps by descriptor: a monitor's own, decoded fast, and any other map with its types."""

from __future__ import annotations

import ctypes as ct
import struct
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain, takewhile
from typing import TYPE_CHECKING, Any

from hypermesh_ebpf.bpf import map_types
from hypermesh_ebpf.bpf.entries import Entries, TypedEntries
from hypermesh_ebpf.bpf.layout import parse_layout
from hypermesh_ebpf.bpf.libbpf import BPF_ANY, check, libbpf
from hypermesh_ebpf.bpf.map_reader import MapReader, RawEntries, map_error
from hypermesh_ebpf.bpf.map_types import (
    ARRAY,
    HASH,
    LRU_HASH,
    LRU_PERCPU_HASH,
    PERCPU_ARRAY,
    PERCPU_HASH,
    RINGBUF,
)
from hypermesh_ebpf.bpf.spec import MapSpec
from hypermesh_ebpf.bpf.strided import uncollected
from hypermesh_ebpf.bpf.types import describe, flatten, is_number, parse_type
from hypermesh_ebpf.errors import MapError, MissingBtf, describe_errno

if TYPE_CHECKING:
    from hypermesh_ebpf.bpf.columns import MapColumns

__all__ = [
    "ARRAY",
    "HASH",
    "LRU_HASH",
    "LRU_PERCPU_HASH",
    "PERCPU_ARRAY",
    "PERCPU_HASH",
    "RINGBUF",
    "Map",
    "TypedMap",
    "cut_trace",
    "name_key",
    "read_map_spec",
    "read_numbers",
]


class Map:
    """A map of the kernel, by descriptor, with the layouts of its keys and values.

    Does not own the descriptor.
    """

    def __init__(self, spec: MapSpec, fd: int) -> None:
        self.spec, self.fd = spec, fd
        self.reader = MapReader(spec, fd)
        self._key = parse_layout(spec.key_desc, spec.key_size)
        self._value = parse_layout(spec.value_desc, spec.value_size)
        self._copies = self.reader.copies if spec.type in map_types.PER_CPU else 0

    def items(self) -> list[tuple[Any, Any]]:
        """All (key, value) pairs, per-CPU values summed.  Raises MapError."""
        pairs: list[tuple[Any, Any]] = []
        with uncollected(self.spec.max_entries):
            for raw in self.reader.chunks():
                pairs += self._entries(raw).items()
        return pairs

    def rows(self) -> Iterator[tuple[Any, ...]]:
        """All entries as plain tuples (see Entries.rows), read as they are asked for.

        Raises MapError, at any of them.
        """
        return chain.from_iterable(self._entries(raw).rows() for raw in self.reader.chunks())

    def entries(self) -> Entries:
        """All entries as they are now, decoded only where they are looked at.  Raises MapError."""
        return self._entries(self.reader.read())

    def columns(self) -> MapColumns:
        """All entries as numpy arrays, one for each member.  Raises MapError."""
        from hypermesh_ebpf.bpf.columns import read_columns

        spec = self.spec
        key = parse_type(spec.key_desc, spec.key_size)
        value = parse_type(spec.value_desc, spec.value_size)
        return read_columns(self.reader, key.description, value.description)

    def _entries(self, raw: RawEntries) -> Entries:
        return Entries(raw, self._key, self._value, self._copies)

    def write(self, key: int, value: bytes) -> None:
        """Set one entry of an array; of a per-CPU one all copies, one after the other.

        Raises MapError; ValueError for a value of the wrong size.
        """
        size = self.reader.stride * self.reader.copies  # each copy rounded up to 8 bytes
        if len(value) != size:
            raise ValueError(f"{self.spec.name}: {len(value)} bytes, not {size}")
        raw = struct.pack("=I", key)
        try:
            check(libbpf().bpf_map_update_elem(self.fd, raw, value, BPF_ANY))
        except OSError as error:
            raise map_error("write", self.spec, error) from error


class TypedMap:
    """Any map, by descriptor, its keys and values decoded by the types in its specification.

    ``readable`` tells whether it has entries to show, ``reason`` why it has none: events, a queue.
    ``refers_to``: the values are not the program's data but ids of a "program", "map" or "socket".
    ``left_out``: how many entries the limit of the last reading left out, None if there were some
    and nobody knows how many.  Does not own the descriptor.
    """

    def __init__(self, spec: MapSpec, fd: int) -> None:
        self.spec, self.fd = spec, fd
        self.reason = map_types.UNREADABLE.get(spec.type)
        self.readable = self.reason is None
        self.refers_to = map_types.REFERS_TO.get(spec.type)
        self.key = parse_type(map_types.describe_key(spec), spec.key_size)
        self.value = parse_type(map_types.describe_value(spec), spec.value_size)
        self.left_out: int | None = 0
        self._reader = MapReader(spec, fd)

    @property
    def single(self) -> bool:
        """True for an array of one entry: a program's globals, or a structure of counters."""
        return self.spec.type in map_types.FULL and self.spec.max_entries == 1

    def entries(self, limit: int | None = None) -> list[tuple[Any, Any]]:
        """All (key, value) pairs, or the first ``limit``; see ``left_out``.  Raises MapError.

        Per-CPU values are added up; what is no number is a list of every CPU's unless it is the
        same on all.  Stack traces end with their last address.  Empty unless ``readable``.
        """
        self.left_out = 0
        if not self.readable:
            return []
        pairs: list[tuple[Any, Any]] = []
        with uncollected(self.spec.max_entries):
            for raw in self._reader.chunks(limit):
                pairs += self._entries(raw).items()
        self.left_out = raw.left_out
        if self.spec.type == map_types.STACK_TRACE:
            return [(key, cut_trace(frames)) for key, frames in pairs]
        return pairs

    def read(self, limit: int | None = None) -> TypedEntries:
        """The same, decoded only where it is looked at; not for maps that are not ``readable``.

        Stack traces come with the zeros behind them: see :func:`cut_trace`.
        """
        raw = self._reader.read(limit)
        self.left_out = raw.left_out
        return self._entries(raw)

    def _entries(self, raw: RawEntries) -> TypedEntries:
        copies = self._reader.copies if self.spec.type in map_types.PER_CPU else 0
        return TypedEntries(raw, self.key, self.value, self._reader.stride, copies)

    def columns(self) -> MapColumns:
        """All entries as numpy arrays, one for each member.

        Raises MapError, also where there are no entries to read.
        """
        from hypermesh_ebpf.bpf.columns import read_columns

        if not self.readable:
            what, remedy = f"read map {self.spec.name}", "name another map of the program"
            raise MapError(what, str(self.reason), remedy)
        self.left_out = 0
        return read_columns(self._reader, self.key.description, self.value.description)

    def numbers(self, limit: int | None = None) -> dict[str, int | float]:
        """Every number in the values, under a name, for metrics.  Raises MapError.

        A single entry's are named like its members ("packets"), or like the map where it has
        none; others "map.key" and "map.key.member".  A key that is a structure is written as
        "a=1,b=2".  Empty for ids, and for what the program itself cannot change: its settings.
        """
        if self.refers_to or self.spec.flags & map_types.RDONLY_PROG:
            self.left_out = 0
            return {}
        entries = self.entries(limit)
        if not self.single and self.value.is_numbers:  # most maps, and all the large ones
            named = [(f"{self.spec.name}.{name_key(key)}", value) for key, value in entries]
            members = self.value.plain
            if not members:
                return dict(named)
            return {f"{name}.{m}": value[m] for name, value in named for m in members}
        found: dict[str, Any] = {}
        for key, value in entries:
            if not self.single:
                found |= flatten(f"{self.spec.name}.{name_key(key)}", value, arrays=True)
            elif isinstance(value, dict):
                found |= flatten("", value, arrays=True)
            else:
                found |= flatten(self.spec.name, value, arrays=True)
        numbers = {name: int(leaf) if leaf is True else leaf for name, leaf in found.items()}
        return {name: leaf for name, leaf in numbers.items() if is_number(leaf)}


def cut_trace(frames: Iterable[Any]) -> list[Any]:
    """A stack trace up to its last address."""
    return list(takewhile(_is_frame, frames))


def _is_frame(frame: Any) -> bool:
    """False behind the end of a stack trace."""
    return bool(frame["status"] if isinstance(frame, dict) else frame != "0x0")


def name_key(key: Any) -> str:
    """A key as part of a name: ``3``, ``eth0``, ``1:2:3`` for an array, ``a=1,b=2``."""
    if isinstance(key, dict):
        return ",".join(f"{name}={name_key(value)}" for name, value in key.items())
    if isinstance(key, list):
        return ":".join(map(name_key, key))
    return str(key)


def read_numbers(
    maps: Iterable[TypedMap], limit: int | None = None
) -> tuple[dict[str, int | float], int | None]:
    """All maps' numbers, and how many entries ``limit`` left out of each (see ``left_out``).

    A name that several maps have gets the map's in front: "counters.packets".  Raises MapError.
    """
    each = [(typed, typed.numbers(limit)) for typed in maps]
    owners = Counter(name for _typed, numbers in each for name in numbers)
    found: dict[str, int | float] = {}
    for typed, numbers in each:
        for name, number in numbers.items():
            found[f"{typed.spec.name}.{name}" if owners[name] > 1 else name] = number
    counts = [typed.left_out for typed, _numbers in each]
    return found, None if None in counts else sum(count or 0 for count in counts)


def read_map_spec(fd: int) -> MapSpec:
    """The specification of any map, its types by BTF where it has them.  Raises MapError.

    Names are cut to 15 characters by the kernel.  Without CAP_SYS_ADMIN the types stay unknown.
    """
    from hypermesh_ebpf.bpf.btf import Btf

    # struct bpf_map_info (include/uapi/linux/bpf.h); an older kernel leaves its end zero.
    raw, length = ct.create_string_buffer(_MAP_INFO.size), ct.c_uint32(_MAP_INFO.size)
    try:
        check(libbpf().bpf_obj_get_info_by_fd(fd, raw, ct.byref(length)))
    except OSError as error:
        number = error.errno or 0
        cause, remedy = describe_errno(number), "give a descriptor of a map"
        raise MapError("read what a map is", cause, remedy, errno=number) from error
    info = _MAP_INFO.unpack(raw.raw)
    type_, _id, key_size, value_size, entries, flags, name, value_in_kernel = info[:8]
    btf_id, key_type, value_type, kernel_btf_id = info[8:]
    key = value = None
    try:
        if btf_id:
            btf = Btf.from_id(btf_id)
            key = describe(btf, key_type) if key_type else None
            value = describe(btf, value_type) if value_type else None
        elif value_in_kernel:  # struct_ops: the kernel's own type, or a module's (Linux 6.9)
            btf = Btf.from_id(kernel_btf_id) if kernel_btf_id else Btf.kernel()
            value = describe(btf, value_in_kernel)
    except (OSError, MissingBtf):
        pass  # the entries can be read all the same, as bytes
    text = name.split(b"\0", 1)[0].decode(errors="replace")
    return MapSpec(text, type_, key_size, value_size, entries, flags, key, value)


_MAP_INFO = struct.Struct("=IIIIII16s4xI16xIIII8x")
