"""Raw instructions, checked before the kernel is asked: what is no program is said in plain words.

An instruction is 8 bytes: opcode, destination and source register (4 bits each), a 16-bit offset
and a 32-bit immediate; ``ld_imm64`` takes two.  Checked is what can be told without following the
program: every opcode up to clang's ``-mcpu=v4``, registers, and where jumps and calls lead.  All
else is the verifier's.

Instruction set: https://docs.kernel.org/bpf/standardization/instruction-set.html (RFC 9669), with
the older ``ld_abs`` and ``ld_ind`` and Linux's own ``may_goto`` and ``addr_space_cast`` (6.9).
"""

from __future__ import annotations

import re
import struct
import sys
from bisect import bisect_right
from collections.abc import Iterator
from functools import lru_cache

from hypermesh_ebpf.bpf.spec import ProgramSpec
from hypermesh_ebpf.errors import (
    EmptyProgram,
    InvalidProgram,
    InvalidRegister,
    JumpOutOfRange,
    MisalignedProgram,
    ProgramTooLong,
    UnknownOpcode,
)
from hypermesh_ebpf.image.image import Image

MAX_INSTRUCTIONS = 1_000_000
"""BPF_COMPLEXITY_LIMIT_INSNS (include/linux/bpf.h); 4096 before Linux 5.2 and without CAP_BPF."""

LD_IMM64 = 0x18
_CALL, _EXIT, _JA, _JA32, _MAY_GOTO = 0x85, 0x95, 0x05, 0x06, 0xE5
_MOV32_X, _MOV64_X, _SWAP = 0xBC, 0xBF, 0xD7
_ATOMIC32, _ATOMIC64 = 0xC3, 0xDB
# ld_imm64's source register, BPF_PSEUDO_...: MAP_FD, MAP_VALUE, BTF_ID, FUNC, two of MAP_IDX
MAP_FD, MAP_VALUE, _FUNC, _LAST_PSEUDO = 1, 2, 4, 6
_CALL_HELPER, _CALL_FUNCTION, _CALL_KERNEL = 0, 1, 2  # a call's source register
_FRAME_POINTER = 10
_FETCH = 0x01
_XCHG, _CMPXCHG = 0xE1, 0xF1
# imm of an atomic operation: add, or, and, xor, each with and without fetch; load and store (6.15)
_ATOMICS = {0x00, 0x40, 0x50, 0xA0, 0x01, 0x41, 0x51, 0xA1, _XCHG, _CMPXCHG}
_LOAD_ACQUIRE, _STORE_RELEASE = 0x100, 0x110
_ATOMIC8, _ATOMIC16 = 0xD3, 0xCB


def _known_opcodes() -> dict[int, bool]:
    """Every opcode, and whether it writes its destination register."""
    known: dict[int, bool] = {}
    for code in range(0x00, 0xE0, 0x10):  # add ... end, in both widths and with both sources
        for kind in (0x04, 0x07, 0x0C, 0x0F):
            known[code | kind] = True
    for code in (0x8C, 0x8F, 0xDF):  # neg has no source; to swap in 64 bits has no register form
        del known[code]
    for code in (*range(0x10, 0x80, 0x10), *range(0xA0, 0xE0, 0x10)):  # jeq ... jsle
        for kind in (0x05, 0x06, 0x0D, 0x0E):
            known[code | kind] = False
    for code in (_JA, _JA32, _CALL, _EXIT, _MAY_GOTO):
        known[code] = False
    for size in (0x00, 0x08, 0x10, 0x18):  # w, h, b, dw
        known[0x61 | size] = True  # ldx
        known[0x81 | size] = True  # ldx, sign-extending
        known[0x62 | size] = known[0x63 | size] = False  # st, stx
        known[0x20 | size] = known[0x40 | size] = False  # ld_abs, ld_ind
    for code in (0x99, 0x38, 0x58):  # sign-extending 8 bytes; packets have none of 8 either
        del known[code]
    for code in (_ATOMIC32, _ATOMIC64, _ATOMIC8, _ATOMIC16):
        known[code] = False
    known[LD_IMM64] = True
    return known


_KNOWN = _known_opcodes()
# Whose offset or immediate selects what they are, or leads somewhere.
_CLOSER = frozenset(
    code
    for code in _KNOWN
    if (code & 7 in (5, 6) and code != _EXIT)
    or code in (LD_IMM64, _ATOMIC32, _ATOMIC64, _ATOMIC8, _ATOMIC16, _MOV32_X, _MOV64_X, 0xD4, 0xDC)
    or code == _SWAP
    or (code & 0xF0 in (0x30, 0x90) and code & 7 in (4, 7))
)


def _split(head: int) -> tuple[int, int, int]:
    """Opcode, destination and source register of an instruction's first two bytes.

    The registers change places with the machine's byte order (struct bpf_insn has bit fields).
    """
    if sys.byteorder == "little":
        return head & 255, head >> 8 & 15, head >> 12
    return head >> 8, head >> 4 & 15, head & 15


