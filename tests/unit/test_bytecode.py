"""Raw instructions: what is refused before the kernel is asked, and in what words."""

from __future__ import annotations

import random
import struct

import pytest

from hypermesh_ebpf.errors import (
    EmptyProgram,
    HmebpfError,
    InvalidProgram,
    InvalidRegister,
    JumpOutOfRange,
    MisalignedProgram,
    ProgramTooLong,
    UnknownOpcode,
)
from hypermesh_ebpf.image.bytecode import (
    MAX_INSTRUCTIONS,
    check_bytecode,
    map_references,
    to_image,
)


def insn(opcode: int, dst: int = 0, src: int = 0, off: int = 0, imm: int = 0) -> bytes:
    """One instruction as this machine has it (little-endian, as all that we run on)."""
    return struct.pack("=BBhi", opcode, src << 4 | dst, off, imm)


EXIT = insn(0x95)
RETURN_0 = insn(0xB7) + EXIT


def refusal(data: bytes) -> InvalidProgram:
    with pytest.raises(InvalidProgram) as caught:
        check_bytecode(data)
    assert caught.value.cause
    assert caught.value.remedy
    return caught.value


def test_smallest_programs_are_accepted() -> None:
    check_bytecode(RETURN_0)
    check_bytecode(EXIT)  # the document's eight bytes: the verifier refuses them, not we


def test_empty() -> None:
    error = refusal(b"")
    assert type(error) is EmptyProgram
    assert "0 bytes" in str(error)


def test_empty_remedy_is_a_program() -> None:
    remedy = refusal(b"").remedy or ""
    check_bytecode(bytes.fromhex(remedy.partition(":")[2].partition("(")[0]))


@pytest.mark.parametrize("size", [1, 7, 9, 15])
def test_misaligned(size: int) -> None:
    error = refusal(bytes(size))
    assert type(error) is MisalignedProgram
    assert f"{size} bytes" in str(error)


def test_too_long() -> None:
    error = refusal(insn(0xB7) * MAX_INSTRUCTIONS + EXIT)
    assert type(error) is ProgramTooLong
    assert "1,000,001" in str(error)


def test_longest_is_accepted() -> None:
    check_bytecode(insn(0xB7) * (MAX_INSTRUCTIONS - 1) + EXIT)


@pytest.mark.parametrize(
    ("second", "words"),
    [
        (insn(0xFF), "there is no opcode 0xff"),
        (insn(0x00), "there is no opcode 0x00"),
        (insn(0x8D), "there is no opcode 0x8d"),  # a call by register: compilers make it, no kernel
        (insn(0xDF), "there is no opcode 0xdf"),
        (insn(0xC3, 1, 2, 0, 0x77), "no atomic operation 0x77"),
        (insn(0xD3, 1, 2, 0, 0x01), "no atomic operation 0x1"),  # 8 bits: load and store only
        (insn(0xDC, 1, 0, 0, 17), "not 17"),
        (insn(0xD7, 1, 0, 0, 8), "not 8"),
        (insn(0xBF, 1, 2, 7), "sign of 7 bits"),
        (insn(0xBC, 1, 2, 32), "sign of 32 bits"),
        (insn(0x3F, 1, 2, 2), "variant 2 of division"),
        (insn(0x85, 0, 5), "kind 5 of call"),
        (insn(0x18, 1, 7) + insn(0), "no variant 7"),
        (insn(0x18, 1) + insn(0xB7), "second half"),
        (insn(0x18, 1) + insn(0, 1), "second half"),
    ],
)
def test_unknown_opcode(second: bytes, words: str) -> None:
    error = refusal(insn(0xB7) + second + EXIT)
    assert type(error) is UnknownOpcode
    assert words in str(error)
    at = 2 if "second half" in words else 1
    assert f"instruction {at} (" in str(error)


def test_half_a_wide_load() -> None:
    error = refusal(insn(0xB7) + insn(0x18, 1))
    assert type(error) is UnknownOpcode
    assert "instruction 1 " in str(error)
    assert "missing" in str(error)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (insn(0xB7, 11), "no register r11"),
        (insn(0xBF, 1, 15), "no register r15"),
        (insn(0x2D, 12, 1), "no register r12"),
        (insn(0xB7, 10), "writes r10"),
        (insn(0x79, 10, 1), "writes r10"),
        (insn(0x18, 10) + insn(0), "writes r10"),
        (insn(0xDB, 1, 10, 0, 0x01), "writes r10"),  # fetch-and-add returns into its source
        (insn(0xDB, 10, 1, 0, 0x100), "writes r10"),  # load-acquire
    ],
)
def test_invalid_register(bad: bytes, words: str) -> None:
    error = refusal(bad + EXIT)
    assert type(error) is InvalidRegister
    assert words in str(error)
    assert f"instruction 0 ({bad[:8].hex(' ')}: " in str(error)


def test_frame_pointer_may_be_read_and_stored_through() -> None:
    reads = insn(0xBF, 1, 10) + insn(0x7B, 10, 1, -8) + insn(0xDB, 10, 1, -8, 0x01)
    check_bytecode(reads + insn(0xDB, 1, 10, 0, 0xF1) + RETURN_0)  # cmpxchg returns into r0


