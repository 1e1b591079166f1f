"""Programs in the kernel, loaded by the bench itself, and what the kernel says that they cost."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from hypermesh_ebpf.attach import attach
from hypermesh_ebpf.attach_type import EbpfAttachType
from hypermesh_ebpf.bpf.info import identify, open_by_id, read_run_statistics
from hypermesh_ebpf.bpf.libbpf import BPF_ANY, check, libbpf
from hypermesh_ebpf.bpf.programs import close_all, close_attachments, create_map, load_program
from hypermesh_ebpf.host.kernel_btf import btf_path
from hypermesh_ebpf.image import bcc
from hypermesh_ebpf.image.image import Image
from hypermesh_ebpf.image.kernel_types import KernelTypes
from hypermesh_ebpf.image.source import bundled_directory
from tests.compiler import run_timed

TEXTS = Path(__file__).resolve().parent / "c"
_HEADER = "hmebpf.h"


@dataclass(frozen=True, slots=True)
class Place:
    """A hook: its kind, where, and the function of the C text that runs there."""

    kind: str
    target: str
    function: str


def compile_text(path: Path, defines: Mapping[str, str | int], *, needs_btf: bool = True) -> Image:
    """The image of a C text with what bundled ones have: hmebpf.h, structures from the BTF."""
    text, types = path.read_text(), ""
    if needs_btf:
        with KernelTypes(btf_path()) as kernel:
            types = kernel.declare(text, (bundled_directory() / _HEADER).read_text())
    flags = bcc.compiler_flags(bundled_directory(), defines)
    return bcc.compile_c(path.name, f'{types}#line 1 "{path.name}"\n{text}', flags)


@contextmanager
def load(
    image: Image, places: Sequence[Place], settings: bytes | None = None
) -> Iterator[list[int]]:
    """An image's programs in the kernel, with maps of their own; a descriptor for each place."""
    with ExitStack() as undo:
        maps = []
        for spec in image.maps:
            maps.append(create_map(spec))
            undo.callback(os.close, maps[-1])
            if spec.name == "settings" and settings is not None:
                check(libbpf().bpf_map_update_elem(maps[-1], bytes(4), settings, BPF_ANY))
        programs = []
        for place in places:
            program = image.program(place.function)
            programs.append(load_program(program, place.kind, image.license, maps))
            undo.callback(os.close, programs[-1])
        yield programs


def time_packets(program: int, packet: bytes, repeat: int = 200_000, tries: int = 3) -> float:
    """Seconds that an XDP program takes for a packet, as BPF_PROG_TEST_RUN tells them in whole
    nanoseconds, its own share included.

    The least of some runs: whatever else the machine does can only add to it.  A run during which
    somebody had run statistics switched on, which cost more than the program, is made again.
    Raises RuntimeError if they stay on.
    """
    durations: list[int] = []
    for _ in range(20 * tries):
        runs, _spent = read_run_statistics(program)
        _result, nanoseconds = run_timed(program, packet, repeat)
        if read_run_statistics(program)[0] > runs:
            time.sleep(1)
            continue
        durations.append(nanoseconds)
        if len(durations) == tries:
            return min(durations) / 1e9
    raise RuntimeError("somebody keeps BPF run statistics on (sysctl kernel.bpf_stats_enabled)")


@contextmanager
def attached(places: Sequence[Place], programs: Sequence[int]) -> Iterator[None]:
    """Programs at their places."""
    made: list[int] = []
    try:
        for place, program in zip(places, programs, strict=True):
            point = EbpfAttachType.make(place.kind, place.target)
            made += attach(point, program, 0, lambda hold: None).descriptors
        yield
    finally:
        close_attachments(made)


@contextmanager
def programs_of(
    command: Sequence[str], count: int, environment: Mapping[str, str]
) -> Iterator[list[int]]:
    """The programs that another process has loaded and attached, once it holds ``count`` of them.

    Raises RuntimeError with its words where it ends before.
    """
    with TemporaryFile("w+") as said:
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=said)
        found: list[int] = []
        try:
            deadline = time.monotonic() + 60
            while len(ids := _programs_held(process.pid)) < count:
                if process.poll() is not None or time.monotonic() > deadline:
                    said.seek(0)
                    raise RuntimeError(f"{command[0]}: {said.read().strip()}")
                time.sleep(0.05)
            time.sleep(0.5)  # the last one is attached a little after it is loaded
            found = [open_by_id("program", number) for number in sorted(ids)]
            yield found
        finally:
            close_all(found)
            process.terminate()
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:  # bpftrace misses a signal just before it waits
                process.kill()
                process.wait()


def _programs_held(pid: int) -> set[int]:
    """Ids of the programs of which a process has descriptors."""
    held = set()
    for path in Path(f"/proc/{pid}/fdinfo").glob("*"):
        try:
            lines = [line.partition(":") for line in path.read_text().splitlines()]
        except OSError:
            continue
        key = identify({name: value.strip() for name, _, value in lines})
        if key and key[0] == "program":
            held.add(key[1])
    return held


def time_events(programs: Sequence[int], produce: Callable[[], Any], slices: int) -> list[float]:
    """Seconds that a run of each program takes, by the kernel's run statistics; 0 for one that did
    not run.

    ``produce`` makes some events and is called ``slices`` times; the least of them counts, as
    interrupts, and a host that takes the processor away, are in the statistics, too.
    """
    found: list[list[float]] = [[] for _ in programs]
    before = [read_run_statistics(fd) for fd in programs]
    for _ in range(slices):
        produce()
        after = [read_run_statistics(fd) for fd in programs]
        for figures, (runs, spent), (runs_before, spent_before) in zip(
            found, after, before, strict=True
        ):
            if runs > runs_before:
                figures.append((spent - spent_before) / (runs - runs_before) / 1e9)
        before = after
    return [min(figures, default=0.0) for figures in found]
