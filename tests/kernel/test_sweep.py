"""The ledger's sweep: what owner and guard left when both were killed, the next start settles."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator

import pytest

from hypermesh_ebpf.attach import attach, xdp
from hypermesh_ebpf.attach_type import EbpfAttachType
from tests.netns import Namespace, VethPair, needs_namespaces, wait_until
from tests.owner import (
    ENVIRONMENT,
    Owner,
    attached,
    entries,
    free_veth,
    has_clsact,
    is_gone,
    tc_filters,
)
from tests.programs import SCHED_CLS, load_program, program_id

pytestmark = [needs_namespaces, pytest.mark.kernel]


@pytest.fixture
def veth() -> Iterator[VethPair]:
    with free_veth() as pair:
        yield pair


def kill_both(owner: Owner) -> None:
    os.kill(owner.guard, signal.SIGSTOP)  # or it could be quicker than the second signal
    os.kill(owner.pid, signal.SIGKILL)
    os.kill(owner.guard, signal.SIGKILL)
    owner.process.wait()
    wait_until(lambda: is_gone(owner.guard), "the guard is dead")


def sweep(ns: Namespace, *prefix: str) -> list[str]:
    """What `ledger.sweep` tells in a process of its own."""
    code = "import json; from hypermesh_ebpf import ledger; print(json.dumps(ledger.sweep()))"
    lines: list[str] = json.loads(
        ns.run(*prefix, sys.executable, "-c", code, env=ENVIRONMENT).stdout
    )
    return lines


@pytest.mark.vm_too
def test_owner_and_guard_killed_at_once_leaves_it_to_the_next_sweep(veth: VethPair) -> None:
    owner = Owner(veth.left, "lo", veth.left_iface)
    kill_both(owner)
    assert attached(veth.left) == {owner.program}
    told = sweep(veth.left)
    assert sorted(told) == [
        f"removed xdp program {owner.program} on {iface} (owner {owner.pid} is dead)"
        for iface in (veth.left_iface, "lo")
    ]
    assert not attached(veth.left)
    assert not entries(veth.left)
    assert sweep(veth.left) == []


def test_sweep_leaves_the_living_and_other_namespaces_alone(veth: VethPair) -> None:
    living = Owner(veth.left, "lo")
    dead = Owner(veth.left, veth.left_iface)
    kill_both(dead)
    assert sweep(veth.right) == []
    assert attached(veth.left) == {living.program, dead.program}
    assert len(entries(veth.left)) == 2
    assert len(sweep(veth.left)) == 1
    assert attached(veth.left) == {living.program}
    living.tell("release")


def test_sweep_settles_silently_what_is_gone(veth: VethPair) -> None:
    owner = Owner(veth.left, veth.left_iface)
    kill_both(owner)
    veth.left.run("ip", "link", "set", veth.left_iface, "xdp", "off")
    assert sweep(veth.left) == []
    assert not entries(veth.left)


def test_sweep_does_not_touch_who_took_the_place(veth: VethPair) -> None:
    owner = Owner(veth.left, veth.left_iface)
    kill_both(owner)
    fd = load_program("hm_theirs")
    with veth.left.entered():
        xdp.attach(fd, program_id(fd), veth.left_iface, replace=True)
    assert sweep(veth.left) == []
    assert attached(veth.left) == {program_id(fd)}
    assert not entries(veth.left)
    veth.left.run("ip", "link", "set", veth.left_iface, "xdp", "off")
    os.close(fd)


def test_sweep_without_the_privilege_says_so(veth: VethPair) -> None:
    owner = Owner(veth.left, "lo")
    kill_both(owner)
    (line,) = sweep(veth.left, "setpriv", "--bounding-set=-sys_admin")
    assert line == (
        f"left xdp program {owner.program} on lo (owner {owner.pid} is dead): "
        "Operation not permitted (EPERM), CAP_SYS_ADMIN is missing; run `sudo hmebpf cleanup`"
    )
    assert attached(veth.left) == {owner.program}
    assert len(sweep(veth.left)) == 1


@pytest.mark.vm_too
def test_sweep_takes_filters_off_and_clsact_with_them(veth: VethPair) -> None:
    iface = veth.left_iface
    owner = Owner(veth.left, f"tc:{iface}", f"tc:{iface},direction=egress")
    kill_both(owner)
    assert len(tc_filters(veth.left, iface)) == 2
    line = f"removed tc program {owner.program} on {iface} (owner {owner.pid} is dead)"
    assert sweep(veth.left) == [line, line]
    assert not has_clsact(veth.left, iface)
    assert not entries(veth.left)


def test_sweep_does_not_touch_filters_that_took_the_place(veth: VethPair) -> None:
    iface = veth.left_iface
    owner = Owner(veth.left, f"tc:{iface}")
    kill_both(owner)
    veth.left.run("tc", "qdisc", "del", "dev", iface, "clsact")
    fd = load_program("hm_theirs", SCHED_CLS)
    with veth.left.entered():
        point = EbpfAttachType.tc(iface, priority=49152)
        attach(point, fd, program_id(fd), lambda hold: None)
    assert sweep(veth.left) == []
    assert tc_filters(veth.left, iface) == [("ingress", 49152, program_id(fd))]
    assert not entries(veth.left)
    veth.left.run("tc", "qdisc", "del", "dev", iface, "clsact")
    os.close(fd)
