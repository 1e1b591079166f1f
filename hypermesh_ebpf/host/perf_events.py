"""Perf events by the names of perf(1): perf-list(1), include/uapi/linux/perf_event.h."""

from __future__ import annotations

import re
from dataclasses import dataclass

from hypermesh_ebpf.errors import UsageError
from hypermesh_ebpf.spelling import find_close

HARDWARE, SOFTWARE, _CACHE, _RAW = 0, 1, 3, 4  # enum perf_type_id

_SOFTWARE_EVENTS = {
    "cpu-clock": 0,
    "task-clock": 1,
    "page-faults": 2,
    "faults": 2,
    "context-switches": 3,
    "cs": 3,
    "cpu-migrations": 4,
    "migrations": 4,
    "minor-faults": 5,
    "major-faults": 6,
    "alignment-faults": 7,
    "emulation-faults": 8,
    "cgroup-switches": 11,
}
_HARDWARE_EVENTS = {
    "cpu-cycles": 0,
    "cycles": 0,
    "instructions": 1,
    "cache-references": 2,
    "cache-misses": 3,
    "branch-instructions": 4,
    "branches": 4,
    "branch-misses": 5,
    "bus-cycles": 6,
    "stalled-cycles-frontend": 7,
    "idle-cycles-frontend": 7,
    "stalled-cycles-backend": 8,
    "idle-cycles-backend": 8,
    "ref-cycles": 9,
}
_CACHES = {
    "L1-dcache": 0, "L1-icache": 1, "LLC": 2, "dTLB": 3, "iTLB": 4, "branch": 5, "node": 6,
}  # fmt: skip
_OPERATIONS = {"load": 0, "store": 1, "prefetch": 2}
_CLOCKS = ("cpu-clock", "task-clock")


@dataclass(frozen=True, slots=True)
class PerfEvent:
    """A perf event: type and config of perf_event_open(2).

    ``frequency`` and ``period`` are what it is sampled with where the user does not say: clocks
    and hardware counters 99 times a second, all other software events every time.
    """

    name: str
    type: int
    config: int
    frequency: int
    period: int


def find_perf_event(name: str) -> PerfEvent:
    """The event of that name; "" is cpu-clock.  Raises UsageError, naming close ones."""
    name = name or "cpu-clock"
    if name in _SOFTWARE_EVENTS and name not in _CLOCKS:
        return PerfEvent(name, SOFTWARE, _SOFTWARE_EVENTS[name], 0, 1)
    if name in _SOFTWARE_EVENTS:
        return PerfEvent(name, SOFTWARE, _SOFTWARE_EVENTS[name], 99, 0)
    if name in _HARDWARE_EVENTS:
        return PerfEvent(name, HARDWARE, _HARDWARE_EVENTS[name], 99, 0)
    events = _cache_events()
    if name in events:
        return PerfEvent(name, _CACHE, events[name], 99, 0)
    if raw := re.fullmatch(r"r([0-9a-fA-F]{1,8})", name):  # libbcc takes 32 bits
        return PerfEvent(name, _RAW, int(raw[1], 16), 99, 0)
    known = [*_SOFTWARE_EVENTS, *_HARDWARE_EVENTS, *events]
    close = find_close(name, known, 3, 0.5)
    raise UsageError(
        f"perf event {name!r}",
        "there is no such software or hardware event",
        f"close to it: {', '.join(close)}"
        if close
        else f"use {', '.join([*_SOFTWARE_EVENTS][:6])}, cycles, instructions, cache-misses, ...",
    )


def _cache_events() -> dict[str, int]:
    """Every name of the kind "L1-dcache-load-misses" with its config."""
    found = {}
    for cache, number in _CACHES.items():
        for operation, code in _OPERATIONS.items():
            plural = f"{operation}es" if operation == "prefetch" else f"{operation}s"
            found[f"{cache}-{plural}"] = number | code << 8
            found[f"{cache}-{operation}-misses"] = number | code << 8 | 1 << 16
    return found


def online_cpus() -> list[int]:
    """The CPUs that are online now."""
    with open("/sys/devices/system/cpu/online") as file:
        ranges = [part.partition("-") for part in file.read().strip().split(",")]
    return [cpu for low, _, high in ranges for cpu in range(int(low), int(high or low) + 1)]
