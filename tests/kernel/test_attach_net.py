"""XDP, traffic control and control groups: packets counted against the kernel's own statistics.

What is on an interface is told by `tc` and `ip`, run by the test.
"""

from __future__ import annotations

import json
import os
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from hypermesh_ebpf import ledger
from hypermesh_ebpf.attach import Attachment, Hold, attach, tc
from hypermesh_ebpf.attach_type import CGROUP_POINTS, EbpfAttachType
from hypermesh_ebpf.bpf.programs import close_attachments
from hypermesh_ebpf.errors import (
    AttachError,
    HookUnsupported,
    InterfaceBusy,
    InterfaceNotFound,
    TargetGone,
    UsageError,
)
from hypermesh_ebpf.guard import Guard
from hypermesh_ebpf.host.filesystems import CGROUP2, find_mount
from hypermesh_ebpf.host.hooks import require_hook
from tests.counting import CGROUP_ALLOW, TC_NEXT, TC_PASS, XDP_PASS, Counter, wait_until_freed
from tests.netns import Namespace, VethPair, needs_namespaces, veth_pair
from tests.owner import has_clsact, tc_filters
from tests.packets import ethernet, received_packets, send_frames

pytestmark = [needs_namespaces, pytest.mark.kernel, pytest.mark.vm_wide]

PRIME = 101
_EXPERIMENTAL = 0x88B5  # an EtherType for local experiments: nobody answers


@pytest.fixture
def counter() -> Iterator[Counter]:
    with Counter() as made:
        yield made


def silence(pair: VethPair) -> None:
    """IPv6 off: nothing but the test sends on this cable."""
    for ns in (pair.left, pair.right):
        switch = "/proc/sys/net/ipv6/conf/all/disable_ipv6"
        ns.run("sh", "-c", f"! test -e {switch} || echo 1 > {switch}")


@pytest.fixture(scope="module")
def cable() -> Iterator[VethPair]:
    with veth_pair() as pair, pair.left.entered():
        silence(pair)
        yield pair


@pytest.fixture
def veth(cable: VethPair) -> Iterator[VethPair]:
    """The pair; at the end nothing may be on its left side."""
    yield cable
    assert not tc_filters(cable.left, cable.left_iface)
    assert not has_clsact(cable.left, cable.left_iface)
    assert "xdp" not in on_link(cable.left, cable.left_iface)
    assert not [entry for entry in ledger.entries() if entry.netns == cable.left.inode]


def on_link(ns: Namespace, iface: str) -> dict[str, Any]:
    (link,) = json.loads(ns.run("ip", "-j", "-d", "link", "show", "dev", iface).stdout)
    return dict(link)


class Holder:
    """What the parent does at "hold": the ledger's entry, and the guard."""

    def __init__(self, guard: Guard) -> None:
        self.guard = guard
        self.holds: list[Hold] = []

    def __call__(self, hold: Hold) -> None:
        self.guard.hold(hold, str(ledger.record(hold)))
        self.holds.append(hold)


@contextmanager
def guarded() -> Iterator[Holder]:
    with Guard.start() as guard:
        yield Holder(guard)


def never(hold: object) -> None:
    raise AssertionError("a link ends with its maker")


def receive(veth: VethPair, number: int) -> int:
    """Send that many frames to the left side; how many it says it received meanwhile."""
    before = received_packets(veth.left, veth.left_iface)
    frame = ethernet(_EXPERIMENTAL, bytes(50))
    assert send_frames(veth.right, veth.right_iface, [frame] * number) == number
    return received_packets(veth.left, veth.left_iface) - before


def others_filter(veth: VethPair, counter: Counter, priority: int) -> int:
    """A filter of somebody else's on the left side, which lets everything go on; its program."""
    point = EbpfAttachType.tc(veth.left_iface, priority=priority)
    fd, prog_id = counter.load(point, returns=TC_NEXT, name="theirs")
    attach(point, fd, prog_id, lambda hold: None)
    return prog_id


def others_clsact(veth: VethPair) -> None:
    veth.left.run("tc", "qdisc", "add", "dev", veth.left_iface, "clsact")


def free_clsact(veth: VethPair) -> None:
    veth.left.run("tc", "qdisc", "del", "dev", veth.left_iface, "clsact")


