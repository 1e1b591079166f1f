"""Every type of map with its types, against what was written and what bpftool shows."""

from __future__ import annotations

import ctypes as ct
import json
import os
import random
import shutil
import socket
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from hypermesh_ebpf.bpf import map_types
from hypermesh_ebpf.bpf.libbpf import MapCreateOpts, check, libbpf, possible_cpus
from hypermesh_ebpf.bpf.maps import TypedMap, read_map_spec, read_numbers
from hypermesh_ebpf.bpf.programs import create_map
from hypermesh_ebpf.bpf.spec import MapSpec
from hypermesh_ebpf.errors import HmebpfError, MapError
from tests.compiler import compile_text, loaded, map_id, run_in_this_task, run_program
from tests.programs import load_program, program_id

vm_wide = pytest.mark.vm_wide
needs_bpftool = pytest.mark.skipif(not shutil.which("bpftool"), reason="needs bpftool")
U32, U64 = "unsigned int", "unsigned long long"
PAIR = ["pair", [["packets", U64], ["bytes", U64]], "struct_packed"]
NO_PREALLOC = 1


def spec(
    kind: int,
    entries: int = 16,
    key: Any = U32,
    value: Any = U64,
    *,
    key_size: int = 4,
    value_size: int = 8,
    flags: int = 0,
    name: str = "hm_test",
) -> MapSpec:
    return MapSpec(name, kind, key_size, value_size, entries, flags, key, value)


@contextmanager
def typed(wanted: MapSpec, inner_fd: int = 0) -> Iterator[TypedMap]:
    """A map made for a test; skips where this kernel does not make it."""
    try:
        fd = create_map(wanted, inner_fd)
    except HmebpfError as error:
        pytest.skip(f"this kernel does not make it: {error}")
    try:
        yield TypedMap(wanted, fd)
    finally:
        os.close(fd)


def put(map_: TypedMap, key: bytes, value: bytes) -> None:
    check(libbpf().bpf_map_update_elem(map_.fd, key, value, 0))


def u32(*numbers: int) -> bytes:
    return struct.pack(f"={len(numbers)}I", *numbers)


def u64(*numbers: int) -> bytes:
    return struct.pack(f"={len(numbers)}Q", *numbers)


KEYED = {
    "hash": map_types.HASH,
    "lru_hash": map_types.LRU_HASH,
    "percpu_hash": map_types.PERCPU_HASH,
    "lru_percpu_hash": map_types.LRU_PERCPU_HASH,
    "array": map_types.ARRAY,
    "percpu_array": map_types.PERCPU_ARRAY,
}


@vm_wide
@pytest.mark.parametrize("kind", KEYED)
def test_structures_and_sums(kind: str) -> None:
    with typed(spec(KEYED[kind], 7, value=PAIR, value_size=16)) as map_:
        copies = possible_cpus() if "percpu" in kind else 1
        for key in range(7):
            put(map_, u32(key), b"".join(u64(key + cpu, 1 << 40) for cpu in range(copies)))
        extra = sum(range(copies))
        assert sorted(map_.entries(), key=lambda entry: int(entry[0])) == [
            (key, {"packets": key * copies + extra, "bytes": copies << 40}) for key in range(7)
        ]
        assert map_.readable and map_.reason is None and map_.left_out == 0
        assert map_.numbers()["hm_test.3.packets"] == 3 * copies + extra


@vm_wide
@pytest.mark.parametrize("kind", ["percpu_hash", "percpu_array"])
def test_what_cannot_be_added_is_told_for_every_cpu(kind: str) -> None:
    value = ["v", [["hits", U32], ["who", "char", [8]]], "struct_packed"]
    with typed(spec(KEYED[kind], 1, value=value, value_size=12)) as map_:
        cpus = possible_cpus()
        each = [struct.pack("=I8s4x", cpu + 1, f"cpu{cpu}".encode()) for cpu in range(cpus)]
        put(map_, u32(0), b"".join(each))
        ((_key, found),) = map_.entries()
        assert found["hits"] == cpus * (cpus + 1) // 2
        names = [f"cpu{cpu}" for cpu in range(cpus)]
        assert found["who"] == (names if cpus > 1 else "cpu0")


