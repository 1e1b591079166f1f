"""Chains of programs in the kernel: what runs, in which order, and what happens at a swap."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import shutil
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from hypermesh_ebpf.bpf import chain
from hypermesh_ebpf.bpf.chain import Chain, Member, close_chain, load_chain
from hypermesh_ebpf.bpf.libbpf import check, libbpf, possible_cpus
from hypermesh_ebpf.bpf.maps import Map
from hypermesh_ebpf.bpf.programs import create_map, load_program
from hypermesh_ebpf.bpf.spec import MapSpec, ProgramSpec
from hypermesh_ebpf.errors import VerifierError
from hypermesh_ebpf.image import clang, elf
from hypermesh_ebpf.image.image import LoadedSource
from tests.compiler import compile_text, run_program
from tests.members import (
    ETHERTYPE,
    EXIT,
    PASS,
    counting,
    counts,
    frames,
    insn,
    load_map,
    returning,
    set_r0,
    with_stack,
)
from tests.netns import VethPair, needs_namespaces, veth_pair, wait_until
from tests.objects import object_path
from tests.packets import ethernet, received_packets, send_frames
from tests.programs import program_id

pytestmark = pytest.mark.kernel
vm_wide = pytest.mark.vm_wide

ROOT = str(Path(__file__).parents[2])
KERNEL = tuple(int(n) for n in re.findall(r"\d+", platform.release())[:2])
WAYS = ("merged", "wrapped")
FRAME = ethernet(ETHERTYPE, bytes(4))
_BPF_XDP = 37  # enum bpf_attach_type
_PROG_ARRAY = 3  # enum bpf_map_type


class Counters:
    """Members that count, each in a map of its own."""

    def __init__(self, kind: str = "xdp", way: str = "merged") -> None:
        self.kind, self.way = kind, way
        self.maps: list[Map] = []

    def __enter__(self) -> Counters:
        return self

    def __exit__(self, *_: object) -> None:
        for each in self.maps:
            os.close(each.fd)

    def add(self, verdict: int | None = None, entries: int = 1, numbered: bool = False) -> Member:
        """One more; every second of those to be wrapped is not under the GPL."""
        number = len(self.maps)
        spec = counts(entries)
        self.maps.append(Map(spec, create_map(spec)))
        free = self.way == "merged" or number % 2 == 0
        return counting(
            self.maps[-1].fd,
            verdict,
            f"member_{number}",
            kind=self.kind,
            numbered=numbered,
            license="GPL" if free else "Proprietary",
        )

    def read(self) -> list[int]:
        """The sum of each member's counts."""
        return [sum(value for _key, value in each.items()) for each in self.maps]


@contextmanager
def loaded(members: Sequence[Member], kind: str = "xdp", way: str | None = None) -> Iterator[Chain]:
    made = load_chain(members, kind)
    try:
        assert way is None or made.way == way, made.note
        yield made
    finally:
        close_chain(made)


@pytest.fixture(scope="module")
def wire() -> Iterator[VethPair]:
    with veth_pair() as pair:
        yield pair


class XdpLink:
    """A chain on an interface by a kernel link; native where the driver can."""

    def __init__(self, pair: VethPair) -> None:
        self.pair, self.fd = pair, -1

    def set(self, prog_fd: int) -> None:
        """Attach, or take the place of what is attached, in one step."""
        if self.fd < 0:
            with self.pair.left.entered():
                ifindex = socket.if_nametoindex(self.pair.left_iface)
                self.fd = check(libbpf().bpf_link_create(prog_fd, ifindex, _BPF_XDP, None))
        else:
            check(libbpf().bpf_link_update(self.fd, prog_fd, None))

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)


