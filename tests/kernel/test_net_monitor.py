"""net-monitor against known socket calls, on every rung that this kernel has."""

from __future__ import annotations

import csv
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hypermesh_ebpf.bpf.libbpf import libbpf
from hypermesh_ebpf.monitors import load
from hypermesh_ebpf.monitors.declaration import Hook, Rung
from tests.loaded import load_rung
from tests.netns import Namespace, needs_namespaces, wait_until
from tests.rungs import find_rung
from tests.running import ROOT, run_cli, running

pytestmark = needs_namespaces

MONITOR = load("net-monitor")
RUNGS = {rung.name: rung for rung in MONITOR.rungs}
COMM = f"hmn{os.getpid() % 10**6}"


# What it shares with the others is shown on every kernel; the rest of its C is the same text.
NEED_OTHER_KERNELS = ("fentry",)


@pytest.fixture(params=[name for name in RUNGS if name not in NEED_OTHER_KERNELS])
def rung(request: pytest.FixtureRequest) -> Rung:
    """Each rung that every kernel with BTF has."""
    return find_rung(RUNGS, request.param)


@pytest.fixture(params=RUNGS)
def every_rung(request: pytest.FixtureRequest) -> Rung:
    """All of them; fentry runs in the virtual machines."""
    return find_rung(RUNGS, request.param)


class Traffic:
    """tests/sockets.py as a process, ready and waiting in a network namespace of its own."""

    def __init__(self, namespace: Namespace, directory: Path, what: str = "calls") -> None:
        argv = [sys.executable, "-m", "tests.sockets", COMM, str(directory), what]
        self._process = namespace.start(*argv, cwd=ROOT)
        self.pid = self._process.pid
        self._read()

    def go(self) -> dict[str, Any]:
        """Let it make its calls, to the end; what it made: "pid", "calls" and "events"."""
        assert self._process.stdin
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        truth: dict[str, Any] = json.loads(self._read())
        assert self._process.wait() == 0
        return truth

    def _read(self) -> str:
        assert self._process.stdout and self._process.stderr
        return self._process.stdout.readline() or pytest.fail(self._process.stderr.read())


@pytest.fixture
def namespace() -> Iterator[Namespace]:
    with Namespace() as namespace:
        yield namespace


def counts(row: dict[str, Any]) -> dict[str, Any]:
    """What a row counted, in the workload's words."""
    return {
        "calls": row["calls"],
        "errors": row["errors"],
        "bytes": row["bytes"] or 0,
        "errnos": row["errnos"] or {},
    }


def seen(rung: Rung, calls: dict[str, Any]) -> dict[str, Any]:
    """What of the truth a rung can see."""
    return {
        name: row for name, row in calls.items() if name != "close" or "closes" not in rung.lost
    }


def comparable(rung: Rung, event: dict[str, Any]) -> dict[str, Any]:
    """An event's fields that this rung gives, without those that nobody knows beforehand."""
    fields = ["call", "ret", "error", "family", "address", "port", "local_address", "local_port"]
    event = {name: event[name] for name in fields if name in rung.fields} | {
        name: None for name in fields if name not in rung.fields
    }
    return event


@pytest.mark.vm_too
def test_counts_and_events_are_exact(
    every_rung: Rung, namespace: Namespace, tmp_path: Path
) -> None:
    rung = every_rung
    traffic = Traffic(namespace, tmp_path)
    with running("net-monitor", "--rung", rung.name, "--comm", COMM, "--events") as monitor:
        truth = traffic.go()
        monitor.finish()
    assert {row["call"]: counts(row) for row in monitor.last["rows"]} == seen(rung, truth["calls"])
    assert {(row["pid"], row["comm"]) for row in monitor.last["rows"]} == {(truth["pid"], COMM)}
    calls = seen(rung, truth["calls"]).values()
    totals = monitor.last["totals"]
    assert totals["calls"] == sum(row["calls"] for row in calls)
    assert totals["errors"] == sum(row["errors"] for row in calls)
    assert totals["bytes"] == sum(row["bytes"] for row in calls)
    assert not any(monitor.last["loss"].values())

    def order(event: dict[str, Any]) -> str:
        return json.dumps(event, sort_keys=True)

    if "local_address" not in rung.fields:
        for event in truth["events"]:  # nobody asked for the address, so it was written nowhere
            if event.get("asked") is False:
                event.update(family=None, address=None, port=None)
    expected = sorted((comparable(rung, e) for e in truth["events"]), key=order)
    assert sorted((comparable(rung, e) for e in monitor.events), key=order) == expected
    assert all((e["pid"], e["comm"], e["uid"]) == (truth["pid"], COMM, 0) for e in monitor.events)
    assert sum(e["latency_ns"] for e in monitor.events) <= sum(
        e["at_most_ns"] for e in truth["events"]
    )


