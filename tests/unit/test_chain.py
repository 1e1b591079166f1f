"""Chains of programs, put together and run by a tiny interpreter: no kernel here."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence

import pytest

from hypermesh_ebpf.bpf import chain
from hypermesh_ebpf.bpf.chain import common_license, load_chain
from hypermesh_ebpf.bpf.dispatcher import Assembly, Member, merge, wrap
from hypermesh_ebpf.bpf.function_info import encode_btf
from hypermesh_ebpf.bpf.spec import ProgramSpec
from hypermesh_ebpf.errors import (
    EmptyProgram,
    HmebpfError,
    JumpOutOfRange,
    LoadError,
    MisalignedProgram,
    UsageError,
)
from tests.members import EXIT, insn, load_map, returning, set_r0

CONTEXT = 0xC0FFEE
KINDS = ("xdp", "tc")
FORMS = pytest.mark.parametrize("call_last", [False, True])
_MASK = (1 << 64) - 1


class Machine:
    """Enough of eBPF for what is made here; a helper's arguments are kept in ``helper_calls``."""

    def __init__(self, code: bytes, helpers: Mapping[int, Callable[[list[int]], int]] = {}) -> None:
        self.code = [struct.unpack_from("=BBhi", code, at) for at in range(0, len(code), 8)]
        self.helpers = helpers
        self.seen: list[int] = []  # what was written to r9: the numbers of the members
        self.functions: list[int] = []  # the places of functions that were loaded
        self.loads: list[tuple[int, int]] = []  # (instruction, immediate) of 64-bit loads

    def run(self) -> int:
        """The verdict as the kernel takes it: 32 bits, signed."""
        registers = [0] * 11
        registers[1] = CONTEXT
        result = self._call(0, registers) & 0xFFFFFFFF
        return result - (1 << 32) if result >> 31 else result

    def _call(self, at: int, r: list[int]) -> int:
        while True:
            opcode, registers, offset, immediate = self.code[at]
            target, source = registers & 15, registers >> 4
            at += 1
            if opcode == 0x95:
                return r[0]
            if opcode == 0x05:
                at += offset
            elif opcode == 0xB7 and target == 9:
                self.seen.append(immediate)
                assert r[1] == CONTEXT, "a member runs without its context"
            elif opcode == 0xB7:
                r[target] = immediate & _MASK
            elif opcode == 0xBF:
                r[target] = r[source]
            elif opcode == 0x67:
                r[target] = r[target] << immediate & _MASK
            elif opcode == 0x61:
                assert r[source] == CONTEXT
                r[target] = 4711  # of a field of the context
            elif opcode in (0x0F, 0x1F):
                sign = 1 if opcode == 0x0F else -1
                r[target] = (r[target] + sign * r[source]) & _MASK
            elif opcode == 0x07:
                r[target] = (r[target] + immediate) & _MASK
            elif opcode == 0x16:
                at += offset if r[target] & 0xFFFFFFFF == immediate & 0xFFFFFFFF else 0
            elif opcode == 0x56:
                at += offset if r[target] & 0xFFFFFFFF != immediate & 0xFFFFFFFF else 0
            elif opcode == 0x18:
                if source == 4:
                    self.functions.append(at + immediate)
                else:
                    self.loads.append((at - 1, immediate))
                r[target] = immediate
                at += 1
            elif opcode == 0x85 and source == 1:
                callee = list(r)  # r6 to r9 are the caller's again afterwards
                r[0] = self._call(at + immediate, callee)
                r[1:6] = [0xDEAD] * 5
            elif opcode == 0x85:
                r[0] = self.helpers[immediate](r)
                r[1:6] = [0xDEAD] * 5
            else:
                raise AssertionError(f"instruction {at - 1}: opcode {opcode:#x}")


def member(number: int, verdict: int) -> Member:
    """A member that the machine sees: it writes its number to r9."""
    code = insn(0xB7, 9, 0, 0, number) + set_r0(verdict) + EXIT
    return Member(ProgramSpec(f"m{number}", code, ()), [])


def run(assembly: Assembly) -> tuple[int, list[int]]:
    """(verdict, numbers of the members that ran)."""
    machine = Machine(assembly.program.instructions)
    verdict = machine.run()
    return verdict, machine.seen


def goes_on(kind: str, verdict: int) -> bool:
    """What the documents of the kernel say of a verdict: does the packet go on?"""
    if kind == "xdp":
        return verdict == 2
    return verdict not in (2, 4, 7, 8)


