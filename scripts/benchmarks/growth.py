"""How cost grows with the number of interfaces, monitors, programs, maps, entries, and events."""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

from benchmarks.growth_library import grow_entries, grow_maps, grow_programs, try_large
from benchmarks.jobs import READING, ours
from benchmarks.measure import OURS, Growth, Result, Settings, say
from benchmarks.peers import environment, hmebpf
from benchmarks.places import network
from benchmarks.process import Running, running
from hypermesh_ebpf.image import clang

TITLE = "Growth"

_INTERFACES = (1, 4, 16, 64)
_MONITORS = (1, 5, 10, 20)
_EVENT_RATES = (100, 1_000, 10_000, 50_000)
_EVENTS = """
#include "vmlinux.h"
#include <bpf/bpf_helpers.h>
struct call {
    __u64 at;
    __u32 pid;
    __u32 asked;
};
struct {
    __uint(type, BPF_MAP_TYPE_RINGBUF);
    __uint(max_entries, 1 << 20);
    __type(value, struct call);
} calls SEC(".maps");
SEC("tp/syscalls/sys_enter_getpgid")
int report(struct trace_event_raw_sys_enter *ctx)
{
    struct call call = { bpf_ktime_get_ns(), bpf_get_current_pid_tgid() >> 32, ctx->args[0] };
    bpf_ringbuf_output(&calls, &call, sizeof(call), 0);
    return 0;
}
char LICENSE[] SEC("license") = "GPL";
"""
_PRODUCER = """
import os, sys, time
each, due = int(sys.argv[1]) / 100, time.perf_counter()
owed = 0.0
while True:
    owed += each
    for _ in range(int(owed)):
        os.getpgid(0)
    owed -= int(owed)
    due += 0.01
    time.sleep(max(due - time.perf_counter(), 0))
"""
_INTERVAL = 0.2
_WATCHED_SECONDS = 4.0


def run(settings: Settings) -> Iterator[Result | Growth]:
    """One table each; a figure is of one run, but for times that are means of many calls."""
    with tempfile.TemporaryDirectory() as scratch:
        env = environment(Path(scratch))
        yield _grow_interfaces(env)
        yield _grow_monitors(env)
        yield _grow_events(env, Path(scratch) / "calls.o")
    _raise_limits()
    yield grow_programs()
    yield grow_maps()
    yield grow_entries()
    yield try_large()


def _grow_interfaces(env: dict[str, str]) -> Growth:
    """One xdp monitor for all of them."""
    start, end, cpu, memory = [], [], [], []
    with network(max(_INTERFACES)) as names:
        for number in (1, *_INTERFACES):  # the first fills the cache
            say(f"growth: {number} interfaces")
            flags = [word for name in names[:number] for word in ("--iface", name)]
            command = hmebpf("xdp", *flags, "-i", str(_INTERVAL), "-o", "json")
            with running(command, READING[OURS], env=env) as run:
                start.append(run.seconds - _INTERVAL)
                cpu.append(_cpu_per_refresh([run]))
                memory.append(run.memory())
                end.append(run.interrupt())
    return Growth(
        "xdp on several interfaces (veth, native mode)",
        "interfaces",
        _INTERFACES,
        {
            "start": ("s", start[1:]),
            "Ctrl-C to exit": ("s", end[1:]),
            "CPU of a refresh": ("s", cpu[1:]),
            "PSS": ("MiB", memory[1:]),
        },
        "one load and one attach for each, and one reading of its maps; processes are constant",
    )


def _grow_monitors(env: dict[str, str]) -> Growth:
    """exec-monitors that know nothing of each other, and see none of what the machine does."""
    start, cpu, memory, end = [], [], [], []
    command = ours("exec", "--comm", "nobody", "-i", str(_INTERVAL), "-o", "json")
    for number in (1, *_MONITORS):
        say(f"growth: {number} monitors")
        with ExitStack() as stack:
            begin = time.perf_counter()
            runs = [
                stack.enter_context(running(command, READING[OURS], env=env)) for _ in range(number)
            ]
            start.append((time.perf_counter() - begin) / number - _INTERVAL)
            cpu.append(_cpu_per_refresh(runs) / number)
            memory.append(sum(run.memory() for run in runs) / number)
            end.append(sum(run.interrupt() for run in runs) / number)
    return Growth(
        "exec-monitors at once, started one after another",
        "monitors",
        _MONITORS,
        {
            "start of each": ("s", start[1:]),
            "Ctrl-C to exit of each": ("s", end[1:]),
            "CPU of a refresh of each": ("s", cpu[1:]),
            "PSS of each": ("MiB", memory[1:]),
        },
        "each is on its own: the sum is linear in all",
    )


def _grow_events(env: dict[str, str], path: Path) -> Growth:
    """A user's own program, an event for each call of a process that calls at a steady rate."""
    path.write_bytes(clang.compile_object(Path("calls.bpf.c"), _EVENTS, []))
    command = hmebpf("load", str(path), "-i", str(_INTERVAL), "-o", "json")
    share, each = [], []
    with running(command, READING[OURS], env=env) as run:
        for rate in _EVENT_RATES:
            say(f"growth: {rate} events a second")
            producer = subprocess.Popen([sys.executable, "-c", _PRODUCER, str(rate)])
            try:
                time.sleep(0.5)
                before, begin = run.cpu(), time.perf_counter()
                time.sleep(_WATCHED_SECONDS)
                took, cpu = time.perf_counter() - begin, run.cpu() - before
            finally:
                producer.kill()
                producer.wait()
            share.append(100 * cpu / took)
            each.append(cpu / took / rate)
    return Growth(
        "events of one program, each written as a line of JSON",
        "events/s",
        _EVENT_RATES,
        {"CPU": ("% of one core", share), "for each": ("s", each)},
        "linear above the refreshes; sections rings and storm tell when events are lost",
    )


def _cpu_per_refresh(runs: Sequence[Running]) -> float:
    """CPU seconds of all of them for one refresh each."""
    before = sum(run.cpu() for run in runs)
    time.sleep(_WATCHED_SECONDS)
    return (sum(run.cpu() for run in runs) - before) / (_WATCHED_SECONDS / _INTERVAL)


def _raise_limits() -> None:
    """As many open files as this process may have: a program is at least three."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