def test_time_and_latency_of_an_accept_that_waits(
    rung: Rung, namespace: Namespace, tmp_path: Path
) -> None:
    traffic = Traffic(namespace, tmp_path)
    with running("net-monitor", "--rung", rung.name, "--comm", COMM, "--events") as monitor:
        truth = traffic.go()
        monitor.finish()
    waited = max(e["latency_ns"] for e in monitor.events if e["call"] == "accept")
    (at_most,) = [e["at_most_ns"] for e in truth["events"] if e.get("asked") is False]
    assert 50_000_000 <= waited <= at_most
    (row,) = [row for row in monitor.last["rows"] if row["call"] == "accept"]
    assert row["avg_ns"] * row["calls"] >= waited
    assert row["p50_ns"] < 50_000_000 <= row["p99_ns"] * 2
    histograms = {h["name"]: h["buckets"] for h in monitor.last["histograms"]}
    assert sum(count for _, _, count in histograms["accept latency"]) == row["calls"]
    assert sum(count for low, high, count in histograms["accept latency"] if high >= waited) == 1
    assert sum(c for _, _, c in histograms["latency"]) == monitor.last["totals"]["calls"]


def test_rows_by_comm_and_by_call(rung: Rung, namespace: Namespace, tmp_path: Path) -> None:
    traffic = Traffic(namespace, tmp_path)
    with (
        running("net-monitor", "--rung", rung.name, "--comm", COMM, "--by", "comm") as by_comm,
        running("net-monitor", "--rung", rung.name, "--comm", COMM, "--by", "call") as by_call,
    ):
        truth = traffic.go()
        by_comm.finish()
        by_call.finish()
    expected = seen(rung, truth["calls"])
    assert {row["call"]: counts(row) for row in by_comm.last["rows"]} == expected
    assert {row["call"]: counts(row) for row in by_call.last["rows"]} == expected
    assert all("pid" not in row and row["comm"] == COMM for row in by_comm.last["rows"])
    assert all("comm" not in row for row in by_call.last["rows"])


def test_name_of_a_thread_and_of_its_process(
    rung: Rung, namespace: Namespace, tmp_path: Path
) -> None:
    traffic = Traffic(namespace, tmp_path, "threads")
    with running("net-monitor", "--rung", rung.name, "--pid", str(traffic.pid)) as monitor:
        truth = traffic.go()
        monitor.finish()
    (row,) = [row for row in monitor.last["rows"] if row["call"] == "send"]
    assert counts(row) == truth["calls"]["send"]
    by_thread = any("names of processes" in lost for lost in rung.lost)
    assert row["comm"] == (f"{COMM}-thread"[:15] if by_thread else COMM)


@pytest.mark.parametrize("option", ["--pid", "--uid", "--comm"])
def test_filters_leave_others_out(option: str, namespace: Namespace, tmp_path: Path) -> None:
    traffic = Traffic(namespace, tmp_path)
    other = {"--pid": str(os.getpid()), "--uid": "4294967294", "--comm": COMM[:-1]}[option]
    same = {"--pid": str(traffic.pid), "--uid": "root", "--comm": COMM}[option]
    with (
        running("net-monitor", option, other, "--events") as excludes,
        running("net-monitor", option, same, "--events") as includes,
    ):
        truth = traffic.go()
        excludes.finish()
        includes.finish()
    mine = [row for row in includes.last["rows"] if row["comm"] == COMM]
    assert {row["call"]: counts(row) for row in mine} == truth["calls"]
    assert not [row for row in excludes.last["rows"] if row["comm"] == COMM]
    assert not [event for event in excludes.events if event["comm"] == COMM]


def test_no_events_unless_asked_for(namespace: Namespace, tmp_path: Path) -> None:
    traffic = Traffic(namespace, tmp_path)
    with running("net-monitor", "--comm", COMM) as monitor:
        traffic.go()
        monitor.finish()
    assert monitor.last["totals"]["calls"] > 0
    assert monitor.events == []


