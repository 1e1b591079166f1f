"""The guard: nothing of ours stays on an interface, however its owner ends.

The owner is a process of its own in a throw-away namespace; what is on the interface is told by
`ip`, run by the test.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hypermesh_ebpf import guard_process, ledger
from hypermesh_ebpf.attach import Hold, xdp
from hypermesh_ebpf.errors import GuardError
from hypermesh_ebpf.guard import Guard, Outcome
from tests.netns import Namespace, VethPair, needs_namespaces, veth_pair, wait_until
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
from tests.programs import load_program, program_id

pytestmark = [needs_namespaces, pytest.mark.kernel]


@pytest.fixture
def veth() -> Iterator[VethPair]:
    with free_veth() as pair:
        yield pair


def kill_owner(owner: Owner) -> None:
    os.kill(owner.pid, signal.SIGKILL)


def kill_group(owner: Owner) -> None:
    os.killpg(owner.pid, signal.SIGKILL)


def interrupt_group(owner: Owner) -> None:
    os.killpg(owner.pid, signal.SIGINT)


def hang_up_group(owner: Owner) -> None:
    os.killpg(owner.pid, signal.SIGHUP)


def signal_both(owner: Owner) -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGTSTP):
        os.kill(owner.guard, number)
    os.kill(owner.pid, signal.SIGTERM)


def close_input(owner: Owner) -> None:
    assert owner.process.stdin
    owner.process.stdin.close()  # it ends without releasing


@pytest.mark.parametrize(
    "end",
    [
        kill_owner,
        pytest.param(kill_group, marks=pytest.mark.vm_too),
        interrupt_group,
        hang_up_group,
        signal_both,
        close_input,
    ],
)
def test_nothing_stays_however_the_owner_ends(veth: VethPair, end: Callable[[Owner], None]) -> None:
    owner = Owner(veth.left, "lo", veth.left_iface, start_new_session=True)
    assert attached(veth.left) == {owner.program}
    assert len(entries(veth.left)) == 2
    started = time.monotonic()
    end(owner)
    wait_until(lambda: not entries(veth.left), "the guard has settled both")
    milliseconds = (time.monotonic() - started) * 1000
    print(f"settled after {milliseconds:.0f} ms")
    assert not attached(veth.left)
    wait_until(lambda: is_gone(owner.guard), "the guard has ended")


def test_owner_dies_with_a_child_that_inherited_the_socket(veth: VethPair) -> None:
    owner = Owner(veth.left, veth.left_iface)
    child = owner.tell("fork")["child"]
    assert attached(veth.left) == {owner.program}  # the child's release released nothing
    kill_owner(owner)
    try:
        wait_until(lambda: not attached(veth.left), "the interface is free")
        assert not is_gone(child)
    finally:
        os.kill(child, signal.SIGKILL)


def test_guard_holds_nothing_of_the_users(veth: VethPair) -> None:
    owner = Owner(veth.left, veth.left_iface)
    links = [os.readlink(path) for path in Path(f"/proc/{owner.guard}/fd").iterdir()]
    assert not [link for link in links if link.startswith(("pipe:", "/dev/pts", "/proc"))]
    assert os.readlink(f"/proc/{owner.guard}/cwd") == "/"
    assert os.getsid(owner.guard) == owner.guard
    assert Path(f"/proc/{owner.guard}/comm").read_text() == "hmebpf-guard\n"
    kill_owner(owner)


def test_pipe_ends_with_the_owner_not_the_guard(veth: VethPair) -> None:
    owner = Owner(veth.left, veth.left_iface)
    os.kill(owner.guard, signal.SIGSTOP)
    kill_owner(owner)
    assert owner.process.stdout
    assert owner.process.stdout.read() == ""  # hangs if the guard had the pipe
    assert attached(veth.left) == {owner.program}
    os.kill(owner.guard, signal.SIGCONT)


def test_memory_of_the_guard(veth: VethPair) -> None:
    owner = Owner(veth.left, veth.left_iface)
    rollup = Path(f"/proc/{owner.guard}/smaps_rollup").read_text()
    kib = {line.split(":")[0]: line.split()[1] for line in rollup.splitlines()[1:]}
    print(f"resident {kib['Rss']} KiB, its share {kib['Pss']} KiB")
    assert int(kib["Pss"]) <= 9 * 1024
    kill_owner(owner)


@pytest.mark.vm_too
def test_killed_guard_is_noticed_and_replaced(veth: VethPair) -> None:
    owner = Owner(veth.left, "lo", veth.left_iface)
    assert owner.tell("watch") == {"waiting": True}
    os.kill(owner.guard, signal.SIGKILL)
    said = owner.read()
    assert said["replaced"] is True
    assert said["guard"] != owner.guard
    assert attached(veth.left) == {owner.program}
    kill_owner(owner)


def test_release_with_a_killed_guard_still_releases(veth: VethPair) -> None:
    owner = Owner(veth.left, "lo", veth.left_iface)
    os.kill(owner.guard, signal.SIGKILL)
    assert owner.tell("release") == {"outcomes": [["removed", ""], ["removed", ""]]}
    assert not attached(veth.left)


def test_release_with_a_stopped_guard_still_releases(
    veth: VethPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hypermesh_ebpf.guard._ANSWER_SECONDS", 1.0)
    fd = load_program()
    with veth.left.entered():
        guard = Guard.start()
        guard.hold(Hold(1, "lo", 0, fd), None)
        xdp.attach(fd, program_id(fd), "lo")
        os.kill(guard.pid, signal.SIGSTOP)
        assert guard.release() == [Outcome(1, "removed")]
    os.close(fd)


def test_orderly_release_tells_each_outcome(veth: VethPair) -> None:
    owner = Owner(veth.left, "lo", veth.left_iface)
    assert owner.tell("release") == {"outcomes": [["removed", ""], ["removed", ""]]}
    assert not attached(veth.left)
    assert not entries(veth.left)
    assert owner.tell("release") == {"outcomes": []}
    wait_until(lambda: not Path(f"/proc/{owner.guard}").exists(), "the guard was reaped")


def test_taken_off_by_the_user_is_no_error(veth: VethPair) -> None:
    owner = Owner(veth.left, "lo")
    veth.left.run("ip", "link", "set", "lo", "xdp", "off")
    (outcome,) = owner.tell("release")["outcomes"]
    assert outcome[0] == "not ours"
    assert not entries(veth.left)


@pytest.mark.parametrize("orderly", [True, False])
def test_somebody_elses_program_in_our_place_stays(veth: VethPair, orderly: bool) -> None:
    owner = Owner(veth.left, veth.left_iface)
    fd = load_program("hm_theirs")
    with veth.left.entered():
        theirs = xdp.attach(fd, program_id(fd), veth.left_iface, replace=True)
    if orderly:
        assert owner.tell("release")["outcomes"][0][0] == "not ours"
    else:
        kill_owner(owner)
        wait_until(lambda: is_gone(owner.guard), "the guard has ended")
    assert attached(veth.left) == {theirs.prog_id}
    assert not entries(veth.left)
    veth.left.run("ip", "link", "set", veth.left_iface, "xdp", "off")
    os.close(fd)


def test_held_but_never_attached_is_no_error(veth: VethPair) -> None:
    fd = load_program()
    with veth.left.entered(), Guard.start() as guard:
        hold = Hold(1, "lo", program_id(fd), fd)
        guard.hold(hold, str(ledger.record(hold)))
        assert entries(veth.left)
        assert [outcome.what for outcome in guard.release()] == ["not ours"]
    os.close(fd)


def test_interface_removed_while_attached() -> None:
    with veth_pair() as pair:
        owner = Owner(pair.left, pair.left_iface)
        pair.left.run("ip", "link", "del", pair.left_iface)
        assert owner.tell("release") == {"outcomes": [["gone", "No such device (ENODEV)"]]}
        assert not entries(pair.left)


@pytest.mark.parametrize("orderly", [True, False])
def test_interface_moved_to_another_namespace(orderly: bool) -> None:
    with veth_pair() as pair, Namespace() as other:
        other.start("sleep", "1000")  # a namespace that some process lives in, as containers are
        owner = Owner(pair.left, pair.left_iface)
        pair.left.run("ip", "link", "set", pair.left_iface, "netns", other.path)
        assert attached(other) == {owner.program}
        if orderly:
            assert owner.tell("release")["outcomes"][0][0] == "moved"
        else:
            kill_owner(owner)
            wait_until(lambda: is_gone(owner.guard), "the guard has ended")
        assert not attached(other)
        assert not entries(pair.left)


def test_what_cannot_be_removed_is_an_error() -> None:
    code = """
