"""eBPF instructions as text, in the kernel's own style, with names for numbers.

The style is kernel/bpf/disasm.c's.  For translated programs, as the kernel runs them, and for
bytecode that no kernel has seen.  The two differ in what calls and map references hold: in a
translated program a helper is an address, a map an id, and a call's offset is in another field.

Instruction set: RFC 9669; what came later: load-acquire and store-release (Linux 6.15).
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from hypermesh_ebpf.bpf.names import HELPERS, words
from hypermesh_ebpf.errors import MisalignedProgram

_LD, _LDX, _ST, _STX, _ALU, _JMP, _JMP32, _ALU64 = range(8)
_IMM, _ABS, _IND, _MEM, _MEMSX, _ATOMIC, _NOSPEC = 0, 1, 2, 3, 4, 6, 6  # the code's upper 3 bits
_CALL, _EXIT, _JA, _JCOND = 0x8, 0x9, 0x0, 0xE
_NEG, _MOV, _END, _DIV, _MOD = 0x8, 0xB, 0xD, 0x3, 0x9
_CMPXCHG, _XCHG, _LOAD_ACQUIRE, _STORE_RELEASE = 0xF1, 0xE1, 0x100, 0x110

_ALU_SIGNS = words("+= -= *= /= |= &= <<= >>= neg %= ^= = s>>= endian")
_JUMP_SIGNS = words("jmp == > >= & != s> s>= call exit < <= s< s<=")
_SIZES = ("u32", "u16", "u8", "u64")
_SIGNED_SIZES = ("s32", "s16", "s8", "s64")
_ATOMIC_NAMES = {0x0: "add", 0x4: "or", 0x5: "and", 0xA: "xor"}
_SIGN_EXTENSIONS = {8: "(s8)", 16: "(s16)", 32: "(s32)"}
_PSEUDO_CALL, _PSEUDO_KFUNC = 1, 2
_TAIL_CALL = HELPERS.index("tail_call")
_MAP_FD, _MAP_VALUE, _BTF_ID, _FUNC, _MAP_INDEX, _MAP_INDEX_VALUE = 1, 2, 3, 4, 5, 6


@dataclass(frozen=True, slots=True)
class Names:
    """What numbers stand for.

    ``translated`` tells the kernel's view from bytecode's.  ``map`` gives a map's name by its id,
    descriptor or index, ``call`` a helper's by address (translated) or a kernel function's by BTF
    id, ``functions`` the program's own by their first instruction.
    """

    translated: bool = False
    map: Callable[[int], str | None] = lambda number: None
    call: Callable[[int], str | None] = lambda number: None
    functions: Mapping[int, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction: its number, its bytes (16 of a wide one), its text, and where it jumps."""

    number: int
    raw: bytes
    text: str
    target: int | None = None

    def __str__(self) -> str:
        return f"{self.number:4}: ({self.raw[0]:02x}) {self.text}"


@dataclass(frozen=True, slots=True)
class _Fields:
    """An instruction taken apart (struct bpf_insn)."""

    code: int
    destination: int
    source: int
    offset: int
    immediate: int


def disassemble(code: bytes, names: Names | None = None) -> Iterator[Instruction]:
    """The instructions of a program.  What is none is shown as such, and nothing is left out.

    Raises MisalignedProgram where the size is no multiple of 8.
    """
    if len(code) % 8:
        raise MisalignedProgram(
            "disassemble the program",
            f"its size is {len(code)} bytes, and an instruction has 8",
            "give the bytes of the instructions alone",
        )
    names = names or Names()
    number, total = 0, len(code) // 8
    while number < total:
        at = 8 * number
        fields = _unpack(code, at)
        if fields.code == 0x18 and number + 1 < total:
            high = struct.unpack_from("=i", code, at + 12)[0]
            text = f"r{fields.destination} = {_describe_wide(fields, high, names)}"
            yield Instruction(number, code[at : at + 16], text)
            number += 2
            continue
        text, target = _describe(fields, number, names)
        yield Instruction(number, code[at : at + 8], text, target)
        number += 1


def _unpack(code: bytes, at: int) -> _Fields:
    opcode, registers, offset, immediate = struct.unpack_from("=BBhi", code, at)
    return _Fields(opcode, registers & 15, registers >> 4, offset, immediate)


def _describe_wide(fields: _Fields, high: int, names: Names) -> str:
    """What a 64-bit immediate load loads: a number, a map, a map's value, a function."""
    low, kind = fields.immediate, fields.source
    if kind in (_MAP_FD, _MAP_VALUE, _MAP_INDEX, _MAP_INDEX_VALUE):
        by = "id" if names.translated else "idx" if kind >= _MAP_INDEX else "fd"
        name = names.map(low)
        found = f"map[{by}:{low} {name}]" if name else f"map[{by}:{low}]"
        is_value = kind in (_MAP_VALUE, _MAP_INDEX_VALUE)
        return f"{found}[0]+{high & 0xFFFFFFFF}" if is_value else found
    if kind == _FUNC:
        return f"subprog[{low:+d}]"
    if kind == _BTF_ID and not names.translated:
        return f"btf[{low}]"
    return f"0x{(high & 0xFFFFFFFF) << 32 | low & 0xFFFFFFFF:x}"


def _describe(fields: _Fields, number: int, names: Names) -> tuple[str, int | None]:
    """An instruction's text, and the number of the one that it jumps to."""
    kind = fields.code & 7
    if kind in (_ALU, _ALU64):
        return _describe_arithmetic(fields), None
    if kind in (_JMP, _JMP32):
        return _describe_jump(fields, number, names)
    return _describe_memory(fields), None