def test_events_that_found_no_room_are_counted(namespace: Namespace, tmp_path: Path) -> None:
    traffic = Traffic(namespace, tmp_path, "storm")
    with running("net-monitor", "--comm", COMM, "--events", "-i", "600") as monitor:
        monitor.process.send_signal(signal.SIGSTOP)
        truth = traffic.go()
        monitor.process.send_signal(signal.SIGCONT)
        monitor.finish()
    made = truth["calls"]["connect"]["calls"]
    lost = monitor.last["loss"]["events_lost"]
    assert lost > 0
    assert len(monitor.events) == made - lost
    assert {row["call"]: row["calls"] for row in monitor.last["rows"]}["connect"] == made


# One process makes five kinds of call, of which the rows and the errors have room for two.
SMALL_MAPS = """
import json, sys, time
from hypermesh_ebpf.attach import tracing
from hypermesh_ebpf.bpf.libbpf import BPF_ANY, check, libbpf
from hypermesh_ebpf.bpf.maps import Map, RINGBUF
from hypermesh_ebpf.bpf.programs import create_map, load_program
from hypermesh_ebpf.image.source import build_image, bundled_directory
from hypermesh_ebpf.monitors import load

monitor = load("net-monitor")
rung = monitor.rungs[-1]
options = {"by": "process", "pid": None, "comm": sys.argv[1], "uid": None, "events": False}
path = bundled_directory() / monitor.source
defines = {**monitor.defines(options), **rung.defines, "ROWS": 2}
image = build_image(path, defines, use_cache=False).image
fds = [create_map(spec) for spec in image.maps]
maps = {s.name: Map(s, fd) for s, fd in zip(image.maps, fds) if s.type != RINGBUF}
maps["settings"].write(0, monitor.settings(options))
attached = [
    tracing.attach(h.kind, h.target, load_program(image.program(h.program), h.kind, "GPL", fds))
    for h in rung.hooks
]
print("attached", flush=True)
sys.stdin.readline()
reading = monitor.collector(options, {"system": maps}).collect()
print(json.dumps([len(reading.rows), reading.map_full, reading.totals]))
"""


def test_calls_that_found_no_row_are_counted(namespace: Namespace, tmp_path: Path) -> None:
    traffic = Traffic(namespace, tmp_path)
    monitor = namespace.start(sys.executable, "-c", SMALL_MAPS, COMM, cwd=ROOT)
    assert monitor.stdin and monitor.stdout and monitor.stderr
    assert monitor.stdout.readline() == "attached\n", monitor.stderr.read()
    calls = seen(MONITOR.rungs[-1], traffic.go()["calls"])
    monitor.stdin.write("read\n")
    monitor.stdin.flush()
    rows, full, totals = json.loads(monitor.stdout.readline())
    assert rows == 2
    assert totals["calls"] == sum(row["calls"] for row in calls.values())
    # connect and accept come first and take the rows; ECONNREFUSED and EAGAIN take the errors.
    left_out = sum(row["calls"] for name, row in calls.items() if name in ("send", "recv"))
    errors = sum(row["errors"] for row in calls.values())
    taken = calls["connect"]["errnos"]["ECONNREFUSED"] + calls["recv"]["errnos"]["EAGAIN"]
    assert full == left_out + errors - taken


def loaded_programs() -> set[int]:
    """The ids of all programs in the kernel."""
    found, number = set(), ctypes.c_uint32()
    while libbpf().bpf_prog_get_next_id(number, ctypes.byref(number)) == 0:
        found.add(number.value)
    return found


def test_nothing_stays_in_the_kernel(rung: Rung) -> None:
    with running("net-monitor", "--rung", rung.name) as monitor:
        programs = set(monitor.start["prog_ids"])
        assert programs <= loaded_programs()
        monitor.finish()
    # The kernel lets go of a raw tracepoint's program after an RCU grace period.
    wait_until(lambda: not programs & loaded_programs(), "the programs are gone")


def test_hooks_that_run_the_same_share_a_program() -> None:
    """Verifying net-monitor's largest program takes 30 ms: once is enough."""
    with running("net-monitor", "--rung", "tracepoint") as monitor:
        numbers = monitor.start["prog_ids"]
        assert len(numbers) < len(monitor.start["hooks"])
        names = [show_program(number)["name"] for number in numbers]
        assert len(set(names)) == len(names)
        monitor.finish()


def show_program(number: int) -> dict[str, Any]:
    """A program as bpftool has it."""
    command = ["bpftool", "-j", "prog", "show", "id", str(number)]
    shown: dict[str, Any] = json.loads(subprocess.check_output(command))
    return shown