@lru_cache(maxsize=1)
def _verdicts() -> bytes:
    """For each possible first two bytes as a number: 0 wrong, 1 right, 2 look closer."""
    table = bytearray(1 << 16)
    for code, writes in _KNOWN.items():
        verdict = 2 if code in _CLOSER else 1
        for target in range(_FRAME_POINTER if writes else _FRAME_POINTER + 1):
            for source in range(_FRAME_POINTER + 1):
                little = source << 12 | target << 8 | code
                big = code << 8 | target << 4 | source
                table[little if sys.byteorder == "little" else big] = verdict
    return bytes(table)


def check_bytecode(data: bytes) -> None:
    """Raise what is wrong with the bytes as a program for this machine, the first such thing.

    EmptyProgram, MisalignedProgram, ProgramTooLong, UnknownOpcode, InvalidRegister,
    JumpOutOfRange.  A million instructions take about half a second.
    """
    _check_size(data)
    count = len(data) // 8
    seconds: set[int] = set()  # second slots of ld_imm64
    jumps: list[tuple[int, int]] = []
    functions: set[int] = {0}
    skip, verdicts = -1, _verdicts()
    for index, (head, offset, immediate) in enumerate(struct.iter_unpack("=Hhi", data)):
        if index == skip:
            seconds.add(index)
            if head or offset:
                raise _unknown(data, index, "it has to be the second half of the ld_imm64 before")
            continue
        verdict = verdicts[head]
        if verdict == 1:
            continue
        if verdict == 0:
            raise _wrong(data, index, head)
        opcode, _target_register, source = _split(head)
        if opcode == LD_IMM64:
            if index + 1 == count:
                raise _unknown(data, index, "the second half of this ld_imm64 is missing")
            skip = index + 1
            if source > _LAST_PSEUDO:
                raise _unknown(data, index, f"ld_imm64 has no variant {source}")
            if source == _FUNC:
                functions.add(_target(data, index, index + 1 + immediate, count))
        elif opcode == _CALL:
            if source == _CALL_FUNCTION:
                functions.add(_target(data, index, index + 1 + immediate, count))
            elif source > _CALL_KERNEL:
                raise _unknown(data, index, f"there is no kind {source} of call")
        elif opcode & 7 in (5, 6):
            distance = immediate if opcode == _JA32 else offset
            jumps.append((index, _target(data, index, index + 1 + distance, count)))
        else:
            _check_variant(data, index, head, offset, immediate)
    _check_ways(data, count, seconds, jumps, sorted(functions))


def to_image(data: bytes, name: str) -> Image:
    """The checked instructions as an image of one program, of no kind yet and without maps.

    GPL is taken for granted: bytes have no licence, and many helpers ask for it.  Raises as
    :func:`check_bytecode` does, and InvalidProgram where the bytes refer to maps: descriptors mean
    something in the process alone that made them.
    """
    check_bytecode(data)
    for offset, _variant, descriptor in map_references(data):
        raise InvalidProgram(
            f"load {name}",
            f"instruction {offset // 8} refers to a map by its descriptor {descriptor}, "
            "and raw bytecode brings no maps along",
            "load the object file (.o) that it was taken from",
        )
    return Image(name, "GPL", (), (ProgramSpec(name, bytes(data), ()),))


def map_references(code: bytes) -> Iterator[tuple[int, int, int]]:
    """(byte offset, MAP_FD or MAP_VALUE, descriptor) of each instruction that loads a map."""
    opcodes = code[::8]
    position = opcodes.find(LD_IMM64)
    while position >= 0:
        head, _offset, immediate = struct.unpack_from("=Hhi", code, 8 * position)
        variant = _split(head)[2]
        if variant in (MAP_FD, MAP_VALUE):
            yield 8 * position, variant, immediate
        position = opcodes.find(LD_IMM64, position + 2)


def _check_size(data: bytes) -> None:
    if not data:
        raise EmptyProgram(
            "check the program",
            "it is empty: 0 bytes",
            "give at least 16 bytes: b7 00 00 00 00 00 00 00 95 00 00 00 00 00 00 00 "
            "(r0 = 0; exit)",
        )
    if len(data) % 8:
        raise MisalignedProgram(
            "check the program",
            f"{len(data)} bytes are no whole number of instructions, which have 8 each",
            _remedy(data, "cut it to a multiple of 8; "),
        )
    if len(data) // 8 > MAX_INSTRUCTIONS:
        raise ProgramTooLong(
            "check the program",
            f"{len(data) // 8:,} instructions are more than the {MAX_INSTRUCTIONS:,} "
            "that any kernel takes",
            "split it into programs that call each other by tail calls",
        )


def _target(data: bytes, index: int, target: int, count: int) -> int:
    """Where a jump or call leads.  Raises JumpOutOfRange where that is outside."""
    if not 0 <= target < count:
        raise _stray(
            data, index, f"leads to instruction {target}, and there are 0 to {count - 1} only"
        )
    return target