@vm_wide
def test_lpm_trie() -> None:
    key = ["key", [["prefixlen", U32], ["address", "unsigned char", [4]]], "struct_packed"]
    wanted = spec(map_types.LPM_TRIE, key=key, key_size=8, flags=NO_PREALLOC)
    with typed(wanted) as map_:
        networks = {"10.0.0.0": 8, "192.168.1.0": 24, "0.0.0.0": 0}
        for n, (address, length) in enumerate(networks.items()):
            put(map_, u32(length) + socket.inet_aton(address), u64(n))
        found = {
            (".".join(map(str, key["address"])), key["prefixlen"]): value
            for key, value in map_.entries()
        }
        assert found == {("10.0.0.0", 8): 0, ("192.168.1.0", 24): 1, ("0.0.0.0", 0): 2}
        assert map_.numbers()["hm_test.prefixlen=24,address=192:168:1:0"] == 1
        unknown = TypedMap(spec(map_types.LPM_TRIE, key=None, key_size=8), map_.fd)
        assert ({"prefixlen": 8, "data": [10, 0, 0, 0]}, 0) in unknown.entries()


@vm_wide
def test_maps_of_maps_show_ids() -> None:
    with typed(spec(map_types.HASH)) as inner:
        number = map_id(inner.fd)
        for kind in (map_types.ARRAY_OF_MAPS, map_types.HASH_OF_MAPS):
            with typed(spec(kind, value=U32, value_size=4), inner.fd) as map_:
                put(map_, u32(3), u32(inner.fd))
                assert map_.entries() == [(3, number)]
                assert (map_.refers_to, map_.readable, map_.numbers()) == ("map", True, {})


@vm_wide
def test_program_array_shows_ids() -> None:
    program = load_program()
    try:
        with typed(spec(map_types.PROG_ARRAY, value=U32, value_size=4)) as map_:
            put(map_, u32(5), u32(program))
            assert map_.entries() == [(5, program_id(program))]
            assert (map_.refers_to, map_.numbers()) == ("program", {})
    finally:
        os.close(program)


WRITER = """
enum hm_color { RED = 1, GREEN, BLUE };
struct inner { u8 x; u32 y; };
struct written {
	u32 a : 3; u32 b : 7; u64 c : 40; u8 d : 1; s32 e : 5; u16 f; u8 g : 6; enum hm_color h : 3;
	struct inner in[2]; union { u32 v4; u8 bytes[4]; }; char comm[6]; double *p; bool last;
};
BPF_ARRAY(result, struct written, 1);

int produce(struct xdp_md *ctx)
{
	u32 zero = 0;
	struct written *w = result.lookup(&zero);
	if (!w)
		return XDP_ABORTED;
	w->a = 5; w->b = 100; w->c = 0x123456789aULL; w->d = 1; w->e = -3; w->f = 300; w->g = 33;
	w->h = BLUE; w->in[0].x = 1; w->in[0].y = 2; w->in[1].x = 3; w->in[1].y = 4;
	w->v4 = 0x0100007f; w->comm[0] = 'h'; w->comm[1] = 'i'; w->p = (double *)ctx; w->last = true;
	return XDP_PASS;
}
"""


@vm_wide
def test_what_a_program_of_bcc_writes_is_read() -> None:
    """By BCC's own description: bit fields of several types, a union and a structure in it."""
    with loaded(compile_text(WRITER)) as programs:
        assert run_program(programs.programs["produce"]) == 2
        result = programs.maps["result"]
        ((_zero, found),) = TypedMap(result.spec, result.fd).entries()
    assert found.pop("p") > 1 << 40, "a pointer is a number to BCC"
    assert found == {
        "a": 5,
        "b": 100,
        "c": 0x123456789A,
        "d": 1,
        "e": -3,
        "f": 300,
        "g": 33,
        "h": 3,
        "in": [{"x": 1, "y": 2}, {"x": 3, "y": 4}],
        "v4": 0x0100007F,
        "bytes": [127, 0, 0, 1],
        "comm": "hi",
        "last": True,
    }


TRACE = """
BPF_STACK_TRACE(stacks, 16);
BPF_ARRAY(result, s64, 1);

int trace(void *ctx)
{
	u32 zero = 0;
	s64 *found = result.lookup(&zero);
	if (found)
		*found = stacks.get_stackid(ctx, 0);
	return 0;
}
"""


