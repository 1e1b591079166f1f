"""``--max-overhead`` on programs that really run: sampled, stopped, or left alone; and estimates
against the number of events that the test makes."""

from __future__ import annotations

import os
import shutil
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from hypermesh_ebpf import monitors
from hypermesh_ebpf.bpf.libbpf import check, libbpf
from hypermesh_ebpf.metrics.sample import Sample
from hypermesh_ebpf.opening import Opening, complete_options
from hypermesh_ebpf.overhead import LOWEST
from hypermesh_ebpf.session import Session
from tests.compiler import run_program
from tests.counting import needs_initial_pids, wait_until_freed
from tests.netns import Namespace, needs_namespaces
from tests.packets import ethernet, ipv4, udp
from tests.rungs import find_rung
from tests.running import Running, run_cli, running

pytestmark = [pytest.mark.kernel, needs_initial_pids]

PRIME = 211
CALLS = 8_009
# A process that does nothing but receive, for a minute at most.
RECEIVE = """
import socket, time
one, other = socket.socketpair()
one.setblocking(False)
end = time.monotonic() + 60
while time.monotonic() < end:
    for _ in range(1000):
        try:
            one.recv(1)
        except BlockingIOError:
            pass
"""
COUNT_CALLS = """
BPF_ARRAY(calls, u64, 1);
RAW_TRACEPOINT_PROBE(sys_enter) {
    u32 zero = 0;
    u64 *count = calls.lookup(&zero);
    if (count)
        (*count)++;
    return 0;
}
"""


@contextmanager
def load() -> Iterator[None]:
    """One CPU's worth of system calls meanwhile."""
    process = subprocess.Popen([sys.executable, "-I", "-S", "-c", RECEIVE])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def receive(times: int) -> None:
    """So many calls of recv(2), all of which fail."""
    one, other = socket.socketpair()
    with one, other:
        one.setblocking(False)
        for _ in range(times):
            with suppress(BlockingIOError):
                one.recv(1)


def to_its_end(monitor: Running) -> tuple[int, str]:
    """Read all that it writes until it ends by itself; exit status and stderr."""
    while monitor.read() is not None:
        pass
    assert monitor.process.stderr is not None
    said = monitor.process.stderr.read()
    return monitor.process.wait(), said


@contextmanager
def sampled(name: str, one_in: int, rung: str | None = None, **options: Any) -> Iterator[Session]:
    """A session that takes one event in so many."""
    monitor = monitors.load(name)
    opening = Opening(monitor, complete_options(monitor, options), True, rung, sampled=True)
    with opening.finish() as session:
        assert session.sample_one_in(one_in)
        yield session


def received(sample: Sample) -> int:
    """How many calls of the recv family it has counted, successful or not."""
    counts: list[Any] = [row["calls"] for row in sample.rows if row["call"] == "recv"]
    return sum(counts)


def is_estimate(number: Any, of: int, one_in: int) -> bool:
    """Whether a count of 1 in ``one_in``, taken at random, is within six standard deviations."""
    assert number % one_in == 0, "each one that was taken counts for that many"
    return bool(abs(number - of) <= 6 * (of * (one_in - 1)) ** 0.5)


# ---- what the command does -----------------------------------------------------------------------


def test_samples_then_stops_where_that_is_not_enough() -> None:
    with load(), running("net-monitor", "--max-overhead", "0.001", "-i", "0.2") as monitor:
        status, said = to_its_end(monitor)
    assert status == 5
    samples = [each for each in monitor.objects if each["type"] == "sample"]
    assert samples[0]["overhead"] == {
        "percent": None,
        "limit": 0.001,
        "sampled": 1.0,
        "estimated": False,
    }
    assert samples[-1]["overhead"]["sampled"] == 1 / LOWEST
    assert samples[-1]["overhead"]["estimated"] is True
    assert samples[-1]["overhead"]["percent"] > 0.001
    assert samples[-1]["totals"]["calls"] > 0
    end = monitor.objects[-1]
    assert (end["type"], end["reason"]) == ("end", "overhead")
    assert end["overhead"] == samples[-1]["overhead"]
    note, error, hint = said.splitlines()
    assert note.startswith("hmebpf: its programs take ")
    assert note.endswith(
        f" % of a CPU (--max-overhead 0.001): 1 event in {LOWEST} is taken from here on, "
        "and counts are estimates"
    )
    assert error.startswith("error: watch with net-monitor: its programs took ")
    assert error.endswith(
        f" % of a CPU, more than --max-overhead 0.001, though they looked at 1 event in {LOWEST} "
        "only"
    )
    assert hint.startswith("hint: allow more (`--max-overhead ")
    for number in monitor.start["prog_ids"]:
        wait_until_freed(number)


