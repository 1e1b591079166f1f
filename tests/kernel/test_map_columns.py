"""Columns and rows of real maps, against what was written and single look-ups of every CPU."""

from __future__ import annotations

import ctypes as ct
import os
import random
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import pytest

from hypermesh_ebpf.bpf import map_reader, map_types
from hypermesh_ebpf.bpf.libbpf import check, libbpf, possible_cpus
from hypermesh_ebpf.bpf.maps import Map, TypedMap
from hypermesh_ebpf.bpf.programs import create_map
from hypermesh_ebpf.bpf.spec import MapSpec
from hypermesh_ebpf.errors import MapError
from hypermesh_ebpf.program_view import make_view

pytest.importorskip("numpy")

PAIR = ["pair", [["packets", "unsigned long long"], ["bytes", "unsigned long long"]], "struct"]
U32, U64 = "unsigned int", "unsigned long long"
KEY = ["key", [["pid", U32], ["comm", "char", [8]]], "struct_packed"]
VALUE = ["v", [["calls", U64], ["errors", U32], ["slots", U32, [3]]], "struct_packed"]
KINDS = {
    "hash": map_types.HASH,
    "percpu_hash": map_types.PERCPU_HASH,
    "lru_percpu_hash": map_types.LRU_PERCPU_HASH,
}


@contextmanager
def made(spec: MapSpec) -> Iterator[int]:
    fd = create_map(spec)
    try:
        yield fd
    finally:
        os.close(fd)


def spec(kind: str, entries: int) -> MapSpec:
    return MapSpec("hm_columns", KINDS[kind], 12, 24, entries, 0, KEY, VALUE)


def key_of(number: int) -> bytes:
    return struct.pack("=I8s", number, f"p{number}".encode())


def put(fd: int, kind: str, number: int) -> None:
    """One entry, with other numbers for each CPU."""
    cpus = possible_cpus() if "percpu" in kind else 1
    raw = b"".join(
        struct.pack("=QIIII", number << 20 | cpu, cpu, number, 7, 0xFFFFFFFF) for cpu in range(cpus)
    )
    check(libbpf().bpf_map_update_elem(fd, key_of(number), raw, 0))


def look_up(fd: int, kind: str, number: int) -> tuple[int, int, list[int]]:
    """What single look-ups find, added up by Python."""
    cpus = possible_cpus() if "percpu" in kind else 1
    raw = ct.create_string_buffer(24 * cpus)
    check(libbpf().bpf_map_lookup_elem(fd, key_of(number), raw))
    each = list(struct.iter_unpack("=QIIII", raw.raw))
    calls, errors, *slots = (sum(column) for column in zip(*each, strict=True))
    return calls, errors, slots


