"""Fills maps in a process of its own, past the code that is measured.

    python -m benchmarks.mapfill PID NAME ROWS    (with scripts/ on the path)

Takes the map of that name that the process holds, writes ROWS entries into it by
bpf_map_update_batch(), prints "filled", and adds to every entry once a second, so that each reading
finds other numbers.  Ends with its standard input.
"""

from __future__ import annotations

import ctypes as ct
import os
import re
import select
import struct
import sys
from pathlib import Path

from hypermesh_ebpf.bpf import map_types
from hypermesh_ebpf.bpf.libbpf import check, libbpf, possible_cpus
from hypermesh_ebpf.bpf.maps import read_map_spec
from hypermesh_ebpf.bpf.spec import MapSpec

_update_batch = ct.CDLL("libbpf.so.1", use_errno=True).bpf_map_update_batch
_update_batch.argtypes = [ct.c_int, *[ct.c_void_p] * 4]
_BATCH = 1 << 15


def fill_map(spec: MapSpec, fd: int, rows: int, first: int = 1) -> None:
    """``rows`` entries of which key and value begin with numbers; each CPU has the same value.

    Words of the key are 1, the row's number, and zeros for as many as there are; those of the value
    ``first`` and three more.
    """
    cpus = possible_cpus() if spec.type in map_types.PER_CPU else 1
    step = spec.value_size + (-spec.value_size % 8 if cpus > 1 else 0)
    words = [first, 64 * first, 0, 0][: spec.value_size // 8]
    value = struct.pack(f"={len(words)}Q", *words).ljust(step, b"\0") * cpus
    for start in range(0, rows, _BATCH):
        here = range(start, min(start + _BATCH, rows))
        keys = b"".join([make_key(spec.key_size, row) for row in here])
        count = ct.c_uint32(len(here))
        check(_update_batch(fd, keys, value * len(here), ct.byref(count), None))


def make_key(size: int, row: int) -> bytes:
    """A key of that size: for a program's four words of address, of IPv4 (see bpf_c/xdp.c)."""
    if size == 20:
        return struct.pack("=I10x2s4s", 1, b"\xff\xff", struct.pack(">I", 0x0A000000 + row))
    return struct.pack("=Q", row)[:size].ljust(size, b"\0")


def find_map(name: str, pid: int) -> tuple[MapSpec, int]:
    """The map of that name that a process holds.  Raises LookupError."""
    for info in Path(f"/proc/{pid}/fdinfo").iterdir():
        found = re.search(r"^map_id:\s*(\d+)", info.read_text(), re.MULTILINE)
        if found is None:
            continue
        fd = check(libbpf().bpf_map_get_fd_by_id(int(found[1])))
        spec = read_map_spec(fd)
        if spec.name == name:
            return spec, fd
        os.close(fd)
    raise LookupError(f"process {pid} has no map called {name}")


def main(pid: int, name: str, rows: int) -> None:
    spec, fd = find_map(name, pid)
    turn = 1
    fill_map(spec, fd, rows, turn)
    print("filled", flush=True)
    while not select.select([sys.stdin], [], [], 1.0)[0]:
        turn += 1
        fill_map(spec, fd, rows, turn)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