@pytest.mark.parametrize(
    ("options", "hook"),
    [
        ("", "xdp:native"),
        ("mode=generic", "xdp:generic"),
        ("link", "xdp:native"),
        ("mode=generic,link", "xdp:generic"),
    ],
)
def test_xdp_counts_every_packet(veth: VethPair, counter: Counter, options: str, hook: str) -> None:
    point = EbpfAttachType.parse(f"xdp:{veth.left_iface},{options}".rstrip(","))
    assert require_hook(point) == veth.left_iface
    fd, prog_id = counter.load(point, returns=XDP_PASS)
    with guarded() as holder:
        made = attach(point, fd, prog_id, never if "link" in options else holder)
        assert made.hook == hook
        assert made.held == ("link" not in options)
        assert made.ifindex == on_link(veth.left, veth.left_iface)["ifindex"]
        assert on_link(veth.left, veth.left_iface)["xdp"]["prog"]["id"] == prog_id
        assert receive(veth, PRIME) == PRIME
        assert counter.read() == PRIME == counter.runs(fd)
        close_attachments(made.descriptors)
    assert receive(veth, 7) == 7
    assert counter.read() == PRIME


def test_xdp_that_is_to_be_pinned_is_a_link(veth: VethPair, counter: Counter) -> None:
    point = EbpfAttachType.xdp("lo")
    fd, prog_id = counter.load(point, returns=XDP_PASS)
    made = attach(point, fd, prog_id, never, pinnable=True)
    assert (made.hook, made.held, len(made.descriptors)) == ("xdp:generic", False, 1)
    assert "native XDP refused" in (made.note or "")
    with pytest.raises(InterfaceBusy, match="attached by a kernel link"):
        attach(point, fd, prog_id, lambda hold: None)
    close_attachments(made.descriptors)


def test_link_takes_nobodys_place(veth: VethPair, counter: Counter) -> None:
    fd, prog_id = counter.load(EbpfAttachType.xdp("lo"), returns=XDP_PASS)
    with guarded() as holder:
        attach(EbpfAttachType.xdp(veth.left_iface), fd, prog_id, holder)
        with pytest.raises(InterfaceBusy) as caught:
            attach(EbpfAttachType.xdp(veth.left_iface, link=True, replace=True), fd, prog_id, never)
    assert "whose place no link can take" in str(caught.value)
    assert caught.value.remedy == (
        f"see it with `hmebpf list --iface {veth.left_iface}`; "
        "attach without a link to take it over with --replace"
    )


@pytest.mark.parametrize("returns", [TC_PASS, TC_NEXT])
def test_tc_counts_every_packet_that_comes(veth: VethPair, counter: Counter, returns: int) -> None:
    point = EbpfAttachType.tc(veth.left_iface)
    assert require_hook(point) == veth.left_iface
    fd, prog_id = counter.load(point, returns=returns)
    with guarded() as holder:
        made = attach(point, fd, prog_id, holder)
        assert (made.hook, made.held, made.descriptors, made.note) == ("tc:ingress", True, (), None)
        assert tc_filters(veth.left, veth.left_iface) == [("ingress", 49152, prog_id)]
        (entry,) = [e for e in ledger.entries() if e.netns == veth.left.inode]
        assert (entry.kind, entry.prog_id, entry.filter) == ("tc", prog_id, made.filter)
        assert receive(veth, PRIME) == PRIME
        assert counter.read() == PRIME == counter.runs(fd)
        (outcome,) = holder.guard.release()
        assert (outcome.what, outcome.kind) == ("removed", "tc")
    assert receive(veth, 7) == 7
    assert counter.read() == PRIME


def test_tc_counts_every_packet_that_goes(veth: VethPair, counter: Counter) -> None:
    point = EbpfAttachType.tc(veth.left_iface, direction="egress", priority=7)
    fd, prog_id = counter.load(point)
    with guarded() as holder:
        made = attach(point, fd, prog_id, holder)
        assert made.hook == "tc:egress"
        assert tc_filters(veth.left, veth.left_iface) == [("egress", 7, prog_id)]
        before = received_packets(veth.right, veth.right_iface)
        frames = [ethernet(_EXPERIMENTAL, bytes(50))] * PRIME
        send_frames(veth.left, veth.left_iface, frames)
        assert counter.read() == PRIME
        assert received_packets(veth.right, veth.right_iface) - before == PRIME


