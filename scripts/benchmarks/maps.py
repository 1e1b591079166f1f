"""Reading maps: into rows and columns, against BCC's items() and bpftool.

CPU time, as nothing here waits.  A map with keys of 8 bytes and values of two counters.  "rows" are
tuples of numbers, a per-CPU map's added up, looked at one after another; "list" keeps them; "items"
are pairs of a key and a named tuple; "columns" numpy arrays, numpy having been imported (70 ms,
once).  All are compared with BCC's items() and the numbers in them: items() itself gives C objects,
and those of every CPU.
"""

from __future__ import annotations

import gc
import os
import subprocess
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from resource import RUSAGE_CHILDREN, getrusage
from statistics import median

from benchmarks.mapfill import fill_map, find_map
from benchmarks.measure import OURS, Result, Settings, say, take_turns
from benchmarks.peers import bcc_script, environment
from hypermesh_ebpf.bpf import map_types
from hypermesh_ebpf.bpf.maps import Map
from hypermesh_ebpf.bpf.programs import create_map
from hypermesh_ebpf.bpf.spec import MapSpec

TITLE = "reading maps (CPU time)"
_SIZES = (100, 1000, 10_000, 100_000, 1_000_000)
_KINDS = {"hash": map_types.HASH, "percpu_hash": map_types.PERCPU_HASH}
_ITEMS, _BATCH, _BPFTOOL = "BCC items()", "BCC items_lookup_batch()", "bpftool -j"
_ROWS = "BCC items() to rows"
_BUDGET_ENTRIES, _BUDGET = 100_000, 1 / 15
_SMALL = 0.01  # seconds: what takes less is read several times in a round

_U64 = "unsigned long long"
_VALUE = ["counter", [["packets", _U64], ["bytes", _U64]], "struct_packed"]


class _BccReader:
    """A BCC process with a filled map of its own."""

    def __init__(self, undo: ExitStack, kind: str, entries: int) -> None:
        command = bcc_script("read_map", kind, str(entries))
        self._process = undo.enter_context(
            subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env=environment(),
            )
        )
        assert self._process.stdin is not None
        undo.callback(self._process.stdin.close)
        self._answer()
        spec, fd = find_map("filled", self._process.pid)
        fill_map(spec, fd, entries)
        os.close(fd)

    def read(self, how: str, entries: int) -> float:
        """The seconds of a read, of many where they are short."""
        return median([self._read(how) for _ in range(max(1, 2000 // entries))])

    def _read(self, how: str) -> float:
        assert self._process.stdin is not None
        self._process.stdin.write(how + "\n")
        self._process.stdin.flush()
        return float(self._answer().split()[0])

    def _answer(self) -> str:
        assert self._process.stdout is not None
        if not (line := self._process.stdout.readline()):
            raise RuntimeError(f"{self._process.args} ended")
        return line


def _per_read(action: Callable[[], object]) -> Callable[[], float]:
    """CPU seconds of a read, of many where they are short; not of throwing away what was read."""

    def once() -> float:
        begin = time.process_time()
        found = action()
        end = time.process_time()
        del found
        return end - begin

    def measure() -> float:
        gc.collect()
        first = once()
        return median([first, *(once() for _ in range(int(_SMALL / first)))])

    return measure


def _dump(fd: int) -> float:
    """bpftool's CPU seconds."""
    info = Path(f"/proc/self/fdinfo/{fd}").read_text()
    number = next(line.split()[1] for line in info.splitlines() if line.startswith("map_id:"))
    before = getrusage(RUSAGE_CHILDREN)
    subprocess.run(["bpftool", "-j", "map", "dump", "id", number], capture_output=True, check=True)
    after = getrusage(RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def run(settings: Settings) -> Iterator[Result]:
    """One small array, then hashes of growing size."""
    yield _small_array(settings)
    for kind, type_ in _KINDS.items():
        for entries in _SIZES:
            say(f"{kind}, {entries} entries")
            yield from _hash(settings, kind, type_, entries)


def _small_array(settings: Settings) -> Result:
    """A monitor's totals: what most reads are."""
    with ExitStack() as undo:
        spec = MapSpec("bench", map_types.ARRAY, 4, 16, 8, 0, "unsigned int", _VALUE)
        fd = create_map(spec)
        undo.callback(os.close, fd)
        bcc = _BccReader(undo, "array", 8)
        map_ = Map(spec, fd)
        contenders = {
            OURS: _per_read(map_.items),
            _ITEMS: lambda: bcc.read("items", 8),
        }
        figures = take_turns(settings.rounds, contenders)
        return Result("array, 8 entries, items", "s", figures, against=_ITEMS)


def _hash(settings: Settings, kind: str, type_: int, entries: int) -> Iterator[Result]:
    with ExitStack() as undo:
        spec = MapSpec("bench", type_, 8, 16, entries, 0, _U64, _VALUE)
        fd = create_map(spec)
        undo.callback(os.close, fd)
        fill_map(spec, fd, entries)
        map_ = Map(spec, fd)
        bcc = _BccReader(undo, kind, entries)
        contenders: dict[str, Callable[[], float]] = {
            f"{OURS} rows": _per_read(lambda: deque(map_.rows(), maxlen=1)),
            f"{OURS} list": _per_read(lambda: list(map_.rows())),
            f"{OURS} items": _per_read(map_.items),
            f"{OURS} columns": _per_read(map_.columns),
            f"{OURS} raw bytes": _per_read(map_.reader.read),
            _ITEMS: lambda: bcc.read("items", entries),
            _ROWS: lambda: bcc.read("rows", entries),
        }
        if kind == "hash":  # of per-CPU maps BCC has no batches
            contenders[_BATCH] = lambda: bcc.read("batch", entries)
        if entries <= 10_000:
            contenders[_BPFTOOL] = lambda: _dump(fd)
        rounds = settings.rounds if entries < 1_000_000 else min(settings.rounds, 3)
        figures = take_turns(rounds, contenders)
        peers = {name: each for name, each in figures.items() if not name.startswith(OURS)}
        rows, columns = f"{OURS} rows", f"{OURS} columns"
        kept = {name: figures[name] for name in (rows, f"{OURS} list", f"{OURS} items")}
        yield Result(
            f"{kind}, {entries:,}, rows",
            "s",
            {**kept, **peers},
            against=_ROWS,
            budget=_BUDGET if entries == _BUDGET_ENTRIES else None,
            ours=rows,
        )
        arrays = {name: figures[name] for name in (columns, f"{OURS} raw bytes")}
        yield Result(
            f"{kind}, {entries:,}, columns",
            "s",
            {**arrays, _ROWS: peers[_ROWS]},
            against=_ROWS,
            ours=columns,
        )