class TcFilter:
    """A chain in a clsact filter."""

    def __init__(self, pair: VethPair) -> None:
        self.pair = pair
        self.set_up = False

    def set(self, prog_fd: int) -> None:
        from pyroute2 import IPRoute

        with self.pair.left.entered(), IPRoute() as route:
            ifindex = socket.if_nametoindex(self.pair.left_iface)
            if not self.set_up:
                route.tc("add", "clsact", ifindex)
            command = "replace-filter" if self.set_up else "add-filter"
            route.tc(
                command, "bpf", ifindex, 1, fd=prog_fd, name="chain", parent=0xFFFFFFF2,
                classid=1, direct_action=True, prio=1, protocol=3,
            )  # fmt: skip
            self.set_up = True

    def close(self) -> None:
        if self.set_up:
            self.pair.left.run("tc", "qdisc", "del", "dev", self.pair.left_iface, "clsact")


HOOKS: dict[str, Callable[[VethPair], XdpLink | TcFilter]] = {"xdp": XdpLink, "tc": TcFilter}


@contextmanager
def hook(kind: str, pair: VethPair) -> Iterator[XdpLink | TcFilter]:
    made = HOOKS[kind](pair)
    try:
        yield made
    finally:
        made.close()


def send(pair: VethPair, count: int) -> int:
    """Send numbered frames; how many more than before the interface has received."""
    before = received_packets(pair.left, pair.left_iface)
    send_frames(pair.right, pair.right_iface, frames(count))
    return received_packets(pair.left, pair.left_iface) - before


# --- verdicts -----------------------------------------------------------------------------------


@vm_wide
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["xdp", "tc"])
def test_the_kernel_treats_every_verdict_as_documented(kind: str, way: str) -> None:
    ends = {"xdp": {-1, 0, 1, 3, 4, 5}, "tc": {2, 4, 7, 8}}[kind]
    first = "GPL" if way == "merged" else "Proprietary"
    for verdict in range(-1, 10):
        with loaded([returning(verdict, "a", first), returning(1, "b")], kind, way) as made:
            goes_on = verdict == 2 if kind == "xdp" else verdict not in ends
            expected = 1 if goes_on else verdict & 0xFFFFFFFF
            assert run_program(made.head_fd) == expected, verdict
        passing = PASS[kind]
        with loaded([returning(passing, "a", first), returning(verdict, "b")], kind, way) as made:
            assert run_program(made.head_fd) == verdict & 0xFFFFFFFF


# --- counts -------------------------------------------------------------------------------------


@vm_wide
@needs_namespaces
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["xdp", "tc"])
def test_every_member_counts_until_one_drops(wire: VethPair, kind: str, way: str) -> None:
    drop = {"xdp": 1, "tc": 2}[kind]
    with Counters(kind, way) as counters, hook(kind, wire) as place:
        members = [counters.add(drop if number == 2 else None) for number in range(4)]
        with loaded(members, kind, way) as made:
            place.set(made.head_fd)
            assert send(wire, 101) >= 101
            wait_until(lambda: counters.read()[2] == 101, "all frames were counted")
            assert counters.read() == [101, 101, 101, 0]


@vm_wide
@pytest.mark.parametrize(
    ("count", "way"), [(1, "merged"), (2, "merged"), (8, "merged"), (32, "merged"),
                       (2, "wrapped"), (8, "wrapped"), (32, "wrapped"), (33, "wrapped")]
)  # fmt: skip
def test_many_members(count: int, way: str) -> None:
    with Counters(way=way) as counters:
        members = [counters.add() for _ in range(count)]
        with loaded(members, way="single" if count == 1 else way) as made:
            assert made.members == tuple(f"member_{n}" for n in range(count))
            assert run_program(made.head_fd, FRAME, repeat=103) == 2
            assert counters.read() == [103] * count


@pytest.mark.parametrize("way", WAYS)
def test_order_decides_who_counts(way: str) -> None:
    with Counters(way=way) as counters:
        a, b, drop = counters.add(), counters.add(), counters.add(1)
        for packets, members, expected in (
            (11, [a, drop, b], [11, 0, 11]),
            (13, [b, a, drop], [24, 13, 24]),
            (17, [drop, b, a], [24, 13, 41]),
        ):
            with loaded(members, way=way) as made:
                assert run_program(made.head_fd, FRAME, repeat=packets) == 1
            assert counters.read() == expected