def test_tables_and_csv_show_it() -> None:
    with load():
        arguments = ("net-monitor", "--max-overhead", "0.001", "-i", "3", "-o")
        with ThreadPoolExecutor() as pool:
            table, csv = pool.map(lambda output: run_cli(*arguments, output), ("table", "csv"))
    assert (table.returncode, csv.returncode) == (5, 5)
    lines = table.stdout.splitlines()
    assert any(line.startswith(f"SAMPLED  1 event in {LOWEST} taken") for line in lines)
    assert lines[-1].endswith("no loss, counts are estimates, stopped by --max-overhead")
    assert csv.stdout.splitlines()[0].endswith(",sampled")
    assert csv.stdout.splitlines()[-1].endswith(f",{1 / LOWEST}")


def test_programs_of_the_users_are_taken_off(tmp_path: Path) -> None:
    source = tmp_path / "calls.c"
    source.write_text(COUNT_CALLS)
    with load(), running("run", str(source), "--max-overhead", "0.001") as monitor:
        status, said = to_its_end(monitor)
    assert status == 5
    error, _hint = said.splitlines()[-2:]
    assert error.startswith("error: watch with calls.c: its programs took ")
    assert error.endswith(
        " % of a CPU, more than --max-overhead 0.001, and programs of your own cannot be sampled"
    )
    assert monitor.last["overhead"]["sampled"] == 1.0
    assert monitor.last["rows"][0]["value"] > 0
    assert monitor.objects[-1]["reason"] == "overhead"
    for number in monitor.start["prog_ids"]:
        wait_until_freed(number)


@needs_namespaces
def test_programs_that_run_one_after_another_are_measured(tmp_path: Path) -> None:
    """The kernel counts their time for the chain that runs them, not for themselves."""
    sources = [tmp_path / name for name in ("first.c", "second.c")]
    for source in sources:
        source.write_text("int pass(struct xdp_md *ctx) { return XDP_PASS; }")
    arguments = ("--attach", "xdp:lo", "--max-overhead", "10000", "-i", "0.2", "-n", "30")
    with Namespace() as ns:
        ping = ns.start("ping", "-q", "-i", "0.002", "127.0.0.1")
        with running("run", *map(str, sources), *arguments, namespace=ns) as monitor:
            while not (monitor.read_until("sample")["overhead"]["percent"] or 0) > 0:
                assert ping.poll() is None
            monitor.finish()


def test_below_the_limit_everything_is_counted() -> None:
    """More than all CPUs: so the numbers are exact, and it ends as it always does."""
    arguments = ("--pid", str(os.getpid()), "--max-overhead", "100000%", "-i", "0.1")
    with running("net-monitor", *arguments) as monitor:
        receive(PRIME)
        while monitor.read_until("sample")["overhead"]["percent"] is None:
            pass
        monitor.finish()
    assert monitor.last["totals"]["calls"] >= PRIME
    rows = {row["call"]: row["calls"] for row in monitor.last["rows"]}
    assert rows["recv"] == PRIME
    assert monitor.last["overhead"]["sampled"] == 1.0
    assert monitor.last["overhead"]["estimated"] is False
    assert 0 < monitor.last["overhead"]["percent"] < 100 * (os.cpu_count() or 1)


def test_nothing_is_told_of_what_nobody_asked() -> None:
    with running("net-monitor", "-i", "0.1") as monitor:
        monitor.read_until("sample")
        objects = monitor.finish()
    assert not any("overhead" in each for each in objects)


# ---- estimates -----------------------------------------------------------------------------------


NEED_OTHER_KERNELS = ("kprobe", "fentry")
RUNGS = [
    pytest.param(
        name,
        rung.name,
        marks=pytest.mark.vm_too if rung.name in NEED_OTHER_KERNELS else pytest.mark.vm_wide,
    )
    for name in monitors.names()
    for rung in monitors.load(name).rungs
]


@needs_namespaces
@pytest.mark.parametrize(("name", "rung"), RUNGS)
def test_every_rung_can_be_sampled(name: str, rung: str) -> None:
    """The verifier of this kernel takes the programs, and they pass events over."""
    find_rung({each.name: each for each in monitors.load(name).rungs}, rung)
    # Of this process alone: another one may be in a call that began before sampling did.
    options: dict[str, Any] = {"iface": ("lo",)} if name == "xdp" else {"pid": os.getpid()}
    with Namespace() as ns, ns.entered(), sampled(name, LOWEST, rung, **options) as session:
        before = session.read().totals
        receive(PRIME)
        ns.run("ping", "-q", "-c", "3", "-i", "0.01", "127.0.0.1")
        totals = session.read().totals
    for counter in monitors.load(name).counters:
        if counter in totals:
            assert (totals[counter] - before[counter]) % LOWEST == 0  # type: ignore[operator]


