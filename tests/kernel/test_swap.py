"""A program is swapped for another while packets flow: each packet meets exactly one of them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace as changed

import pytest

from hypermesh_ebpf import ledger
from hypermesh_ebpf.attach import Hold, attach, swap
from hypermesh_ebpf.attach_type import EbpfAttachType
from hypermesh_ebpf.bpf.programs import close_attachments
from hypermesh_ebpf.errors import AttachError, HookUnsupported
from hypermesh_ebpf.guard import Guard
from tests.counting import TC_PASS, XDP_PASS, Counter
from tests.netns import VethPair, needs_namespaces, veth_pair
from tests.packets import ethernet, received_packets, send_frames

pytestmark = [needs_namespaces, pytest.mark.kernel, pytest.mark.vm_wide]

PACKETS = 20011
SWAPS = 40
_EXPERIMENTAL = 0x88B5


@pytest.fixture
def veth() -> Iterator[VethPair]:
    with veth_pair() as pair, pair.left.entered():
        for ns in (pair.left, pair.right):
            switch = "/proc/sys/net/ipv6/conf/all/disable_ipv6"
            ns.run("sh", "-c", f"! test -e {switch} || echo 1 > {switch}")
        yield pair


@pytest.mark.parametrize(
    "text",
    [
        "xdp:IFACE",
        "xdp:IFACE,mode=generic",
        "xdp:IFACE,link",
        "tc:IFACE",
        "tc:IFACE,link",
    ],
)
def test_no_packet_in_between(veth: VethPair, text: str) -> None:
    point = EbpfAttachType.parse(text.replace("IFACE", veth.left_iface))
    returns = XDP_PASS if point.kind == "xdp" else TC_PASS
    with ExitStack() as stack:
        guard = stack.enter_context(Guard.start())
        counters = [stack.enter_context(Counter()) for _ in range(2)]
        loaded = [each.load(point, returns=returns) for each in counters]
        holds: list[Hold] = []

        def hold(wanted: Hold) -> None:
            guard.hold(wanted, str(ledger.record(wanted)))
            holds.append(wanted)

        (fd, prog_id), _ = loaded
        try:
            made = attach(point, fd, prog_id, hold)
        except HookUnsupported as error:
            pytest.skip(str(error))
        before = received_packets(veth.left, veth.left_iface)
        frames = [ethernet(_EXPERIMENTAL, bytes(50))] * PACKETS
        sender = threading.Thread(target=send_frames, args=(veth.right, veth.right_iface, frames))
        sender.start()
        swaps = 0
        while sender.is_alive() or swaps < SWAPS:
            number, swaps = swaps, swaps + 1
            (old_fd, _old), (new_fd, new_id) = loaded[number % 2], loaded[(number + 1) % 2]
            if holds:
                old, new = holds[-1], changed(holds[-1], prog_id=new_id, prog_fd=new_fd)
                hold(new)
                swap.replace(point, old_fd, new_fd, old)
                guard.drop(old)
            else:
                swap.replace(point, old_fd, new_fd, None, made.descriptors)
        sender.join()
        counted = [each.read() for each in counters]
        received = received_packets(veth.left, veth.left_iface) - before
        close_attachments(made.descriptors)
        if holds:
            assert [outcome.what for outcome in guard.release()] == ["removed"]
    print(text, counted, f"{swaps} swaps")
    assert sum(counted) == PACKETS == received
    assert all(counted)
    assert not [entry for entry in ledger.entries() if entry.netns == veth.left.inode]


@pytest.mark.parametrize("text", ["xdp:IFACE", "tc:IFACE", "xdp:IFACE,link"])
def test_only_our_own_program_is_swapped(veth: VethPair, text: str) -> None:
    point = EbpfAttachType.parse(text.replace("IFACE", veth.left_iface))
    returns = XDP_PASS if point.kind == "xdp" else TC_PASS
    holds: list[Hold] = []
    with Counter() as counter, Guard.start() as guard:
        fd, prog_id = counter.load(point, returns=returns)
        other_fd, other_id = counter.load(point, returns=returns)

        def hold(wanted: Hold) -> None:
            guard.hold(wanted, None)
            holds.append(wanted)

        made = attach(point, fd, prog_id, hold)
        old = changed(holds[0], prog_id=other_id, prog_fd=other_fd) if holds else None
        with pytest.raises(AttachError) as caught:  # as if the other one were there
            swap.replace(point, other_fd, fd, old, made.descriptors)
        assert f"{point.kind}" in str(caught.value)
        if holds:
            assert "taken off or replaced by somebody else" in str(caught.value)
            assert f"hmebpf list --iface {veth.left_iface}" in (caught.value.remedy or "")
        close_attachments(made.descriptors)