def test_both_directions_at_once(veth: VethPair, counter: Counter) -> None:
    """One program, two filters: each is taken off, and clsact with the last."""
    with guarded() as holder:
        fd, prog_id = counter.load(EbpfAttachType.tc(veth.left_iface))
        for direction in ("ingress", "egress"):
            attach(EbpfAttachType.tc(veth.left_iface, direction=direction), fd, prog_id, holder)
        first, second = holder.holds
        assert [h.filter.clsact_ours for h in holder.holds if h.filter] == [True, True]
        outcome = holder.guard.remove(first)
        assert outcome
        assert outcome.what == "removed"
        assert tc_filters(veth.left, veth.left_iface) == [("egress", 49152, prog_id)]
        assert holder.guard.remove(first) is None
        assert holder.guard.remove(second)
        assert not has_clsact(veth.left, veth.left_iface)
        assert holder.guard.release() == []


def test_clsact_of_somebody_else_stays(veth: VethPair, counter: Counter) -> None:
    others_clsact(veth)
    fd, prog_id = counter.load(EbpfAttachType.tc("lo"))
    with guarded() as holder:
        attach(EbpfAttachType.tc(veth.left_iface), fd, prog_id, holder)
        assert tc_filters(veth.left, veth.left_iface)
    assert not tc_filters(veth.left, veth.left_iface)
    assert has_clsact(veth.left, veth.left_iface)
    free_clsact(veth)


def test_clsact_of_ours_stays_while_others_use_it(veth: VethPair, counter: Counter) -> None:
    fd, prog_id = counter.load(EbpfAttachType.tc("lo"))
    with guarded() as holder:
        attach(EbpfAttachType.tc(veth.left_iface), fd, prog_id, holder)
        theirs = others_filter(veth, counter, 9)
    assert tc_filters(veth.left, veth.left_iface) == [("ingress", 9, theirs)]
    free_clsact(veth)


def test_last_of_two_owners_takes_clsact_off(veth: VethPair, counter: Counter) -> None:
    fd, prog_id = counter.load(EbpfAttachType.tc("lo"))
    other_fd, other_id = counter.load(EbpfAttachType.tc("lo"))
    with guarded() as second:
        with guarded() as first:
            attach(EbpfAttachType.tc(veth.left_iface), fd, prog_id, first)
            made = attach(EbpfAttachType.tc(veth.left_iface), other_fd, other_id, second)
            assert made.note == (
                f"{veth.left_iface} ingress: runs behind 1 other filter (priority 49152), "
                "which may end before it"
            )
        assert tc_filters(veth.left, veth.left_iface) == [("ingress", 49153, other_id)]
        assert has_clsact(veth.left, veth.left_iface)


def test_priority_that_is_taken_and_one_behind_all(veth: VethPair, counter: Counter) -> None:
    others_clsact(veth)
    others_filter(veth, counter, 9)
    fd, prog_id = counter.load(EbpfAttachType.tc("lo"), returns=TC_NEXT)
    with guarded() as holder:
        with pytest.raises(InterfaceBusy) as caught:
            attach(EbpfAttachType.tc(veth.left_iface, priority=9), fd, prog_id, holder)
        assert "priority 9 is taken by another filter" in str(caught.value)
        assert "(taken: 9)" in (caught.value.remedy or "")
        assert not holder.holds
        made = attach(EbpfAttachType.tc(veth.left_iface), fd, prog_id, holder)
        assert "behind 1 other filter (priority 9)" in (made.note or "")
        assert receive(veth, 7) == 7
        assert counter.runs(fd) == 7
    free_clsact(veth)


def test_ingress_qdisc_has_no_egress_side(veth: VethPair, counter: Counter) -> None:
    veth.left.run("tc", "qdisc", "add", "dev", veth.left_iface, "ingress")
    fd, prog_id = counter.load(EbpfAttachType.tc("lo"))
    with guarded() as holder:
        with pytest.raises(InterfaceBusy, match="has no egress side"):
            attach(EbpfAttachType.tc(veth.left_iface, direction="egress"), fd, prog_id, holder)
        attach(EbpfAttachType.tc(veth.left_iface), fd, prog_id, holder)
        assert receive(veth, 7) == 7
        assert counter.read() == 7
    veth.left.run("tc", "qdisc", "del", "dev", veth.left_iface, "ingress")


