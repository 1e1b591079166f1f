"""Several unmodified programs at one XDP or TC hook, as one that runs them in order.

A chain is built in one of three ways:

- ``single``: one member is the program itself; nothing is added.
- ``merged``: one program, a dispatcher that calls each member but the last as a BPF function
  (bpf-to-bpf call), goes on while the packet is passed, and ends in the last.
- ``wrapped``: where the kernel refuses the merged one (too complex, too many maps), or where the
  members' licences must not be mixed: every member but the last is called by a wrapper of its own
  that goes on with the next by a tail call, through a program array.  The last runs as it is.

A member's verdict ends the chain unless it passes the packet on:

- XDP: everything but XDP_PASS ends it.
- TC: SHOT, STOLEN, REDIRECT and TRAP end it.  OK, UNSPEC and PIPE pass; so does whatever else a
  program returns, which the kernel takes for UNSPEC in direct-action mode (net/sched/cls_bpf.c,
  cls_bpf_exec_opcode()).

The chain's verdict is that of the member that ended it, else the last one's.  A chain is changed
by building a new one and putting its head in the place of the old one's in one step; the maps are
the members' own and stay.  Needs Linux 5.10 on x86-64.  docs/composition.md has what is promised.
"""

from __future__ import annotations

import ctypes as ct
import os
import re
import struct
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate

from hypermesh_ebpf import log
from hypermesh_ebpf.bpf.function_info import load_function_info
from hypermesh_ebpf.bpf.libbpf import BPF_ANY, MapCreateOpts, ProgLoadOpts, check, libbpf
from hypermesh_ebpf.bpf.programs import PROGRAM_TYPES, close_all, create_map, load_program
from hypermesh_ebpf.bpf.spec import MapSpec, ProgramSpec
from hypermesh_ebpf.errors import (
    EmptyProgram,
    HmebpfError,
    JumpOutOfRange,
    LoadError,
    MisalignedProgram,
    UsageError,
    VerifierError,
    describe_errno,
)

NAME = "hmebpf_chain"
"""What the head of a chain of several members is called in the kernel (15 characters at most)."""

MAX_MERGED = 256
"""Members of a merged chain, if none has functions of its own (BPF_MAX_SUBPROGS)."""

MAX_WRAPPED = 33
"""Members of a wrapped chain: a packet is good for 32 tail calls (MAX_TAIL_CALL_CNT; 33 since
Linux 5.17, except where a member makes some of its own)."""

_ENDING = {"xdp": (), "tc": (2, 4, 7, 8)}  # TC_ACT_SHOT, STOLEN, REDIRECT, TRAP
_XDP_PASS = 2
# include/linux/license.h, license_is_gpl_compatible()
_GPL_COMPATIBLE = {
    "GPL",
    "GPL v2",
    "GPL and additional rights",
    "Dual BSD/GPL",
    "Dual MIT/GPL",
    "Dual MPL/GPL",
}

_MOV, _MOV_IMM, _JUMP, _CALL, _EXIT, _LD_IMM64 = 0xBF, 0xB7, 0x05, 0x85, 0x95, 0x18
_JEQ32, _JNE32 = 0x16, 0x56  # 32 bits, as the kernel takes of a verdict (Linux 5.1)
_MAP_FD, _MAP_INDEX, _FUNCTION, _MAP_INDEX_VALUE = 1, 5, 4, 6  # BPF_PSEUDO_... of LD_IMM64
_PROGRAM_CALL, _KERNEL_CALL = 1, 2  # BPF_PSEUDO_CALL, BPF_PSEUDO_KFUNC_CALL
_TAIL_CALL = 12  # BPF_FUNC_tail_call
_PROG_ARRAY, _ARRAY, _ARRAY_OF_MAPS = 3, 2, 12  # BPF_MAP_TYPE_...
_LOG_REASON = 4  # BPF_LOG_STATS: of a refusal, the reason alone
_LOG_SIZE = 1 << 16


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
class Chain:
    """A chain in the kernel: attach ``head_fd``.

    ``descriptors`` (the head's first) are the caller's, to keep as long as the chain may run and
    to close with :func:`close_chain`: the kernel empties a program array with its last descriptor
    or pin, and the chain would end after its first member.  ``way`` is "single", "merged" or
    "wrapped"; ``note`` says why it is not merged; ``members`` are the names, in order.
    """

    head_fd: int
    descriptors: tuple[int, ...]
    way: str
    members: tuple[str, ...]
    note: str | None = None


