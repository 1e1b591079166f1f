"""Section: what the programs cost in the kernel, for each packet, socket call and exec.

XDP programs run by BPF_PROG_TEST_RUN.  What others take for an event is the kernel's own run
statistics under a known load, less what these say of an empty program at the same hook; a figure
is the sum over the programs that one event runs through.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial

from benchmarks.measure import OURS, Result, Settings, say, seconds, take_turns
from benchmarks.peers import bcc_script, bpftrace, environment, hmebpf
from benchmarks.programs import (
    TEXTS,
    Place,
    attached,
    compile_text,
    load,
    programs_of,
    time_events,
    time_packets,
)
from hypermesh_ebpf import monitors
from hypermesh_ebpf.bpf.statistics import switch_statistics_on
from hypermesh_ebpf.image.image import Image
from hypermesh_ebpf.image.source import build_image, bundled_directory
from hypermesh_ebpf.opening import complete_options

TITLE = "In the kernel"

LEANEST = "leanest"
RUNNING = f"{OURS} as it runs"
"""With the tool reading what the program writes: peers are measured so, and wake-ups count."""
_WITHIN = 1.1
_XDP_ADDED_SECONDS = 10e-9
_SLICES = 20
_TURNS = 3
_PAIRS = 500  # of a send and a recv, in a slice
_EXECS = 30

_TCP = bytes.fromhex("4500003200000000400600007f0000017f000001") + bytes(30)
_UDP6 = bytes.fromhex("6000000000101140") + bytes(15) + b"\1" + bytes(15) + b"\2" + bytes(16)
_MACS = bytes.fromhex("ffffffffffff000000000000")
_PACKETS = {
    "TCP": _MACS + b"\x08\0" + _TCP,
    "UDP over IPv6": _MACS + b"\x86\xdd" + _UDP6,
    "TCP with a VLAN tag": _MACS + bytes.fromhex("810000070800") + _TCP,
}
_OUT_OF_THE_WAY = ("TCP with a VLAN tag",)  # which is counted as such, too
_PLAIN = {
    "empty": "pass",
    "per-CPU counter": "count_by_cpu",
    "atomic counter": "count_atomically",
}
_BY = {"protocol": "protocol or size", "source": "source", "port": "port"}


def run(settings: Settings) -> Iterator[Result]:
    """Packets, socket calls, execs, a user's tracepoint program."""
    yield from _measure_packets(settings.rounds)
    left, right = socket.socketpair()
    with left, right:

        def call_sockets() -> None:
            for _ in range(_PAIRS):
                left.send(b"x" * 64)
                right.recv(64)

        sockets = _socket_calls(call_sockets)
        yield from _measure_events(settings.rounds, sockets)
        yield _measure_callers(settings.rounds, sockets)
        yield from _measure_events(settings.rounds, _bytes_received(call_sockets))
    yield from _measure_events(settings.rounds, _executions())


def _take_least(
    rounds: int, contenders: Mapping[str, Callable[[], float]]
) -> dict[str, list[float]]:
    """Turns, of which the least of each few, far apart, is a round's figure.

    The machine's speed changes by a quarter for seconds at a time when its core is shared; what is
    compared here differs by less.
    """
    found = take_turns(_TURNS * rounds, contenders, warm_up=0)
    return {
        name: [min(figures[first::rounds]) for first in range(rounds)]
        for name, figures in found.items()
    }


# ---- packets ------------------------------------------------------------------------------------


def _measure_packets(rounds: int) -> Iterator[Result]:
    plain = compile_text(TEXTS / "plain.c", {}, needs_btf=False)
    images = {name: (plain, function) for name, function in _PLAIN.items()}
    for by in _BY:
        image, _settings = _bundled("xdp", "xdp", iface=("lo",), by=by)
        options = complete_options(monitors.load("xdp"), {"iface": ("lo",), "by": by})
        lean = compile_text(
            TEXTS / "lean_xdp.c", monitors.load("xdp").defines(options), needs_btf=False
        )
        images[f"{OURS} {by}"] = (image, "count_packet")
        images[f"{LEANEST} {by}"] = (lean, "count_packet")
    with ExitStack() as undo:
        programs = {
            name: undo.enter_context(load(image, [Place("xdp", "", function)]))[0]
            for name, (image, function) in images.items()
        }
        for packet, frame in _PACKETS.items():
            say(f"XDP: {packet}")
            found = _take_least(
                rounds, {name: partial(time_packets, fd, frame) for name, fd in programs.items()}
            )
            for by, words in _BY.items():
                shown = {name: found[name] for name in _PLAIN}
                shown |= {LEANEST: found[f"{LEANEST} {by}"], OURS: found[f"{OURS} {by}"]}
                what = f"xdp by {words}: {packet}"
                yield Result(what, "s", shown, against=LEANEST, budget=_WITHIN)
                if by == "protocol" and packet not in _OUT_OF_THE_WAY:
                    pairs = zip(shown[OURS], shown["empty"], strict=True)
                    added = [ours - empty for ours, empty in pairs]
                    yield Result(
                        f"xdp, over an empty program: {packet}",
                        "s",
                        {OURS: added},
                        limit=_XDP_ADDED_SECONDS,
                    )