@FORMS
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("verdict", [*range(-3, 14), 255, 1 << 30])
def test_a_verdict_goes_on_or_ends_the_chain(kind: str, verdict: int, call_last: bool) -> None:
    other = 2 if kind == "xdp" else 0
    expected = (1, [0, 1]) if goes_on(kind, verdict) else (verdict, [0])
    members = [member(0, verdict), member(1, 1)]
    assert run(merge(members, kind, call_last=call_last)) == expected
    members = [member(0, other), member(1, verdict)]
    assert run(merge(members, kind, call_last=call_last)) == (verdict, [0, 1])


@FORMS
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [1, 2, 3, 8, 32, 256])
def test_every_member_runs_in_order(kind: str, count: int, call_last: bool) -> None:
    passing = 2 if kind == "xdp" else -1
    members, numbers = [member(number, passing) for number in range(count)], [*range(count)]
    assert run(merge(members, kind, call_last=call_last)) == (passing, numbers)
    assert run(merge(members[::-1], kind, call_last=call_last)) == (passing, numbers[::-1])


@FORMS
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", [0, 1, 6, 7])
def test_none_runs_after_the_one_that_drops(kind: str, place: int, call_last: bool) -> None:
    drop = 1 if kind == "xdp" else 2
    verdicts = [2 if kind == "xdp" else 0] * 8
    verdicts[place] = drop
    members = [member(number, verdict) for number, verdict in enumerate(verdicts)]
    assert run(merge(members, kind, call_last=call_last)) == (drop, [*range(place + 1)])


def test_the_kernel_takes_32_bits_of_a_verdict_and_so_does_the_chain() -> None:
    # r0 = (1 << 32) + 2
    wide = set_r0(1) + insn(0x67, 0, 0, 0, 32) + insn(0x07, 0, 0, 0, 2) + EXIT
    for kind, on in (("xdp", True), ("tc", False)):
        first = Member(ProgramSpec("wide", wide, ()), [])
        assert run(merge([first, member(7, 5)], kind)) == ((5, [7]) if on else (2, []))


def subprograms() -> ProgramSpec:
    """main calls two functions, the second calls the first; a reference to it as a callback."""
    code = [
        insn(0xB7, 9, 0, 0, 10),
        insn(0xBF, 6, 1),
        insn(0x85, 0, 1, 0, 6),  # 2: call 9
        insn(0xBF, 1, 6),
        insn(0x85, 0, 1, 0, 7),  # 4: call 12
        insn(0x18, 3, 4, 0, 3),  # 5: r3 = function at 9
        insn(0),
        set_r0(2),
        EXIT,
        insn(0xB7, 9, 0, 0, 11),  # 9
        set_r0(7),
        EXIT,
        insn(0xB7, 9, 0, 0, 12),  # 12
        insn(0xBF, 6, 1),
        insn(0x85, 0, 1, 0, -6),  # 14: call 9
        EXIT,
    ]
    return ProgramSpec("tree", b"".join(code), ())


@FORMS
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_members_own_calls_and_callbacks_stay_right(place: int, call_last: bool) -> None:
    members, expected = [member(0, 2), member(1, 2)], [[0], [1]]
    members.insert(place, Member(subprograms(), []))
    expected.insert(place, [10, 11, 12, 11])
    assembly = merge(members, "xdp", call_last=call_last)
    machine = Machine(assembly.program.instructions)
    assert machine.run() == 2
    assert machine.seen == [number for group in expected for number in group]
    code, functions = assembly.program.instructions, dict(assembly.functions)
    start = code.index(subprograms().instructions) // 8
    # The callback is the function at 9, where it is now.
    assert machine.functions == [start + 9]
    assert functions[start + 9] == "tree_1" and functions[start + 12] == "tree_2"
    names = list(functions.values())
    in_front = "" if call_last else f"_{members[-1].program.name}"
    assert names[0] == f"hmebpf_chain{in_front}"
    assert all(each.program.name in names for each in members[: None if call_last else -1])
    assert [*functions] == sorted(functions)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("verdict", range(-1, 9))
