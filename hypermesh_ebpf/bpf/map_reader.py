"""The bytes of a map's entries, in as few system calls as the kernel allows.

Batched lookups exist since Linux 5.6 (per-CPU arrays since 5.13); what has none is read entry by
entry.
"""

from __future__ import annotations

import ctypes as ct
import errno
import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from hypermesh_ebpf.bpf import map_types
from hypermesh_ebpf.bpf.libbpf import libbpf, possible_cpus
from hypermesh_ebpf.bpf.spec import MapSpec
from hypermesh_ebpf.errors import MapError, describe_errno

_ENOTSUPP = 524  # the kernel's own; libc has no name for it
_CHUNK_BYTES = 1 << 18
"""How much one system call may copy: it stays in the processor's cache until it is decoded (a fifth
faster than a megabyte), and is over soon: the kernel walks a batch without a pause."""
_CHUNK = 1 << 16  # entries at a time, however small they are
_SMALL = 1 << 16  # bytes that are cleared in less time than mapping memory takes

_Memory = bytearray | mmap.mmap


@dataclass(frozen=True, slots=True)
class RawEntries:
    """The bytes of keys and of their values (every CPU's), in the same order.

    ``left_out``: how many entries a limit left out; None if there are some, and nobody knows how
    many.
    """

    keys: memoryview
    values: memoryview
    left_out: int | None = 0


