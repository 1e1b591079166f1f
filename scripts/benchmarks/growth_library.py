"""How cost grows for a user of the library: programs, maps, entries, one map of a gigabyte."""

from __future__ import annotations

import ctypes as ct
import os
import statistics
import struct
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.measure import Growth, say, seconds
from hypermesh_ebpf import (
    EbpfAbstraction,
    EbpfAttachType,
    EbpfHandle,
    create_os_abstraction,
)
from hypermesh_ebpf.bpf.libbpf import check, libbpf
from hypermesh_ebpf.bpf.maps import TypedMap
from hypermesh_ebpf.bpf.programs import create_map
from hypermesh_ebpf.bpf.spec import MapSpec
from hypermesh_ebpf.image import clang

_HASH = 1  # BPF_MAP_TYPE_HASH
_BATCH = 10_000
_TRIES = 7
_PROGRAMS = (10, 100, 500, 2000)
_MAPS = (1, 8, 64)
_ENTRIES = (1_000, 10_000, 100_000)

_RARE = EbpfAttachType.raw_tracepoint("cgroup_mkdir")
_SOURCE = """
#include "vmlinux.h"
#include <bpf/bpf_helpers.h>
{maps}
SEC("raw_tp/cgroup_mkdir")
int count(void *ctx)
{{
    __u32 zero = 0;
    __u64 *hits;
{uses}
    return 0;
}}
char LICENSE[] SEC("license") = "GPL";
"""
_MAP = """
struct {{
    __uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
    __uint(max_entries, 1);
    __type(key, __u32);
    __type(value, __u64);
}} hits{number} SEC(".maps");
"""
_USE = """
    hits = bpf_map_lookup_elem(&hits{number}, &zero);
    if (hits)
        *hits += 1;
"""


def _compile(maps: int) -> bytes:
    """An object with one program that counts in so many maps."""
    text = _SOURCE.format(
        maps="".join(_MAP.format(number=each) for each in range(maps)),
        uses="".join(_USE.format(number=each) for each in range(maps)),
    )
    return clang.compile_object(Path("count.bpf.c"), text, [])


def grow_programs() -> Growth:
    """A user who loads the same object again and again, and keeps all."""
    elf = _compile(1)
    columns: dict[str, tuple[str, list[float | None]]] = {}
    for number in _PROGRAMS:
        say(f"growth: {number} programs")
        for name, (unit, figure) in _use_programs(elf, number).items():
            columns.setdefault(name, (unit, []))[1].append(figure)
    return Growth(
        "programs of one library user, raw tracepoint, one map each; figures for each program",
        "programs",
        _PROGRAMS,
        columns,
        "constant for each program: the sum is linear, descriptors too (`ulimit -n`)",
    )


def _use_programs(elf: bytes, number: int) -> dict[str, tuple[str, float]]:
    """Load, attach, read, list and unload so many; then close with all of them loaded again."""
    with create_os_abstraction() as os_:
        handles: list[EbpfHandle] = []

        def load() -> None:
            handles.extend(os_.load_ebpf_program(elf) for _ in range(number))

        def attach() -> None:
            for each in handles:
                os_.attach_ebpf_monitor(each, _RARE)

        def read() -> None:
            for each in handles:
                os_.read_ebpf_metrics(each)

        def unload() -> None:
            for each in handles:
                os_.unload_ebpf_program(each)
            handles.clear()

        _warm_up(os_, elf)
        before = len(os.listdir("/proc/self/fd"))
        steps = (load, attach, read, os_.list_programs, unload)
        took: dict[str, tuple[str, float]] = {}
        for step in steps:
            if step is unload:
                took["descriptors"] = "", (len(os.listdir("/proc/self/fd")) - before) / number
            took[step.__name__.removesuffix("_programs")] = "s", seconds(step) / number
        load()
        attach()
        took["close"] = "s", seconds(os_.close) / number
    return took


def _warm_up(os_: EbpfAbstraction, elf: bytes) -> None:
    """Start the worker, and let it import what loading and attaching need."""
    handle = os_.load_ebpf_program(elf)
    os_.attach_ebpf_monitor(handle, _RARE)
    os_.unload_ebpf_program(handle)


def grow_maps() -> Growth:
    """One program, more and more maps."""
    columns: dict[str, tuple[str, list[float | None]]] = {}
    for number in _MAPS:
        say(f"growth: {number} maps")
        for name, took in _use_maps(_compile(number)).items():
            columns.setdefault(name, ("s", []))[1].append(took)
    return Growth(
        "maps of one program; times for all of them",
        "maps",
        _MAPS,
        columns,
        "load and read are linear above a constant of one round to the worker; attach is constant",
    )


