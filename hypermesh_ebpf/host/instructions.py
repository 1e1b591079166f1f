"""The instructions of a program that is in the kernel, with names and source lines."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from hypermesh_ebpf.bpf import info
from hypermesh_ebpf.bpf.btf import Btf
from hypermesh_ebpf.bpf.disassembler import Instruction, Names, disassemble
from hypermesh_ebpf.errors import (
    MissingBtf,
    MissingPrivilege,
    ObjectNotFound,
    describe_errno,
)

_KALLSYMS = "/proc/kallsyms"
_BASE = "__bpf_call_base"


@dataclass(frozen=True, slots=True)
class SourceLine:
    """A line of C: file name, line number, text."""

    file: str
    number: int
    text: str


@dataclass(frozen=True, slots=True)
class Step:
    """An instruction; ``function`` begins and ``line`` begins with it, None where none does."""

    instruction: Instruction
    function: str | None
    line: SourceLine | None


def read_instructions(program_id: int, map_names: Mapping[int, str]) -> list[Step]:
    """A program as the kernel runs it, from its first instruction to its last.

    ``map_names`` are the names of the host's maps by id.  Raises ObjectNotFound, MissingPrivilege
    where the kernel does not show the instructions.
    """
    try:
        fd = info.open_by_id("program", program_id)
    except OSError as error:
        raise ObjectNotFound(
            f"show the instructions of program {program_id}",
            describe_errno(error.errno or 0),
            "`hmebpf list programs` shows what there is",
            errno=error.errno,
        ) from error
    try:
        about, code = info.read_program(fd), info.read_translated(fd)
    finally:
        os.close(fd)
    if not code.instructions:
        raise MissingPrivilege(
            f"show the instructions of program {program_id}",
            "the kernel does not show them to this process",
            "run it as root; under lockdown=confidentiality nobody sees them",
        )
    functions, lines = _read_source(about.btf_id, code)
    addresses = _find_calls(code.instructions)
    calls = name_addresses(addresses) if addresses else {}
    names = Names(
        translated=True, map=map_names.get, call=calls.get, functions=functions
    )  # fmt: skip
    return [
        Step(each, functions.get(each.number), lines.get(each.number))
        for each in disassemble(code.instructions, names)
    ]


def _read_source(
    btf_id: int, code: info.Translated
) -> tuple[dict[int, str], dict[int, SourceLine]]:
    """The names of functions and the source lines, by instruction."""
    if not btf_id:
        return {}, {}
    try:
        types = Btf.from_id(btf_id)
        functions = {at: types.type(type_id).name for at, type_id in code.functions}
    except (OSError, MissingBtf):
        return {}, {}
    return functions, {
        at: SourceLine(types.text(file), number, types.text(text).strip())
        for at, file, text, number in code.lines
    }


def _find_calls(code: bytes) -> set[int]:
    """The immediates of calls out of the program, each relative to __bpf_call_base."""
    found = set()
    for at in range(0, len(code), 8):
        if code[at] == 0x85 and code[at + 1] >> 4 != 1:
            found.add(int.from_bytes(code[at + 4 : at + 8], "little", signed=True))
    return found - {0}  # the kernel hides addresses that way


def name_addresses(relative: Collection[int]) -> dict[int, str]:
    """The kernel functions at addresses relative to __bpf_call_base, as far as kallsyms tells."""
    try:
        with open(_KALLSYMS, "rb") as file:
            symbols = file.read()
    except OSError:
        return {}
    base = re.search(rb"^([0-9a-f]+) . %s$" % _BASE.encode(), symbols, re.M)
    if base is None or not int(base[1], 16):
        return {}
    found = {}
    for each in relative:
        address = b"\n%016x " % (int(base[1], 16) + each)
        at = symbols.find(address)
        if at >= 0:
            line = symbols[at + 1 : symbols.index(b"\n", at + 1)]
            found[each] = line.split()[2].decode()
    return found


def as_json(steps: Collection[Step]) -> Iterator[dict[str, object]]:
    """The steps as ``hmebpf show -o json`` writes them."""
    for step in steps:
        each, line = step.instruction, step.line
        yield {
            "number": each.number,
            "bytes": each.raw.hex(),
            "text": each.text,
            "target": each.target,
            "function": step.function,
            "file": line.file if line else None,
            "line": line.number if line else None,
            "source": line.text if line else None,
        }