def test_one_member_is_the_program_itself() -> None:
    with Counters() as counters:
        member = counters.add()
        fd = load_program(member.program, "xdp", "GPL", member.maps)
        try:
            already = Member(member.program, member.maps, "GPL", fd)
            with loaded([already], way="single") as made:
                assert program_id(made.head_fd) == program_id(fd)
                assert made.descriptors == (made.head_fd,) and made.head_fd != fd
            with loaded([member], way="single") as made:
                assert program_name(made.head_fd) == member.program.name
                assert run_program(made.head_fd, FRAME, repeat=7) == 2
        finally:
            os.close(fd)
        assert counters.read() == [7]


# --- changes while packets flow -----------------------------------------------------------------


FLOOD = 100003


@needs_namespaces
@pytest.mark.parametrize("way", [*WAYS, "alternating"])
@pytest.mark.parametrize("kind", ["xdp", "tc"])
def test_changes_under_a_flood_lose_no_packet(wire: VethPair, kind: str, way: str) -> None:
    """Numbered frames: each is counted exactly once by every member that was there throughout."""
    ways = WAYS if way == "alternating" else (way,)
    with Counters(kind, "wrapped") as counters, hook(kind, wire) as place:
        always = [counters.add(entries=FLOOD, numbered=True) for _ in range(2)]
        sometimes = [counters.add() for _ in range(3)]
        orders = [
            [always[0], sometimes[0], always[1]],
            [always[1], always[0]],
            [sometimes[1], always[1], sometimes[0], always[0]],
            [always[0], always[1], sometimes[2]],
        ]
        received = -received_packets(wire.left, wire.left_iface)
        current = load_chain(orders[0], kind)
        place.set(current.head_fd)
        sender = threading.Thread(
            target=send_frames, args=(wire.right, wire.right_iface, frames(FLOOD))
        )
        sender.start()
        swaps = 0
        while sender.is_alive() or swaps < 8:
            swaps += 1
            members = orders[swaps % len(orders)]
            if ways[swaps % len(ways)] == "merged":
                members = [same_license(member) for member in members]
            new = load_chain(members, kind)
            assert new.way == ways[swaps % len(ways)]
            place.set(new.head_fd)
            close_chain(current)
            current = new
        sender.join()
        wait_until(lambda: counters.read()[0] >= FLOOD, "all frames came in")
        received += received_packets(wire.left, wire.left_iface)
        close_chain(current)
        assert received >= FLOOD
        for number, each in enumerate(counters.maps[:2]):
            wrong = {key: value for key, value in each.items() if value != 1}
            assert not wrong, f"member {number}, {swaps} swaps"
        # Those that came and went (on a busy machine perhaps not all of them before the last frame)
        # counted some, and their maps kept it.
        some = counters.read()[2:]
        assert any(some) and max(some) < FLOOD, some


@needs_namespaces
@pytest.mark.skipif(KERNEL < (5, 17), reason="bpf_loop() came with Linux 5.17")
def test_a_wrapped_chain_is_closed_behind_the_last_packet(wire: VethPair) -> None:
    """Packets that are in a slow first member at the swap meet the old chain's second one."""
    packets = 97
    with Counters("tc") as counters, hook("tc", wire) as place:
        members = [dawdling(), counters.add()]
        current = load_chain(members, "tc")
        place.set(current.head_fd)
        sender = threading.Thread(
            target=send_frames, args=(wire.right, wire.right_iface, frames(packets))
        )
        sender.start()
        while sender.is_alive():
            new = load_chain(members, "tc")
            assert new.way == "wrapped"
            place.set(new.head_fd)
            close_chain(current)
            current = new
        wait_until(lambda: counters.read()[0] == packets, "every frame was counted", 20)
        close_chain(current)


def dawdling() -> Member:
    """Takes some milliseconds for a packet: bpf_loop() of a million empty rounds."""
    code = [
        insn(0xB7, 1, 0, 0, 1 << 20),
        insn(0x18, 2, 4, 0, 6),  # 1: r2 = callback at 8
        insn(0),
        insn(0xB7, 3),
        insn(0xB7, 4),
        insn(0x85, 0, 0, 0, 181),
        set_r0(PASS["tc"]),
        EXIT,
        set_r0(0),
        EXIT,
    ]
    return Member(ProgramSpec("dawdling", b"".join(code), ()), [], "MIT")