@vm_wide
def test_stack_traces_end_with_their_last_address() -> None:
    with loaded(compile_text(TRACE), "raw_tracepoint") as programs:
        run_in_this_task(programs.programs["trace"])
        ((_zero, number),) = programs.maps["result"].items()
        stacks = programs.maps["stacks"]
        map_ = TypedMap(stacks.spec, stacks.fd)
        ((key, frames),) = map_.entries()
        assert key == number >= 0
        raw = ct.create_string_buffer(stacks.spec.value_size)
        check(libbpf().bpf_map_lookup_elem(stacks.fd, u32(key), raw))
        assert map_.numbers() == {}
    addresses = [address for (address,) in struct.iter_unpack("=Q", raw.raw) if address]
    assert len(addresses) > 2
    assert frames == [f"{address:#x}" for address in addresses]


BUILD_IDS = """
BPF_STACK_TRACE_BUILDID(stacks, 16);

int trace(void *ctx)
{
	stacks.get_stackid(ctx, BPF_F_USER_STACK);
	return 0;
}
"""


@vm_wide
def test_stack_traces_by_build_id() -> None:
    """User space's: each frame is a file's build id and an offset, or an address."""
    with loaded(compile_text(BUILD_IDS), "raw_tracepoint") as programs:
        run_in_this_task(programs.programs["trace"])
        stacks = programs.maps["stacks"]
        ((key, frames),) = TypedMap(stacks.spec, stacks.fd).entries()
        raw = ct.create_string_buffer(stacks.spec.value_size)
        check(libbpf().bpf_map_lookup_elem(stacks.fd, u32(key), raw))
    # struct bpf_stack_build_id; status 0 is the end
    expected = [each for each in struct.iter_unpack("=I20sQ", raw.raw) if each[0]]
    assert expected
    assert [
        (frame["status"], bytes(frame["build_id"]), frame["offset"]) for frame in frames
    ] == expected


@vm_wide
def test_cgroup_storage() -> None:
    """Filled by programs that are attached to cgroups: here, empty, but it can be read."""
    for kind in (map_types.CGROUP_STORAGE, map_types.PERCPU_CGROUP_STORAGE):
        for key_size in (8, 16):
            with typed(spec(kind, 0, None, key_size=key_size)) as map_:
                assert (map_.readable, map_.entries(), map_.left_out) == (True, [], 0)
                assert map_.key.decode(u64(7, 1)) == (
                    7 if key_size == 8 else {"cgroup": 7, "attach_type": 1}
                )


@vm_wide
def test_sockets_show_cookies() -> None:
    with socket.socket() as server, socket.socket() as client:
        server.bind(("127.0.0.1", 0))
        server.listen()
        client.connect(server.getsockname())
        cookie = struct.unpack("=Q", client.getsockopt(socket.SOL_SOCKET, 57, 8))[0]  # SO_COOKIE
        for kind in (map_types.SOCKMAP, map_types.SOCKHASH):
            with typed(spec(kind)) as map_:
                put(map_, u32(2), u64(client.fileno()))
                assert map_.entries() == [(2, cookie)]
                assert (map_.refers_to, map_.numbers()) == ("socket", {})
            with typed(spec(kind, value=U32, value_size=4)) as map_:  # made for descriptors alone
                put(map_, u32(2), u32(client.fileno()))
                with pytest.raises(MapError, match=r"read map hm_test: .*\(ENOSPC\)"):
                    map_.entries()


@vm_wide
def test_devices_and_cpus() -> None:
    index = socket.if_nametoindex("lo")
    for kind in (map_types.DEVMAP, map_types.DEVMAP_HASH):
        with typed(spec(kind, value=None)) as map_:
            put(map_, u32(4), u32(index, 0))
            assert map_.entries() == [(4, {"ifindex": index, "program": 0})]
        with typed(spec(kind, value=None, value_size=4)) as map_:
            put(map_, u32(4), u32(index))
            assert map_.entries() == [(4, index)]
    with typed(spec(map_types.CPUMAP, 1, value=None)) as map_:
        put(map_, u32(0), u32(192, 0))
        assert map_.entries() == [(0, {"queue_size": 192, "program": 0})]


UNREADABLE = {
    "ringbuf": (map_types.RINGBUF, 0, 0, 4096),
    "perf_event_array": (map_types.PERF_EVENT_ARRAY, 4, 4, 1),
    "user_ringbuf": (map_types.USER_RINGBUF, 0, 0, 4096),
    "queue": (map_types.QUEUE, 0, 8, 4),
    "stack": (map_types.STACK, 0, 8, 4),
    "bloom_filter": (map_types.BLOOM_FILTER, 0, 8, 4),
    "cgroup_array": (map_types.CGROUP_ARRAY, 4, 4, 4),
    "xskmap": (map_types.XSKMAP, 4, 4, 4),
    "sk_storage": (map_types.SK_STORAGE, 4, 8, 0),
    "inode_storage": (map_types.INODE_STORAGE, 4, 8, 0),
    "task_storage": (map_types.TASK_STORAGE, 4, 8, 0),
    "cgrp_storage": (map_types.CGRP_STORAGE, 4, 8, 0),
}


