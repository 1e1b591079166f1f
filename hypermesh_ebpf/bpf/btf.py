"""Type information (BTF): one open set of types, by libbpf.

The kernel's own types are one set, every module's a further one on top of it, and every loaded
program or map can have its own.  Ids begin with 1; id 0 is void.
BTF: https://docs.kernel.org/bpf/btf.html
"""

from __future__ import annotations

import ctypes as ct
import errno
import os
import struct
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from hypermesh_ebpf.bpf.libbpf import check, libbpf
from hypermesh_ebpf.errors import MissingBtf, describe_errno

# Kinds of types (include/uapi/linux/btf.h)
VOID, INT, PTR, ARRAY, STRUCT, UNION, ENUM, FWD, TYPEDEF, VOLATILE, CONST, RESTRICT = range(12)
FUNC, FUNC_PROTO, VAR, DATASEC, FLOAT, DECL_TAG, TYPE_TAG, ENUM64 = range(12, 20)
_TRANSPARENT = (TYPEDEF, VOLATILE, CONST, RESTRICT, TYPE_TAG, VAR, DECL_TAG)
_DEEPEST = 64  # typedefs of typedefs: what goes deeper runs in a circle
_HEADER = 12

_READ, _REMEDY = "read type information (BTF)", "see `hmebpf check-system`"
_NO_BTF_REMEDY = "use a kernel built with CONFIG_DEBUG_INFO_BTF=y; see `hmebpf check-system`"


@dataclass(frozen=True, slots=True)
class BtfType:
    """One type: its kind, name and members' number.

    ``size`` is in bytes, and the id of another type for what only points to one (pointers,
    typedefs, qualifiers, variables).  ``address`` is where libbpf keeps it.
    """

    address: int
    name: str
    kind: int
    count: int
    size: int
    kind_flag: bool


@dataclass(frozen=True, slots=True)
class BtfMember:
    """A member of a structure or union; places in bits, ``bit_size`` 0 unless a bit field.

    (An older encoding of bit fields is in the integer's own type: see :meth:`Btf.integer`.)
    """

    name: str
    type: int
    bit_offset: int
    bit_size: int