class MapReader:
    """Reads a map by its descriptor, which it does not own.

    ``copies`` is the number of values in an entry: one, or one for each possible CPU; they are
    ``stride`` bytes apart.
    """

    def __init__(self, spec: MapSpec, fd: int) -> None:
        self.spec, self.fd = spec, fd
        per_cpu = spec.type in map_types.PER_CPU
        self.copies = possible_cpus() if per_cpu else 1
        # The kernel rounds each CPU's value up to 8 bytes, on a machine with one CPU, too.
        self.stride = spec.value_size + (-spec.value_size % 8 if per_cpu else 0)
        self.batched = spec.type in map_types.BATCHED

    def read(self, limit: int | None = None) -> RawEntries:
        """All entries, or the first ``limit`` that are found.  Raises MapError."""
        (raw,) = self._read(limit, whole=True)
        return raw

    def chunks(self, limit: int | None = None) -> Iterator[RawEntries]:
        """The same, a part at a time: each is good until the next is asked for.

        There is always one, if an empty one; ``left_out`` is told by the last.  Raises MapError.
        """
        # From a trie, a batch may fail in the middle, after which everything is read anew.
        return self._read(limit, whole=self.spec.type == map_types.LPM_TRIE)

    def _read(self, limit: int | None, whole: bool) -> Iterator[RawEntries]:
        if self.batched:
            try:
                yield from self._read_batched(limit, whole)
                return
            except OSError as error:
                # EINTR: an entry was deleted just when it was its turn.
                if error.errno != errno.EINTR:
                    if error.errno not in (errno.EINVAL, _ENOTSUPP, errno.EOPNOTSUPP):
                        raise map_error("read", self.spec, error) from error
                    self.batched = False
        try:
            raw = self._read_singly(limit)
        except OSError as error:
            raise map_error("read", self.spec, error) from error
        yield raw

    def _read_batched(self, limit: int | None, whole: bool) -> Iterator[RawEntries]:
        """BPF_MAP_LOOKUP_BATCH until the kernel says ENOENT; ``whole``: all of it at the end.

        ENOSPC means that one hash bucket did not fit into what was left of the buffer: try wider.
        The kernel writes where the entries stay: pages that it does not reach take no memory, and
        a mapping grows without being copied.
        """
        lookup, key_size = libbpf().bpf_map_lookup_batch, self.spec.key_size
        entry, full = self.stride * self.copies, self.spec.type in map_types.FULL
        token, position = ct.create_string_buffer(max(key_size, 8)), None
        room = min(self.spec.max_entries, _CHUNK, max(_CHUNK_BYTES // (key_size + entry), 1))
        if limit is not None:
            room = min(room, limit + 1)  # the one more tells whether there are any
        keys, values = _reserve(room * key_size), _reserve(room * entry)
        read = at = 0  # entries of the whole map, and those in memory
        while True:
            count = ct.c_uint32(room)
            key_at, value_at = _address(keys, at * key_size), _address(values, at * entry)
            result = lookup(self.fd, position, token, key_at, value_at, ct.byref(count), None)
            number = ct.get_errno() if result < 0 else 0
            if number == errno.ENOSPC:
                room *= 2
                keys, values = _widen(keys, at + room, key_size), _widen(values, at + room, entry)
                continue
            if number not in (0, errno.ENOENT):
                raise OSError(number, "bpf_map_lookup_batch")
            read, at = read + count.value, at + count.value
            position = token
            complete = number == errno.ENOENT or (full and read >= self.spec.max_entries)
            over = 0 if limit is None else read - limit
            if complete or over > 0:
                yield self._cut(keys, values, at, over, read, complete)
                return
            if whole:
                keys, values = _widen(keys, at + room, key_size), _widen(values, at + room, entry)
            else:
                yield self._cut(keys, values, at, 0, read, False)
                at = 0

    def _read_singly(self, limit: int | None) -> RawEntries:
        """One lookup for each key; an entry deleted meanwhile is left out."""
        keys, values, read = bytearray(), bytearray(), 0
        value = ct.create_string_buffer(self.stride * self.copies)
        for key in self._each_key(limit):
            if libbpf().bpf_map_lookup_elem(self.fd, key, value) < 0:
                if ct.get_errno() != errno.ENOENT:
                    raise OSError(ct.get_errno(), "bpf_map_lookup_elem")
                continue
            keys += key
            values += value.raw
            read += 1
            if limit is not None and read > limit:
                return self._cut(keys, values, read, read - limit, read, False)
        return self._cut(keys, values, read, 0, read, True)

    def _cut(
        self, keys: _Memory, values: _Memory, here: int, over: int, read: int, complete: bool
    ) -> RawEntries:
        """The last of what was read: ``here`` entries in memory, ``over`` of them past the limit.

        ``read`` were found; ``complete`` if these are all that the map has.
        """
        over = max(over, 0)
        left_out: int | None = over if complete else None
        if self.spec.type in map_types.FULL:
            left_out = self.spec.max_entries - (read - over)
        shown = max(here - over, 0)
        return RawEntries(
            memoryview(keys)[: shown * self.spec.key_size],
            memoryview(values)[: shown * self.stride * self.copies],
            left_out,
        )

    def _each_key(self, limit: int | None) -> Iterator[bytes]:
        if self.spec.type in map_types.INDEXED:
            for index in range(self.spec.max_entries):
                yield struct.pack("=I", index)
            return
        # Keys first: deleting the current key while walking would start the walk again.
        key: bytes | None = None
        found: list[bytes] = []
        following = ct.create_string_buffer(self.spec.key_size)
        most = 2 * self.spec.max_entries if limit is None else 2 * limit + 1
        while len(found) <= most:
            if libbpf().bpf_map_get_next_key(self.fd, key, following) < 0:
                if ct.get_errno() != errno.ENOENT:
                    raise OSError(ct.get_errno(), "bpf_map_get_next_key")
                break
            key = following.raw
            found.append(key)
        yield from dict.fromkeys(found)


def map_error(verb: str, spec: MapSpec, error: OSError) -> MapError:
    """What went wrong with a map, in the kernel's words."""
    number = error.errno or errno.EINVAL
    words = "this kernel does not let user space do it" if number == _ENOTSUPP else None
    return MapError(
        f"{verb} map {spec.name}",
        describe_errno(number, words),
        "see `hmebpf check-system`",
        errno=number,
    )


def _reserve(size: int) -> _Memory:
    """Memory for the kernel to write to."""
    if size <= _SMALL:
        return bytearray(max(size, 1))
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def _widen(memory: _Memory, entries: int, size: int) -> _Memory:
    """The memory, or more of it with the same content, for ``entries`` of ``size`` bytes."""
    if len(memory) >= entries * size:
        return memory
    wanted = max(entries * size, 2 * len(memory))
    if isinstance(memory, mmap.mmap):
        try:
            memory.resize(wanted)  # mremap(2): pages are moved, not copied
            return memory
        except BufferError:
            pass  # somebody still looks at an earlier chunk
    larger = _reserve(wanted)
    larger[: len(memory)] = memory[:]
    return larger


def _address(memory: _Memory, offset: int) -> int:
    """Where a byte is; good as long as the memory is neither grown nor freed."""
    return ct.addressof(ct.c_char.from_buffer(memory)) + offset