def looping(rounds: int, verdict: int) -> bytes:
    """A program that does nothing so many times."""
    loop = [insn(0xB7, 1), insn(0x07, 1, 0, 0, 1), insn(0xA5, 1, 0, -2, rounds)]
    return b"".join([*loop, set_r0(verdict), EXIT])


def same_license(member: Member) -> Member:
    return Member(member.program, member.maps, "GPL", member.fd)


@vm_wide
@needs_namespaces
def test_add_remove_and_reorder_keep_every_map(wire: VethPair) -> None:
    with Counters() as counters, hook("xdp", wire) as place:
        a, b, drop = counters.add(), counters.add(), counters.add(1)
        current: Chain | None = None
        for packets, members, expected in (
            (3, [a], [3, 0, 0]),
            (5, [a, b], [8, 5, 0]),
            (7, [drop, a, b], [8, 5, 7]),
            (11, [a, drop, b], [19, 5, 18]),
            (13, [b], [19, 18, 18]),
        ):
            new = load_chain(members, "xdp")
            place.set(new.head_fd)
            if current:
                close_chain(current)
            current = new
            send(wire, packets)
            total = sum(expected)
            wait_until(lambda total=total: sum(counters.read()) == total, "all were counted")
            assert counters.read() == expected
        assert current
        close_chain(current)


# --- members of every kind ----------------------------------------------------------------------


def test_members_that_bcc_made() -> None:
    """Two images with maps of the same name, a hash and per-CPU values among them."""
    one = compile_text("""
BPF_PERCPU_ARRAY(seen, u64, 4);
int first(struct xdp_md *ctx) {
    u32 key = 3;
    u64 *value = seen.lookup(&key);
    if (value) (*value)++;
    return XDP_PASS;
}
""")
    two = compile_text("""
BPF_HASH(seen, u32, u64);
int second(struct xdp_md *ctx) {
    void *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
    if (data + 18 > end) return XDP_PASS;
    u32 key = *(u32 *)(data + 14);
    u64 zero = 0, *value = seen.lookup_or_try_init(&key, &zero);
    if (!value) return XDP_PASS;
    (*value)++;
    return key == 4711 ? XDP_DROP : XDP_PASS;
}
""")
    with ExitStack() as stack:
        members, maps = [], []
        for image in (one, two, one):
            fds = [create_map(spec) for spec in image.maps]
            for fd in fds:
                stack.callback(os.close, fd)
            maps += [Map(spec, fd) for spec, fd in zip(image.maps, fds, strict=True)]
            members.append(Member(image.programs[0], fds, image.license))
        made = stack.enter_context(loaded(members, way="merged"))
        assert run_program(made.head_fd, FRAME, repeat=19) == 2
        dropped = ethernet(ETHERTYPE, struct.pack("=I", 4711))
        assert run_program(made.head_fd, dropped, repeat=23) == 1
        assert dict(maps[0].items())[3] == 19 + 23
        assert dict(maps[1].items()) == {0: 19, 4711: 23}
        assert dict(maps[2].items())[3] == 19


def load_source(stack: ExitStack, name: str, data: bytes) -> LoadedSource:
    """An object, loaded until the stack ends."""
    made = elf.load_object(data, name, {}, {})
    for _spec, fd in (*made.maps, *made.programs):
        if fd is not None:
            stack.callback(os.close, fd)
    return made


def member_of(source: LoadedSource, name: str, license: str | None = None) -> Member:
    (program,) = [spec for spec, _fd in source.programs if spec.name == name]
    license = source.license if license is None else license
    return Member(program, [fd for _spec, fd in source.maps], license)


def value_of(source: LoadedSource, name: str, size: int) -> bytes:
    """The first value of an array, as many bytes of it."""
    (fd,) = [fd for spec, fd in source.maps if spec.name.endswith(name)]
    raw = ctypes.create_string_buffer(4096 * possible_cpus())
    check(libbpf().bpf_map_lookup_elem(fd, struct.pack("=I", 0), raw))
    return raw.raw[:size]


