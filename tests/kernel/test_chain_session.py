"""Chains by the library's front door: programs come, go and change places while packets flow."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from hypermesh_ebpf import EbpfAbstraction, EbpfHandle, create_os_abstraction
from tests.members import ETHERTYPE, frames
from tests.netns import VethPair, needs_namespaces, veth_pair, wait_until
from tests.owner import ENVIRONMENT, attached, entries, is_gone, tc_filters
from tests.packets import received_packets, send_frames

pytestmark = needs_namespaces

PACKETS = 60013
# Counts the frames of our Ethernet type, each under its number.
NUMBERED = """
BPF_ARRAY(numbers, u64, %d);
int count(struct CONTEXT *ctx) {
    void *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
    if (data + 18 > end || *(u16 *)(data + 12) != %d) return PASSING;
    u32 number = *(u32 *)(data + 14);
    u64 *seen = numbers.lookup(&number);
    if (seen) __sync_fetch_and_add(seen, 1);
    return PASSING;
}
"""
SIMPLE = """
BPF_ARRAY(packets, u64, 1);
int count(struct CONTEXT *ctx) {
    u32 zero = 0;
    u64 *seen = packets.lookup(&zero);
    if (seen) __sync_fetch_and_add(seen, 1);
    return PASSING;
}
"""
CONTEXT = {"xdp": ("xdp_md", "XDP_PASS"), "tc": ("__sk_buff", "0")}


@pytest.fixture
def wire() -> Iterator[VethPair]:
    with veth_pair() as pair:
        yield pair


@pytest.fixture
def os_(wire: VethPair) -> Iterator[EbpfAbstraction]:
    with wire.left.entered(), create_os_abstraction() as made:
        yield made
    assert not attached(wire.left)
    assert not tc_filters(wire.left, wire.left_iface)
    assert not entries(wire.left)


def load(os_: EbpfAbstraction, kind: str, text: str, name: str) -> EbpfHandle:
    context, passing = CONTEXT[kind]
    text = text.replace("CONTEXT", context).replace("PASSING", passing)
    return os_.load_ebpf_program(source=text, name=name)


@pytest.mark.parametrize("option", ["", ",link"])
@pytest.mark.parametrize("kind", ["xdp", "tc"])
def test_every_packet_is_counted_once_whatever_changes(
    os_: EbpfAbstraction, wire: VethPair, kind: str, option: str
) -> None:
    """Two members stay, alone at first; others come and go, and all change places, in a flood."""
    if (kind, option) == ("tc", ",link") and not _has_tcx():
        pytest.skip("this kernel has no TCX (Linux 6.6)")
    point = f"{kind}:{wire.left_iface}{option}"
    numbered = NUMBERED % (PACKETS, socket.htons(ETHERTYPE))
    one = load(os_, kind, numbered, "one.c")
    two = load(os_, kind, numbered, "two.c")
    guest = load(os_, kind, SIMPLE, "guest.c")
    received = -received_packets(wire.left, wire.left_iface)
    os_.attach_ebpf_monitor(one, point)
    os_.attach_ebpf_monitor(two, point)
    sender = threading.Thread(
        target=send_frames, args=(wire.right, wire.right_iface, frames(PACKETS))
    )
    sender.start()
    changes = 0
    while sender.is_alive() or not changes:
        os_.attach_ebpf_monitor(guest, point, position=1)
        os_.reorder_ebpf_monitors(point, [two, guest, one])
        os_.reorder_ebpf_monitors(point, [one, two, guest])
        guests = os_.read_ebpf_metrics(guest).values["packets"]
        os_.detach_ebpf_monitor(guest)
        changes += 4
    sender.join()
    for handle in (one, two):
        wait_until(lambda handle=handle: _counted(os_, handle) >= PACKETS, "all frames came in")
        values = os_.read_ebpf_metrics(handle).values
        wrong = {name: value for name, value in values.items() if value != 1}
        assert not wrong, f"after {changes} changes"
    received += received_packets(wire.left, wire.left_iface)
    assert received >= PACKETS
    assert guests and guests <= received


def _counted(os_: EbpfAbstraction, handle: EbpfHandle) -> int:
    return sum(int(value or 0) for value in os_.read_ebpf_metrics(handle).values.values())


def _has_tcx() -> bool:
    from hypermesh_ebpf.host.kernel import read_kernel_release

    return read_kernel_release().code >= 6 << 16 | 6 << 8


_OWNER = """
import sys, time
from hypermesh_ebpf import create_os_abstraction
os_ = create_os_abstraction()
code = bytes.fromhex(sys.argv[2])
for _ in range(3):
    os_.attach_ebpf_monitor(os_.load_ebpf_program(code), sys.argv[1])
print("attached", flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("kind", ["xdp", "tc"])
def test_a_chain_goes_with_its_killed_owner(wire: VethPair, kind: str) -> None:
    code = {"xdp": "b700000002000000", "tc": "b700000000000000"}[kind] + "9500000000000000"
    point = f"{kind}:{wire.left_iface}"
    owner = wire.left.start(sys.executable, "-c", _OWNER, point, code, env=ENVIRONMENT)
    assert owner.stdout and owner.stdout.readline() == "attached\n"
    held = attached(wire.left) if kind == "xdp" else set(tc_filters(wire.left, wire.left_iface))
    assert len(held) == 1
    os.kill(owner.pid, signal.SIGKILL)
    wait_until(lambda: is_gone(owner.pid), "the owner is dead")
    wait_until(lambda: not attached(wire.left), "xdp is free")
    wait_until(lambda: not tc_filters(wire.left, wire.left_iface), "tc is free")
    wait_until(lambda: not entries(wire.left), "the ledger is empty")


def test_members_of_different_sources_and_licences(
    os_: EbpfAbstraction, wire: VethPair, tmp_path: Path
) -> None:
    """C for BCC, C for libbpf that is not under the GPL, raw bytecode: wrapped, and they count."""
    if not shutil.which("clang"):
        pytest.skip("needs clang")
    other = tmp_path / "other.bpf.c"
    other.write_text(
        '#include "vmlinux.h"\n#include <bpf/bpf_helpers.h>\n__u64 packets;\n'
        'SEC("xdp") int other(struct xdp_md *ctx) { packets++; return XDP_PASS; }\n'
        'char LICENSE[] SEC("license") = "Proprietary";\n'
    )
    point = f"xdp:{wire.left_iface}"
    before = load(os_, "xdp", SIMPLE, "before.c")
    middle = os_.load_ebpf_program(other)
    drop = os_.load_ebpf_program(bytes.fromhex("b700000001000000" + "9500000000000000"))
    after = load(os_, "xdp", SIMPLE, "after.c")
    for handle in (before, middle, drop, after):
        os_.attach_ebpf_monitor(handle, point)
    send_frames(wire.right, wire.right_iface, frames(211))
    wait_until(lambda: _counted(os_, before) >= 211, "the first has counted")
    wait_until(lambda: _counted(os_, before) == _counted(os_, middle), "the second, too")
    assert _counted(os_, after) == 0
    os_.detach_ebpf_monitor(drop)
    send_frames(wire.right, wire.right_iface, frames(223))
    wait_until(lambda: _counted(os_, after) >= 223, "the last has counted")
    wait_until(lambda: _counted(os_, before) == _counted(os_, middle), "the second, too")
    assert _counted(os_, after) < _counted(os_, before)