@dataclass(frozen=True, slots=True)
class Assembly:
    """A program put together, and (number of the first instruction, name) of its functions."""

    program: ProgramSpec
    functions: tuple[tuple[int, str], ...]


class _Refused(Exception):
    """The kernel's no to a program."""

    def __init__(self, error: OSError, said: str) -> None:
        self.errno = error.errno or 0
        self.said = said
        # Statistics follow the reason, on newer kernels an explanation of several lines, too.
        said = said.partition("\nVerification failed: ")[0]
        lines = [
            line
            for line in said.splitlines()
            if line and not re.match(r"(processed|verification time|stack depth) ", line)
        ]
        self.words = lines[-1] if lines else describe_errno(self.errno)
        super().__init__(self.words)


def merge(members: Sequence[Member], kind: str) -> Assembly:
    """The members' programs behind one dispatcher; ``kind`` is "xdp" or "tc".

    All but the last are called; the last follows the dispatcher in its place.  Map references
    count through the maps of all members, one list after the other.  Nothing in a member is
    changed: calls and jumps are relative.  Raises what :func:`check_members` raises.
    """
    check_members(members, kind)
    *called, last = members
    end = 2 + len(called) * (2 + len(_ending_jumps(kind, 0)))
    # The context stays in r6, which calls keep.  No stack is used: the members' limit is 512
    # bytes together with their callers (before Linux 6.8 the verifier counts 32 for none).
    head = [_instruction(_MOV, 6, 1)]
    place = end + 2 + len(last.program.instructions) // 8
    for member in called:
        head.append(_instruction(_MOV, 1, 6))
        head.append(_instruction(_CALL, 0, _PROGRAM_CALL, 0, place - len(head) - 1))
        head += _ending_jumps(kind, end - len(head) - 1)
        place += len(member.program.instructions) // 8
    head += [_instruction(_JUMP, 0, 0, 1), _instruction(_EXIT), _instruction(_MOV, 1, 6)]
    code, functions = b"".join(head), [(0, f"{NAME}_{last.program.name}")]
    refs: list[tuple[int, int]] = []
    maps_before = [0, *accumulate(len(member.maps) for member in members)]
    for number in (len(called), *range(len(called))):
        start, program = len(code) // 8, members[number].program
        refs += [(8 * start + at, maps_before[number] + index) for at, index in program.map_refs]
        found = _functions(program, start)
        functions += found[1:] if number == len(called) else found
        code += program.instructions
    return Assembly(ProgramSpec(NAME, code, tuple(refs), kind), tuple(functions))


