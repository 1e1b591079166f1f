"""Instructions as text, each against what the kernel's own disassembler writes for it."""

from __future__ import annotations

import random
import struct

import pytest

from hypermesh_ebpf.bpf.disassembler import Names, disassemble
from hypermesh_ebpf.bpf.names import HELPERS
from hypermesh_ebpf.errors import MisalignedProgram


def insn(code: int, dst: int = 0, src: int = 0, offset: int = 0, imm: int = 0) -> bytes:
    return struct.pack("=BBhi", code, dst | src << 4, offset, imm)


def text(raw: bytes, names: Names | None = None) -> str:
    """The text of the first instruction."""
    return next(disassemble(raw, names)).text


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        # arithmetic, 64 and 32 bits
        (insn(0xB7, 0, imm=2), "r0 = 2"),
        (insn(0xB4, 3, imm=-1), "w3 = -1"),
        (insn(0xBF, 6, 1), "r6 = r1"),
        (insn(0xBC, 6, 1), "w6 = w1"),
        (insn(0x07, 2, imm=-16), "r2 += -16"),
        (insn(0x1F, 3, 2), "r3 -= r2"),
        (insn(0x27, 3, imm=5), "r3 *= 5"),
        (insn(0x3F, 3, 2), "r3 /= r2"),
        (insn(0x3F, 3, 2, 1), "r3 s/= r2"),
        (insn(0x97, 3, 0, 1, 7), "r3 s%= 7"),
        (insn(0x47, 1, imm=1), "r1 |= 1"),
        (insn(0x57, 1, imm=255), "r1 &= 255"),
        (insn(0x67, 1, imm=32), "r1 <<= 32"),
        (insn(0x77, 1, imm=32), "r1 >>= 32"),
        (insn(0xC7, 1, imm=32), "r1 s>>= 32"),
        (insn(0xA7, 1, imm=1), "r1 ^= 1"),
        (insn(0x87, 4), "r4 = -r4"),
        (insn(0x84, 4), "w4 = -w4"),
        (insn(0xBF, 1, 2, 8), "r1 = (s8)r2"),
        (insn(0xBF, 1, 2, 32), "r1 = (s32)r2"),
        (insn(0xBC, 1, 2, 16), "w1 = (s16)w2"),
        (insn(0xDC, 1, imm=16), "r1 = be16 r1"),
        (insn(0xD4, 1, imm=64), "r1 = le64 r1"),
        (insn(0xD7, 1, imm=32), "r1 = bswap32 r1"),
        (insn(0xBF, 1, 2, 1, 1 << 16), "r1 = addr_space_cast(r2, 1, 0)"),
        (insn(0xBF, 0, 0, -1), "r0 = &(void __percpu *)(r0)"),
        # memory
        (insn(0x79, 2, 6, 8), "r2 = *(u64 *)(r6 +8)"),
        (insn(0x61, 2, 1, 76), "r2 = *(u32 *)(r1 +76)"),
        (insn(0x69, 2, 1, -2), "r2 = *(u16 *)(r1 -2)"),
        (insn(0x71, 2, 1), "r2 = *(u8 *)(r1 +0)"),
        (insn(0x91, 2, 1), "r2 = *(s8 *)(r1 +0)"),
        (insn(0x81, 2, 1), "r2 = *(s32 *)(r1 +0)"),
        (insn(0x7B, 10, 1, -8), "*(u64 *)(r10 -8) = r1"),
        (insn(0x62, 10, 0, -4, 7), "*(u32 *)(r10 -4) = 7"),
        (insn(0xC2), "nospec"),
        (insn(0x30, imm=14), "r0 = *(u8 *)skb[14]"),
        (insn(0x48, 0, 6, imm=14), "r0 = *(u16 *)skb[r6 + 14]"),
        # atomics
        (insn(0xDB, 1, 2), "lock *(u64 *)(r1 +0) += r2"),
        (insn(0xC3, 1, 2, 4, 0x40), "lock *(u32 *)(r1 +4) |= r2"),
        (insn(0xDB, 1, 2, 0, 0x51), "r2 = atomic64_fetch_and((u64 *)(r1 +0), r2)"),
        (insn(0xC3, 1, 2, 0, 0x01), "r2 = atomic_fetch_add((u32 *)(r1 +0), r2)"),
        (insn(0xDB, 1, 2, 0, 0xF1), "r0 = atomic64_cmpxchg((u64 *)(r1 +0), r0, r2)"),
        (insn(0xC3, 1, 2, 0, 0xE1), "r2 = atomic_xchg((u32 *)(r1 +0), r2)"),
        (insn(0xDB, 1, 2, 8, 0x100), "r1 = load_acquire((u64 *)(r2 +8))"),
        (insn(0xC3, 1, 2, 8, 0x110), "store_release((u32 *)(r1 +8), r2)"),
        # jumps, with the number of the instruction they lead to
        (insn(0x05, offset=3), "goto pc+3 <4>"),
        (insn(0x06, imm=70000), "gotol pc+70000 <70001>"),
        (insn(0x15, 0, offset=2, imm=0), "if r0 == 0x0 goto pc+2 <3>"),
        (insn(0x55, 0, offset=-1, imm=-1), "if r0 != 0xffffffff goto pc-1 <0>"),
        (insn(0x2D, 1, 2, 5), "if r1 > r2 goto pc+5 <6>"),
        (insn(0x66, 1, offset=1, imm=4), "if w1 s> 0x4 goto pc+1 <2>"),
        (insn(0xDE, 1, 2, 1), "if w1 s<= w2 goto pc+1 <2>"),
        (insn(0x4D, 1, 2, 1), "if r1 & r2 goto pc+1 <2>"),
        (insn(0xE5, offset=4), "may_goto pc+4 <5>"),
        (insn(0x95), "exit"),
        # calls
        (insn(0x85, imm=1), "call bpf_map_lookup_elem#1"),
        (insn(0x85, imm=9999), "call unknown#9999"),
        (insn(0x85, 0, 1, 0, 6), "call pc+6 <7>"),
        (insn(0x85, 0, 2, 0, 6), "call kernel-function#6"),
        # wide immediates
        (insn(0x18, 1, imm=-1) + insn(0), "r1 = 0xffffffff"),
        (insn(0x18, 1, imm=1) + insn(0, imm=-1), "r1 = 0xffffffff00000001"),
        (insn(0x18, 1, 1, imm=5) + insn(0), "r1 = map[fd:5]"),
        (insn(0x18, 1, 2, imm=5) + insn(0, imm=8), "r1 = map[fd:5][0]+8"),
        (insn(0x18, 1, 3, imm=77) + insn(0), "r1 = btf[77]"),
        (insn(0x18, 1, 4, imm=3) + insn(0), "r1 = subprog[+3]"),
        (insn(0x18, 1, 5, imm=0) + insn(0), "r1 = map[idx:0]"),
        # what is none
        (insn(0xFF), "unknown"),
        (insn(0x18, 1), "unknown"),
        (insn(0xDB, 1, 2, 0, 0x33), "unknown atomic operation 0x33"),
    ],
)
def test_text(raw: bytes, said: str) -> None:
    assert text(raw).startswith(said) if said == "unknown" else text(raw) == said


