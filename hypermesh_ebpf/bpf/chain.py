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
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

from hypermesh_ebpf import log
from hypermesh_ebpf.bpf.dispatcher import (
    NAME,
    Assembly,
    Member,
    check_members,
    list_functions,
    merge,
    wrap,
)
from hypermesh_ebpf.bpf.function_info import identifier, load_function_info
from hypermesh_ebpf.bpf.libbpf import BPF_ANY, ProgLoadOpts, check, libbpf
from hypermesh_ebpf.bpf.programs import PROGRAM_TYPES, close_all, create_map, load_program
from hypermesh_ebpf.bpf.spec import MapSpec
from hypermesh_ebpf.errors import HmebpfError, LoadError, VerifierError, describe_errno

__all__ = ["NAME", "Chain", "Member", "close_chain", "load_chain", "wait_for_running_programs"]

MAX_MERGED = 256
"""Members of a merged chain, if none has functions of its own (BPF_MAX_SUBPROGS)."""

MAX_WRAPPED = 33
"""Members of a wrapped chain: a packet is good for 32 tail calls (MAX_TAIL_CALL_CNT, 33 since
Linux 5.17), less those that members make themselves."""

# include/linux/license.h, license_is_gpl_compatible()
_GPL_COMPATIBLE = {
    "GPL",
    "GPL v2",
    "GPL and additional rights",
    "Dual BSD/GPL",
    "Dual MIT/GPL",
    "Dual MPL/GPL",
}

_PROG_ARRAY, _ARRAY, _ARRAY_OF_MAPS = 3, 2, 12  # BPF_MAP_TYPE_...
_LOG_REASON = 4  # BPF_LOG_STATS: of a refusal, the reason alone
_LOG_SIZE = 1 << 16


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
    note = f"a program has {MAX_MERGED} functions at most"
    if license is None:
        note = "GPL-compatible programs and others are not merged into one"
    elif len(members) <= MAX_MERGED:
        merged = _load_merged(members, kind, license)
        if isinstance(merged, int):
            return Chain(merged, (merged,), "merged", names)
        note = merged.words
        log.debug("chain of %s not merged: %s", ", ".join(names), merged.said or note)
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
    with ExitStack() as stack:
        inner = create_map(MapSpec("hmebpf_wait", _ARRAY, 4, 4, 1, 0, None, None))
        stack.callback(os.close, inner)
        spec = MapSpec("hmebpf_wait", _ARRAY_OF_MAPS, 4, 4, 1, 0, None, None)
        outer = create_map(spec, inner)
        stack.callback(os.close, outer)
        try:
            _set_element(outer, 0, inner)
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


def _load_merged(members: Sequence[Member], kind: str, license: str) -> int | _Refused:
    """The descriptor of the merged program, or the kernel's no."""
    maps = [fd for member in members for fd in member.maps]
    try:
        return _load(merge(members, kind), kind, license, maps)
    except _Refused as refused:
        if "stack" not in refused.words:
            return refused
    try:
        return _load(merge(members, kind, call_last=True), kind, license, maps)
    except _Refused as refused:
        return refused


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
            plain = Assembly(program, tuple(list_functions(program, 0)))
            return _load(plain, kind, member.license, member.maps)
        assembly = wrap(program, kind, next_slot)
        if next_slot == 1:
            assembly = replace(assembly, program=replace(assembly.program, name=NAME))
        return _load(assembly, kind, member.license, [array, *member.maps])
    except _Refused as refused:
        if member.fd is None:
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
                    identifier(program.name).encode()[:15],
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


def _set_element(array: int, slot: int, fd: int) -> None:
    key, value = struct.pack("=I", slot), struct.pack("=I", fd)
    check(libbpf().bpf_map_update_elem(array, key, value, BPF_ANY))