class Btf:
    """An open set of types; freed with the object."""

    def __init__(self, handle: int, base: Btf | None = None) -> None:
        """Takes over libbpf's ``handle``; ``base`` are the types that it adds to."""
        self._lib, self._handle, self._base = libbpf(), handle, base
        self._free = weakref.finalize(self, self._lib.btf__free, handle)

    @classmethod
    def open(cls, path: str) -> Btf:
        """The types in a file, as /sys/kernel/btf/vmlinux.  Raises MissingBtf."""
        handle = libbpf().btf__parse(os.fsencode(path), None)
        return cls(_require(handle, f"read the kernel's types from {path}", _NO_BTF_REMEDY))

    @classmethod
    @lru_cache(maxsize=1)
    def kernel(cls) -> Btf:
        """The running kernel's types, read once (13-24 ms).  Raises MissingBtf."""
        from hypermesh_ebpf.host.kernel_btf import require_btf

        return cls.open(require_btf())

    @classmethod
    def from_bytes(cls, raw: bytes) -> Btf:
        """The types of a .BTF section.  Raises MissingBtf for what is none."""
        return cls(_require(libbpf().btf__new(raw, len(raw)), _READ, _REMEDY))

    @classmethod
    @lru_cache(maxsize=32)
    def from_id(cls, btf_id: int) -> Btf:
        """The types that the kernel keeps under an id (Linux 4.18).

        Raises OSError: ENOENT where there are none, EPERM without CAP_SYS_ADMIN; MissingBtf.
        """
        from hypermesh_ebpf.bpf.info import read_btf

        fd = check(libbpf().bpf_btf_get_fd_by_id(btf_id))
        try:
            info = read_btf(fd)
        finally:
            os.close(fd)
        # A module's types (Linux 5.11) continue the kernel's.
        base = cls.kernel() if info.of_kernel and info.name != "vmlinux" else None
        handle = libbpf().btf__load_from_kernel_by_id_split(btf_id, base._handle if base else None)
        return cls(_require(handle, _READ, _REMEDY), base)

    def __len__(self) -> int:
        """How many types there are, void and the base's included."""
        return int(self._lib.btf__type_cnt(self._handle))

    def type(self, type_id: int) -> BtfType:
        """The type of an id.  Raises MissingBtf where there is none."""
        if type_id == 0:
            return BtfType(0, "void", VOID, 0, 0, False)
        address = self._lib.btf__type_by_id(self._handle, type_id)
        if not address:
            raise MissingBtf(f"find type {type_id}", "the type information has no such type", None)
        name, info, size = struct.unpack("=III", ct.string_at(address, _HEADER))
        kind = info >> 24 & 31
        return BtfType(address, self.text(name), kind, info & 0xFFFF, size, bool(info >> 31))

    def text(self, offset: int) -> str:
        """A name, by its place among all names."""
        found: bytes | None = self._lib.btf__str_by_offset(self._handle, offset)
        return (found or b"").decode(errors="replace")

    def find(self, name: str, kinds: Sequence[int]) -> int | None:
        """The id of the first type of that name and one of those kinds; None without one."""
        for kind in kinds:
            found = self._lib.btf__find_by_name_kind(self._handle, name.encode(), kind)
            if found > 0:
                return int(found)
        return None

    def members(self, this: BtfType) -> Iterator[BtfMember]:
        """The members of a structure or union as they are declared."""
        for name, type_, offset in self._records(this, "=III"):
            if this.kind_flag:
                yield BtfMember(self.text(name), type_, offset & 0xFFFFFF, offset >> 24)
            else:
                yield BtfMember(self.text(name), type_, offset, 0)

    def variables(self, this: BtfType) -> Iterator[BtfMember]:
        """The variables of a data section (.data, .bss, .rodata), as members of it."""
        for type_, offset, _size in self._records(this, "=III"):
            yield BtfMember(self.type(type_).name, type_, 8 * offset, 0)

    def enumerators(self, this: BtfType) -> dict[str, int]:
        """The names of an enum with their values (64-bit ones since Linux 6.0)."""
        if this.kind == ENUM64:
            sign = "q" if this.kind_flag else "Q"
            parts = (struct.pack("=III", *each) for each in self._records(this, "=III"))
            values = (struct.unpack(f"=I{sign}", each) for each in parts)
            return {self.text(name): value for name, value in values}
        # Before Linux 6.0 no flag told the sign, and no enum was wider than 32 bits.
        return {self.text(name): value for name, value in self._records(this, "=Ii")}

    def array(self, this: BtfType) -> tuple[int, int]:
        """(element's type id, number of elements) of an array."""
        element, _index, count = struct.unpack("=III", ct.string_at(this.address + _HEADER, 12))
        return element, count

    def integer(self, this: BtfType) -> tuple[int, int, int]:
        """(encoding, bit offset, bits) of an integer: 1 signed, 2 char, 4 bool.

        Where bits are fewer than its size has, it is a bit field in the older encoding.
        """
        (word,) = struct.unpack("=I", ct.string_at(this.address + _HEADER, 4))
        return word >> 24 & 15, word >> 16 & 255, word & 255

    def resolve(self, type_id: int) -> int:
        """The id behind typedefs, qualifiers and variables.  Raises MissingBtf for a circle."""
        for _ in range(_DEEPEST):
            this = self.type(type_id)
            if this.kind not in _TRANSPARENT:
                return type_id
            type_id = this.size
        raise MissingBtf(f"follow type {type_id}", "its definition runs in a circle", None)

    def _records(self, this: BtfType, layout: str) -> Iterator[tuple[int, ...]]:
        size = struct.calcsize(layout)
        raw = ct.string_at(this.address + _HEADER, size * this.count)
        return struct.iter_unpack(layout, raw)


def _require(handle: int | None, what: str, remedy: str) -> int:
    if not handle:
        number = ct.get_errno() or errno.EINVAL
        raise MissingBtf(what, describe_errno(number), remedy, errno=number)
    return handle