@vm_wide
@pytest.mark.parametrize("name", UNREADABLE)
def test_what_has_no_entries_to_show_says_why(name: str) -> None:
    kind, key_size, value_size, entries = UNREADABLE[name]
    flags = NO_PREALLOC if name.endswith("_storage") else 0
    wanted = spec(kind, entries, key_size=key_size, value_size=value_size, flags=flags)
    with typed(wanted) as map_:
        assert not map_.readable
        assert map_.reason and map_.reason[0].islower() and not map_.reason.endswith(".")
        assert (map_.entries(), map_.numbers(), map_.left_out) == ([], {}, 0)
        if kind in (map_types.QUEUE, map_types.STACK):
            check(libbpf().bpf_map_update_elem(map_.fd, None, u64(7), 0))
            assert map_.entries() == []
            value = ct.create_string_buffer(8)
            check(libbpf().bpf_map_lookup_elem(map_.fd, None, value))
            assert value.raw == u64(7), "it is still there"


def test_no_type_of_the_kernel_is_forgotten() -> None:
    """bpftool's list: each is read in one of the ways here, or has its reason."""
    assert map_types.UNREADABLE.keys() >= {kind for kind, *_rest in UNREADABLE.values()}
    read = {
        *(*map_types.PER_CPU, *map_types.INDEXED, *map_types.BATCHED, *map_types.REFERS_TO),
        *(map_types.STACK_TRACE, map_types.DEVMAP_HASH, map_types.CGROUP_STORAGE),
    }
    assert not read & map_types.UNREADABLE.keys()
    assert read | map_types.UNREADABLE.keys() == set(range(1, map_types.ARENA + 1))


@vm_wide
@pytest.mark.parametrize("kind", ["array", "percpu_array", "hash", "percpu_hash"])
def test_limit(kind: str) -> None:
    with typed(spec(KEYED[kind], 1000)) as map_:
        for key in range(1000):
            put(map_, u32(key), u64(key) * possible_cpus())
        everything = dict(map_.entries())
        assert map_.left_out == 0
        some = map_.entries(10)
        assert len(dict(some)) == 10
        assert all(everything[key] == value for key, value in some)
        assert map_.left_out == (990 if "array" in kind else None)
        assert len(map_.entries(1000)) == 1000
        assert map_.left_out == 0
        assert len(map_.entries(5000)) == 1000
        assert map_.left_out == 0
        assert map_.entries(0) == []
        map_._reader.batched = False
        assert len(map_.entries(10)) == 10
        assert map_.left_out == (990 if "array" in kind else None)
        assert len(map_.numbers(10)) == 10


@vm_wide
def test_limit_spares_a_huge_array() -> None:
    """Ten million entries, of which not more than asked for are touched."""
    with typed(spec(map_types.ARRAY, 10_000_000)) as map_:
        put(map_, u32(1), u64(99))
        assert map_.entries(3) == [(0, 0), (1, 99), (2, 0)]
        assert map_.left_out == 9_999_997


@vm_wide
def test_large_values_are_read_in_small_batches() -> None:
    """Or 4,096 of them at a time would take 4 GiB."""
    with typed(spec(map_types.HASH, 8000, value=None, value_size=1 << 20, flags=1)) as map_:
        for key in range(3):
            put(map_, u32(key), bytes([key]) * (1 << 20))
        assert dict(map_.entries()) == {key: f"{key:02x}" * (1 << 20) for key in range(3)}