@pytest.mark.parametrize("direction", ["ingress", "egress"])
def test_tcx_link(veth: VethPair, counter: Counter, direction: str) -> None:
    point = EbpfAttachType.tc(veth.left_iface, direction=direction, link=True)
    fd, prog_id = counter.load(point, returns=TC_NEXT)
    try:
        made = attach(point, fd, prog_id, never, pinnable=direction == "egress")
    except HookUnsupported as error:
        assert "this kernel has no TCX links (Linux 6.6)" in str(error)
        assert error.remedy == "attach without a link (and without --pin)"
        return
    assert (made.hook, made.held, len(made.descriptors)) == (f"tc:{direction}", False, 1)
    sender, iface = (
        (veth.right, veth.right_iface) if direction == "ingress" else (veth.left, veth.left_iface)
    )
    send_frames(sender, iface, [ethernet(_EXPERIMENTAL, bytes(50))] * PRIME)
    assert counter.read() == PRIME
    close_attachments(made.descriptors)
    send_frames(sender, iface, [ethernet(_EXPERIMENTAL, bytes(50))] * 7)
    assert counter.read() == PRIME


def test_links_have_no_priority(veth: VethPair, counter: Counter) -> None:
    point = EbpfAttachType.tc(veth.left_iface, link=True, priority=3)
    fd, prog_id = counter.load(point)
    with pytest.raises(UsageError, match="have no priority"):
        attach(point, fd, prog_id, never)
    with pytest.raises(UsageError, match="priority is 70000"):
        attach(EbpfAttachType.tc("lo", priority=70000), fd, prog_id, never)


def test_filter_that_was_taken_off_or_replaced_is_not_ours(
    veth: VethPair, counter: Counter
) -> None:
    fd, prog_id = counter.load(EbpfAttachType.tc("lo"))
    theirs_fd, theirs_id = counter.load(EbpfAttachType.tc("lo"), name="theirs")
    with guarded() as holder:
        made = attach(EbpfAttachType.tc(veth.left_iface), fd, prog_id, holder)
        assert made.filter
        assert made.ifindex
        tc.swap(veth.left_iface, made.ifindex, made.filter, prog_id, theirs_fd)
        assert [outcome.what for outcome in holder.guard.release()] == ["not ours"]
    assert tc_filters(veth.left, veth.left_iface) == [("ingress", 49152, theirs_id)]
    free_clsact(veth)


def test_wrong_program_type_leaves_no_clsact(veth: VethPair, counter: Counter) -> None:
    fd, prog_id = counter.load(EbpfAttachType.xdp("lo"))
    with guarded() as holder:
        with pytest.raises(AttachError, match="not of type sched_cls"):
            attach(EbpfAttachType.tc(veth.left_iface), fd, prog_id, holder)
        assert not has_clsact(veth.left, veth.left_iface)


def test_interface_that_is_not_there(veth: VethPair, counter: Counter) -> None:
    for kind in (EbpfAttachType.tc("nosuch0"), EbpfAttachType.xdp("nosuch0")):
        for call in (require_hook, lambda point: attach(point, 0, 0, never)):
            with pytest.raises(InterfaceNotFound) as caught:
                call(kind)
            assert veth.left_iface in (caught.value.remedy or "")
    fd, prog_id = counter.load(EbpfAttachType.tc("lo"))
    with pytest.raises(TargetGone):
        tc.attach(fd, prog_id, "gone0", 4321, "ingress", None, lambda hold: None)


def test_moved_interface_loses_its_tc_filters(counter: Counter) -> None:
    fd, prog_id = counter.load(EbpfAttachType.tc("lo"))
    with veth_pair() as pair, Namespace() as other, pair.left.entered(), guarded() as holder:
        attach(EbpfAttachType.tc(pair.left_iface), fd, prog_id, holder)
        pair.left.run("ip", "link", "set", pair.left_iface, "netns", other.path)
        assert not tc_filters(other, pair.left_iface)
        assert not has_clsact(other, pair.left_iface)
        assert [outcome.what for outcome in holder.guard.release()] == ["gone"]


_UNPRIVILEGED = """
import os, sys
from hypermesh_ebpf.attach import attach
from hypermesh_ebpf.attach_type import EbpfAttachType
from hypermesh_ebpf.errors import MissingPrivilege
from tests.counting import Counter
import sysconfig, pyroute2, hypermesh_ebpf.libbcc  # what that user cannot read here
from hypermesh_ebpf.attach import cgroup, perf_event, tc, uprobe, xdp
point = EbpfAttachType.parse(sys.argv[1])
hypermesh_ebpf.libbcc.libbcc()
with Counter() as counter:
    fd, prog_id = counter.load(point, returns=1)
    os.setresuid(65534, 65534, 65534)
    try:
        attach(point, fd, prog_id, lambda hold: None)
    except MissingPrivilege as error:
        print(error, "|", error.remedy)
"""