@pytest.mark.parametrize("way", WAYS)
def test_members_from_elf_objects(way: str) -> None:
    """Functions, global data in maps, a program array of the member's own, CO-RE, GPL helpers."""
    with ExitStack() as stack, Counters() as counters:
        sources = [
            load_source(stack, name, object_path(name).read_bytes())
            for name in ("subprograms", "globals", "tailcalls", "subprograms")
        ]
        squares, settings, jumps, again = sources
        assert [source.license for source in sources] == ["GPL"] * 4
        members = [
            counters.add(),
            member_of(squares, "sum_squares"),
            member_of(settings, "show_settings"),
            member_of(jumps, "enter"),
            member_of(again, "sum_squares"),
            counters.add(),
        ]
        if way == "wrapped":
            members[0] = Member(members[0].program, members[0].maps, "Proprietary")
        made = stack.enter_context(loaded(members, way=way))
        assert run_program(made.head_fd, FRAME, repeat=41) == 2
        assert counters.read() == [41, 41]
        assert struct.unpack("=Q", value_of(squares, "sums", 8)) == (41 * (1 + 4 + 9),)
        assert struct.unpack("=Q", value_of(again, "sums", 8)) == (41 * (1 + 4 + 9),)
        assert 41 in struct.unpack(
            "=4I", value_of(settings, ".bss", 16)
        )  # in_bss, beside a pointer
        assert struct.unpack("=I", value_of(settings, ".data", 4)) == (17 + 41,)  # in_data
        assert struct.unpack("=I", value_of(jumps, ".bss", 4)) == (2,)  # reached: the target ran


_KERNEL_FUNCTIONS = """
#include "vmlinux.h"
#include <bpf/bpf_helpers.h>
extern int bpf_dynptr_from_xdp(struct xdp_md *, __u64, struct bpf_dynptr *) __ksym;
extern void *bpf_dynptr_slice(const struct bpf_dynptr *, __u32, void *, __u32) __ksym;
__u64 last_type;
SEC("xdp") int slicing(struct xdp_md *ctx)
{
    struct bpf_dynptr packet;
    char room[14];
    struct ethhdr *header;

    if (bpf_dynptr_from_xdp(ctx, 0, &packet))
        return XDP_PASS;
    header = bpf_dynptr_slice(&packet, 0, room, sizeof(room));
    if (header)
        last_type = header->h_proto;
    return XDP_PASS;
}
char LICENSE[] SEC("license") = "GPL";
"""


@pytest.mark.skipif(not shutil.which("clang"), reason="needs clang")
@pytest.mark.skipif(KERNEL < (6, 4), reason="bpf_dynptr_from_xdp() came with Linux 6.4")
def test_a_member_that_calls_functions_of_the_kernel(tmp_path: Path) -> None:
    data = clang.compile_object(tmp_path / "slicing.bpf.c", _KERNEL_FUNCTIONS, [])
    with ExitStack() as stack:
        source = load_source(stack, "slicing", data)
        member = member_of(source, "slicing")
        for members in ([member, returning(1)], [returning(2), member]):
            with loaded(members, way="merged") as made:
                run_program(made.head_fd, FRAME)
            assert struct.unpack("=Q", value_of(source, ".bss", 8)) == (socket.htons(ETHERTYPE),)
            run_alone = ethernet(0x0800, bytes(4))
            with loaded([member], way="single") as made:
                run_program(made.head_fd, run_alone)
            assert struct.unpack("=Q", value_of(source, ".bss", 8)) == (socket.htons(0x0800),)


def _map(spec: MapSpec, stack: ExitStack) -> int:
    fd = create_map(spec)
    stack.callback(os.close, fd)
    return fd


