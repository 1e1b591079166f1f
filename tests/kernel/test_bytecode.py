"""The checks of raw instructions against the kernel's own: the same opcodes exist for both."""

from __future__ import annotations

import ctypes as ct
import os
import struct
from pathlib import Path

import pytest

from hypermesh_ebpf.bpf.libbpf import ProgLoadOpts, libbpf
from hypermesh_ebpf.errors import InvalidRegister, UnknownOpcode
from hypermesh_ebpf.image.bytecode import check_bytecode
from hypermesh_ebpf.image.elf import load_object
from tests.objects import object_path

_SOCKET_FILTER = 1
_LOG_SIZE = 1 << 16


def ask_kernel(code: bytes) -> str:
    """What the verifier says of a program; "" if it takes it."""
    log = ct.create_string_buffer(_LOG_SIZE)
    options = ProgLoadOpts(sz=ct.sizeof(ProgLoadOpts), log_level=1, log_size=_LOG_SIZE)
    options.log_buf = ct.addressof(log)
    fd = libbpf().bpf_prog_load(
        _SOCKET_FILTER, b"", b"GPL", code, len(code) // 8, ct.byref(options)
    )
    if fd >= 0:
        os.close(fd)
        return ""
    return log.value.decode()


def program(opcode: int, registers: int = 0x21, immediate: int = 0) -> bytes:
    """r0 and r1 are set, the instruction, a second half if it needs one, exit."""
    start = struct.pack("=BBhi", 0xB7, 0, 0, 0) + struct.pack("=BBhi", 0xB7, 1, 0, 0)
    second = bytes(8) if opcode == 0x18 else b""
    each = struct.pack("=BBhi", opcode, registers, 0, immediate)
    return start + each + second + struct.pack("=BBhi", 0x95, 0, 0, 0)


def is_unknown(code: bytes) -> bool:
    try:
        check_bytecode(code)
    except UnknownOpcode as error:
        return "there is no opcode" in str(error)
    except InvalidRegister:
        return False
    return False


def test_every_opcode_as_the_kernel_has_it() -> None:
    """What we refuse the kernel refuses; what it does not know, we refuse, but for the newest."""
    ours = {opcode for opcode in range(256) if is_unknown(program(opcode))}
    answers = {opcode: ask_kernel(program(opcode)) for opcode in range(256)}
    assert not {opcode for opcode in ours if not answers[opcode]}
    unknown = {opcode for opcode, answer in answers.items() if "unknown opcode" in answer}
    assert len(unknown) > 20
    newest = {0x06, 0xE5, 0xD7, 0x81, 0x89, 0x91, 0xCB, 0xD3}  # Linux 6.6, 6.9, 6.15
    assert unknown - ours <= newest


@pytest.mark.parametrize("registers", [0xB1, 0xF1, 0x1B, 0x1F])
def test_registers_as_the_kernel_has_them(registers: int) -> None:
    code = program(0xBF, registers)
    with pytest.raises(InvalidRegister):
        check_bytecode(code)
    assert "is invalid" in ask_kernel(code)


@pytest.mark.parametrize("name", ["subprograms", "core", "events", "globals", "kprobe", "tc"])
def test_what_clang_makes_is_accepted(name: str) -> None:
    path: Path = object_path(name)
    loaded = load_object(path.read_bytes(), path.name, {}, {})
    for fd in [fd for _spec, fd in (*loaded.maps, *loaded.programs) if fd is not None]:
        os.close(fd)
    for spec, _fd in loaded.programs:
        check_bytecode(spec.instructions)