@pytest.mark.parametrize(
    ("point", "said"),
    [
        ("xdp:lo", "CAP_NET_ADMIN is missing"),
        ("tc:lo", "CAP_NET_ADMIN is missing"),
        ("cgroup:CGROUP", "needs CAP_BPF and CAP_NET_ADMIN"),
        ("uprobe:c:a64l", "EACCES"),
        ("perf_event:cpu-clock", "EACCES"),
    ],
)
def test_missing_privilege(point: str, said: str) -> None:
    root = find_mount(CGROUP2.magic)
    if "CGROUP" in point and root is None:
        pytest.skip("no cgroup2 hierarchy is mounted")
    with Namespace() as ns:
        done = ns.run(
            sys.executable, "-c", _UNPRIVILEGED, point.replace("CGROUP", root or ""),
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        )  # fmt: skip
    assert said in done.stdout, (done.stdout, done.stderr)
    assert "run" in done.stdout


@pytest.fixture
def group() -> Iterator[Path]:
    root = find_mount(CGROUP2.magic)
    if root is None:
        pytest.skip("no cgroup2 hierarchy is mounted")
    path = Path(root) / f"hmebpf-test-{uuid.uuid4().hex}"
    path.mkdir()
    try:
        yield path
    finally:
        path.rmdir()


# A member of the group: makes sockets that it binds, sends to itself, closes.
_MEMBER = """
import socket, sys
open(sys.argv[1] + "/cgroup.procs", "w").write("0")
number = int(sys.argv[2])
for family, address in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
    with socket.socket(family, socket.SOCK_DGRAM) as receiver:
        receiver.bind((address, 0))
        for _ in range(number if family == socket.AF_INET else 0):
            receiver.sendto(b"x", receiver.getsockname()[:2])
            receiver.recv(10)
"""
_EXPECTED = {
    "ingress": PRIME,
    "egress": PRIME,
    "sock_create": 2,
    "sock_release": 2,
    "post_bind4": 1,
    "post_bind6": 1,
}


@pytest.mark.parametrize("side", CGROUP_POINTS)
def test_cgroup_counts_what_its_members_do(group: Path, counter: Counter, side: str) -> None:
    point = EbpfAttachType.cgroup(str(group), side)
    assert require_hook(point) == str(group)
    fd, prog_id = counter.load(point, returns=CGROUP_ALLOW)
    made = attach(point, fd, prog_id, never)
    assert made.hook == f"cgroup:{group}:{side}"
    with Namespace() as ns:
        ns.run(sys.executable, "-c", _MEMBER, str(group), str(PRIME))
        assert counter.read() == _EXPECTED[side] == counter.runs(fd)
        close_attachments(made.descriptors)
        ns.run(sys.executable, "-c", _MEMBER, str(group), "7")
    assert counter.read() == _EXPECTED[side]


def test_cgroup_by_its_name_below_the_root(group: Path, counter: Counter) -> None:
    point = EbpfAttachType.cgroup(group.name)
    assert require_hook(point) == str(group)
    with pytest.raises(AttachError) as caught:
        require_hook(EbpfAttachType.cgroup(group.name[:-1]))
    assert "No such file or directory" in str(caught.value)
    assert str(group) in (caught.value.remedy or "")
    with pytest.raises(AttachError, match="not the directory of a cgroup") as caught:
        require_hook(EbpfAttachType.cgroup("/proc"))
    assert "find " in (caught.value.remedy or "")


def test_link_ends_with_its_last_descriptor(group: Path) -> None:
    point = EbpfAttachType.cgroup(str(group), "sock_create")
    with Counter() as counter:
        fd, prog_id = counter.load(point, returns=CGROUP_ALLOW)
        made: Attachment = attach(point, fd, prog_id, never)
        copies = [os.dup(each) for each in made.descriptors]
        close_attachments(made.descriptors)
        with Namespace() as ns:
            ns.run(sys.executable, "-c", _MEMBER, str(group), "1")
        assert counter.read() == 2
        close_attachments(copies)
    wait_until_freed(prog_id)