@vm_wide
def test_a_member_that_tail_calls_goes_on_with_what_the_target_returned() -> None:
    """As the target is the member's own program, its verdict is the member's."""
    with ExitStack() as stack, Counters() as counters:
        array = _map(MapSpec("hm_progs", _PROG_ARRAY, 4, 4, 2, 0, None, None), stack)
        # Returns what slot 1 does, or drops if nothing is there.
        code = [load_map(2), insn(0xB7, 3, 0, 0, 1), insn(0x85, 0, 0, 0, 12), set_r0(1), EXIT]
        spec = ProgramSpec("caller", b"".join(code), ((0, 0),))
        caller, after = Member(spec, [array]), counters.add()
        target = counters.add()
        fd = load_program(target.program, "xdp", "GPL", target.maps)
        stack.callback(os.close, fd)
        with loaded([caller, after], way="merged") as made:
            assert run_program(made.head_fd, FRAME, repeat=5) == 1  # the slot is empty
            assert counters.read() == [0, 0]
            check(
                libbpf().bpf_map_update_elem(array, struct.pack("=I", 1), struct.pack("=i", fd), 0)
            )
            assert run_program(made.head_fd, FRAME, repeat=29) == 2
            assert counters.read() == [29, 29]
        others = [returning(2, license="MIT"), caller, after]
        with loaded(others, way="wrapped") as made:
            assert run_program(made.head_fd, FRAME, repeat=31) == 2
            assert counters.read() == [60, 60]


@vm_wide
@pytest.mark.parametrize("way", WAYS)
def test_a_member_that_reads_behind_the_end_by_ld_abs_returns_0(way: str) -> None:
    """LD_ABS (BCC's cursor_advance) ends the function it is in with 0: TC_ACT_OK, the next runs."""
    code = [insn(0xBF, 6, 1), insn(0x30, 0, 0, 0, 14), set_r0(2), EXIT]  # drops if it can read
    reader = Member(ProgramSpec("reader", b"".join(code), ()), [])
    short = Member(
        ProgramSpec("short", b"".join([code[0], insn(0x30, 0, 0, 0, 5000), *code[2:]]), ()), []
    )
    with Counters("tc") as counters:
        after = counters.add()
        first = returning(0, license="GPL" if way == "merged" else "MIT")
        with loaded([first, short, after], "tc", way) as made:
            assert run_program(made.head_fd, FRAME, repeat=37) == 0
            assert counters.read() == [37]
        with loaded([first, reader, after], "tc", way) as made:
            assert run_program(made.head_fd, FRAME) == 2
            assert counters.read() == [37]


@pytest.mark.skipif(KERNEL < (5, 17), reason="bpf_loop() came with Linux 5.17")
@pytest.mark.parametrize("way", WAYS)
def test_a_member_with_functions_a_callback_and_global_data(way: str) -> None:
    """bpf_loop(41, callback): the callback adds 1 to what is 8 bytes into a map's value."""
    code = [
        insn(0xB7, 1, 0, 0, 41),
        insn(0x18, 2, 4, 0, 6),  # 1: r2 = callback at 8
        insn(0),
        insn(0xB7, 3),
        insn(0xB7, 4),
        insn(0x85, 0, 0, 0, 181),
        set_r0(2),
        EXIT,
        insn(0x18, 1, 2),  # 8: r1 = address of the map's value, 8 bytes into it
        insn(0, 0, 0, 0, 8),
        insn(0x79, 2, 1),
        insn(0x07, 2, 0, 0, 1),
        insn(0x7B, 1, 2),
        set_r0(0),
        EXIT,
    ]
    spec = ProgramSpec("looping", b"".join(code), ((64, 0),))
    with ExitStack() as stack:
        data = _map(MapSpec("hm.bss", 2, 4, 16, 1, 0, None, None), stack)
        member = Member(spec, [data])
        first = returning(2, license="GPL" if way == "merged" else "MIT")
        for members in ([first, member, returning(2)], [first, returning(2), member]):
            with loaded(members, way=way) as made:
                assert run_program(made.head_fd, FRAME) == 2
        value = bytearray(16)
        key, raw = struct.pack("=I", 0), (ctypes.c_char * 16).from_buffer(value)
        check(libbpf().bpf_map_lookup_elem(data, key, raw))
        assert struct.unpack("=QQ", value) == (0, 2 * 41)


