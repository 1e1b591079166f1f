"""Reading maps in batches and one by one, against what was written and what bpftool sees."""

from __future__ import annotations

import ctypes as ct
import json
import os
import random
import resource
import shutil
import struct
import subprocess
import threading
from pathlib import Path

import pytest

from hypermesh_ebpf.bpf import map_reader, maps
from hypermesh_ebpf.bpf.libbpf import check, libbpf, possible_cpus
from hypermesh_ebpf.bpf.maps import Map
from hypermesh_ebpf.bpf.programs import create_map
from hypermesh_ebpf.bpf.spec import MapSpec
from hypermesh_ebpf.errors import LoadError, MapError, Unsupported
from tests.compiler import map_id, new_map

vm_too = pytest.mark.vm_too  # on the rest, an emulated machine would spend minutes
U32, U64 = "unsigned int", "unsigned long long"
THREE = ["three", [["a", U32], ["b", U32], ["c", U32]], "struct_packed"]
TYPES = {
    "hash": maps.HASH,
    "lru_hash": maps.LRU_HASH,
    "percpu_hash": maps.PERCPU_HASH,
    "lru_percpu_hash": maps.LRU_PERCPU_HASH,
    "array": maps.ARRAY,
    "percpu_array": maps.PERCPU_ARRAY,
}
ARRAYS = ("array", "percpu_array")
needs_bpftool = pytest.mark.skipif(not shutil.which("bpftool"), reason="needs bpftool")


def spec(kind: str, entries: int, value: object = U64, size: int = 8) -> MapSpec:
    return MapSpec("hm_test", TYPES[kind], 4, size, entries, 0, U32, value)


