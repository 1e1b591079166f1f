"""Programs that fill ring buffers: compiled by hmebpf's own compiler, run by BPF_PROG_TEST_RUN."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hypermesh_ebpf.bpf.spec import MapSpec
from tests.compiler import compile_text, loaded, run_program


@dataclass(frozen=True, slots=True)
class RingPrograms:
    """XDP programs by name, and the ring that they fill."""

    programs: dict[str, int]
    ring: MapSpec
    ring_fd: int

    def produce(self, name: str, count: int) -> None:
        """Run a program so many times, in one system call.  Raises OSError."""
        run_program(self.programs[name], repeat=count)


@contextmanager
def load_rings(source: Path) -> Iterator[RingPrograms]:
    """Compile and load what is in the file; freed on leaving."""
    with loaded(compile_text(source.read_text())) as made:
        ring = made.maps["events"]
        yield RingPrograms(made.programs, ring.spec, ring.fd)