def test_a_member_sees_the_packet_as_the_one_before_left_it() -> None:
    # bpf_xdp_adjust_head(ctx, 14): the Ethernet header is gone
    cut = [insn(0xB7, 2, 0, 0, 14), insn(0x85, 0, 0, 0, 44), set_r0(2), EXIT]
    with Counters() as counters:
        before, after = counters.add(), counters.add()
        cutter = Member(ProgramSpec("cutter", b"".join(cut), ()), [])
        with loaded([before, cutter, after], way="merged") as made:
            assert run_program(made.head_fd, FRAME) == 2
        assert counters.read() == [1, 0]


# --- the wrapped form ---------------------------------------------------------------------------


@vm_wide
def test_more_maps_than_one_program_may_have_are_wrapped() -> None:
    """64 maps a program (MAX_USED_MAPS)."""
    with ExitStack() as stack:
        members, every = [], []
        for number in range(4):
            fds = [_map(MapSpec("hm_many", 2, 4, 8, 1, 0, None, None), stack) for _ in range(20)]
            # Adds one to the value of each of its maps.
            code, refs = b"", []
            for index in range(20):
                refs.append((len(code), index))
                code += insn(0x18, 1, 2) + insn(0) + insn(0xB7, 2, 0, 0, 1) + insn(0xDB, 1, 2)
            spec = ProgramSpec(f"many_{number}", code + set_r0(2) + EXIT, tuple(refs))
            members.append(Member(spec, fds))
            every += fds
        with loaded(members[:3], way="merged") as made:
            assert run_program(made.head_fd, FRAME, repeat=2) == 2
        with loaded(members, way="wrapped") as made:
            assert made.note
            assert run_program(made.head_fd, FRAME, repeat=5) == 2
        counts_ = [Map(MapSpec("", 2, 4, 8, 1, 0, "unsigned int", "unsigned long long"), fd).items()
                   for fd in every]  # fmt: skip
        assert [items[0][1] for items in counts_] == [7] * 60 + [5] * 20


def test_what_is_too_complex_together_is_wrapped() -> None:
    """Loops that the verifier walks through: together more than a million instructions."""
    members = [Member(ProgramSpec(f"long_{n}", looping(130000, 2), ()), []) for n in range(5)]
    with loaded(members, way="wrapped") as made:
        assert "too large" in (made.note or "").lower()
        assert run_program(made.head_fd) == 2


def test_an_empty_slot_ends_a_chain_with_the_verdict_so_far() -> None:
    """That is why the descriptors are kept: without any the kernel empties the array."""
    with Counters("tc", "wrapped") as counters:
        members = [counters.add(3), counters.add(0), counters.add(0)]
        made = load_chain(members, "tc")
        head, array = made.descriptors
        try:
            assert run_program(head, FRAME) == 0
            os.close(array)
            wait_until(lambda: run_program(head, FRAME) == 3, "the array is empty")
            tried = counters.read()
            assert run_program(head, FRAME) == 3
            assert counters.read() == [tried[0] + 1, *tried[1:]]
        finally:
            os.close(head)


def test_a_closed_chain_leaves_nothing_in_the_kernel() -> None:
    with Counters(way="wrapped") as counters:
        made = load_chain([counters.add() for _ in range(5)], "xdp")
        ids = [program_id(made.head_fd)]
        for slot in range(1, 5):
            value = (ctypes.c_uint32 * 1)()
            check(libbpf().bpf_map_lookup_elem(made.descriptors[1], struct.pack("=I", slot), value))
            ids.append(value[0])
        assert all(exists(number) for number in ids)
        close_chain(made)
        wait_until(lambda: not any(exists(number) for number in ids), "the programs are gone")


def exists(number: int) -> bool:
    fd = libbpf().bpf_prog_get_fd_by_id(number)
    if fd >= 0:
        os.close(fd)
    return bool(fd >= 0)


# --- what is shown, what is refused -------------------------------------------------------------


def program_name(fd: int) -> str:
    raw, length = ctypes.create_string_buffer(256), ctypes.c_uint32(256)
    check(libbpf().bpf_obj_get_info_by_fd(fd, raw, ctypes.byref(length)))
    return raw.raw[64:80].rstrip(b"\0").decode()