def put(map_: Map, key: int, *values: bytes) -> None:
    """Write an entry past the code under test: one value for each CPU, or the only one."""
    raw = b"".join(value.ljust(-(-len(value) // 8) * 8, b"\0") for value in values)
    if len(values) == 1:
        raw = values[0].ljust(8, b"\0")
    check(libbpf().bpf_map_update_elem(map_.fd, struct.pack("=I", key), raw, 0))


def fill(map_: Map, kind: str, count: int) -> dict[int, int]:
    """Entries 0 to ``count``, each with another value on every CPU; what they add up to."""
    sums = {}
    for key in range(count):
        values = [key * 1000 + cpu for cpu in range(possible_cpus() if "percpu" in kind else 1)]
        put(map_, key, *(struct.pack("=Q", value) for value in values))
        sums[key] = sum(values)
    return sums


def singly(map_: Map) -> Map:
    """The same map, read as on a kernel without batches (before Linux 5.6)."""
    other = Map(map_.spec, map_.fd)
    other.reader.batched = False
    return other


def dump(map_: Map) -> dict[int, int]:
    """What bpftool, which reads key by key, sees: values of all CPUs added up."""
    argv = ["bpftool", "-j", "map", "dump", "id", str(map_id(map_.fd))]
    found = json.loads(subprocess.run(argv, capture_output=True, check=True, timeout=300).stdout)

    def number(octets: list[str]) -> int:
        return int.from_bytes(bytes(int(octet, 16) for octet in octets), "little")

    return {
        number(entry["key"]): sum(number(v["value"]) for v in entry["values"])
        if "values" in entry
        else number(entry["value"])
        for entry in found
    }


@pytest.mark.parametrize(
    "count", [0, 1, pytest.param(211, marks=vm_too), 4096, pytest.param(9973, marks=vm_too)]
)
@pytest.mark.parametrize("kind", TYPES)
def test_batches_and_single_reads_give_what_was_written(kind: str, count: int) -> None:
    """Several batches, the last one full, partly full or empty."""
    count = max(count, kind in ARRAYS)  # an array is never empty
    # An LRU map throws entries out before it is full.
    room = count if kind in ARRAYS else 4 * max(count, 1024)
    with new_map(spec(kind, room)) as map_:
        expected = fill(map_, kind, count)
        items = map_.items()
        assert map_.reader.batched or kind == "percpu_array"  # which has batches since Linux 5.13
        assert len(items) == len(expected)
        assert dict(items) == expected
        assert dict(singly(map_).items()) == expected


@needs_bpftool
@vm_too
@pytest.mark.parametrize("kind", TYPES)
def test_bpftool_sees_the_same(kind: str) -> None:
    with new_map(spec(kind, 4096)) as map_:
        fill(map_, kind, 211)
        assert dump(map_) == dict(map_.items())


@pytest.mark.parametrize("kind", ["hash", "percpu_hash"])
def test_full_map(kind: str) -> None:
    with new_map(spec(kind, 4099)) as map_:
        expected = fill(map_, kind, 4099)
        assert dict(map_.items()) == dict(singly(map_).items()) == expected


@vm_too
@pytest.mark.parametrize("room", [1, 2, 7])
@pytest.mark.parametrize("kind", ["hash", "percpu_hash", "lru_hash"])
def test_bucket_that_does_not_fit_makes_the_batch_wider(
    kind: str, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys that share a hash bucket come together or not at all: ENOSPC, and nothing is lost."""
    monkeypatch.setattr(map_reader, "_CHUNK", room)
    # An LRU map that is nearly full evicts: each CPU keeps free entries of its own.
    with new_map(spec(kind, 4096 if kind == "lru_hash" else 1024)) as map_:
        expected = fill(map_, kind, 1000)
        items = map_.items()
        assert map_.reader.batched
        assert len(items) == 1000
        assert dict(items) == expected


@vm_too
@pytest.mark.parametrize("size", [1, 2, 3, 4, 6, 12, 20, 24])
@pytest.mark.parametrize("kind", ["percpu_hash", "percpu_array"])
def test_per_cpu_values_of_any_size(kind: str, size: int) -> None:
    """Every CPU's value is found, whatever the size: the kernel keeps them 8-byte aligned."""
    member = "unsigned char" if size % 2 else "unsigned short"
    width = 1 if size % 2 else 2
    value = ["v", [["m", member, [size // width]]], "struct_packed"]
    with new_map(spec(kind, 5, value, size)) as map_:
        for key in range(5):
            numbers = [
                [key + cpu + i for i in range(size // width)] for cpu in range(possible_cpus())
            ]
            put(map_, key, *(b"".join(n.to_bytes(width, "little") for n in row) for row in numbers))
        expected = {
            key: tuple(
                sum(key + cpu + i for cpu in range(possible_cpus())) for i in range(size // width)
            )
            for key in range(5)
        }
        assert {key: found.m for key, found in map_.items()} == expected
        assert {key: found.m for key, found in singly(map_).items()} == expected


@vm_too
def test_possible_cpus_are_those_of_sysfs() -> None:
    count = 0
    for part in Path("/sys/devices/system/cpu/possible").read_text().strip().split(","):
        first, _, last = part.partition("-")
        count += int(last or first) - int(first) + 1
    assert possible_cpus() == count


@pytest.mark.parametrize("single", [False, True], ids=["batched", "singly"])
@pytest.mark.parametrize("kind", ["hash", "percpu_hash"])
def test_map_that_changes_meanwhile(kind: str, single: bool) -> None:
    """What is there all the time is read once, in full; what comes and goes does no harm."""
    stable, moving = range(300), range(300, 900)
    with new_map(spec(kind, 8192)) as map_:
        expected = fill(map_, kind, len(stable))
        over = threading.Event()

        def change() -> None:
            chance = random.Random(1)
            while not over.is_set():
                key = struct.pack("=I", chance.choice(moving))
                raw = struct.pack("=Q", 1) * (possible_cpus() if kind == "percpu_hash" else 1)
                libbpf().bpf_map_update_elem(map_.fd, key, raw, 0)
                key = struct.pack("=I", chance.choice(moving))
                _LIBBPF.bpf_map_delete_elem(map_.fd, key)

        thread = threading.Thread(target=change)
        thread.start()
        try:
            for _ in range(10 if single else 50):
                items = (singly(map_) if single else map_).items()
                assert len(dict(items)) == len(items), "no key comes twice"
                seen = dict(items)
                assert set(seen) <= {*stable, *moving}
                if not single:  # a walk from key to key may lose its way where keys are deleted
                    assert {key: seen.get(key) for key in stable} == expected
        finally:
            over.set()
            thread.join()


_LIBBPF = ct.CDLL("libbpf.so.1")


@pytest.mark.parametrize("single", [False, True], ids=["batched", "singly"])
@pytest.mark.parametrize("kind", TYPES)
def test_descriptor_that_is_no_map_is_an_error(kind: str, single: bool) -> None:
    null = os.open("/dev/null", os.O_RDONLY)
    try:
        map_ = Map(spec(kind, 16), null)
        with pytest.raises(MapError, match=r"read map hm_test: .*\(EINVAL\)") as caught:
            (singly(map_) if single else map_).items()
        assert caught.value.remedy
    finally:
        os.close(null)
    with pytest.raises(MapError, match=r"read map hm_test: Bad file descriptor \(EBADF\)"):
        (singly(map_) if single else map_).items()


def test_no_room_for_another_descriptor() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.dup(0)
    os.close(lowest_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, hard))
    try:
        with pytest.raises(LoadError, match=r"make map hm_test: .*\(EMFILE\)") as caught:
            create_map(spec("hash", 16))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert "ulimit -n" in str(caught.value.remedy)


@pytest.mark.parametrize("entries", [0, 1 << 31])
def test_map_that_the_kernel_does_not_make(entries: int) -> None:
    with pytest.raises((Unsupported, LoadError), match=r"make map hm_test: .*\(E\w+\)") as caught:
        create_map(spec("hash", entries))
    assert caught.value.remedy


@vm_too
def test_write_sets_an_entry_of_an_array() -> None:
    with new_map(spec("array", 4, THREE, 12)) as map_:
        map_.write(2, struct.pack("=III", 1, 2, 3))
        assert [value for _key, value in map_.items()] == [(0,) * 3, (0,) * 3, (1, 2, 3), (0,) * 3]
        with pytest.raises(ValueError, match="11 bytes, not 12"):
            map_.write(2, bytes(11))
        with pytest.raises(MapError, match=r"write map hm_test: .*\(E2BIG\)"):
            map_.write(4, bytes(12))