def _check_variant(data: bytes, index: int, head: int, offset: int, immediate: int) -> None:
    """Instructions that their offset or immediate tells apart."""
    opcode, target, source = _split(head)
    if opcode in (_ATOMIC32, _ATOMIC64, _ATOMIC8, _ATOMIC16):
        ordered = immediate in (_LOAD_ACQUIRE, _STORE_RELEASE)
        wide = opcode in (_ATOMIC32, _ATOMIC64)
        if not ordered and not (wide and immediate in _ATOMICS):
            raise _unknown(data, index, f"there is no atomic operation {immediate:#x} of this size")
        # These write the source register, or for a load the destination.
        fetches = immediate & _FETCH and immediate != _CMPXCHG and source == _FRAME_POINTER
        loads = immediate == _LOAD_ACQUIRE and target == _FRAME_POINTER
        if fetches or loads:
            raise _read_only(data, index)
    elif opcode in (0xD4, 0xDC, _SWAP):
        if immediate not in (16, 32, 64):
            raise _unknown(data, index, f"bytes are swapped in 16, 32 or 64 bits, not {immediate}")
    elif opcode in (_MOV32_X, _MOV64_X):
        widths = (0, 8, 16) if opcode == _MOV32_X else (0, 1, 8, 16, 32)  # 1: addr_space_cast
        if offset not in widths:
            raise _unknown(data, index, f"a move cannot extend the sign of {offset} bits")
    elif offset not in (0, 1):  # div and mod; 1: signed
        raise _unknown(data, index, f"there is no variant {offset} of division")


def _check_ways(
    data: bytes,
    count: int,
    seconds: set[int],
    jumps: list[tuple[int, int]],
    functions: list[int],
) -> None:
    """Jumps stay in their function and out of ld_imm64, and no function falls off its end."""
    for start in functions:
        if start in seconds:
            raise _stray(data, start, "is where a call leads, in the middle of a ld_imm64")
    for index, target in jumps:
        if target in seconds:
            raise _stray(data, index, f"leads to {target}, the second half of a ld_imm64")
    if len(functions) > 1:
        for index, target in jumps:
            if bisect_right(functions, index) != bisect_right(functions, target):
                raise _stray(data, index, f"leads to {target}, which is in another function")
    for end in [start - 1 for start in functions[1:]] + [count - 1]:
        opcode, _register, source = _split(*struct.unpack_from("=H", data, 8 * end))
        if end in seconds:
            opcode = LD_IMM64
        throws = opcode == _CALL and source == _CALL_KERNEL  # bpf_throw() never returns
        if opcode not in (_EXIT, _JA, _JA32) and not throws:
            where = "the program" if end == count - 1 else "a function"
            raise _stray(data, end, f"is the last of {where}, which goes on behind it")


def _name(data: bytes, index: int) -> str:
    """``instruction 3 (85 10 00 00 fe ff ff ff: call pc-2)``."""
    from hypermesh_ebpf.bpf.disassembler import disassemble

    raw = data[8 * index : 8 * index + 8]
    # Taken out of its place: a ld_imm64 gets a second half, and where a jump leads is not told.
    text = re.sub(r" <-?\d+>$", "", next(disassemble(raw + bytes(8))).text)
    return f"instruction {index} ({raw.hex(' ')}: {text})"


def _remedy(data: bytes, rule: str = "") -> str:
    if re.match(rb"\x7fELF|#|//|/\*", data):
        return "this is a whole file, not instructions: give it by its path, FILE.o or FILE.c"
    return f"{rule}correct the instruction named, or compile again for eBPF (`clang -target bpf`)"


def _wrong(data: bytes, index: int, head: int) -> InvalidProgram:
    """Why the opcode and registers of an instruction are refused."""
    opcode, target, source = _split(head)
    if opcode not in _KNOWN:
        return _unknown(data, index, f"there is no opcode {opcode:#04x}")
    for register in (target, source):
        if register > _FRAME_POINTER:
            return InvalidRegister(
                "check the program",
                f"{_name(data, index)}: there is no register r{register}",
                _remedy(data, "registers are r0 to r10; "),
            )
    return _read_only(data, index)


def _read_only(data: bytes, index: int) -> InvalidRegister:
    return InvalidRegister(
        "check the program",
        f"{_name(data, index)}: it writes r10, the frame pointer, which is read-only",
        _remedy(data, "use r0 to r9 as the destination; "),
    )


def _unknown(data: bytes, index: int, why: str) -> UnknownOpcode:
    return UnknownOpcode("check the program", f"{_name(data, index)}: {why}", _remedy(data))


def _stray(data: bytes, index: int, why: str) -> JumpOutOfRange:
    return JumpOutOfRange(
        "check the program",
        f"{_name(data, index)} {why}",
        "end each function with exit (95 00 00 00 00 00 00 00) and keep jumps inside of it",
    )