@pytest.mark.parametrize("chunk", [1, 7, 1 << 18], ids=["entry", "few", "default"])
@pytest.mark.parametrize("kind", KINDS)
def test_columns_are_what_single_look_ups_find(
    kind: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the map is read in many parts, and the memory they are in has to grow."""
    monkeypatch.setattr(map_reader, "_CHUNK_BYTES", chunk * 100)
    monkeypatch.setattr(map_reader, "_SMALL", 1 << 16 if chunk == 7 else 256)
    wanted = spec(kind, 4096)
    with made(wanted) as fd:
        for number in range(499):
            put(fd, kind, number)
        typed, plain = TypedMap(wanted, fd), Map(wanted, fd)
        found = typed.columns()
        assert len(found) == 499
        assert sorted(found.keys["pid"].tolist()) == list(range(499))
        for place, number in enumerate(found.keys["pid"].tolist()):
            assert found.keys["comm"][place] == f"p{number}".encode()
            calls, errors, slots = look_up(fd, kind, number)
            assert found.values["calls"][place] == calls
            assert found.values["errors"][place] == errors
            assert found.values["slots"][place].tolist() == slots
        other = plain.columns()
        assert other.values["calls"].tolist() == found.values["calls"].tolist()
        expected = {number: look_up(fd, kind, number) for number in range(499)}
        assert {
            pid: (calls, errors, slots) for pid, _comm, calls, errors, *slots in plain.rows()
        } == expected
        entries = plain.entries()
        pids = entries.keys("pid")
        assert dict(zip(pids, entries.values("calls"), strict=True)) == {
            number: calls for number, (calls, *_rest) in expected.items()
        }
        assert list(entries.items()) == plain.items()
        assert list(entries.select([3, 0, 498]).items()) == [plain.items()[n] for n in (3, 0, 498)]
        assert {
            key["pid"]: (value["calls"], value["errors"], value["slots"])
            for key, value in typed.entries()
        } == expected


@pytest.mark.parametrize("kind", KINDS)
def test_empty_map(kind: str) -> None:
    with made(spec(kind, 16)) as fd:
        found = TypedMap(spec(kind, 16), fd).columns()
        assert len(found) == 0
        assert found.values["slots"].shape == (0, 3)
        assert list(Map(spec(kind, 16), fd).rows()) == []


def test_array_and_trie() -> None:
    array = MapSpec("hm_array", map_types.PERCPU_ARRAY, 4, 8, 5, 0, U32, U64)
    with made(array) as fd:
        for index in range(5):
            raw = struct.pack("=Q", index + 1) * possible_cpus()
            check(libbpf().bpf_map_update_elem(fd, struct.pack("=I", index), raw, 0))
        found = TypedMap(array, fd).columns()
        assert found.keys["key"].tolist() == [0, 1, 2, 3, 4]
        assert found.values["value"].tolist() == [(n + 1) * possible_cpus() for n in range(5)]
    trie = MapSpec("hm_trie", map_types.LPM_TRIE, 8, 8, 16, 1, None, U64)
    with made(trie) as fd:
        for length, address in ((8, b"\x0a\0\0\0"), (16, b"\x0a\x01\0\0")):
            key = struct.pack("=I4s", length, address)
            check(libbpf().bpf_map_update_elem(fd, key, struct.pack("=Q", length), 0))
        found = TypedMap(trie, fd).columns()
        assert sorted(found.keys["prefixlen"].tolist()) == [8, 16]
        assert found.keys["data"].shape == (2, 4)
        assert found.values["value"].tolist() == found.keys["prefixlen"].tolist()


@pytest.mark.parametrize("kind", ["hash", "percpu_hash"])
def test_map_that_grows_and_shrinks_meanwhile(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys and values stay together, and what is there all the time is never missed."""
    monkeypatch.setattr(map_reader, "_CHUNK_BYTES", 2000)
    wanted = spec(kind, 8192)
    with made(wanted) as fd:
        for number in range(300):
            put(fd, kind, number)
        over = threading.Event()

        def change() -> None:
            chance = random.Random(1)
            while not over.is_set():
                put(fd, kind, chance.randrange(300, 3000))
                libbpf().bpf_map_delete_elem(fd, key_of(chance.randrange(300, 3000)))

        thread = threading.Thread(target=change)
        thread.start()
        try:
            for _ in range(30):
                found = TypedMap(wanted, fd).columns()
                pids = found.keys["pid"].tolist()
                assert len(set(pids)) == len(pids)
                assert set(range(300)) <= set(pids)
                numbers = found.values["slots"][:, 0].tolist()
                cpus = possible_cpus() if kind == "percpu_hash" else 1
                assert numbers == [cpus * pid for pid in pids]
        finally:
            over.set()
            thread.join()


def test_map_without_entries_to_read_is_an_error() -> None:
    queue = MapSpec("hm_queue", map_types.QUEUE, 0, 4, 4, 0, None, U32)
    with made(queue) as fd, pytest.raises(MapError, match=r"read map hm_queue: reading an element"):
        TypedMap(queue, fd).columns()


def set_(fd: int, index: int, value: bytes) -> None:
    check(libbpf().bpf_map_update_elem(fd, struct.pack("=I", index), value, 0))


def test_tables_show_what_is_set_in_an_array_with_rates() -> None:
    """Through a refresh and another: rows come, count and go back to nothing."""
    wanted = MapSpec("hm_array", map_types.ARRAY, 4, 16, 1000, 0, U32, PAIR)
    with made(wanted) as fd:
        set_(fd, 7, struct.pack("=QQ", 5, 50))
        _monitor, collector = make_view([(wanted, fd)], "prog.c")
        set_(fd, 7, struct.pack("=QQ", 8, 50))
        set_(fd, 999, struct.pack("=QQ", 0, 3))
        (table,) = collector.collect().tables
        assert table.zeros == 998
        assert [(row["key"], row["value"]) for row in table.rows] == [
            (7, {"packets": 8, "bytes": 50}),
            (999, {"packets": 0, "bytes": 3}),
        ]
        assert set(table.rows[0]) == {"map", "key", "value", "value_per_s"}
        first, second = (cast(Any, row["value_per_s"]) for row in table.rows)
        assert first["packets"] > 0
        assert first["bytes"] == 0
        assert second["bytes"] > 0
        set_(fd, 7, bytes(16))
        reading = collector.collect()
        assert reading.tables[0].zeros == 999
        assert [row["key"] for row in reading.rows] == [999]


def test_an_enum_whose_zero_has_a_name_is_set() -> None:
    color = {"kind": "enum", "name": "c", "size": 4, "signed": False, "values": {"RED": 0}}
    wanted = MapSpec("hm_array", map_types.ARRAY, 4, 4, 3, 0, None, color)
    with made(wanted) as fd:
        set_(fd, 1, struct.pack("=I", 6))
        _monitor, collector = make_view([(wanted, fd)], "prog.c")
        assert [row["value"] for row in collector.collect().rows] == ["RED", 6, "RED"]


_MEMORY = """
import resource, struct, sys
from hypermesh_ebpf.bpf.maps import Map
from hypermesh_ebpf.bpf.programs import create_map
from hypermesh_ebpf.bpf.spec import MapSpec
spec = MapSpec("hm_big", 2, 4, 1 << 20, int(sys.argv[1]), 0, "unsigned int", None)
map_ = Map(spec, create_map(spec))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
total = 0
for raw in map_.reader.chunks():
    total += len(raw.values)
print(total, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
raw = map_.reader.read()
print(len(raw.values), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_a_large_map_is_held_once_or_a_part_at_a_time() -> None:
    """64 MB: by parts two of its entries at most, whole no more than it has."""
    run = [sys.executable, "-c", _MEMORY, "64"]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(run, capture_output=True, text=True, check=True, env=env)
    (parts, parts_kib), (whole, whole_kib) = (
        map(int, line.split()) for line in done.stdout.splitlines()
    )
    assert parts == whole == 64 << 20
    assert parts_kib < 4 << 10
    assert whole_kib < 72 << 10


def test_many_rows_leave_the_garbage_collector_as_it_was() -> None:
    import gc

    with made(spec("hash", 4096)) as fd:
        for number in range(2000):
            put(fd, "hash", number)
        map_ = Map(spec("hash", 4096), fd)
        for state in (True, False):
            (gc.enable if state else gc.disable)()
            try:
                assert len(map_.items()) == 2000
                assert gc.isenabled() is state
            finally:
                gc.enable()
    with pytest.raises(MapError):
        map_.items()
    assert gc.isenabled()
