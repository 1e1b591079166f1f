"""A dispatcher around programs, instruction by instruction: no kernel is asked here.

Programs are put in as they are: their calls and jumps are relative, their map references are
counted anew.  :mod:`hypermesh_ebpf.bpf.chain` tells what a chain is, and loads it.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from hypermesh_ebpf.bpf.spec import ProgramSpec
from hypermesh_ebpf.errors import (
    EmptyProgram,
    JumpOutOfRange,
    LoadError,
    MisalignedProgram,
    UsageError,
)

NAME = "hmebpf_chain"
"""What the head of a chain of several members is called in the kernel (15 characters at most)."""

_KINDS = ("xdp", "tc")
_XDP_PASS = 2
_TC_ENDING = (2, 4, 7, 8)  # TC_ACT_SHOT, STOLEN, REDIRECT, TRAP
# Where a context has a number that no verifier knows: xdp_md.rx_queue_index, __sk_buff.len
_UNKNOWN = {"xdp": 16, "tc": 0}

_MOV, _MOV_IMM, _ADD, _SUB, _LOAD32 = 0xBF, 0xB7, 0x0F, 0x1F, 0x61
_JUMP, _CALL, _EXIT, _LD_IMM64 = 0x05, 0x85, 0x95, 0x18
_JEQ32, _JNE32 = 0x16, 0x56  # 32 bits, as the kernel takes of a verdict (Linux 5.1)
_LD_ABS_OR_IND = (0x20, 0x28, 0x30, 0x40, 0x48, 0x50)
# BPF_PSEUDO_... of LD_IMM64
_MAP_FD, _VARIABLE, _FUNCTION, _MAP_INDEX, _MAP_INDEX_VALUE = 1, 3, 4, 5, 6
_PROGRAM_CALL, _KERNEL_CALL = 1, 2  # BPF_PSEUDO_CALL, BPF_PSEUDO_KFUNC_CALL
_TAIL_CALL = 12  # BPF_FUNC_tail_call
_FIRST = re.compile(rb"[\x18\x85\x20\x28\x30\x40\x48\x50]")


@dataclass(frozen=True, slots=True)
class Member:
    """A program to run in a chain, with descriptors of the maps that its references count.

    ``fd`` is its own descriptor where it is loaded already.
    """

    program: ProgramSpec
    maps: Sequence[int]
    license: str = "GPL"
    fd: int | None = None


@dataclass(frozen=True, slots=True)
class Assembly:
    """A program put together, and (number of the first instruction, name) of its functions."""

    program: ProgramSpec
    functions: tuple[tuple[int, str], ...]


def merge(members: Sequence[Member], kind: str, *, call_last: bool = False) -> Assembly:
    """The members' programs behind one dispatcher; ``kind`` is "xdp" or "tc".

    All but the last are called; the last follows the dispatcher in its place, and its stack counts
    with that of each other, unless ``call_last``.  Map references count through the maps of all
    members, one list after the other.  Raises what :func:`check_members` raises.
    """
    check_members(members, kind)
    programs = [member.program for member in members]
    last = len(programs) - 1
    order = [*range(last + 1)] if call_last else [last, *range(last)]
    called = order if call_last else order[1:]
    # No stack is used: the members' limit is 512 bytes together with their callers (older
    # verifiers, 5.10's for one, count 32 for none).
    tail = [_instruction(_EXIT)]
    if not call_last:
        tail = [_instruction(_JUMP, 0, 0, 1), *tail, _instruction(_MOV, 1, 6)]
    end = 1 + sum(len(_call(programs[number], kind, 0, 0, 0)) for number in called)
    sizes = [len(programs[number].instructions) // 8 for number in order]
    starts = dict(zip(order, accumulate(sizes, initial=end + len(tail)), strict=False))
    end += 0 if call_last else 1
    head = [_instruction(_MOV, 6, 1)]  # the context stays there: calls keep r6
    for number in called:
        head += _call(programs[number], kind, len(head), starts[number], end)
    functions = [(0, NAME if call_last else f"{NAME}_{programs[last].name}")]
    refs: list[tuple[int, int]] = []
    maps_before = [*accumulate((len(member.maps) for member in members), initial=0)]
    for number, start in starts.items():
        program, before = programs[number], maps_before[number]
        refs += [(8 * start + offset, before + index) for offset, index in program.map_refs]
        found = list_functions(program, start)
        functions += found if number in called else found[1:]
    code = b"".join([*head, *tail, *(programs[number].instructions for number in order)])
    return Assembly(ProgramSpec(NAME, code, tuple(refs), kind), tuple(functions))


def wrap(program: ProgramSpec, kind: str, next_slot: int) -> Assembly:
    """One program behind a wrapper that goes on with a slot of a program array.

    The array is map 0; the program's own maps follow.
    """
    array = 1 + len(_call(program, kind, 0, 0, 0)) + 2
    end = array + 5
    head = [
        _instruction(_MOV, 6, 1),
        *_call(program, kind, 1, end + 1, end),
        _instruction(_MOV, 7, 0),
        _instruction(_MOV, 1, 6),
        _instruction(_LD_IMM64, 2, _MAP_FD),
        _instruction(0),
        _instruction(_MOV_IMM, 3, 0, 0, next_slot),
        _instruction(_CALL, 0, 0, 0, _TAIL_CALL),
        _instruction(_MOV, 0, 7),  # the slot is empty: this verdict is the last
        _instruction(_EXIT),
    ]
    start = len(head)
    refs = [(8 * array, 0), *((8 * start + at, index + 1) for at, index in program.map_refs)]
    code = b"".join(head) + program.instructions
    functions = ((0, NAME), *list_functions(program, start))
    return Assembly(replace(program, instructions=code, map_refs=tuple(refs)), functions)


def _call(program: ProgramSpec, kind: str, at: int, callee: int, end: int) -> list[bytes]:
    """Instructions, from ``at`` on, that call a function and jump if its verdict ends the chain."""
    code = [
        _instruction(_MOV, 1, 6),
        _instruction(_CALL, 0, _PROGRAM_CALL, 0, callee - at - 2),
    ]
    if _returns_unseen(program):
        # The verifier takes a verdict that it knows for certain, and removes what follows on
        # others.  Older ones do not see that what a tail call went to returns here (seen on 5.10
        # and 6.12), nor the way out of a read by LD_ABS behind the packet's end (5.10).  So a zero
        # is added of which no verifier knows more than that it is a number.
        code += [
            _instruction(_LOAD32, 1, 6, _UNKNOWN[kind]),
            _instruction(_LOAD32, 2, 6, _UNKNOWN[kind]),
            _instruction(_SUB, 1, 2),
            _instruction(_ADD, 0, 1),
        ]
    distance = end - at - len(code) - 1
    if kind == "xdp":
        return [*code, _instruction(_JNE32, 0, 0, distance, _XDP_PASS)]
    jumps = enumerate(_TC_ENDING)
    return [*code, *(_instruction(_JEQ32, 0, 0, distance - n, verdict) for n, verdict in jumps)]


def _returns_unseen(program: ProgramSpec) -> bool:
    """Whether the program can return otherwise than by its own exits."""
    return any(
        opcode in _LD_ABS_OR_IND or (opcode == _CALL and not source and immediate == _TAIL_CALL)
        for _, opcode, source, _, immediate in _telling_instructions(program.instructions)
    )


def check_members(members: Sequence[Member], kind: str) -> None:
    """Raise what is wrong with a chain before the kernel is asked.

    UsageError for another kind of hook or program, or none at all; InvalidProgram for code that
    would reach into its neighbour; LoadError for what cannot be moved into another program.
    """
    if kind not in _KINDS:
        remedy = "chains are for xdp and tc; other hooks take several programs as they are"
        raise UsageError(f"build a chain of {kind} programs", "there is no such chain", remedy)
    if not members:
        raise UsageError(f"build a chain of {kind} programs", "it has no members", "name one")
    for member in members:
        program = member.program
        if program.kind not in (None, kind):
            raise UsageError(
                f"put {program.name} into a chain at {kind}", f"it is a program for {program.kind}"
            )
        list_functions(program, 0)


def list_functions(program: ProgramSpec, start: int) -> list[tuple[int, str]]:
    """(first instruction, name) of a program's functions when it is put at ``start``, in order.

    Raises InvalidProgram for code that is none or leads out of the program, LoadError for what
    would be lost in another program.
    """
    what = f"put {program.name} into a chain"
    code = program.instructions
    if not code:
        raise EmptyProgram(what, "it has no instructions")
    if len(code) % 8:
        raise MisalignedProgram(what, f"its size, {len(code)} bytes, is no multiple of 8")
    count, starts = len(code) // 8, {0}
    for number, opcode, source, offset, immediate in _telling_instructions(code):
        if opcode == _LD_IMM64 and source in (_MAP_INDEX, _MAP_INDEX_VALUE):
            raise LoadError(
                what,
                f"instruction {number} names a map by its place in a list of its own",
                "build it with map descriptors, as libbpf and BCC do",
            )
        calls = opcode == _CALL and source == _KERNEL_CALL and offset
        reads = opcode == _LD_IMM64 and source == _VARIABLE and _second_half(code, number)
        if calls or reads:
            uses = "calls a function" if calls else "reads a variable"
            raise LoadError(
                what,
                f"instruction {number} {uses} of a kernel module, by a descriptor of its own",
                "attach it alone",
            )
        if (opcode, source) in ((_LD_IMM64, _FUNCTION), (_CALL, _PROGRAM_CALL)):
            target = number + 1 + immediate
            if not 0 <= target < count:
                cause = f"instruction {number} calls {target}, of {count}"
                raise JumpOutOfRange(what, cause, "build the program again")
            starts.add(target)
    names = [program.name, *(f"{program.name}_{n}" for n in range(1, len(starts)))]
    return [(start + at, name) for at, name in zip(sorted(starts), names, strict=True)]


def _second_half(code: bytes, number: int) -> int:
    """The second immediate of a 64-bit load: of a variable, the descriptor of its module's BTF."""
    return int.from_bytes(code[8 * number + 12 : 8 * number + 16], "little")


def _telling_instructions(code: bytes) -> Iterator[tuple[int, int, int, int, int]]:
    """(number, opcode, source register, offset, immediate) of calls, 64-bit loads and LD_ABS.

    The second half of a 64-bit load has opcode 0 and is none of them.
    """
    for found in _FIRST.finditer(code[::8]):
        opcode, registers, offset, immediate = struct.unpack_from("=BBhi", code, 8 * found.start())
        yield found.start(), opcode, registers >> 4, offset, immediate


def _instruction(
    opcode: int, target: int = 0, source: int = 0, offset: int = 0, immediate: int = 0
) -> bytes:
    return struct.pack("=BBhi", opcode, target | source << 4, offset, immediate)
