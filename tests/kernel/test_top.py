"""`hmebpf top`: its numbers against the program's own count, and statistics off afterwards."""

from __future__ import annotations

import csv
import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from hypermesh_ebpf.attach import attach
from hypermesh_ebpf.attach_type import EbpfAttachType
from hypermesh_ebpf.bpf.info import STATS_SYSCTL
from hypermesh_ebpf.bpf.libbpf import check, libbpf
from hypermesh_ebpf.errors import Unsupported
from hypermesh_ebpf.host.holders import read_holders
from hypermesh_ebpf.top import TopSession, _Reading
from tests.counting import Counter, wait_until_freed
from tests.netns import wait_until
from tests.programs import load_program, program_id
from tests.running import ROOT, run_cli, running

pytestmark = [pytest.mark.kernel, pytest.mark.vm_wide]
parse = EbpfAttachType.parse
SWITCH = parse("raw_tracepoint:sched_switch")


@contextmanager
def busy(counter: Counter, name: str = "hm_busy") -> Iterator[tuple[int, int]]:
    """A program that runs at every context switch; (descriptor, id)."""
    fd, number = counter.load(SWITCH, name=name)
    made = attach(SWITCH, fd, number, lambda hold: None)
    try:
        yield fd, number
    finally:
        for descriptor in made.descriptors:
            os.close(descriptor)


@pytest.fixture
def counter() -> Iterator[Counter]:
    with Counter() as made:
        yield made


def row_of(sample: dict[str, Any], number: int) -> dict[str, Any]:
    row: dict[str, Any]
    (row,) = [each for each in sample["rows"] if each["id"] == number]
    return row


def switch(times: int) -> None:
    for _ in range(times):
        time.sleep(0.0005)


def test_runs_are_those_that_the_program_counted(counter: Counter) -> None:
    with busy(counter) as (fd, number), TopSession() as session:
        first = session.read()
        before = counter.runs(fd)
        switch(101)
        sample = session.read()
        after = counter.runs(fd)
        began = {row["id"]: row for row in first.rows}.get(number, {"runs": 0})["runs"]
        (row,) = [each for each in sample.rows if each["id"] == number]
        assert began is not None
        counted = row["runs"] - began  # type: ignore[operator]
        assert 101 <= counted <= after - before + 1_000
        assert row["name"] == "hm_busy"
        assert row["attached"] == "raw_tracepoint:sched_switch"
        assert row["mean_ns"] > 0  # type: ignore[operator]
        assert row["runs_per_s"] > 0  # type: ignore[operator]
        assert sample.totals["runs"] >= row["runs"]  # type: ignore[operator]


def test_share_of_a_cpu_is_the_time_by_the_interval() -> None:
    """Shares and rates from two readings, whatever the kernel counted."""
    with TopSession(idle=True) as session:
        session._last, session._begin = {7: _Reading(10, 1000)}, {7: _Reading(10, 1000)}
        session._about[7] = ("xdp", "x")
        session._read_all = lambda: {7: _Reading(30, 500_001_000)}  # type: ignore[method-assign]
        session._look_again = lambda now: None  # type: ignore[method-assign]
        session._read_at = time.monotonic() - 2.0
        sample = session.read()
        (row,) = sample.rows
        assert row["runs"] == 20
        assert row["run_time_ns"] == 500_000_000
        assert row["mean_ns"] == 25_000_000
        assert row["cpu_percent"] == pytest.approx(25.0, rel=0.2)
        assert row["runs_per_s"] == pytest.approx(10.0, rel=0.2)
        assert sample.totals["cpu_percent"] == row["cpu_percent"]


def test_idle_programs_are_left_out_unless_asked_for() -> None:
    fd = load_program("hm_idle")
    try:
        number = program_id(fd)
        with TopSession() as session:
            assert number not in [row["id"] for row in session.read().rows]
        with TopSession(idle=True) as session:
            (row,) = [row for row in session.read().rows if row["id"] == number]
            assert (row["runs"], row["mean_ns"], row["cpu_percent"]) == (0, None, 0)
    finally:
        os.close(fd)


