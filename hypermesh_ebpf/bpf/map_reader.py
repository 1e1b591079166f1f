"""The bytes of a map's entries, in as few system calls as the kernel allows.

Batched lookups exist since Linux 5.6 (per-CPU arrays since 5.13); what has none is read entry by
entry.
"""

from __future__ import annotations

import ctypes as ct
import errno
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from hypermesh_ebpf.bpf import map_types
from hypermesh_ebpf.bpf.libbpf import libbpf, possible_cpus
from hypermesh_ebpf.bpf.spec import MapSpec
from hypermesh_ebpf.errors import MapError, describe_errno

_ENOTSUPP = 524  # the kernel's own; libc has no name for it
_CHUNK = 4096  # entries at a time
_CHUNK_BYTES = 1 << 24


@dataclass(frozen=True, slots=True)
class RawEntries:
    """The bytes of all keys and of all values (every CPU's), in the same order.

    ``left_out``: how many entries a limit left out; None if there are some, and nobody knows how
    many.
    """

    keys: memoryview
    values: memoryview
    left_out: int | None


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
        if self.batched:
            try:
                return self._read_batched(limit)
            except OSError as error:
                # EINTR: an entry was deleted just when it was its turn.
                if error.errno != errno.EINTR:
                    if error.errno not in (errno.EINVAL, _ENOTSUPP, errno.EOPNOTSUPP):
                        raise map_error("read", self.spec, error) from error
                    self.batched = False
        try:
            return self._read_singly(limit)
        except OSError as error:
            raise map_error("read", self.spec, error) from error

    def _read_batched(self, limit: int | None) -> RawEntries:
        """BPF_MAP_LOOKUP_BATCH until the kernel says ENOENT.

        ENOSPC means that one hash bucket did not fit into what was left of the buffer: try wider.
        """
        lookup, key_size = libbpf().bpf_map_lookup_batch, self.spec.key_size
        entry = self.stride * self.copies
        token, position = ct.create_string_buffer(max(key_size, 8)), None
        room = min(self.spec.max_entries, _CHUNK, max(_CHUNK_BYTES // entry, 1))
        if limit is not None:
            room = min(room, limit + 1)  # the one more tells whether there are any
        keys, values, read = bytearray(), bytearray(), 0
        while limit is None or read <= limit:
            _resize(keys, (read + room) * key_size)
            _resize(values, (read + room) * entry)
            count = ct.c_uint32(room)
            key_at = ct.addressof(ct.c_char.from_buffer(keys, read * key_size))
            value_at = ct.addressof(ct.c_char.from_buffer(values, read * entry))
            result = lookup(self.fd, position, token, key_at, value_at, ct.byref(count), None)
            number = ct.get_errno() if result < 0 else 0
            if number == errno.ENOSPC:
                room *= 2
                continue
            if number not in (0, errno.ENOENT):
                raise OSError(number, "bpf_map_lookup_batch")
            read += count.value
            if number == errno.ENOENT:
                return self._cut(keys, values, read, limit, True)
            position = token
        return self._cut(keys, values, read, limit, False)

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
                return self._cut(keys, values, read, limit, False)
        return self._cut(keys, values, read, limit, True)

    def _cut(
        self, keys: bytearray, values: bytearray, read: int, limit: int | None, complete: bool
    ) -> RawEntries:
        """The first ``limit`` of the entries that were read; ``complete`` if these are all."""
        shown = read if limit is None else min(read, limit)
        left_out: int | None = read - shown if complete else None
        if self.spec.type in map_types.FULL:
            left_out = self.spec.max_entries - shown
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


def _resize(buffer: bytearray, size: int) -> None:
    if len(buffer) < size:
        buffer.extend(bytes(size - len(buffer)))
