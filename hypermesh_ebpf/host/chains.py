"""The members of a chain that is in the kernel, read from the chain itself.

A chain (:mod:`hypermesh_ebpf.bpf.chain`) carries its members as functions under their own names.  A
merged one calls them in order and goes on with the last in its own main part, which is therefore
called "hmebpf_chain_LAST"; a wrapped one calls its first member, and finds the others in a program
array.
"""

from __future__ import annotations

import ctypes
import os
import sys

from hypermesh_ebpf.bpf import info
from hypermesh_ebpf.bpf.btf import Btf
from hypermesh_ebpf.bpf.libbpf import libbpf
from hypermesh_ebpf.errors import MissingBtf

NAME = "hmebpf_chain"
"""As in :data:`hypermesh_ebpf.bpf.chain.NAME`, which is too much to import for a look."""

_CALL, _FUNCTION_CALL = 0x85, 1  # BPF_PSEUDO_CALL


def read_members(fd: int, program: info.ProgramInfo) -> tuple[str, ...] | None:
    """The names of a chain's members in the order they run; None for what is no chain of ours.

    Raises OSError.
    """
    if program.name != NAME or not program.functions:
        return None
    types = Btf.from_id(program.btf_id)
    code = info.read_translated(fd)
    names = _called(code, types)
    first = code.functions[0][1] if code.functions else 0
    last = types.type(first).name.removeprefix(NAME).removeprefix("_") if first else ""
    if last:  # merged
        return (*names, last)
    followers = tuple(name for map_id in program.map_ids for name in _followers(map_id))
    return (*names[:1], *followers) if followers else names or None


def _called(code: info.Translated, types: Btf) -> tuple[str, ...]:
    """The members that a dispatcher calls, in order.

    The functions of the last member, if its main part follows the dispatcher, come before all
    others: what it calls itself lies in front of what is called first.
    """
    raw, starts = code.instructions, dict(code.functions)
    end = code.functions[1][0] if len(code.functions) > 1 else 0
    targets = []
    for number in range(end):
        at = 8 * number
        if raw[at] == _CALL and raw[at + 1] >> 4 == _FUNCTION_CALL:
            offset = int.from_bytes(raw[at + 2 : at + 4], sys.byteorder, signed=True)
            targets.append(number + 1 + offset)
    found = []
    for target in targets:
        if target >= targets[0] and target in starts:
            name = types.type(starts[target]).name
            found.append("?" if name == NAME else name)
    return tuple(found)


def _followers(map_id: int) -> tuple[str, ...]:
    """Members behind a program array's slots, if they are wrapped ones of a chain."""
    try:
        fd = info.open_by_id("map", map_id)
    except OSError:
        return ()
    found: list[str] = []
    try:
        about = info.read_map(fd)
        if about.type != "prog_array" or not about.name.startswith("hmebpf"):
            return ()
        value = ctypes.c_uint32()
        for slot in range(about.max_entries):
            key = ctypes.c_uint32(slot)
            if libbpf().bpf_map_lookup_elem(fd, ctypes.byref(key), ctypes.byref(value)) < 0:
                continue
            found += _name_member(value.value)
    finally:
        os.close(fd)
    return tuple(found)


def _name_member(program_id: int) -> tuple[str, ...]:
    try:
        fd = info.open_by_id("program", program_id)
    except OSError:
        return ()
    try:
        program = info.read_program(fd)
        called: tuple[str, ...] = ()
        if program.functions > 1:
            called = _called(info.read_translated(fd), Btf.from_id(program.btf_id))
        return called[:1] or (program.name,)
    except MissingBtf:
        return ("?",)
    finally:
        os.close(fd)