def test_program_that_is_unloaded_meanwhile(counter: Counter) -> None:
    """Its row goes; what it had stays in the totals; nothing keeps it alive."""
    with TopSession() as session:
        with Counter() as other, busy(other, "hm_leaves") as (_fd, number):
            switch(53)
            sample = session.read()
            (row,) = [each for each in sample.rows if each["id"] == number]
            had = row["runs"]
            assert had >= 53  # type: ignore[operator]
            assert session._begin.get(number) is None, "it was not there at the beginning"
        wait_until_freed(number)
        time.sleep(0.06)  # shorter intervals are taken together with the one before
        sample = session.read()
        assert number not in [each["id"] for each in sample.rows]
        assert sample.totals["runs"] >= had  # type: ignore[operator]


def statistics_are_on() -> bool:
    return read_holders().statistics


def test_statistics_are_on_while_it_runs_and_off_after_sigkill() -> None:
    """Others may have them on at the same time: what counts is who holds them."""

    def held_by(pid: int) -> bool:
        directory = f"/proc/{pid}/fd"
        try:
            links = [os.readlink(f"{directory}/{name}") for name in os.listdir(directory)]
        except OSError:
            return False
        return "anon_inode:bpf-stats" in links

    before = Path(STATS_SYSCTL).read_text()
    for number in (signal.SIGINT, signal.SIGKILL):
        with running("top", "-i", "0.1") as top:
            assert top.read_until("sample")
            assert held_by(top.process.pid)
            assert statistics_are_on()
            if number == signal.SIGINT:
                top.finish()
            else:
                top.process.kill()
                top.process.wait()
            pid = top.process.pid
            wait_until(lambda: not held_by(pid), "it let go")  # noqa: B023
        assert Path(STATS_SYSCTL).read_text() == before, "the sysctl is not touched"


def test_json_and_csv(counter: Counter) -> None:
    with busy(counter) as (_fd, number):
        with running("top", "-i", "0.2", "-n", "2") as top:
            sample = top.read_until("sample")
            row = row_of(sample, number)
            assert row["name"] == "hm_busy"
            assert set(row) >= {"cpu_percent", "runs_per_s", "mean_ns", "runs", "run_time_ns"}
            assert top.start["target"] == "system"
            while top.read() is not None:
                pass
            assert top.objects[-1]["reason"] == "count"
        done = run_cli("top", "-i", "0.2", "-n", "1", "-o", "csv")
        rows = list(csv.DictReader(io.StringIO(done.stdout)))
        (row,) = [each for each in rows if each["id"] == str(number)]
        assert row["name"] == "hm_busy"
        assert float(row["cpu_percent"]) >= 0
        assert int(row["runs"]) > 0


def test_table_has_the_busiest_first(counter: Counter) -> None:
    with busy(counter):
        done = run_cli("top", "-i", "0.3", "-n", "1", "--top", "3")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    heading = next(n for n, line in enumerate(lines) if line.lstrip().startswith("id "))
    names = lines[heading].split("  ")
    assert [word.strip() for word in names if word.strip()][:7] == [
        *("id", "type", "name", "cpu", "runs/s", "mean", "runs")
    ]
    shown = [line for line in lines[heading + 1 :] if "%" in line]
    assert 1 <= len(shown) <= 3


def test_kernel_that_cannot_switch_them_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before Linux 5.8: the sysctl is what to type."""
    if Path(STATS_SYSCTL).read_text().strip() == "1":
        pytest.skip("statistics are on for good here")

    class Old:
        @staticmethod
        def bpf_enable_stats(kind: int) -> int:
            return -22

    monkeypatch.setattr("hypermesh_ebpf.bpf.statistics.libbpf", Old)
    monkeypatch.setattr("hypermesh_ebpf.bpf.libbpf.ct.get_errno", lambda: 22)
    with pytest.raises(Unsupported) as caught:
        TopSession()
    assert "Linux 5.8" in str(caught.value)
    assert "sysctl kernel.bpf_stats_enabled=1" in (caught.value.remedy or "")


def test_somebody_elses_statistics_stay_on() -> None:
    """A descriptor of another process has them on, and has them on afterwards."""
    theirs = check(libbpf().bpf_enable_stats(0))
    try:
        assert run_cli("top", "-i", "0.1", "-n", "1").returncode == 0
        assert statistics_are_on()
    finally:
        os.close(theirs)


def test_reader_that_goes_away() -> None:
    shell = f"exec 2>&1; {sys.executable} -m hypermesh_ebpf top -i 0.1 | head -1"
    done = subprocess.run(
        ["bash", "-c", shell], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.stdout.count("\n") == 1
