"""The smallest programs for kernel tests: no compiler, no maps, two instructions."""

from __future__ import annotations

import ctypes
from pathlib import Path

from hypermesh_ebpf.bpf.libbpf import ProgLoadOpts, check, libbpf

SOCKET_FILTER, SCHED_CLS, XDP = 1, 3, 6  # BPF_PROG_TYPE_...
_RETURN_2 = bytes.fromhex("b7000000020000009500000000000000")  # r0 = 2 (XDP_PASS); exit


def load_program(name: str = "hm_pass", kind: int = XDP) -> int:
    """A descriptor of a program that does nothing: in XDP it passes every packet."""
    options = ProgLoadOpts(sz=ctypes.sizeof(ProgLoadOpts))
    return check(
        libbpf().bpf_prog_load(kind, name.encode(), b"GPL", _RETURN_2, 2, ctypes.byref(options))
    )


def program_id(fd: int) -> int:
    """The kernel's id of a program, from fdinfo."""
    for line in Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines():
        if line.startswith("prog_id:"):
            return int(line.split()[1])
    raise AssertionError(f"descriptor {fd} is no program")