@pytest.mark.vm_wide
@pytest.mark.parametrize("one_in", [2, 16])
def test_calls_are_estimated(one_in: int) -> None:
    with sampled("net-monitor", one_in, pid=os.getpid(), by="process") as session:
        before = received(session.read())
        receive(CALLS)
        sample = session.read()
    (row,) = [row for row in sample.rows if row["call"] == "recv"]
    assert is_estimate(received(sample) - before, CALLS, one_in)
    assert row["errors"] == row["errnos"]["EAGAIN"] >= received(sample) - before  # type: ignore
    (slots,) = [each.buckets for each in sample.histograms if each.name == "recv latency"]
    assert sum(count for _low, _high, count in slots) == row["calls"]


def test_share_may_change_while_it_counts() -> None:
    """What was counted until then stays as it is."""
    with sampled("net-monitor", 1, pid=os.getpid()) as session:
        before = received(session.read())
        receive(CALLS)
        exact = received(session.read())
        session.sample_one_in(8)
        receive(CALLS)
        estimate = received(session.read())
        session.sample_one_in(1)
        receive(CALLS)
        last = received(session.read())
    assert exact - before == CALLS
    assert is_estimate(estimate - exact, CALLS, 8)
    assert last - estimate == CALLS


def test_call_that_never_returned_is_not_taken_for_another() -> None:
    """Its entry must not be met by the return of a call that was passed over: an hour's latency."""
    with sampled("net-monitor", LOWEST, pid=os.getpid()) as session:
        before = received(session.read())
        (target,) = session._loaded.targets
        ((spec, places),) = [each for each in target.maps if each[0].name == "places"]
        thread = os.getpid() | os.getpid() << 32
        place = (os.getpid() * 0x9E35 % spec.max_entries).to_bytes(4, sys.byteorder)
        recv, weight, claims = 3, 1, 1
        begun_at_boot = struct.pack("=QQQQIIBBH4x", thread, 1, 0, 0, 0, claims, recv, 0, weight)
        assert len(begun_at_boot) == spec.value_size
        one, other = socket.socketpair()
        with one, other:
            one.setblocking(False)
            for _ in range(PRIME):
                check(libbpf().bpf_map_update_elem(places, place, begun_at_boot, 0))
                with pytest.raises(BlockingIOError):
                    one.recv(1)
        sample = session.read()
    for histogram in sample.histograms:
        assert all(high < 10_000_000_000 for _low, high, _count in histogram.buckets)
    assert is_estimate(received(sample) - before, PRIME, LOWEST)


@pytest.mark.vm_wide
def test_execs_are_estimated_and_each_says_how_many_it_stands_for(tmp_path: Path) -> None:
    name = f"hm{os.getpid()}"  # nobody else executes it
    program = tmp_path / name
    program.symlink_to(shutil.which("true") or "/bin/true")
    with sampled("exec-monitor", 2, by="comm", comm=name) as session:
        for _ in range(PRIME):
            subprocess.run([program], check=True)
        events = session.events()
        sample = session.read()
    assert is_estimate(sample.totals["execs"], PRIME, 2)
    assert [event.fields["stands_for"] for event in events] == [2] * len(events)
    assert sample.totals["execs"] == 2 * len(events)
    assert [(row["comm"], row["execs"]) for row in sample.rows] == [(name, 2 * len(events))]


@needs_namespaces
@pytest.mark.vm_wide
def test_packets_are_estimated() -> None:
    """Runs of the program itself: exactly so many, in the namespace of nobody else."""
    packet = ethernet(0x0800, ipv4(17, udp(53, b"x" * 30)))
    with Namespace() as ns, ns.entered(), sampled("xdp", 4, iface=("lo",), by="port") as session:
        ((program,),) = [target.programs for target in session._loaded.targets]
        passed = run_program(program.fd, packet, repeat=CALLS)
        sample = session.read()
    assert passed == 2, "XDP_PASS, taken or not"
    packets = sample.totals["packets"]
    assert is_estimate(packets, CALLS, 4)
    assert sample.totals["bytes"] == packets * len(packet)  # type: ignore[operator]
    (row,) = sample.rows
    assert (row["protocol"], row["port"], row["packets"]) == ("UDP", 53, packets)
    assert sum(count for _low, _high, count in sample.histograms[0].buckets) == packets