def test_names() -> None:
    names = Names(
        map={5: "counts"}.get, call={1234: "htab_map_update_elem"}.get, functions={7: "account"}
    )
    assert text(insn(0x18, 1, 1, imm=5) + insn(0), names) == "r1 = map[fd:5 counts]"
    assert text(insn(0x85, 0, 1, 0, 6), names) == "call pc+6 <account>"


def test_translated_programs_say_the_same_in_other_fields() -> None:
    names = Names(
        translated=True,
        map={5: "counts"}.get,
        call={1234: "htab_map_update_elem"}.get,
        functions={7: "account"},
    )
    assert text(insn(0x18, 1, 1, imm=5) + insn(0), names) == "r1 = map[id:5 counts]"
    assert text(insn(0x85, imm=1234), names) == "call htab_map_update_elem"
    assert text(insn(0x85, 0, 1, 6, 1), names) == "call pc+6 <account>"
    assert text(insn(0x85, imm=5), names) == "call unknown#5", "an address that is not told"
    assert text(insn(0x85, imm=12), names) == "call bpf_tail_call#12"


def test_numbers_count_wide_instructions_twice() -> None:
    raw = insn(0xBF, 6, 1) + insn(0x18, 1, 1, imm=5) + insn(0) + insn(0x95)
    found = list(disassemble(raw))
    assert [each.number for each in found] == [0, 1, 3]
    assert b"".join(each.raw for each in found) == raw
    assert str(found[0]) == "   0: (bf) r6 = r1"
    assert str(found[1]) == "   1: (18) r1 = map[fd:5]"


def test_targets() -> None:
    raw = insn(0x05, offset=1) + insn(0x95) + insn(0x85, 0, 1, 0, -2) + insn(0x95)
    assert [each.target for each in disassemble(raw)] == [2, None, 1, None]


def test_size_that_is_no_multiple_of_eight() -> None:
    with pytest.raises(MisalignedProgram) as caught:
        list(disassemble(insn(0x95) + b"\0"))
    assert "9 bytes" in str(caught.value)
    assert list(disassemble(b"")) == []


def test_any_bytes_give_some_text() -> None:
    """Nothing is left out, whatever it is, and nothing raises."""
    source = random.Random(7)
    for translated in (False, True):
        raw = source.randbytes(8 * 20_011)
        found = list(disassemble(raw, Names(translated=translated)))
        assert b"".join(each.raw for each in found) == raw
        assert all(each.text for each in found)


def test_helpers_have_their_numbers() -> None:
    """A few of those in include/uapi/linux/bpf.h, from the first to the last."""
    known = {1: "map_lookup_elem", 12: "tail_call", 25: "perf_event_output", 44: "xdp_adjust_head"}
    known |= {113: "probe_read_kernel", 130: "ringbuf_output", 174: "get_attach_cookie"}
    known |= {211: "cgrp_storage_delete"}
    assert {number: HELPERS[number] for number in known} == known