import ctypes, sys
from hypermesh_ebpf import ledger
from hypermesh_ebpf.errors import DetachError
from hypermesh_ebpf.attach import Hold, xdp
from hypermesh_ebpf.guard import Guard
from tests.programs import load_program, program_id
fd = load_program()
xdp.attach(fd, program_id(fd), "lo")
PR_CAPBSET_DROP, CAP_NET_ADMIN = 24, 12
assert ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, CAP_NET_ADMIN, 0, 0, 0) == 0
guard = Guard.start()  # what it executes has no CAP_NET_ADMIN any more
path = ledger.record(Hold(1, "lo", program_id(fd), fd))
guard.hold(Hold(1, "lo", 0, fd), str(path))
try:
    guard.release()
except DetachError as error:
    print(error, "|", error.remedy, path.exists())
path.unlink()
"""
    with Namespace() as ns:
        done = ns.run(sys.executable, "-c", code, env=ENVIRONMENT)
        assert attached(ns)
    assert done.stdout == (
        "detach xdp from lo: Operation not permitted (EPERM) | "
        "see it with `hmebpf list`, take it off with `hmebpf cleanup` as root True\n"
    )


def test_guard_cannot_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nonexistent/python3")
    with pytest.raises(GuardError, match=r"start the guard: .*No such file"):
        Guard.start()


def test_nothing_can_detach_is_told(veth: VethPair, monkeypatch: pytest.MonkeyPatch) -> None:
    fd = load_program()
    with veth.left.entered():
        guard = Guard.start()
        guard.hold(Hold(1, "lo", 0, fd), None)
        xdp.attach(fd, program_id(fd), "lo")
        os.kill(guard.pid, signal.SIGKILL)
        wait_until(lambda: is_gone(guard.pid), "the guard is dead")
        monkeypatch.setattr(sys, "executable", "/nonexistent/python3")
        with pytest.raises(GuardError) as caught:
            guard.release()
    assert str(caught.value).startswith("detach xdp: start the guard: ")
    assert caught.value.remedy == "run `hmebpf cleanup` as root"
    veth.left.run("ip", "link", "set", "lo", "xdp", "off")
    os.close(fd)


@pytest.mark.parametrize("delay", ["0", "0.1"])
def test_attach_that_comes_after_the_owners_death(veth: VethPair, delay: str) -> None:
    """A worker inside the attach while everything is killed: the guard looks again."""
    owner = Owner(veth.left, "lo")
    veth.left.run("ip", "link", "set", "lo", "xdp", "off")
    code = """
