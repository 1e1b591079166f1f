"""All types of a kernel, its loaded modules' included, as C text.

libbpf's btf_dump writes the text.  It takes one BTF at a time, while the types of modules come as
split BTF: each file continues the ids and strings of the kernel's own.  So they are joined into one
first, which is nothing but moving the numbers of every module behind those of the last.
BTF: https://docs.kernel.org/bpf/btf.html
"""

from __future__ import annotations

import ctypes as ct
import os
import struct
from collections.abc import Iterable
from pathlib import Path

from hypermesh_ebpf.bpf.libbpf import check, libbpf
from hypermesh_ebpf.errors import MissingBtf, describe_errno

_SYSFS = Path("/sys/kernel/btf")
_HEADER = struct.Struct("=HBBIIIII")  # magic, version, flags, header length, types, strings
_TYPE = struct.Struct("=III")  # name, kind and number of members, size or type

# What follows a type of each kind: (words in all, words for each member), and which words of a
# member are names and which are types.
_FIXED = {1: 1, 3: 3, 14: 1, 17: 1}  # INT, ARRAY, VAR, DECL_TAG
_MEMBERS: dict[int, tuple[int, tuple[int, ...], tuple[int, ...]]] = {
    4: (3, (0,), (1,)),  # STRUCT: name, type, offset
    5: (3, (0,), (1,)),  # UNION
    6: (2, (0,), ()),  # ENUM: name, value
    13: (2, (0,), (1,)),  # FUNC_PROTO: name, type
    15: (3, (), (0,)),  # DATASEC: type, offset, size
    19: (3, (0,), ()),  # ENUM64: name, low, high
}
_ARRAY = 3
# PTR, TYPEDEF, VOLATILE, CONST, RESTRICT, FUNC, FUNC_PROTO, VAR, DECL_TAG, TYPE_TAG
_TYPE_NOT_SIZE = frozenset({2, 8, 9, 10, 11, 12, 13, 14, 17, 18})


def module_btfs(path: str) -> list[Path]:
    """The split BTF of the loaded modules, by name; none for a BTF that is not this kernel's."""
    if Path(path).parent != _SYSFS:
        return []
    return sorted(file for file in _SYSFS.iterdir() if file.name != "vmlinux")


def read_btf(path: str) -> bytes:
    """A BTF file.  Raises MissingBtf."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise _unreadable(path, error.errno or 0) from error


def join_modules(kernel: bytes, modules: Iterable[bytes]) -> bytes:
    """One BTF of a kernel's and its modules' split BTF."""
    types, strings = _sections(kernel)
    first_id, first_string = _count(kernel), len(strings)
    all_types, all_strings, next_id, next_string = [types], [strings], first_id, first_string
    for module in modules:
        more, text = _sections(module)
        moved, count = _move(
            more, first_id, next_id - first_id, first_string, next_string - first_string
        )
        all_types.append(moved)
        all_strings.append(text)
        next_id += count
        next_string += len(text)
    types, strings = b"".join(all_types), b"".join(all_strings)
    head = _HEADER.pack(0xEB9F, 1, 0, _HEADER.size, 0, len(types), len(types), len(strings))
    return head + types + strings


def _sections(raw: bytes) -> tuple[bytes, bytes]:
    """The types and the strings of a BTF."""
    _magic, _version, _flags, head, types, types_size, strings, strings_size = _HEADER.unpack_from(
        raw
    )
    types, strings = head + types, head + strings
    return raw[types : types + types_size], raw[strings : strings + strings_size]


def _count(raw: bytes) -> int:
    """How many types a BTF has, the void type included: the first id of a split BTF."""
    lib = libbpf()
    btf = _parse(raw, "the kernel")
    try:
        return int(lib.btf__type_cnt(btf))
    finally:
        lib.btf__free(btf)


def _move(
    raw: bytes, first_id: int, ids: int, first_string: int, strings: int
) -> tuple[bytes, int]:
    """The types of a split BTF with their own ids and strings moved up; and their number."""
    words = bytearray(raw)
    position, count = 0, 0

    def add(offset: int, first: int, distance: int) -> None:
        (number,) = struct.unpack_from("=I", words, offset)
        if number >= first:
            struct.pack_into("=I", words, offset, number + distance)

    while position < len(words):
        _name, info, _size = _TYPE.unpack_from(words, position)
        kind, members = info >> 24 & 31, info & 0xFFFF
        add(position, first_string, strings)
        if kind in _TYPE_NOT_SIZE:
            add(position + 8, first_id, ids)
        position += _TYPE.size
        if kind == _ARRAY:
            add(position, first_id, ids)
            add(position + 4, first_id, ids)
        position += 4 * _FIXED.get(kind, 0)
        if kind in _MEMBERS:
            size, names, types = _MEMBERS[kind]
            for member in range(position, position + 4 * size * members, 4 * size):
                for word in names:
                    add(member + 4 * word, first_string, strings)
                for word in types:
                    add(member + 4 * word, first_id, ids)
            position += 4 * size * members
        count += 1
    return bytes(words), count


def dump_types(raw: bytes, path: str) -> str:
    """Every type of a BTF as C; ``path`` names it in errors.  Raises MissingBtf."""
    lib, libc = libbpf(), ct.CDLL(None, use_errno=True)
    libc.open_memstream.restype = ct.c_void_p
    libc.open_memstream.argtypes = [ct.c_void_p, ct.c_void_p]
    libc.fclose.argtypes = libc.free.argtypes = [ct.c_void_p]
    btf = _parse(raw, path)
    text, size = ct.c_void_p(), ct.c_size_t()
    stream = libc.open_memstream(ct.byref(text), ct.byref(size))
    # libc's vfprintf(FILE *, const char *, va_list) is what btf_dump wants for a callback.
    dump = lib.btf_dump__new(btf, ct.cast(libc.vfprintf, ct.c_void_p), stream, None)
    try:
        for type_id in range(1, lib.btf__type_cnt(btf)):
            check(lib.btf_dump__dump_type(dump, type_id))
    except OSError as error:
        raise _unreadable(path, error.errno or 0) from error
    finally:
        lib.btf_dump__free(dump)
        lib.btf__free(btf)
        libc.fclose(stream)
        written = ct.string_at(text, size.value)
        libc.free(text)
    return written.decode()


def _parse(raw: bytes, path: str) -> int:
    """libbpf's handle of a BTF, which keeps a copy of it."""
    btf = libbpf().btf__new(raw, len(raw))
    if not btf:
        raise _unreadable(path, ct.get_errno())
    return int(btf)


def _unreadable(path: str, number: int) -> MissingBtf:
    cause = describe_errno(number)
    if os.path.exists(path) and number in (0, 22):  # EINVAL is what libbpf says of anything
        cause = "this is no BTF, or a damaged one"
    return MissingBtf(
        "read the kernel's type information (BTF)",
        f"{path}: {cause}",
        "use a kernel built with CONFIG_DEBUG_INFO_BTF=y, or name a BTF file of this kernel with "
        "HMEBPF_BTF=FILE",
        errno=number,
    )