def _use_maps(elf: bytes) -> dict[str, float]:
    """Load, attach, read: medians."""
    took: dict[str, list[float]] = {"load": [], "attach": [], "read": []}
    with create_os_abstraction() as os_:
        # One stays: to attach where the last one has just left is to wait for a grace period.
        os_.attach_ebpf_monitor(os_.load_ebpf_program(elf), _RARE)
        for _ in range(_TRIES):
            begin = time.perf_counter()
            handle = os_.load_ebpf_program(elf)
            loaded = time.perf_counter()
            os_.attach_ebpf_monitor(handle, _RARE)
            attached = time.perf_counter()
            os_.read_ebpf_metrics(handle)
            took["read"].append(time.perf_counter() - attached)
            took["attach"].append(attached - loaded)
            took["load"].append(loaded - begin)
            os_.unload_ebpf_program(handle)
    return {name: statistics.median(each) for name, each in took.items()}


def grow_entries() -> Growth:
    """A hash of 8-byte keys and values, read whole."""
    times: list[float | None] = []
    for number in _ENTRIES:
        say(f"growth: {number} entries")
        spec = _hash_spec(number, 8)
        fd = create_map(spec)
        try:
            _fill(spec, fd, number)
            typed = TypedMap(spec, fd)
            times.append(statistics.median(seconds(typed.entries) for _ in range(_TRIES)))
        finally:
            os.close(fd)
    each = [took / number for took, number in zip(times, _ENTRIES, strict=True) if took]
    return Growth(
        "entries of one hash, read whole as Python values",
        "entries",
        _ENTRIES,
        {"read": ("s", times), "for each": ("s", each)},
        "linear; section maps has the columns and the other kinds",
    )


def try_large() -> Growth:
    """One map of a gigabyte: 1,000,000 places for values of 1,000 bytes, a tenth of them taken."""
    say("growth: one map of 1 GB")
    spec, filled = _hash_spec(1_000_000, 1000), 100_000
    figures: dict[str, tuple[float, float]] = {}
    made: list[int] = []
    figures["make"] = _weigh(lambda: made.append(create_map(spec)))
    try:
        figures["fill"] = _weigh(lambda: _fill(spec, made[0], filled))
        typed = TypedMap(spec, made[0])
        figures["read 1,000"] = _weigh(lambda: typed.entries(1_000))
        figures["read all"] = _weigh(typed.entries)
    finally:
        figures["free"] = _weigh(lambda: os.close(made[0]))
    columns: dict[str, tuple[str, list[float | None]]] = {}
    for name, (took, memory) in figures.items():
        columns[name] = ("s", [took])
        columns[f"{name}: memory"] = ("MiB", [memory])
    return Growth(
        "one hash of 1 GB in the kernel, 100,000 entries of 1,000 bytes in it",
        "places",
        (spec.max_entries,),
        columns,
        "memory: the most that our process grew by; what is read counts, not the room in the map",
    )


_U64 = {"kind": "int", "name": "unsigned long", "size": 8, "signed": False}


def _hash_spec(entries: int, value_size: int) -> MapSpec:
    """A hash of 8-byte keys; its values begin with a number."""
    member = {"name": "packets", "type": _U64, "offset": 0}
    value = {"kind": "struct", "name": "value", "size": value_size, "members": [member]}
    return MapSpec("large", _HASH, 8, value_size, entries, 0, _U64, value)


def _fill(spec: MapSpec, fd: int, entries: int) -> None:
    """Keys 0, 1, ... by BPF_MAP_UPDATE_BATCH, since Linux 5.6."""
    for begin in range(0, entries, _BATCH):
        count = min(_BATCH, entries - begin)
        keys = struct.pack(f"={count}Q", *range(begin, begin + count))
        values = bytes(spec.value_size * count)
        taken = ct.c_uint32(count)
        check(libbpf().bpf_map_update_batch(fd, keys, values, ct.byref(taken), None))


def _weigh(action: Callable[[], object]) -> tuple[float, float]:
    """Seconds, and by how many MiB this process grew at most: VmHWM, set back by clear_refs."""
    Path("/proc/self/clear_refs").write_text("5")
    before = _peak()
    took = seconds(action)
    return took, (_peak() - before) / 1024


def _peak() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0])