@pytest.mark.skipif(not shutil.which("bpftool"), reason="needs bpftool")
@pytest.mark.parametrize("way", WAYS)
def test_bpftool_shows_the_members_by_name(way: str) -> None:
    with Counters() as counters:
        first = returning(2, "first", "GPL" if way == "merged" else "MIT")
        with loaded([first, returning(2, "with-a-dash"), counters.add()], way=way) as made:
            assert program_name(made.head_fd) == chain.NAME
            functions = function_names(program_id(made.head_fd))
            if way == "merged":
                assert functions == [f"{chain.NAME}_member_0", "first", "with_a_dash"]
                return
            assert functions == [chain.NAME, "first"]
            names = []
            for slot in (1, 2):
                value = (ctypes.c_uint32 * 1)()
                key = struct.pack("=I", slot)
                check(libbpf().bpf_map_lookup_elem(made.descriptors[1], key, value))
                names.append(function_names(value[0]))
            assert names == [[chain.NAME, "with_a_dash"], ["member_0"]]


def function_names(number: int) -> list[str]:
    """The functions of a program, as bpftool shows them."""
    done = subprocess.run(
        ["bpftool", "prog", "dump", "xlated", "id", str(number)],
        capture_output=True,
        text=True,
        check=True,
    )
    return re.findall(r"^int (\w+)\(\):", done.stdout, re.M)


@vm_wide
def test_a_member_with_the_whole_stack() -> None:
    """512 bytes are for a program and its callers; in older kernels a caller takes 32 at least."""
    newer = KERNEL >= (6, 12)
    with loaded([returning(2), with_stack(512)], way="merged" if newer else None) as made:
        assert run_program(made.head_fd) == 2
    # The last one's stack is not added to that of the others, whichever way that takes.
    with loaded([with_stack(304), with_stack(400)], way="merged") as made:
        assert run_program(made.head_fd) == 2
    if newer:
        with loaded([with_stack(512), returning(1)], way="merged") as made:
            assert run_program(made.head_fd) == 1
    elif KERNEL < (6, 6):
        with pytest.raises(VerifierError) as caught:
            load_chain([with_stack(512), returning(1)], "xdp")
        assert caught.value.what.startswith("chain xdp program stack_512: refused by the kernel")
        assert "combined stack size" in (caught.value.cause or "")
        assert "put it last" in (caught.value.remedy or "")


def test_a_member_that_the_kernel_refuses_alone_is_named() -> None:
    bad = Member(ProgramSpec("no_verdict", insn(0xBF, 0, 3) + EXIT, ()), [])  # r0 = r3
    for members in ([bad, returning(2)], [returning(2), bad], [returning(2), bad, returning(2)]):
        with pytest.raises(VerifierError) as caught:
            load_chain(members, "xdp")
        assert caught.value.what == "load program no_verdict: refused by the kernel's verifier"
        assert "R3 !read_ok" in (caught.value.cause or "")


def test_refusals_leave_no_descriptor_behind() -> None:
    bad = Member(ProgramSpec("no_verdict", insn(0xBF, 0, 3) + EXIT, ()), [])  # r0 = r3
    before = len(os.listdir("/proc/self/fd"))
    for members in ([bad], [returning(2), returning(2), bad], [bad, returning(2)]):
        with pytest.raises(VerifierError):
            load_chain(members, "xdp")
    assert len(os.listdir("/proc/self/fd")) == before


_UNPRIVILEGED = """
import os
from hypermesh_ebpf.bpf.chain import load_chain
from hypermesh_ebpf.errors import MissingPrivilege
from tests.members import returning
os.setresuid(65534, 65534, 65534)
try:
    load_chain([returning(2), returning(2)], "xdp")
except MissingPrivilege as error:
    print(error, "|", error.remedy)
"""


def test_missing_privilege() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _UNPRIVILEGED],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": ROOT},
    )
    assert "Operation not permitted (EPERM)" in done.stdout, done.stderr
    assert "run as root" in done.stdout