@pytest.mark.parametrize(
    "way_out",
    [insn(0x85, 0, 0, 0, 12), insn(0x30, 0, 0, 0, 5), insn(0x48, 0, 3)],
    ids=["tail call", "LD_ABS", "LD_IND"],
)
def test_the_verifier_cannot_know_what_a_member_with_a_second_way_out_returns(
    kind: str, verdict: int, way_out: bytes
) -> None:
    """A number that it does not know is added: 0.  Others cost no such addition."""
    last = member(1, 1)
    plain = member(0, verdict)
    # Never reached, as the instruction before it jumps over it.
    jump = insn(0x05, 0, 0, 1)
    code = jump + way_out + plain.program.instructions
    made = merge([Member(ProgramSpec("a", code, ()), []), last], kind)
    without = merge([Member(ProgramSpec("a", jump + jump + code[16:], ()), []), last], kind)
    assert run(made) == run(merge([plain, last], kind))
    assert len(made.program.instructions) == len(without.program.instructions) + 4 * 8
    added = [struct.unpack_from("=BBhi", made.program.instructions, 8 * n) for n in range(3, 7)]
    assert [opcode for opcode, *_ in added] == [0x61, 0x61, 0x1F, 0x0F]
    assert added[0][2] == {"xdp": 16, "tc": 0}[kind]  # rx_queue_index, len


def test_one_program_may_be_there_twice() -> None:
    twice = Member(subprograms(), [])
    assembly = merge([twice, member(5, 2), twice], "tc")
    assert run(assembly) == (2, [10, 11, 12, 11])  # 2 drops in TC
    assembly = merge([twice, member(5, 2), twice], "xdp")
    assert run(assembly) == (2, [10, 11, 12, 11, 5, 10, 11, 12, 11])
    assert len(assembly.functions) == 1 + 2 + 3 + 1


@FORMS
def test_map_references_count_through_all_members_maps(call_last: bool) -> None:
    value = insn(0x18, 2, 2) + insn(0, immediate=40)  # a pseudo map value: 40 bytes into it
    one = ProgramSpec(
        "one", load_map(1) + value + load_map(3) + set_r0(2) + EXIT, ((0, 1), (16, 0), (32, 1))
    )
    two = ProgramSpec("two", set_r0(2) + load_map(1) + EXIT, ((8, 2),))
    members = [Member(one, [10, 11]), returning(2), Member(two, [20, 21, 22])]
    program = merge(members, "xdp", call_last=call_last).program
    maps = [fd for member in members for fd in member.maps]
    code = bytearray(program.instructions)
    for offset, index in program.map_refs:
        assert code[offset] == 0x18
        struct.pack_into("=i", code, offset + 4, maps[index])
    machine = Machine(bytes(code))
    assert machine.run() == 2
    assert [fd for _at, fd in machine.loads] == [11, 10, 11, 22]
    at = next(at for at, fd in machine.loads if fd == 10)
    assert code[8 * at + 8 :][:8] == insn(0, immediate=40)
    assert code[8 * at + 1] == 2 | 2 << 4  # still a map's value


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("slot_is_filled", [True, False])
@pytest.mark.parametrize("verdict", range(-1, 9))
def test_a_wrapper_goes_on_with_the_next_slot(
    kind: str, slot_is_filled: bool, verdict: int
) -> None:
    code_ = insn(0xB7, 9, 0, 0, 3) + load_map(1) + set_r0(verdict) + EXIT
    spec = ProgramSpec("own", code_, ((8, 0),))
    assembly = wrap(spec, kind, 5)
    code = bytearray(assembly.program.instructions)
    for offset, index in assembly.program.map_refs:
        struct.pack_into("=i", code, offset + 4, [100, 200][index])

    class Next(Exception):
        """A tail call that went well does not come back."""

    def tail_call(registers: list[int]) -> int:
        assert registers[1:4] == [CONTEXT, 100, 5]
        if slot_is_filled:
            raise Next
        return -2 & _MASK

    machine = Machine(bytes(code), {12: tail_call})
    if goes_on(kind, verdict) and slot_is_filled:
        with pytest.raises(Next):
            machine.run()
    else:
        assert machine.run() == verdict
    assert machine.loads[0][1] == 200
    assert machine.seen == [3]
    assert [name for _at, name in assembly.functions] == ["hmebpf_chain", "own"]


def _member(code: bytes, kind: str | None = None) -> Member:
    return Member(ProgramSpec("bad", code, (), kind), [])


