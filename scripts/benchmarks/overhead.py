"""What ``--max-overhead`` costs and saves: statistics, and programs by the share of events taken.

Times are those of the kernel's run statistics, for all of a monitor's programs together, unless a
line says otherwise: it is what the limit is kept by.
"""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any

from benchmarks.measure import Result, Settings, take_turns
from hypermesh_ebpf import monitors
from hypermesh_ebpf.bpf.info import read_run_statistics
from hypermesh_ebpf.bpf.programs import load_program
from hypermesh_ebpf.bpf.spec import ProgramSpec
from hypermesh_ebpf.bpf.statistics import Statistics
from hypermesh_ebpf.opening import Opening, complete_options
from hypermesh_ebpf.overhead import LOWEST
from hypermesh_ebpf.session import Session
from tests.compiler import run_program
from tests.netns import Namespace
from tests.packets import ethernet, ipv4, udp

TITLE = "--max-overhead: run statistics, and programs by the share of events taken"

_SHARES = (1, 4, 16, LOWEST)
_EVERY = "every event"
_RUNS, _CALLS, _EXECS = 1_000_000, 20_000, 40
_PACKET = ethernet(0x0800, ipv4(17, udp(53, b"x" * 30)))


def run(settings: Settings) -> Iterator[Result]:
    """Statistics, then each monitor."""
    with Namespace() as ns, ns.entered(), ExitStack() as stack:
        program = _load_empty(stack)
        packets = partial(_run_xdp, program)
        yield Result(
            "an empty XDP program's run",
            "ns",
            take_turns(
                settings.rounds,
                {
                    "statistics off": partial(_time, packets, _RUNS),
                    "on": _with_statistics(partial(_time, packets, _RUNS)),
                    "as statistics tell it": _with_statistics(
                        partial(_told, partial(_spent, program), packets, _RUNS)
                    ),
                },
            ),
            note="statistics are the whole host's: nobody else may have them on",
        )
    yield from _monitor(settings, "net-monitor", "a call of recv", _receive, _CALLS)
    yield from _monitor(settings, "exec-monitor", "an exec", _execute, _EXECS)
    with Namespace() as ns, ns.entered():
        for by in ("protocol", "source"):
            yield from _monitor(
                settings, "xdp", f"a packet, by {by}", _run_session, _RUNS, iface=("lo",), by=by
            )


def _monitor(
    settings: Settings,
    name: str,
    what: str,
    load: Callable[[Session], None],
    events: int,
    **options: Any,
) -> Iterator[Result]:
    """A line: what an event costs in one of the monitors, by the share that is taken."""
    monitor = monitors.load(name)
    opening = Opening(monitor, complete_options(monitor, options), True, sampled=True)
    statistics = Statistics("measure", "run it as root")
    try:
        with opening.finish() as session:

            def cost(one_in: int) -> float:
                session.sample_one_in(one_in)
                return _told(session.run_time_ns, partial(load, session), events)

            figures = take_turns(
                settings.rounds,
                {
                    _EVERY if share == 1 else f"1 in {share}": partial(cost, share)
                    for share in _SHARES
                },
            )
    finally:
        statistics.close()
    yield Result(f"{name}: {what}", "ns", figures, ours=f"1 in {LOWEST}", against=_EVERY)


def _told(spent: Callable[[], int], load: Callable[[], None], events: int) -> float:
    before = spent()
    load()
    return (spent() - before) / events


def _time(load: Callable[[], None], events: int) -> float:
    begin = time.perf_counter_ns()
    load()
    return (time.perf_counter_ns() - begin) / events


def _with_statistics(measure: Callable[[], float]) -> Callable[[], float]:
    def measured() -> float:
        statistics = Statistics("measure", "run it as root")
        try:
            return measure()
        finally:
            statistics.close()

    return measured


def _spent(program: int) -> int:
    return read_run_statistics(program)[1]


def _load_empty(stack: ExitStack) -> int:
    """An XDP program that passes packets and does nothing else."""
    code = struct.pack("=BBhiBBhi", 0xB7, 0, 0, 2, 0x95, 0, 0, 0)
    program = load_program(ProgramSpec("hm_empty", code, ()), "xdp", "GPL", [])
    stack.callback(os.close, program)
    return program


def _run_xdp(program: int) -> None:
    run_program(program, _PACKET, repeat=_RUNS)


def _run_session(session: Session) -> None:
    ((program,),) = [target.programs for target in session._loaded.targets]
    _run_xdp(program.fd)


def _receive(session: Session) -> None:
    one, other = socket.socketpair()
    with one, other:
        one.setblocking(False)
        for _ in range(_CALLS):
            with suppress(BlockingIOError):
                one.recv(1)


def _execute(session: Session) -> None:
    for _ in range(_EXECS):
        subprocess.run(["/bin/true"], check=True)
    session.events()