@pytest.mark.parametrize(
    ("program", "at", "words"),
    [
        (insn(0x05, 0, 0, 1) + EXIT, 0, "leads to instruction 2"),
        (insn(0x15, 1, 0, -2) + EXIT, 0, "leads to instruction -1"),
        (insn(0x1E, 1, 2, 100) + EXIT, 0, "leads to instruction 101"),
        (insn(0x06, 0, 0, 0, 7) + EXIT, 0, "leads to instruction 8"),
        (insn(0xE5, 0, 0, 7) + EXIT, 0, "leads to instruction 8"),
        (insn(0x85, 0, 1, 0, -3) + EXIT, 0, "leads to instruction -2"),
        (insn(0x18, 1, 4, 0, 9) + insn(0) + EXIT, 0, "leads to instruction 10"),
        (insn(0x18, 1) + insn(0) + insn(0x05, 0, 0, -2) + EXIT, 2, "second half"),
        (insn(0x85, 0, 1, 0, 2) + EXIT + insn(0x18, 1) + insn(0) + RETURN_0, 3, "in the middle"),
        (insn(0xB7), 0, "the last of the program"),
        (insn(0x18, 1) + insn(0), 1, "the last of the program"),
        (insn(0x85, 0, 1, 0, 1) + insn(0xB7) + RETURN_0, 1, "the last of a function"),
        (insn(0x15, 0, 0, 2) + insn(0x85, 0, 1, 0, 1) + EXIT + RETURN_0, 0, "another function"),
    ],
)
def test_jump_out_of_range(program: bytes, at: int, words: str) -> None:
    error = refusal(program)
    assert type(error) is JumpOutOfRange
    assert f"instruction {at} (" in str(error)
    assert words in str(error)


def test_functions_and_jumps_that_are_right() -> None:
    main = insn(0x15, 1, 0, 1) + insn(0x85, 0, 1, 0, 1) + EXIT  # if, call, exit
    check_bytecode(main + insn(0x05, 0, 0, 0) + RETURN_0)
    check_bytecode(insn(0x06, 0, 0, 0, 0) + RETURN_0)  # gotol
    check_bytecode(insn(0xB7) + insn(0x05, 0, 0, -2))  # may end with a jump back


def test_every_kind_of_instruction() -> None:
    """The newest of each group, by the numbers of the standard (RFC 9669) and of Linux."""
    known = [
        insn(0x84, 1),  # neg32
        insn(0x16, 1, 0, 0, 5),  # jeq32
        insn(0xDE, 1, 2, 0),  # jsle32 by register
        insn(0xDB, 1, 2, 0, 0xE1),  # xchg
        insn(0xC3, 1, 2, 0, 0xF1),  # cmpxchg32
        insn(0xDB, 1, 2, 0, 0xA1),  # fetch-and-xor
        insn(0xCB, 1, 2, 0, 0x110),  # store-release, 16 bits
        insn(0x20, 0, 0, 0, 14),  # ld_abs
        insn(0x50, 0, 2, 0, 14),  # ld_ind, 8 bits
        insn(0xD7, 1, 0, 0, 64),  # bswap64
        insn(0xD4, 1, 0, 0, 16),  # le16
        insn(0x3F, 1, 2, 1),  # sdiv
        insn(0x97, 1, 0, 1, 3),  # smod
        insn(0xBF, 1, 2, 32),  # movsx
        insn(0xBF, 1, 2, 1, 1 << 16),  # addr_space_cast
        insn(0x81, 1, 2, 4),  # ldsx, 32 bits
        insn(0x85, 0, 2, 0, 1),  # kernel function
    ]
    for each in known:
        check_bytecode(each + RETURN_0)


@pytest.mark.parametrize(
    "text", [b"#include <x>\n\n\n\n", b"// a program\n", b"\x7fELF" + bytes(12)]
)
def test_a_whole_file_is_no_program(text: bytes) -> None:
    assert "whole file" in (refusal(text).remedy or "")


def test_random_bytes_end_as_errors() -> None:
    source = random.Random(4)
    for _ in range(3000):
        data = source.randbytes(8 * source.randrange(1, 6))
        try:
            check_bytecode(data)
        except HmebpfError as error:
            assert isinstance(error, InvalidProgram)


def test_image_of_bytecode() -> None:
    image = to_image(RETURN_0, "exit.bin")
    assert image.name == "exit.bin"
    assert image.maps == ()
    (program,) = image.programs
    assert program.instructions == RETURN_0
    assert program.kind is None


def test_bytecode_cannot_bring_maps() -> None:
    with pytest.raises(InvalidProgram) as caught:
        to_image(insn(0xB7) + insn(0x18, 1, 1, 0, 5) + insn(0) + RETURN_0, "x.bin")
    assert "descriptor 5" in str(caught.value)
    assert "instruction 1 " in str(caught.value)


def test_map_references() -> None:
    by_fd, by_value = insn(0x18, 1, 1, 0, 7), insn(0x18, 2, 2, 0, 8)
    plain = insn(0x18, 3, 0, 0, 9)
    code = plain + insn(0) + by_fd + insn(0, imm=0x18) + RETURN_0 + by_value + insn(0, imm=4)
    assert list(map_references(code)) == [(16, 1, 7), (48, 2, 8)]