@pytest.mark.parametrize(
    ("members", "kind", "error", "words"),
    [
        ([], "xdp", UsageError, "build a chain of xdp programs: it has no members"),
        (
            [returning(2)],
            "kprobe",
            UsageError,
            "build a chain of kprobe programs: there is no such chain",
        ),
        (
            [returning(2), _member(EXIT, "tracepoint")],
            "xdp",
            UsageError,
            "put bad into a chain at xdp: it is a program for tracepoint",
        ),
        (
            [_member(b""), returning(2)],
            "tc",
            EmptyProgram,
            "put bad into a chain: it has no instructions",
        ),
        (
            [_member(b"1234567"), returning(2)],
            "tc",
            MisalignedProgram,
            "7 bytes, is no multiple of 8",
        ),
        (
            # would call into the member behind it
            [_member(insn(0x85, 0, 1, 0, 1) + EXIT), returning(2)],
            "xdp",
            JumpOutOfRange,
            "put bad into a chain: instruction 0 calls 2, of 2",
        ),
        (
            [returning(2), _member(insn(0x85, 0, 1, 0, -3) + EXIT)],
            "xdp",
            JumpOutOfRange,
            "instruction 0 calls -2, of 2",
        ),
        (
            [returning(2), _member(insn(0x18, 1, 4, 0, 9) + insn(0) + EXIT)],
            "xdp",
            JumpOutOfRange,
            "instruction 0 calls 10, of 3",
        ),
        (
            [returning(2), _member(insn(0x85, 0, 2, 1, 4711) + EXIT)],
            "xdp",
            LoadError,
            "instruction 0 calls a function of a kernel module",
        ),
        (
            [returning(2), _member(insn(0x18, 1, 3, 0, 4711) + insn(0, 0, 0, 0, 9) + EXIT)],
            "xdp",
            LoadError,
            "instruction 0 reads a variable of a kernel module",
        ),
        (
            [returning(2), _member(set_r0(2) + insn(0x18, 1, 5) + insn(0) + EXIT)],
            "xdp",
            LoadError,
            "instruction 1 names a map by its place in a list of its own",
        ),
    ],
)
def test_what_cannot_be_a_chain_is_told_before_the_kernel_is_asked(
    members: Sequence[Member], kind: str, error: type[HmebpfError], words: str
) -> None:
    with pytest.raises(error) as caught:
        load_chain(members, kind)
    assert words in str(caught.value)


def test_a_constant_that_looks_like_a_call_is_none() -> None:
    """Bytes 0x85 and 0x18 inside instructions, and the second half of a 64-bit load."""
    code = insn(0x18, 1, 0, 0, 0x18851885) + insn(0, 0, 0, 0, 0x18851885) + set_r0(0x85) + EXIT
    assembly = merge([Member(ProgramSpec("a", code, ()), []), returning(2)], "tc")
    assert [name for _at, name in assembly.functions] == ["hmebpf_chain_returning", "a"]


@pytest.mark.parametrize(
    ("licenses", "common"),
    [
        (["GPL", "GPL"], "GPL"),
        (["Dual BSD/GPL"] * 3, "Dual BSD/GPL"),
        (["Dual BSD/GPL", "GPL v2", "Dual MIT/GPL"], "GPL"),
        (["MIT", "MIT"], "MIT"),
        (["MIT", ""], "Proprietary"),
        (["GPL", "MIT"], None),
        (["Dual MIT/GPL", "Proprietary"], None),
    ],
)
def test_licences_are_mixed_only_where_they_may_be(licenses: list[str], common: str | None) -> None:
    assert common_license([returning(2, license=text) for text in licenses]) == common


def test_function_names_become_identifiers() -> None:
    raw = encode_btf(["plain", "has-dash.and dot", "7up", "ümlaut", "x" * 300])
    header = struct.unpack_from("=HBBIIIII", raw)
    types_size, strings_at = header[5], header[6]
    strings = raw[24 + strings_at :].split(b"\0")
    assert header[0] == 0xEB9F
    assert len(raw) == 24 + types_size + header[7]
    assert strings[2:7] == [b"plain", b"has_dash_and_dot", b"_7up", b"_mlaut", b"x" * 100]


def test_functions_and_variables_of_the_kernel_itself_are_no_hindrance() -> None:
    code = insn(0x18, 1, 3, 0, 4711) + insn(0) + insn(0x85, 0, 2, 0, 4712) + set_r0(2) + EXIT
    assembly = merge([returning(2), Member(ProgramSpec("a", code, ()), [])], "xdp")
    assert code in assembly.program.instructions


def test_more_members_than_can_be_joined() -> None:
    with pytest.raises(LoadError, match="build a chain of 30000 xdp programs") as caught:
        load_chain([returning(2)] * 30000, "xdp")
    assert "256 functions at most; and tail calls join 33 at most" in str(caught.value)


def test_names_fit_the_kernel() -> None:
    assert len(chain.NAME) <= 15