def _describe_arithmetic(f: _Fields) -> str:
    wide, operation = f.code & 7 == _ALU64, f.code >> 4
    register = "r" if wide else "w"
    destination = f"{register}{f.destination}"
    if operation == _END:
        swap = "bswap" if wide else "be" if f.code & 8 else "le"
        return f"r{f.destination} = {swap}{f.immediate} r{f.destination}"
    if operation == _NEG:
        return f"{destination} = -{destination}"
    if operation >= len(_ALU_SIGNS):
        return _unknown(f)
    sign = _ALU_SIGNS[operation]
    if operation in (_DIV, _MOD) and f.offset == 1:
        sign = f"s{sign}"
    if not f.code & 8:
        return f"{destination} {sign} {f.immediate}"
    if operation == _MOV and f.offset in _SIGN_EXTENSIONS:
        return f"{destination} = {_SIGN_EXTENSIONS[f.offset]}{register}{f.source}"
    if operation == _MOV and wide and f.offset == 1:
        spaces = f"{(f.immediate & 0xFFFFFFFF) >> 16}, {f.immediate & 0xFFFF}"
        return f"r{f.destination} = addr_space_cast(r{f.source}, {spaces})"
    if operation == _MOV and wide and f.offset == -1:
        return f"r{f.destination} = &(void __percpu *)(r{f.source})"
    return f"{destination} {sign} {register}{f.source}"


def _describe_jump(f: _Fields, number: int, names: Names) -> tuple[str, int | None]:
    operation, short = f.code >> 4, f.code & 7 == _JMP32
    if operation > _JCOND or (short and operation in (_CALL, _EXIT, _JCOND)):
        return _unknown(f), None
    if operation == _CALL:
        return _describe_call(f, number, names)
    if operation == _EXIT:
        return "exit", None
    if operation == _JA:
        distance = f.immediate if short else f.offset
        target = number + 1 + distance
        return f"{'gotol' if short else 'goto'} pc{distance:+d} <{target}>", target
    target = number + 1 + f.offset
    goto = f"goto pc{f.offset:+d} <{target}>"
    if operation == _JCOND:
        return f"may_{goto}", target
    register = "w" if short else "r"
    with_what = f"{register}{f.source}" if f.code & 8 else f"0x{f.immediate & 0xFFFFFFFF:x}"
    return f"if {register}{f.destination} {_JUMP_SIGNS[operation]} {with_what} {goto}", target


def _describe_call(f: _Fields, number: int, names: Names) -> tuple[str, int | None]:
    if f.source == _PSEUDO_CALL:
        # Loading rewrites the call: the offset moves to where other jumps have theirs.
        distance = f.offset if names.translated else f.immediate
        target = number + 1 + distance
        name = names.functions.get(target)
        return f"call pc{distance:+d} <{name or target}>", target
    if f.code & 8:
        return f"callx r{f.destination}", None
    if names.translated and f.immediate != _TAIL_CALL:  # which has no address
        return f"call {names.call(f.immediate) or f'unknown#{f.immediate}'}", None
    if f.source == _PSEUDO_KFUNC:
        return f"call {names.call(f.immediate) or f'kernel-function#{f.immediate}'}", None
    known = 0 < f.immediate < len(HELPERS)
    return f"call {f'bpf_{HELPERS[f.immediate]}' if known else 'unknown'}#{f.immediate}", None


def _describe_memory(f: _Fields) -> str:
    kind, mode = f.code & 7, f.code >> 5
    size = _SIZES[f.code >> 3 & 3]
    stored = f"*({size} *)(r{f.destination} {f.offset:+d})"
    loaded = f"*({size} *)(r{f.source} {f.offset:+d})"
    if kind == _LDX and mode in (_MEM, _MEMSX):
        if mode == _MEMSX:
            loaded = loaded.replace(size, _SIGNED_SIZES[f.code >> 3 & 3], 1)
        return f"r{f.destination} = {loaded}"
    if kind == _ST and mode == _MEM:
        return f"{stored} = {f.immediate}"
    if kind == _ST and mode == _NOSPEC:
        return "nospec"
    if kind == _STX and mode == _MEM:
        return f"{stored} = r{f.source}"
    if kind == _STX and mode == _ATOMIC:
        return _describe_atomic(f, size, stored, loaded)
    if kind == _LD and mode == _ABS:
        return f"r0 = *({size} *)skb[{f.immediate}]"
    if kind == _LD and mode == _IND:
        return f"r0 = *({size} *)skb[r{f.source} + {f.immediate}]"
    return _unknown(f)


def _unknown(f: _Fields) -> str:
    return f"unknown instruction {f.code:02x}"


def _describe_atomic(f: _Fields, size: str, stored: str, loaded: str) -> str:
    wide = "64" if size == "u64" else ""
    place = stored.removeprefix("*")  # "(u64 *)(r1 +0)"
    if f.immediate == _CMPXCHG:
        return f"r0 = atomic{wide}_cmpxchg({place}, r0, r{f.source})"
    if f.immediate == _XCHG:
        return f"r{f.source} = atomic{wide}_xchg({place}, r{f.source})"
    if f.immediate == _LOAD_ACQUIRE:
        return f"r{f.destination} = load_acquire({loaded.removeprefix('*')})"
    if f.immediate == _STORE_RELEASE:
        return f"store_release({place}, r{f.source})"
    operation, fetches = f.immediate >> 4, f.immediate & 1
    if operation not in _ATOMIC_NAMES or f.immediate & ~0xF1:
        return f"unknown atomic operation {f.immediate:#x}"
    if fetches:
        name = _ATOMIC_NAMES[operation]
        return f"r{f.source} = atomic{wide}_fetch_{name}({place}, r{f.source})"
    return f"lock {stored} {_ALU_SIGNS[operation]} r{f.source}"