def wrap(program: ProgramSpec, kind: str, next_slot: int) -> Assembly:
    """One program behind a wrapper that goes on with a slot of a program array.

    The array is map 0; the program's own maps follow.
    """
    jumps = len(_ending_jumps(kind, 0))
    end = jumps + 9
    head = [
        _instruction(_MOV, 6, 1),
        _instruction(_CALL, 0, _PROGRAM_CALL, 0, end - 1),
        *_ending_jumps(kind, end - 3),
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
    array = 8 * (jumps + 4)
    refs = [(array, 0), *((8 * start + at, i + 1) for at, i in program.map_refs)]
    code = b"".join(head) + program.instructions
    functions = ((0, NAME), *_functions(program, start))
    return Assembly(replace(program, instructions=code, map_refs=tuple(refs)), functions)


def check_members(members: Sequence[Member], kind: str) -> None:
    """Raise what is wrong with a chain before the kernel is asked.

    UsageError for another kind of hook or program, or none at all; InvalidProgram for code that
    would reach into its neighbour; LoadError for what cannot be moved into another program.
    """
    if kind not in _ENDING:
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
        _functions(program, 0)


def load_chain(members: Sequence[Member], kind: str) -> Chain:
    """Load programs as one chain, in the order given; ``kind`` is "xdp" or "tc".

    Raises what :func:`check_members` does and what :func:`programs.load_program` raises for a
    member that the kernel refuses by itself; VerifierError or LoadError, naming the member, for
    one that it refuses in a chain; MissingPrivilege.
    """
    check_members(members, kind)
    names = tuple(member.program.name for member in members)
    if len(members) == 1:
        (member,) = members
        fd = os.dup(member.fd) if member.fd is not None else _load_alone(member, kind)
        return Chain(fd, (fd,), "single", names)
    license = common_license(members)
    if license is None:
        note = "GPL-compatible programs and others are not merged into one"
    elif len(members) > MAX_MERGED:
        note = f"a program has {MAX_MERGED} functions at most"
    else:
        try:
            maps = [fd for member in members for fd in member.maps]
            head = _load(merge(members, kind), kind, license, maps)
            return Chain(head, (head,), "merged", names)
        except _Refused as refused:
            note = refused.words
            log.debug("chain of %s not merged: %s", ", ".join(names), refused.said or note)
    if len(members) > MAX_WRAPPED:
        raise LoadError(
            f"build a chain of {len(members)} {kind} programs",
            f"{note}; and tail calls join {MAX_WRAPPED} at most",
            f"leave out all but {MAX_WRAPPED}",
        )
    return Chain(*_load_wrapped(members, kind), "wrapped", names, note)


def common_license(members: Sequence[Member]) -> str | None:
    """The licence under which the members can be one program, None where there is none.

    A program that is not GPL-compatible must not reach GPL-only helpers by its neighbours, nor
    lose those of its neighbours to them.
    """
    licenses = {member.license for member in members}
    if len(licenses) == 1:
        return licenses.pop()
    compatible = licenses & _GPL_COMPATIBLE
    if compatible == licenses:
        return "GPL"
    return None if compatible else "Proprietary"


def wait_for_running_programs() -> None:
    """Return when every program that is running now has ended (an RCU grace period).

    After a swap the old head may still be at work on a packet: only now may its program array go.
    Setting an element of an array of maps waits for it (maybe_wait_bpf_programs(), Linux 4.20).
    Raises LoadError or MissingPrivilege.
    """
    with _array(MapSpec("hmebpf_wait", _ARRAY, 4, 4, 1, 0, None, None)) as inner:
        options = MapCreateOpts(sz=ct.sizeof(MapCreateOpts), inner_map_fd=inner)
        try:
            outer = check(
                libbpf().bpf_map_create(_ARRAY_OF_MAPS, b"hmebpf_wait", 4, 4, 1, ct.byref(options))
            )
            try:
                _set_element(outer, 0, inner)
            finally:
                os.close(outer)
        except OSError as error:
            raise LoadError(
                "wait for running programs", str(error), "try again", errno=error.errno
            ) from error


def close_chain(chain: Chain) -> None:
    """Close the descriptors of a chain that was swapped or taken off.

    Of a wrapped one not before the packets that are under way have been through all members.
    Raises what :func:`wait_for_running_programs` raises; the descriptors are closed even then.
    """
    try:
        if chain.way == "wrapped":
            wait_for_running_programs()
    finally:
        close_all(chain.descriptors)


def _load_wrapped(members: Sequence[Member], kind: str) -> tuple[int, tuple[int, ...]]:
    """(head, (head, program array)); each member is loaded under its own licence.

    The array holds the others: no descriptors of theirs have to be kept.
    """
    with ExitStack() as failed:
        spec = MapSpec(NAME, _PROG_ARRAY, 4, 4, len(members), 0, None, None)
        array = create_map(spec)
        failed.callback(os.close, array)
        head = -1
        for slot, member in enumerate(members):
            last = slot == len(members) - 1
            fd = _load_link(member, kind, array, None if last else slot + 1)
            if slot == 0:
                head = fd
                failed.callback(os.close, head)
                continue
            try:
                _set_element(array, slot, fd)
            except OSError as error:
                raise LoadError(
                    f"chain {kind} program {member.program.name}",
                    describe_errno(error.errno or 0),
                    "attach it alone",
                    errno=error.errno,
                ) from error
            finally:
                os.close(fd)
        failed.pop_all()
        return head, (head, array)


def _load_link(member: Member, kind: str, array: int, next_slot: int | None) -> int:
    """One member of a wrapped chain; without a next slot it is loaded as it is."""
    program = member.program
    try:
        if next_slot is None:
            plain = Assembly(program, tuple(_functions(program, 0)))
            return _load(plain, kind, member.license, member.maps)
        if next_slot == 1:
            program = replace(program, name=NAME)
        assembly = wrap(program, kind, next_slot)
        return _load(assembly, kind, member.license, [array, *member.maps])
    except _Refused as refused:
        # Is it refused by itself?  Then that is the error to tell, at the member's own lines.
        os.close(_load_alone(member, kind))
        raise _chain_error(member.program.name, kind, refused) from refused


def _load_alone(member: Member, kind: str) -> int:
    return load_program(member.program, kind, member.license, member.maps)


def _chain_error(name: str, kind: str, refused: _Refused) -> HmebpfError:
    what = f"chain {kind} program {name}: refused by the kernel, which takes it alone"
    remedy = "put it last in the chain, where it needs no caller, or attach it alone"
    error = VerifierError if refused.said else LoadError
    return error(what, refused.words, remedy, errno=refused.errno, details=refused.said or None)


def _load(assembly: Assembly, kind: str, license: str, maps: Sequence[int]) -> int:
    """Load a program with the names of its functions.  Raises _Refused."""
    type_, expected = PROGRAM_TYPES[kind]
    program = assembly.program
    code = bytearray(program.instructions)
    for offset, index in program.map_refs:
        struct.pack_into("=i", code, offset + 4, maps[index])
    said = ct.create_string_buffer(_LOG_SIZE)
    try:
        btf, records = load_function_info(assembly.functions)
        try:
            raw, info = (ct.c_char * len(code)).from_buffer(code), ct.create_string_buffer(records)
            options = ProgLoadOpts(sz=ct.sizeof(ProgLoadOpts), expected_attach_type=expected)
            options.attempts = 5
            options.prog_btf_fd = btf
            options.func_info = ct.addressof(info)
            options.func_info_cnt, options.func_info_rec_size = len(assembly.functions), 8
            options.log_level, options.log_size = _LOG_REASON, _LOG_SIZE
            options.log_buf = ct.addressof(said)
            return check(
                libbpf().bpf_prog_load(
                    type_,
                    program.name.encode()[:15],
                    license.encode(),
                    ct.addressof(raw),
                    len(code) // 8,
                    ct.byref(options),
                )
            )
        finally:
            os.close(btf)
    except OSError as error:
        raise _Refused(error, said.value.decode(errors="replace").strip()) from error


def _functions(program: ProgramSpec, start: int) -> list[tuple[int, str]]:
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
    for number, opcode, source, offset, immediate in _calls_and_loads(code):
        if opcode == _LD_IMM64 and source in (_MAP_INDEX, _MAP_INDEX_VALUE):
            raise LoadError(
                what,
                f"instruction {number} names a map by its place in a list of its own",
                "build it with map descriptors, as libbpf and BCC do",
            )
        if opcode == _CALL and source == _KERNEL_CALL and offset:
            raise LoadError(
                what,
                f"instruction {number} calls a function of a kernel module, by a list of its own",
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


def _calls_and_loads(code: bytes) -> Iterator[tuple[int, int, int, int, int]]:
    """(number, opcode, source register, offset, immediate) of each call and 64-bit load.

    The second half of a 64-bit load has opcode 0 and is none of them.
    """
    for found in re.finditer(rb"[\x18\x85]", code[::8]):
        opcode, registers, offset, immediate = struct.unpack_from("=BBhi", code, 8 * found.start())
        yield found.start(), opcode, registers >> 4, offset, immediate


def _ending_jumps(kind: str, distance: int) -> list[bytes]:
    """Jumps over ``distance`` instructions behind them for verdicts that end the chain."""
    if kind == "xdp":
        return [_instruction(_JNE32, 0, 0, distance, _XDP_PASS)]
    verdicts = _ENDING[kind]
    return [_instruction(_JEQ32, 0, 0, distance - n, v) for n, v in enumerate(verdicts)]


def _instruction(
    opcode: int, target: int = 0, source: int = 0, offset: int = 0, immediate: int = 0
) -> bytes:
    return struct.pack("=BBhi", opcode, target | source << 4, offset, immediate)


def _set_element(array: int, slot: int, fd: int) -> None:
    key, value = struct.pack("=I", slot), struct.pack("=I", fd)
    check(libbpf().bpf_map_update_elem(array, key, value, BPF_ANY))


@contextmanager
def _array(spec: MapSpec) -> Iterator[int]:
    fd = create_map(spec)
    try:
        yield fd
    finally:
        os.close(fd)
