"""The members of a chain that is in the kernel, read from the chain itself.

A chain (:mod:`hypermesh_ebpf.bpf.chain`) carries its members as functions under their own names: a
merged one calls all of them in order, a wrapped one the first, and finds the head of the rest in a
program array.
"""

from __future__ import annotations

import ctypes
import os

from hypermesh_ebpf.bpf import info
from hypermesh_ebpf.bpf.btf import Btf
from hypermesh_ebpf.bpf.libbpf import libbpf
from hypermesh_ebpf.errors import MissingBtf

NAME = "hmebpf_chain"
"""As in :data:`hypermesh_ebpf.bpf.chain.NAME`, which is too much to import for a look."""

_CALL, _FUNCTION_CALL = 0x85, 1


def read_members(fd: int, program: info.ProgramInfo) -> tuple[str, ...] | None:
    """The names of a chain's members in the order they run; None for what is no chain of ours.

    Raises OSError.
    """
    if program.name != NAME or not program.functions:
        return None
    names = _called(fd, program.btf_id)
    for map_id in program.map_ids:
        names += _followers(map_id)
    return names or None


def _called(fd: int, btf_id: int) -> tuple[str, ...]:
    """The functions that a program's main part calls, in order."""
    code = info.read_translated(fd)
    starts = dict(code.functions)
    end = code.functions[1][0] if len(code.functions) > 1 else len(code.instructions) // 8
    types = Btf.from_id(btf_id)
    found = []
    for number in range(min(end, len(code.instructions) // 8)):
        opcode, registers = code.instructions[8 * number], code.instructions[8 * number + 1]
        if opcode == _CALL and registers >> 4 == _FUNCTION_CALL:
            offset = int.from_bytes(
                code.instructions[8 * number + 2 : 8 * number + 4], "little", signed=True
            )
            type_id = starts.get(number + 1 + offset)
            if type_id is not None:
                found.append(types.type(type_id).name)
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
        called = _called(fd, program.btf_id) if program.functions > 1 else ()
        return called[:1] or (program.name,)
    except MissingBtf:
        return ("?",)
    finally:
        os.close(fd)
