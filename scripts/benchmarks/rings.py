"""Draining a full ring buffer, in records made per second: discarded ones count, they take time.

A program fills the ring by BPF_PROG_TEST_RUN without waking anybody; what is timed is one reading
of it all.  The peer is BCC's callback, which takes each record apart and adds one member up.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from benchmarks.measure import Result, Settings, say, take_turns
from benchmarks.peers import SCRIPTS, bcc_script, environment
from benchmarks.ring_programs import RingPrograms, load_rings
from hypermesh_ebpf.bpf.record_columns import RecordColumns
from hypermesh_ebpf.bpf.ring import RingBuffer
from hypermesh_ebpf.bpf.types import parse_type

TITLE = "Ring buffers, records per second (32 bytes each; mixed: 32 to 95)"

_SOURCE = SCRIPTS / "ring_records.c"
_COUNT = 300_000  # 12 MB of 32; mixed 23 MB
_SHAPES = {"fixed": "one size", "mixed": "mixed sizes", "half": "one size, half discarded"}
_CALLBACK = "BCC callback"
_RECORD = parse_type(
    [
        "record",
        [
            ["number", "unsigned long long"],
            ["pid", "unsigned int"],
            ["length", "unsigned int"],
            ["comm", "char", [16]],
        ],
        "struct",
    ]
)
_BUDGET = 30.0  # times what BCC's callback takes


def run(settings: Settings) -> Iterator[Result]:
    """One line for each way to read, for each kind of records."""
    with load_rings(_SOURCE) as programs, _bcc_callback() as callback:
        mapped = RingBuffer(programs.ring_fd, programs.ring.max_entries)
        try:
            for shape, words in _SHAPES.items():
                say(f"rings: {words}")
                contenders = _contenders(programs, shape, mapped)
                contenders[_CALLBACK] = lambda shape=shape: callback(shape)
                rounds = take_turns(settings.rounds, contenders)
                # libbpf's reader of ours keeps a mapping of its own: one at a time
                libbpf = RingBuffer(programs.ring_fd, programs.ring.max_entries, in_order=False)
                rounds |= take_turns(settings.rounds, _by_libbpf(programs, shape, libbpf))
                libbpf.close()
                yield from _results(words, rounds)
        finally:
            mapped.close()


def _results(words: str, rounds: Mapping[str, list[float]]) -> Iterator[Result]:
    for name in rounds:
        if name == _CALLBACK:
            continue
        yield Result(
            f"{words}: {name}",
            "records/s",
            {name: rounds[name], _CALLBACK: rounds[_CALLBACK]},
            against=_CALLBACK,
            budget=_BUDGET if name == "columns" else None,
            more_is_better=True,
            ours=name,
        )


def _contenders(
    programs: RingPrograms, shape: str, ring: RingBuffer
) -> dict[str, Callable[[], float]]:
    columns = RecordColumns(_RECORD)
    wanted = _COUNT // 2 if shape == "half" else _COUNT

    def by_columns() -> float:
        found = ring.read_columns(columns)
        _check(len(found["number"]), wanted)
        return float(found["length"].sum())

    return {
        "columns": _timed(programs, shape, by_columns),
        "read()": _timed(programs, shape, lambda: _check(len(ring.read()), wanted)),
    }


def _by_libbpf(
    programs: RingPrograms, shape: str, ring: RingBuffer
) -> dict[str, Callable[[], float]]:
    columns = RecordColumns(_RECORD)
    return {
        "columns by libbpf": _timed(programs, shape, lambda: ring.read_columns(columns)),
        "read() by libbpf": _timed(programs, shape, ring.read),
    }


def _timed(programs: RingPrograms, shape: str, read: Callable[[], object]) -> Callable[[], float]:
    def measure() -> float:
        programs.produce(shape, _COUNT)
        begin = time.perf_counter()
        found = read()
        taken = time.perf_counter() - begin
        del found
        return _COUNT / taken

    return measure


def _check(count: int, wanted: int) -> None:
    if count != wanted:
        raise RuntimeError(f"{count} records were read, {wanted} made")


@contextmanager
def _bcc_callback() -> Iterator[Callable[[str], float]]:
    """The BCC script; the function has it fill and drain its ring once."""
    process = subprocess.Popen(
        bcc_script("ring_drain", str(_SOURCE)),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment(),
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None

    def measure(shape: str) -> float:
        print(shape, _COUNT, file=process.stdin, flush=True)
        records, taken = process.stdout.readline().split()
        _check(int(records), _COUNT // 2 if shape == "half" else _COUNT)
        return _COUNT / float(taken)

    try:
        yield measure
    finally:
        process.stdin.close()
        process.wait()
