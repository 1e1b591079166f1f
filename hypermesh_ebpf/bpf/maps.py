"""Reading maps: all entries in as few system calls as the kernel allows, decoded in one go.

Batched lookups exist since Linux 5.6 (per-CPU arrays since 5.13); what has none is read entry by
entry.
"""

from __future__ import annotations

import ctypes as ct
import errno
import struct
from collections.abc import Iterator
from typing import Any

from hypermesh_ebpf.bpf.layout import parse_layout
from hypermesh_ebpf.bpf.libbpf import BPF_ANY, check, libbpf, possible_cpus
from hypermesh_ebpf.bpf.spec import MapSpec
from hypermesh_ebpf.errors import MapError, describe_errno

# BPF_MAP_TYPE_* (include/uapi/linux/bpf.h)
HASH, ARRAY, PERCPU_HASH, PERCPU_ARRAY, LRU_HASH, LRU_PERCPU_HASH = 1, 2, 5, 6, 9, 10
RINGBUF = 27
_PER_CPU = (PERCPU_HASH, PERCPU_ARRAY, LRU_PERCPU_HASH)
_ARRAYS = (ARRAY, PERCPU_ARRAY)
_ENOTSUPP = 524  # the kernel's own; libc has no name for it
_CHUNK = 4096


class Map:
    """A map of the kernel, by descriptor, with the layouts of its keys and values.

    Does not own the descriptor.
    """

    def __init__(self, spec: MapSpec, fd: int) -> None:
        self.spec, self.fd = spec, fd
        self._key = parse_layout(spec.key_desc, spec.key_size)
        self._value = parse_layout(spec.value_desc, spec.value_size)
        self._per_cpu = spec.type in _PER_CPU
        # The kernel rounds each CPU's value up to 8 bytes, on a machine with one CPU, too.
        padding = -spec.value_size % 8 if self._per_cpu else 0
        self._copies = possible_cpus() if self._per_cpu else 1
        self._stride = (spec.value_size + padding) * self._copies
        self._batched = True

    def items(self) -> list[tuple[Any, Any]]:
        """All (key, value) pairs, per-CPU values summed.  Raises MapError."""
        keys, values = self.read_raw()
        return list(zip(self._key.decode_all(keys), self._decode_values(values), strict=True))

    def read_raw(self) -> tuple[memoryview, memoryview]:
        """The bytes of all keys and of all values (every CPU's), in the same order."""
        if self._batched:
            try:
                return self._read_batched()
            except OSError as error:
                if error.errno not in (errno.EINVAL, _ENOTSUPP, errno.EOPNOTSUPP):
                    raise self._error("read", error) from error
                self._batched = False
        try:
            return self._read_singly()
        except OSError as error:
            raise self._error("read", error) from error

    def write(self, key: int, value: bytes) -> None:
        """Set one entry of an array.  Raises MapError; ValueError for a value of the wrong size."""
        if len(value) != self.spec.value_size:
            raise ValueError(f"{self.spec.name}: {len(value)} bytes, not {self.spec.value_size}")
        raw = struct.pack("=I", key)
        try:
            check(libbpf().bpf_map_update_elem(self.fd, raw, value, BPF_ANY))
        except OSError as error:
            raise self._error("write", error) from error

    def _decode_values(self, raw: memoryview) -> Iterator[Any]:
        if self._per_cpu:
            return self._value.decode_sums(raw, self._copies)
        return self._value.decode_all(raw)

    def _read_batched(self) -> tuple[memoryview, memoryview]:
        """BPF_MAP_LOOKUP_BATCH until the kernel says ENOENT.

        ENOSPC means that one hash bucket did not fit into what was left of the buffer: try wider.
        """
        lookup, key_size, stride = libbpf().bpf_map_lookup_batch, self.spec.key_size, self._stride
        token, position = ct.create_string_buffer(max(key_size, 8)), None
        room = min(self.spec.max_entries, _CHUNK)
        keys, values, read = bytearray(), bytearray(), 0
        while True:
            _resize(keys, (read + room) * key_size)
            _resize(values, (read + room) * stride)
            count = ct.c_uint32(room)
            key_at = ct.addressof(ct.c_char.from_buffer(keys, read * key_size))
            value_at = ct.addressof(ct.c_char.from_buffer(values, read * stride))
            result = lookup(self.fd, position, token, key_at, value_at, ct.byref(count), None)
            number = ct.get_errno() if result < 0 else 0
            if number == errno.ENOSPC:
                room *= 2
                continue
            if number not in (0, errno.ENOENT):
                raise OSError(number, "bpf_map_lookup_batch")
            read += count.value
            if number == errno.ENOENT:
                break
            position = token
        return memoryview(keys)[: read * key_size], memoryview(values)[: read * stride]

    def _read_singly(self) -> tuple[memoryview, memoryview]:
        """One lookup for each key; an entry deleted meanwhile is left out."""
        keys, values = bytearray(), bytearray()
        value = ct.create_string_buffer(self._stride)
        for key in self._each_key():
            if libbpf().bpf_map_lookup_elem(self.fd, key, value) < 0:
                if ct.get_errno() != errno.ENOENT:
                    raise OSError(ct.get_errno(), "bpf_map_lookup_elem")
                continue
            keys += key
            values += value.raw
        return memoryview(keys), memoryview(values)

    def _each_key(self) -> Iterator[bytes]:
        if self.spec.type in _ARRAYS:
            for index in range(self.spec.max_entries):
                yield struct.pack("=I", index)
            return
        # Keys first: deleting the current key while walking would start the walk again.
        key, found = None, []
        following = ct.create_string_buffer(self.spec.key_size)
        while True:
            if libbpf().bpf_map_get_next_key(self.fd, key, following) < 0:
                if ct.get_errno() != errno.ENOENT:
                    raise OSError(ct.get_errno(), "bpf_map_get_next_key")
                break
            key = following.raw
            found.append(key)
            if len(found) > 2 * self.spec.max_entries:
                break
        yield from dict.fromkeys(found)

    def _error(self, verb: str, error: OSError) -> MapError:
        number = error.errno or errno.EINVAL
        return MapError(
            f"{verb} map {self.spec.name}",
            describe_errno(number),
            "see `hmebpf check-system`",
            errno=number,
        )


def _resize(buffer: bytearray, size: int) -> None:
    if len(buffer) < size:
        buffer.extend(bytes(size - len(buffer)))