import os, signal, sys, time
from hypermesh_ebpf.attach import xdp
from hypermesh_ebpf.ledger import _program_fd
import pyroute2
fd = _program_fd(int(sys.argv[1]))
os.kill(int(sys.argv[2]), signal.SIGKILL)
time.sleep(float(sys.argv[3]))
print(xdp.attach(fd, int(sys.argv[1]), "lo").mode)
"""
    late = veth.left.run(
        sys.executable, "-c", code, str(owner.program), str(owner.pid), delay, env=ENVIRONMENT
    )
    assert late.stdout == "generic\n"
    wait_until(lambda: not entries(veth.left), "the guard has settled it")
    assert not attached(veth.left)


def test_guard_that_dies_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    fd = load_program()
    with Guard.start() as guard:
        with pytest.raises(GuardError, match="start the guard: it died 3 times"):
            guard.hold(Hold(1, "lo", 0, fd), None)
        monkeypatch.undo()
    os.close(fd)


def test_released_guard_is_not_to_be_used() -> None:
    guard = Guard.start()
    assert guard.release() == []
    with pytest.raises(GuardError, match="it was released already"):
        guard.hold(Hold(1, "lo", 0, 0), None)


def test_guard_survives_the_thread_that_started_it(veth: VethPair) -> None:
    import threading

    guards: list[Guard] = []
    thread = threading.Thread(target=lambda: guards.append(Guard.start()))
    thread.start()
    thread.join()
    fd = load_program()
    with guards[0] as guard:
        pid = guard.pid
        guard.hold(Hold(1, "lo", 0, fd), None)
        assert guard.pid == pid
    os.close(fd)


def test_owner_side_imports_no_pyroute2() -> None:
    code = "import sys, hypermesh_ebpf.guard, hypermesh_ebpf.ledger; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, check=True
    )
    assert not {"pyroute2", "asyncio", "ctypes", "subprocess"} & set(done.stdout.split())


def test_kernel_words_reach_the_outcome() -> None:
    """The raw netlink answer is read right: words of the kernel, not only a number."""
    fd = load_program()
    with Namespace() as ns, ns.entered():
        netlink = guard_process.netlink_socket()
        outcome, number, words = guard_process.remove(netlink, 1, fd)
        netlink.close()
    os.close(fd)
    assert (outcome, number) == (guard_process.NOT_OURS, 0)
    assert words == "Active program does not match expected"


def places(iface: str) -> tuple[str, str]:
    return f"tc:{iface}", f"tc:{iface},direction=egress,priority=5"


@pytest.mark.parametrize(
    "end", [kill_owner, pytest.param(kill_group, marks=pytest.mark.vm_too), close_input]
)
def test_no_filter_stays_however_the_owner_ends(
    veth: VethPair, end: Callable[[Owner], None]
) -> None:
    iface = veth.left_iface
    owner = Owner(veth.left, *places(iface), start_new_session=True)
    assert tc_filters(veth.left, iface) == [
        ("ingress", 49152, owner.program),
        ("egress", 5, owner.program),
    ]
    assert len(entries(veth.left)) == 2
    started = time.monotonic()
    end(owner)
    wait_until(lambda: not entries(veth.left), "the guard has settled both")
    print(f"settled after {(time.monotonic() - started) * 1000:.0f} ms")
    assert not tc_filters(veth.left, iface)
    assert not has_clsact(veth.left, iface)
    wait_until(lambda: is_gone(owner.guard), "the guard has ended")


def test_killed_guard_is_replaced_by_one_that_holds_the_filters(veth: VethPair) -> None:
    owner = Owner(veth.left, *places(veth.left_iface))
    os.kill(owner.guard, signal.SIGKILL)
    assert owner.tell("release") == {"outcomes": [["removed", ""], ["removed", ""]]}
    assert not has_clsact(veth.left, veth.left_iface)


def test_filter_taken_off_by_the_user_is_no_error(veth: VethPair) -> None:
    owner = Owner(veth.left, *places(veth.left_iface))
    veth.left.run("tc", "filter", "del", "dev", veth.left_iface, "ingress")
    outcomes = owner.tell("release")["outcomes"]
    assert [outcome for outcome, _ in outcomes] == ["not ours", "removed"]
    assert not has_clsact(veth.left, veth.left_iface)


def test_clsact_taken_off_by_the_user_is_no_error(veth: VethPair) -> None:
    owner = Owner(veth.left, *places(veth.left_iface))
    veth.left.run("tc", "qdisc", "del", "dev", veth.left_iface, "clsact")
    outcomes = owner.tell("release")["outcomes"]
    assert [outcome for outcome, _ in outcomes] == ["not ours", "not ours"]
    assert not entries(veth.left)


def test_memory_of_the_guard_that_holds_filters(veth: VethPair) -> None:
    owner = Owner(veth.left, *places(veth.left_iface))
    rollup = Path(f"/proc/{owner.guard}/smaps_rollup").read_text()
    kib = {line.split(":")[0]: line.split()[1] for line in rollup.splitlines()[1:]}
    print(f"resident {kib['Rss']} KiB, its share {kib['Pss']} KiB")
    assert int(kib["Pss"]) <= 9 * 1024
    kill_owner(owner)


@pytest.mark.parametrize("guard_dies", [False, True])
def test_dropped_program_is_left_where_it_is(veth: VethPair, guard_dies: bool) -> None:
    fd, other = load_program(), load_program()
    with veth.left.entered(), Guard.start() as guard:
        kept = Hold(1, "lo", program_id(fd), fd)
        dropped = Hold(kept.ifindex, veth.left_iface, program_id(other), other)
        for hold in (kept, dropped):
            guard.hold(hold, str(ledger.record(hold)))
        xdp.attach(other, program_id(other), "lo")
        if guard_dies:
            os.kill(guard.pid, signal.SIGKILL)
        guard.drop(dropped)
        guard.drop(dropped)  # which it does not hold any more
        assert [entry.prog_id for entry in entries(veth.left)] == [kept.prog_id]
        assert [outcome.what for outcome in guard.release()] == ["not ours"]
    assert attached(veth.left) == {program_id(other)}
    veth.left.run("ip", "link", "set", "lo", "xdp", "off")
    os.close(fd)
    os.close(other)


@pytest.mark.parametrize("guard_dies", [False, True])
def test_one_of_several_can_be_removed(veth: VethPair, guard_dies: bool) -> None:
    fd = load_program()
    with veth.left.entered(), Guard.start() as guard:
        holds = [
            Hold(xdp.find_interface(iface), iface, program_id(fd), fd)
            for iface in ("lo", veth.left_iface)
        ]
        for hold in holds:
            guard.hold(hold, str(ledger.record(hold)))
            xdp.attach(fd, program_id(fd), hold.iface)
        if guard_dies:
            os.kill(guard.pid, signal.SIGKILL)
        assert guard.remove(holds[0]) == Outcome(1, "removed")
        assert guard.remove(holds[0]) is None
        assert [entry.iface for entry in entries(veth.left)] == [veth.left_iface]
        assert guard.release() == [Outcome(holds[1].ifindex, "removed")]
    os.close(fd)