@vm_wide
def test_names_of_numbers() -> None:
    """What metrics are called: by the member alone where a map has but one entry."""
    with (
        typed(spec(map_types.ARRAY, 1, value=PAIR, value_size=16, name="totals")) as totals,
        typed(spec(map_types.PERCPU_ARRAY, 1, name="hits")) as hits,
        typed(spec(map_types.ARRAY, 2, name="counts")) as counts,
        typed(spec(map_types.HASH, 1, ["k", [["pid", U32]], "struct_packed"])) as by_pid,
        typed(spec(map_types.HASH, 1, "char", PAIR, key_size=8, value_size=16)) as by_name,
    ):
        put(totals, u32(0), u64(7, 8))
        put(hits, u32(0), u64(1) * possible_cpus())
        put(by_pid, u32(12), u64(3))
        put(by_name, b"eth0".ljust(8, b"\0"), u64(4, 5))
        assert totals.numbers() == {"packets": 7, "bytes": 8}
        assert hits.numbers() == {"hits": possible_cpus()}
        assert counts.numbers() == {"counts.0": 0, "counts.1": 0}
        assert by_pid.numbers() == {"hm_test.pid=12": 3}
        assert by_name.numbers() == {"hm_test.eth0.packets": 4, "hm_test.eth0.bytes": 5}
        numbers, left_out = read_numbers([totals, hits, counts])
        assert numbers == {**totals.numbers(), **hits.numbers(), **counts.numbers()}
        assert left_out == 0
        assert read_numbers([counts, totals], 1) == ({"counts.0": 0, "packets": 7, "bytes": 8}, 1)


@vm_wide
def test_numbers_of_the_same_name_get_the_maps_in_front() -> None:
    with (
        typed(spec(map_types.ARRAY, 1, value=PAIR, value_size=16, name="sent")) as sent,
        typed(spec(map_types.ARRAY, 1, value=PAIR, value_size=16, name="received")) as received,
    ):
        put(sent, u32(0), u64(7, 8))
        numbers, _left_out = read_numbers([sent, received])
    assert numbers == {
        "sent.packets": 7,
        "sent.bytes": 8,
        "received.packets": 0,
        "received.bytes": 0,
    }


@vm_wide
def test_settings_are_no_metrics() -> None:
    """What the program can only read (.rodata) was set before it ran."""
    with typed(spec(map_types.ARRAY, 1, flags=map_types.RDONLY_PROG)) as map_:
        assert map_.entries() == [(0, 0)]
        assert map_.numbers() == {}


@vm_wide
def test_maps_without_types_are_read_as_bytes() -> None:
    with typed(spec(map_types.HASH, key=None, value=None)) as map_:
        put(map_, u32(1), u64(2))
        assert map_.entries() == [("01000000", "0200000000000000")]
        assert read_map_spec(map_.fd) == spec(map_types.HASH, key=None, value=None)


@vm_wide
def test_descriptor_that_is_no_map() -> None:
    null = os.open("/dev/null", os.O_RDONLY)
    try:
        with pytest.raises(MapError, match=r"read what a map is: .*\(EINVAL\)") as caught:
            read_map_spec(null)
        assert caught.value.remedy
    finally:
        os.close(null)


@vm_wide
def test_global_variables() -> None:
    """.bss as libbpf makes it: an array of one entry, whose type is a section of variables."""
    names = b"\0.bss\0hits\0last\0unsigned int\0"
    types = struct.pack("=IIII", 16, 1 << 24, 4, 32)
    types += struct.pack("=IIII", 6, 14 << 24, 1, 1) + struct.pack("=IIII", 11, 14 << 24, 1, 1)
    types += struct.pack("=III", 1, 15 << 24 | 2, 12) + struct.pack("=IIIIII", 2, 0, 4, 3, 8, 4)
    raw = struct.pack("=HBBIIIII", 0xEB9F, 1, 0, 24, 0, len(types), len(types), len(names))
    raw += types + names
    load = ct.CDLL("libbpf.so.1", use_errno=True).bpf_btf_load
    load.argtypes = [ct.c_char_p, ct.c_size_t, ct.c_void_p]
    btf_fd = check(load(raw, len(raw), None))
    options = MapCreateOpts(sz=ct.sizeof(MapCreateOpts), btf_fd=btf_fd, btf_value_type_id=4)
    fd = check(
        libbpf().bpf_map_create(map_types.ARRAY, b"hm_test.bss", 4, 12, 1, ct.byref(options))
    )
    os.close(btf_fd)
    try:
        map_ = TypedMap(read_map_spec(fd), fd)
        put(map_, u32(0), u32(41, 0, 43))
        assert map_.spec.name == "hm_test.bss"
        assert map_.entries() == [(0, {"hits": 41, "last": 43})]
        assert map_.numbers() == {"hits": 41, "last": 43}
    finally:
        os.close(fd)