def test_a_kernel_without_btf_is_degraded_and_says_so(namespace: Namespace, tmp_path: Path) -> None:
    traffic = Traffic(namespace, tmp_path)
    environment = {**os.environ, "HMEBPF_BTF": str(tmp_path / "missing")}
    with running("net-monitor", "--comm", COMM, env=environment) as monitor:
        truth = traffic.go()
        monitor.finish()
    degraded = monitor.start["degraded"]
    assert (degraded["rung"], degraded["hook"]) == (4, "tracepoint without BTF")
    assert "closes" in degraded["lost"]
    assert str(tmp_path / "missing") in degraded["reason"]
    calls = {name: row for name, row in truth["calls"].items() if name != "close"}
    assert {row["call"]: counts(row) for row in monitor.last["rows"]} == calls


def test_an_unknown_user_is_a_usage_error() -> None:
    done = run_cli("net-monitor", "--uid", "no-such-user")
    assert done.returncode == 2
    assert "error: --uid no-such-user: no such user" in done.stderr
    assert "getent passwd" in done.stderr


def test_table_and_csv_name_the_errors(namespace: Namespace, tmp_path: Path) -> None:
    traffic = Traffic(namespace, tmp_path)
    files = {kind: tmp_path / f"{kind}.out" for kind in ("table", "csv")}
    argv = [sys.executable, "-m", "hypermesh_ebpf", "net-monitor", "--comm", COMM, "-o"]
    with running("net-monitor", "--comm", COMM) as monitor:
        processes = []
        for kind, path in files.items():
            with path.open("w") as file:
                processes.append(subprocess.Popen([*argv, kind], cwd=ROOT, stdout=file))
        try:
            # Each has written its first reading, of nothing yet.
            wait_until(lambda: all(path.read_text() for path in files.values()), "they run", 300)
            truth = traffic.go()
            monitor.finish()
        finally:
            for process in processes:
                process.send_signal(signal.SIGINT)
        assert [process.wait() for process in processes] == [0, 0]
    connects = truth["calls"]["connect"]
    table, rows = files["table"].read_text(), files["csv"].read_text()
    assert any(
        line.split()[:3] == [str(truth["pid"]), COMM, "connect"]
        and f"ECONNREFUSED {connects['errnos']['ECONNREFUSED']}" in line
        for line in table.splitlines()
    )
    records = list(csv.DictReader(rows.splitlines()))
    last = [record for record in records if record["call"] == "connect"][-1]
    assert int(last["calls"]) == connects["calls"]
    assert f"ECONNREFUSED {connects['errnos']['ECONNREFUSED']}" in last["errnos"]


def test_threads_that_share_a_place_are_all_counted() -> None:
    """The array of places made so small that all threads meet in one of them."""
    rung = find_rung(RUNGS, "tracepoint")
    sizes = list(range(2, 13))

    def answer(end: socket.socket) -> None:
        end.send(end.recv(64))

    def is_used(hook: Hook) -> bool:
        return hook.target.endswith(("_sendto", "_recvfrom"))

    with load_rung(MONITOR, rung, {"PLACES": 1}, is_used, pid=os.getpid()) as maps:
        pairs = [socket.socketpair() for _ in sizes]
        threads = [threading.Thread(target=answer, args=(right,)) for _left, right in pairs]
        for thread in threads:
            thread.start()
        wait_until(lambda: all(_is_in_recv(thread) for thread in threads), "all in recv")
        for size, (left, _right) in zip(reversed(sizes), reversed(pairs), strict=True):
            left.send(b"x" * size)
            assert len(left.recv(64)) == size
        for thread in threads:
            thread.join()
        for left, right in pairs:
            left.close()
            right.close()
        calls = {row.call: counter for row, counter in maps["rows"].items()}
        assert maps["overflow"].items() == []
        ((_index, place),) = maps["places"].items()
        assert (place.thread, place.claims) == (0, 0)
        assert not any(count for _key, count in maps["counts"].items())
    for number in (2, 3):  # SEND, RECV
        assert calls[number].calls == 2 * len(sizes)
        assert calls[number].bytes == 2 * sum(sizes)
        assert calls[number].errors == 0


def _is_in_recv(thread: threading.Thread) -> bool:
    """Whether a thread sleeps in recvfrom: 45 on x86-64, 207 on arm64."""
    text = Path(f"/proc/self/task/{thread.native_id}/syscall").read_text()
    return text.split()[0] in ("45", "207")
