"""A program of a few instructions that counts its runs, for any hook: no compiler, one array map.

with Counter() as counter:
    fd, prog_id = counter.load(EbpfAttachType.xdp("lo"), returns=2)
    ...
    assert counter.read() == 7 == counter.runs(fd)
"""

from __future__ import annotations

import ctypes
import os
import struct
from contextlib import ExitStack

import pytest

from hypermesh_ebpf.attach import attach
from hypermesh_ebpf.attach_type import EbpfAttachType
from hypermesh_ebpf.bpf.libbpf import check, libbpf
from hypermesh_ebpf.bpf.programs import create_map, load_program, read_program_info
from hypermesh_ebpf.bpf.spec import MapSpec, ProgramSpec
from hypermesh_ebpf.errors import HookUnsupported
from hypermesh_ebpf.host.environment import own_namespaces
from hypermesh_ebpf.host.kernel_btf import function_btf_id
from tests.netns import wait_until

XDP_PASS, TC_PASS, TC_NEXT, CGROUP_ALLOW = 2, 0, -1, 1
_ARRAY = 2
_GET_CURRENT_PID_TGID = 14
_BY_BTF_ID = {"fentry": "", "fexit": "", "lsm": "bpf_lsm_"}

needs_initial_pids = pytest.mark.skipif(
    "pid" in own_namespaces(),
    reason="programs see process ids of the initial namespace, which is not ours",
)


def _instruction(code: int, registers: int = 0, offset: int = 0, immediate: int = 0) -> bytes:
    return struct.pack("=BBhi", code, registers, offset, immediate)


def _count(returns: int, tgid: int | None) -> tuple[bytes, int]:
    """(instructions, byte offset of the map reference): r1 = &value; *r1 += 1, for one process."""
    only = b""
    if tgid is not None:
        only = (
            _instruction(0x85, immediate=_GET_CURRENT_PID_TGID)
            + _instruction(0x77, 0x00, immediate=32)  # r0 >>= 32
            + _instruction(0x55, 0x00, 4, tgid)  # if r0 != tgid goto exit
        )
    count = (
        _instruction(0x18, 0x21)  # r1 = map value (BPF_PSEUDO_MAP_VALUE), two instructions long
        + _instruction(0)
        + _instruction(0xB7, 2, immediate=1)
        + _instruction(0xDB, 0x21)  # lock *(u64 *)(r1 + 0) += r2
    )
    end = _instruction(0xB7, 0, immediate=returns) + _instruction(0x95)
    return only + count + end, len(only)


class Counter:
    """The map and what was loaded with it; all closed at the end."""

    def __init__(self) -> None:
        self._stack = ExitStack()

    def __enter__(self) -> Counter:
        spec = MapSpec("hm_counter", _ARRAY, 4, 8, 1, 0, None, None)
        self._map = create_map(spec)
        self._stack.callback(os.close, self._map)
        statistics = libbpf().bpf_enable_stats(0)  # for runs(); Linux 5.8
        self._stack.callback(os.close, check(statistics))
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def load(
        self,
        point: EbpfAttachType,
        target: str = "",
        *,
        returns: int = 0,
        tgid: int | None = None,
        name: str = "hm_count",
    ) -> tuple[int, int]:
        """(descriptor, id) of a program for that point; ``target`` is its function's name."""
        code, at = _count(returns, tgid)
        btf_id = 0
        if point.kind in _BY_BTF_ID:
            btf_id = function_btf_id(_BY_BTF_ID[point.kind] + target) or 0
        fd = load_program(ProgramSpec(name, code, ((at, 0),)), point, "GPL", [self._map], btf_id)
        self._stack.callback(os.close, fd)
        return fd, read_program_info(fd).id

    def read(self) -> int:
        """How often the programs have counted."""
        key, value = ctypes.c_uint32(0), ctypes.c_uint64()
        check(libbpf().bpf_map_lookup_elem(self._map, ctypes.byref(key), ctypes.byref(value)))
        return value.value

    @staticmethod
    def runs(fd: int) -> int:
        """How often the kernel says that it ran a program."""
        return read_program_info(fd).run_count


def wait_until_freed(prog_id: int) -> None:
    """Wait until the kernel has no program of that id any more: nothing attaches it."""

    def is_gone() -> bool:
        fd = libbpf().bpf_prog_get_fd_by_id(prog_id)
        if fd >= 0:
            os.close(fd)
        return bool(fd < 0)

    wait_until(is_gone, f"program {prog_id} is freed")


def link(point: EbpfAttachType, fd: int, number: int) -> int:
    """A program attached by a link; its descriptor.  Skips where the kernel has no such links."""
    try:
        made = attach(point, fd, number, lambda hold: None, pinnable=True)
    except HookUnsupported as error:
        pytest.skip(str(error))
    (found,) = made.descriptors
    return found