def _bundled(name: str, rung: str, **given: object) -> tuple[Image, bytes | None]:
    """A bundled monitor's image, and its settings, with these options."""
    monitor = monitors.load(name)
    options = complete_options(monitor, given)
    (found,) = [each for each in monitor.rungs if each.name == rung]
    defines = {**monitor.defines(options), **found.defines}
    path = bundled_directory() / monitor.source
    return build_image(path, defines, needs_btf=found.needs_btf).image, monitor.settings(options)


# ---- events -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Program:
    """A contender that the bench loads itself; its functions, one for each place of the events."""

    image: Image
    functions: Sequence[str]
    settings: bytes | None = None


@dataclass(frozen=True, slots=True)
class _Events:
    """One kind of event, which ``produce`` makes.

    ``places`` are (kind, target) of the hooks that ``each`` of them run through together; ``peers``
    are commands, with the numbers of the places that they use; ``filtered`` are ours again, asked
    for somebody else's events.
    """

    what: str
    produce: Callable[[], object]
    places: Sequence[tuple[str, str]]
    ours: _Program
    peers: Mapping[str, tuple[Sequence[str], Sequence[int]]]
    lean: _Program | None = None
    filtered: Mapping[str, _Program] = field(default_factory=dict)
    each: int = 1

    @contextmanager
    def attached(self, program: _Program) -> Iterator[list[int]]:
        """A program's descriptors while it runs at the places."""
        places = [
            Place(kind, target, function)
            for (kind, target), function in zip(self.places, program.functions, strict=True)
        ]
        with (
            load(program.image, places, program.settings) as programs,
            attached(places, programs),
        ):
            self.produce()
            yield programs

    def empty(self) -> _Program:
        """Programs that do nothing, at the same places."""
        plain = compile_text(TEXTS / "plain.c", {}, needs_btf=False)
        return _Program(plain, ["nothing"] * len(self.places))


def _measure_events(rounds: int, events: _Events) -> Iterator[Result]:
    """What each contender's programs take for an event."""
    say(f"{events.what}: run statistics")
    empty = events.empty()
    idle: list[float] = []  # of each place, in this round

    def measure_empty() -> float:
        with events.attached(empty) as programs:
            idle[:] = time_events(programs, events.produce, _SLICES)
        return sum(idle) / events.each

    def measure(program: _Program) -> float:
        with events.attached(program) as programs:
            spent = time_events(programs, events.produce, _SLICES)
        return sum(max(a - b, 0.0) for a, b in zip(spent, idle, strict=True)) / events.each

    def measure_peer(command: Sequence[str], places: Sequence[int]) -> float:
        with programs_of(command, len(places), environment()) as programs:
            events.produce()
            spent = time_events(programs, events.produce, _SLICES)
        return (sum(spent) - sum(idle[each] for each in places)) / events.each

    ours = {OURS: events.ours, **({LEANEST: events.lean} if events.lean else {})}
    contenders: dict[str, Callable[[], float]] = {"empty": measure_empty}
    contenders |= {
        name: partial(measure, each) for name, each in {**ours, **events.filtered}.items()
    }
    contenders |= {name: partial(measure_peer, *each) for name, each in events.peers.items()}
    statistics_on = switch_statistics_on()
    assert statistics_on is not None
    try:
        found = _take_least(rounds, contenders)
    finally:
        os.close(statistics_on)
    shown = {name: figures for name, figures in found.items() if name not in events.filtered}
    note = "less what the empty programs take by themselves"
    if events.lean:
        yield Result(events.what, "s", shown, against=LEANEST, budget=_WITHIN, note=note)
    for peer in [name for name in events.peers if name != RUNNING]:
        pair = {peer: found[peer], OURS: found.get(RUNNING, found[OURS])}
        yield Result(f"{events.what}, by {peer}", "s", pair, against=peer)
    if events.filtered:
        left_out = {name: found[name] for name in events.filtered}
        yield Result(f"{events.what} that a filter excludes", "s", left_out)