# No floats and no signed bit fields: bpftool does not know the former, nor the latter's sign.
SOURCE = """
#include "vmlinux.h"
#include <bpf/bpf_helpers.h>
enum hm_color { RED = 1, GREEN, BLUE };
typedef __u8 hm_mac_t[6];
struct hm_inner { __u8 x; __u32 y; };
struct hm_bits { __u32 a : 3; __u32 b : 7; __u64 c : 40; __u8 d : 1; __u16 e : 5; __u16 f; };
struct hm_key { __u32 a; enum hm_color color; };
struct hm_value {
  __u64 n; char comm[16]; __u8 a4[4]; __u32 m[2][3]; struct hm_inner in[2];
  union { __u32 v4; __u64 v6[2]; } u; void *p; hm_mac_t mac; _Bool b; __s32 i;
  struct { __u16 q, r; }; struct hm_bits bits; unsigned __int128 wide;
};
#define MAP(name, kind, keys, values) \\
  struct { __uint(type, kind); __uint(max_entries, 64); __type(key, keys); \\
    __type(value, values); } name SEC(".maps")
MAP(hashes, BPF_MAP_TYPE_HASH, struct hm_key, struct hm_value);
MAP(per_cpu, BPF_MAP_TYPE_PERCPU_HASH, struct hm_bits, __u64);
MAP(arrays, BPF_MAP_TYPE_ARRAY, __u32, struct hm_bits);
MAP(names, BPF_MAP_TYPE_LRU_HASH, hm_mac_t, enum hm_color);
SEC("xdp") int pass(struct xdp_md *ctx) { return XDP_PASS; }
"""


def normal(shown: Any) -> Any:
    """What bpftool shows, as it should be decoded: it writes some numbers in hexadecimal."""
    if isinstance(shown, dict):
        found: dict[str, Any] = {}
        for name, value in shown.items():
            found.update(normal(value) if name == "" else {name: normal(value)})
        return found
    if isinstance(shown, list):
        return [normal(value) for value in shown]
    return int(shown, 16) if isinstance(shown, str) and shown.startswith("0x") else shown


def numbered(value: Any) -> Any:
    """Decoded values with pointers as bpftool has them: as numbers."""
    if isinstance(value, dict):
        return {name: numbered(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [numbered(inner) for inner in value]
    if isinstance(value, str) and value.startswith("0x"):
        return int(value, 16)
    return value


@needs_bpftool
def test_bpftool_shows_the_same(tmp_path: Path) -> None:
    """Random bytes in maps that clang and libbpf made, through the types that the kernel keeps."""
    from hypermesh_ebpf.image import clang, elf

    if not shutil.which("clang"):
        pytest.skip("needs clang")
    made = clang.compile_object(tmp_path / "types.bpf.c", SOURCE, [])
    source = elf.load_object(made, "types", {}, {})
    chance = random.Random(7)
    try:
        maps = {each.name: TypedMap(read_map_spec(fd), fd) for each, fd in source.maps}
        assert maps.keys() == {"hashes", "per_cpu", "arrays", "names"}
        members = maps["hashes"].value.description["members"]
        (flag,) = (each["offset"] // 8 for each in members if each["name"] == "b")
        for name, map_ in maps.items():
            for n in range(17):
                key = u32(n) if name == "arrays" else chance.randbytes(map_.spec.key_size)
                value = bytearray(chance.randbytes(map_.spec.value_size))
                if name == "hashes":
                    key = key[:4] + u32(n % 5)
                    value[8:24] = f"task {n}".encode().ljust(16, b"\0")
                    value[flag] = n & 1  # a _Bool has no other values
                if name == "names":
                    value[:] = u32(n % 5)
                put(map_, key, bytes(value) * possible_cpus())
            argv = ["bpftool", "-j", "map", "dump", "id", str(map_id(map_.fd))]
            done = subprocess.run(argv, capture_output=True, check=True, timeout=300)
            theirs = [normal(entry["formatted"]) for entry in json.loads(done.stdout)]
            ours = numbered([list(entry) for entry in map_.entries()])
            assert len(ours) == (64 if name == "arrays" else 17)
            expected = [
                [
                    entry["key"],
                    sum(each["value"] for each in entry["values"])
                    if "values" in entry
                    else entry["value"],
                ]
                for entry in theirs
            ]
            for kept in (ours, expected):
                kept.sort(key=repr)
            assert len(ours) == len(expected)
            for mine, other in zip(ours, expected, strict=True):
                assert mine == other
        shown = {entry[1] for entry in maps["names"].entries()}
        assert shown == {0, "RED", "GREEN", "BLUE", 4}
    finally:
        for _spec, fd in (*source.maps, *source.programs):
            if fd is not None:
                os.close(fd)
