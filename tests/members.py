"""Programs made instruction by instruction, to be members of chains: no compiler needed."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator

from hypermesh_ebpf.bpf.chain import Member
from hypermesh_ebpf.bpf.maps import ARRAY
from hypermesh_ebpf.bpf.spec import MapSpec, ProgramSpec
from tests.packets import ethernet

ETHERTYPE = 0x88B5  # IEEE 802 local experimental: nothing else on the wire has it
PASS = {"xdp": 2, "tc": 0}
_DATA = {"xdp": (0, 4), "tc": (76, 80)}  # offsets of data and data_end in xdp_md and __sk_buff


def counts(entries: int = 1) -> MapSpec:
    """The map of a program made by :func:`counting`."""
    return MapSpec("hm_counts", ARRAY, 4, 8, entries, 0, "unsigned int", "unsigned long long")


def insn(
    opcode: int, target: int = 0, source: int = 0, offset: int = 0, immediate: int = 0
) -> bytes:
    """One instruction of eight bytes."""
    return struct.pack("=BBhi", opcode, target | source << 4, offset, immediate)


EXIT = insn(0x95)


def set_r0(value: int) -> bytes:
    return insn(0xB7, 0, 0, 0, value)


def load_map(register: int) -> bytes:
    """A map's descriptor into a register; the loader fills it in."""
    return insn(0x18, register, 1) + insn(0)


def returning(verdict: int, name: str = "returning", license: str = "GPL") -> Member:
    """Two instructions and no map."""
    return Member(ProgramSpec(name, set_r0(verdict) + EXIT, ()), [], license)


def frames(count: int) -> Iterator[bytes]:
    """Frames for :func:`counting`, numbered from 0."""
    for number in range(count):
        yield ethernet(ETHERTYPE, struct.pack("=I", number))


def counting(
    map_fd: int,
    verdict: int | None = None,
    name: str = "counting",
    *,
    kind: str = "xdp",
    numbered: bool = False,
    license: str = "GPL",
) -> Member:
    """Counts the frames of our Ethernet type in an array; passes, or returns ``verdict``.

    All in its first element, or each under its number.
    """
    data, data_end = _DATA[kind]
    code = [
        insn(0x61, 2, 1, data),
        insn(0x61, 3, 1, data_end),
        insn(0xBF, 4, 2),
        insn(0x07, 4, 0, 0, 18),
        insn(0x2D, 4, 3, 12),  # if r4 > r3 goto out
        insn(0x69, 4, 2, 12),  # r4 = *(u16 *)(r2 + 12)
        insn(0x55, 4, 0, 10, socket.htons(ETHERTYPE)),  # if r4 != ... goto out
        insn(0x61, 5, 2, 14) if numbered else insn(0xB7, 5),
        insn(0x63, 10, 5, -4),  # *(u32 *)(r10 - 4) = r5
        insn(0xBF, 2, 10),
        insn(0x07, 2, 0, 0, -4),
        load_map(1),
        insn(0x85, 0, 0, 0, 1),  # r0 = bpf_map_lookup_elem(r1, r2)
        insn(0x15, 0, 0, 2, 0),  # if r0 == 0 goto out
        insn(0xB7, 1, 0, 0, 1),
        insn(0xDB, 0, 1),  # lock *(u64 *)(r0 + 0) += r1
        set_r0(PASS[kind] if verdict is None else verdict),  # out:
        EXIT,
    ]
    program = ProgramSpec(name, b"".join(code), ((8 * 11, 0),), kind)
    return Member(program, [map_fd], license)


def with_stack(size: int, verdict: int = 2) -> Member:
    """Uses so many bytes of stack."""
    code = insn(0x7A, 10, 0, -size, 1) + set_r0(verdict) + EXIT
    return Member(ProgramSpec(f"stack_{size}", code, ()), [])
