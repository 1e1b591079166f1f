"""`hmebpf show --instructions` against bpftool, which uses the kernel's own disassembler."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator

import pytest

from hypermesh_ebpf.attach_type import EbpfAttachType
from hypermesh_ebpf.bpf import info
from hypermesh_ebpf.bpf.chain import load_chain
from hypermesh_ebpf.bpf.programs import create_map, load_program
from hypermesh_ebpf.bpf.spec import MapSpec, ProgramSpec
from hypermesh_ebpf.errors import ObjectNotFound
from hypermesh_ebpf.host.instructions import as_json, read_instructions
from tests.counting import Counter
from tests.members import EXIT, insn, load_map, returning, set_r0
from tests.programs import program_id
from tests.running import run_cli

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.skipif(not shutil.which("bpftool"), reason="bpftool is not installed"),
]

# Something of everything that the verifier takes: arithmetic of both widths, byte orders, memory
# of all sizes, atomics, jumps.
_MOVES = b"".join(
    [
        insn(0x7A, 10, 0, -8, 0x1234),
        insn(0x7A, 10, 0, -16, -1),
        insn(0x61, 2, 10, -8),
        insn(0x69, 3, 10, -8),
        insn(0x71, 4, 10, -8),
        insn(0xB4, 5, 0, 0, 77),
        insn(0x0C, 5, 2),
        insn(0x27, 5, 0, 0, 3),
        insn(0x57, 2, 0, 0, 7),
        insn(0x47, 2, 0, 0, 1),
        insn(0x67, 3, 0, 0, 4),
        insn(0x74, 3, 0, 0, 2),
        insn(0xC7, 4, 0, 0, 1),
        insn(0xAF, 4, 3),
        insn(0x87, 4),
        insn(0xDC, 4, 0, 0, 16),
        insn(0xDB, 10, 2, -8, 0x00),
        insn(0xDB, 10, 2, -8, 0x51),
        insn(0xBF, 0, 2),
        insn(0xDB, 10, 3, -16, 0xF1),
        insn(0xDB, 10, 3, -16, 0xE1),
        insn(0x25, 2, 0, 2, 5),
        insn(0xAE, 3, 4, 1, 0),
        insn(0x05, 0, 0, 0),
        insn(0x63, 10, 4, -4),
        insn(0x73, 10, 4, -1),
        insn(0x6B, 10, 4, -2),
    ]
)


@pytest.fixture
def counter() -> Iterator[Counter]:
    with Counter() as made:
        yield made


def compare(number: int, names: dict[int, str]) -> list[str]:
    """Our text and bpftool's, but for what each says of calls, targets and maps' names; ours."""
    done = subprocess.run(
        ["bpftool", "prog", "dump", "xlated", "id", str(number)],
        capture_output=True,
        text=True,
        check=True,
    )
    theirs = [line.strip() for line in done.stdout.splitlines() if re.match(r" *\d+: \(", line)]
    ours = [str(step.instruction).strip() for step in read_instructions(number, names)]
    assert [_plain(line) for line in ours] == [_plain(line) for line in theirs]
    return ours


def _plain(line: str) -> str:
    line = re.sub(r" <\w+>$", "", line)
    line = re.sub(r"(call pc[+-]\d+).*", r"\1", line)
    line = re.sub(r"(call \w+)#.*", r"\1", line)
    return re.sub(r"map\[id:(\d+)[^\]]*\]", r"map[id:\1]", line)


def test_a_map_value_and_an_atomic(counter: Counter) -> None:
    _fd, number = counter.load(EbpfAttachType.xdp("lo"), returns=2)
    fd = info.open_by_id("program", number)
    try:
        (used,) = info.read_program(fd).map_ids
    finally:
        os.close(fd)
    lines = compare(number, {used: "hm_counter"})
    assert f"map[id:{used} hm_counter][0]+0" in lines[0]
    assert "lock *(u64 *)(r1 +0) += r2" in lines[2]


def test_everything_that_the_verifier_takes() -> None:
    fd = load_program(
        ProgramSpec("hm_all", _MOVES + set_r0(2) + EXIT, ()), EbpfAttachType.xdp("lo"), "GPL", []
    )
    try:
        lines = compare(program_id(fd), {})
        assert len(lines) >= 27
    finally:
        os.close(fd)


def test_functions_by_name_and_helpers_by_symbol() -> None:
    """bpf_map_update_elem is called by its address, which kallsyms has a name for."""
    store = b"".join(
        [
            insn(0x62, 10, 0, -4, 0),
            insn(0x7A, 10, 0, -16, 1),
            load_map(1),
            insn(0xBF, 2, 10),
            insn(0x07, 2, 0, 0, -4),
            insn(0xBF, 3, 10),
            insn(0x07, 3, 0, 0, -16),
            insn(0xB7, 4, 0, 0, 0),
            insn(0x85, 0, 0, 0, 2),  # bpf_map_update_elem
        ]
    )
    array = create_map(MapSpec("hm_stored", 2, 4, 8, 1, 0, None, None))
    fd = load_program(
        ProgramSpec("hm_store", store + set_r0(2) + EXIT, ((16, 0),)),
        EbpfAttachType.xdp("lo"),
        "GPL",
        [array],
    )
    chain = load_chain([returning(2, "first"), returning(2, "second")], "xdp")
    try:
        (call,) = [line for line in compare(program_id(fd), {}) if "call" in line]
        assert re.search(r"call (bpf_map_update_elem|array_map_update_elem)$", call)
        number = program_id(chain.head_fd)
        (call,) = [line for line in compare(number, {}) if "call" in line]
        assert call.endswith("<first>")
        steps = [*as_json(read_instructions(number, {}))]
        starts = {step["function"]: step["number"] for step in steps if step["function"]}
        (target,) = [step["target"] for step in steps if "call" in str(step["text"])]
        assert starts["first"] == target
        said = run_cli("show", f"prog:{number}", "--instructions").stdout
        assert "\nfirst:\n" in said
        assert re.search(r"^ +\d+: \(85\) call pc\+\d+ <first>$", said, re.M)
    finally:
        for each in (fd, array, *chain.descriptors):
            os.close(each)


def test_program_that_is_gone() -> None:
    with pytest.raises(ObjectNotFound) as caught:
        read_instructions(0xFFFFFFF0, {})
    assert "No such file or directory (ENOENT)" in str(caught.value)