def _measure_callers(rounds: int, events: _Events) -> Result:
    """What callers wait for one event, the kernel's way to the programs included."""

    def measure(program: _Program | None) -> float:
        with events.attached(program) if program else nullcontext():
            return min(seconds(events.produce) for _ in range(_SLICES)) / _PAIRS / events.each

    say(f"{events.what}: its caller")
    contenders = {"alone": None, "empty": events.empty(), **events.filtered, OURS: events.ours}
    found = take_turns(rounds, {name: partial(measure, each) for name, each in contenders.items()})
    return Result(f"{events.what}, as its caller sees it", "s", found, against="empty")


def _text(name: str) -> Image:
    """The image of one of the bench's own C texts."""
    return compile_text(TEXTS / name, {})


def _socket_calls(produce: Callable[[], object]) -> _Events:
    functions = ("begin_send", "end_call", "begin_recvfrom", "end_call")
    return _Events(
        "socket call",
        produce,
        [
            ("tracepoint", f"syscalls:sys_{end}_{call}")
            for call in ("sendto", "recvfrom")
            for end in ("enter", "exit")
        ],
        _ours("net-monitor", functions),
        {
            "BCC": (bcc_script("kernel", "net"), range(4)),
            "bpftrace": (bpftrace(_BPFTRACE_NET), range(4)),
        },
        _Program(_text("lean_net.c"), ("begin_send", "end_send", "begin_recvfrom", "end_recv")),
        {
            f"{OURS} --pid": _ours("net-monitor", functions, pid=1),
            f"{OURS} --comm": _ours("net-monitor", functions, comm="nobody"),
        },
        each=2,
    )


def _executions() -> _Events:
    def execute() -> None:
        for _ in range(_EXECS):
            os.waitpid(os.posix_spawn("/bin/true", ["true"], os.environ), 0)

    functions = ("enter_call", "leave_done", "leave_call")
    return _Events(
        "exec",
        execute,
        (
            ("tracepoint", "syscalls:sys_enter_execve"),
            ("raw_tracepoint", "sched_process_exec"),
            ("tracepoint", "syscalls:sys_exit_execve"),
        ),
        _ours("exec-monitor", functions),
        {
            RUNNING: (hmebpf("exec-monitor", "-o", "json"), (0, 1, 2)),
            "BCC": (bcc_script("kernel", "exec"), (0, 2)),
            "bpftrace": (bpftrace(_BPFTRACE_EXEC), (0, 2)),
        },
        _Program(_text("lean_exec.c"), functions),
        {
            f"{OURS} --pid": _ours("exec-monitor", functions, pid=1),
            f"{OURS} --comm": _ours("exec-monitor", functions, comm="nobody"),
        },
    )


def _bytes_received(produce: Callable[[], object]) -> _Events:
    return _Events(
        "a user's tracepoint program",
        produce,
        [("tracepoint", "syscalls:sys_exit_recvfrom")],
        _Program(_text("received.c"), ("end_recv",)),
        {
            "BCC": (bcc_script("kernel", "received"), (0,)),
            "bpftrace": (bpftrace(_BPFTRACE_RECEIVED), (0,)),
        },
    )


def _ours(name: str, functions: Sequence[str], **given: object) -> _Program:
    image, settings = _bundled(name, "tracepoint", **given)
    return _Program(image, functions, settings)


_BPFTRACE_RECEIVED = "tracepoint:syscalls:sys_exit_recvfrom { @[comm] = sum(args->ret) }"
_BPFTRACE_NET = "".join(
    f"tracepoint:syscalls:sys_enter_{call} {{ @start[tid] = nsecs }}"
    f"tracepoint:syscalls:sys_exit_{call} /@start[tid]/ {{"
    f' @ns[pid, comm, "{call}"] = hist(nsecs - @start[tid]);'
    f' @calls[pid, comm, "{call}"] = count();'
    f" if (args->ret < 0) {{ @errors[pid, comm, args->ret] = count() }}"
    f' else {{ @bytes[pid, comm, "{call}"] = sum(args->ret) }}'
    " delete(@start[tid]) }"
    for call in ("sendto", "recvfrom")
)
_BPFTRACE_EXEC = (
    "tracepoint:syscalls:sys_enter_execve { @start[tid] = nsecs;"
    ' printf("%d %s ", pid, comm); join(args->argv) }'
    "tracepoint:syscalls:sys_exit_execve /@start[tid]/ {"
    ' printf("%d %d %s %d %d", pid, uid, comm, args->ret, nsecs - @start[tid]);'
    " delete(@start[tid]) }"
)
