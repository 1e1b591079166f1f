"""Programs that fill ring buffers: compiled by hmebpf's own compiler, run by BPF_PROG_TEST_RUN."""

from __future__ import annotations

import ctypes as ct
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.peers import ROOT
from hypermesh_ebpf.bpf.libbpf import check
from hypermesh_ebpf.bpf.programs import create_map, load_program
from hypermesh_ebpf.bpf.spec import MapSpec
from hypermesh_ebpf.image.image import Image

# In a process of its own: LLVM's memory would stay here, and slow down what is measured.
_COMPILER = """
import sys
from pathlib import Path
from hypermesh_ebpf.image import bcc
from hypermesh_ebpf.image.source import bundled_directory
text = Path(sys.argv[1]).read_text()
image = bcc.compile_c("bench.c", text, bcc.compiler_flags(bundled_directory(), {}))
sys.stdout.buffer.write(image.to_bytes())
"""


@dataclass(frozen=True, slots=True)
class RingPrograms:
    """XDP programs by name, and the ring that they fill."""

    programs: dict[str, int]
    ring: MapSpec
    ring_fd: int

    def produce(self, name: str, count: int) -> None:
        """Run a program so many times, in one system call.  Raises OSError."""
        packet = ct.create_string_buffer(64)
        options = _TestRunOptions(sz=ct.sizeof(_TestRunOptions), repeat=count)
        options.data_in, options.data_size_in = ct.addressof(packet), len(packet)
        check(_libbpf().bpf_prog_test_run_opts(self.programs[name], ct.byref(options)))


@contextmanager
def load_rings(source: Path) -> Iterator[RingPrograms]:
    """Compile and load what is in the file; freed on leaving."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", _COMPILER, str(source)]
    done = subprocess.run(command, capture_output=True, check=True, env=environment)
    image = Image.from_bytes(done.stdout)
    with ExitStack() as stack:
        maps = [create_map(spec) for spec in image.maps]
        programs = {
            each.name: load_program(each, "xdp", image.license, maps) for each in image.programs
        }
        for fd in (*maps, *programs.values()):
            stack.callback(os.close, fd)
        (ring,) = (index for index, spec in enumerate(image.maps) if spec.name == "events")
        yield RingPrograms(programs, image.maps[ring], maps[ring])


class _TestRunOptions(ct.Structure):
    """struct bpf_test_run_opts of libbpf 1.0."""

    _fields_ = (
        ("sz", ct.c_size_t),
        ("data_in", ct.c_void_p),
        ("data_out", ct.c_void_p),
        ("data_size_in", ct.c_uint32),
        ("data_size_out", ct.c_uint32),
        ("ctx_in", ct.c_void_p),
        ("ctx_out", ct.c_void_p),
        ("ctx_size_in", ct.c_uint32),
        ("ctx_size_out", ct.c_uint32),
        ("retval", ct.c_uint32),
        ("repeat", ct.c_int),
        ("duration", ct.c_uint32),
        ("flags", ct.c_uint32),
        ("cpu", ct.c_uint32),
        ("batch_size", ct.c_uint32),
    )


def _libbpf() -> ct.CDLL:
    return ct.CDLL("libbpf.so.1", use_errno=True)
