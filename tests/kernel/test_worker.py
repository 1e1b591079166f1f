"""The worker process: killed, orphaned, used from threads - and nothing is left of it."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hypermesh_ebpf import WorkerError, create_os_abstraction, monitors, open_monitor
from hypermesh_ebpf.errors import HmebpfError, InterfaceNotFound, UsageError
from hypermesh_ebpf.opening import Opening
from hypermesh_ebpf.worker import Worker
from tests.compiler import copy_project
from tests.netns import Namespace, needs_namespaces, wait_until
from tests.owner import attached, is_gone
from tests.running import COMMAND, ROOT, running

pytestmark = needs_namespaces


def children(pid: int) -> dict[int, str]:
    """The pids of a process's children and their states (Z: a zombie), from /proc."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(parent) == pid:
            found[int(stat.parent.name)] = state
    return found


def command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def find_worker(pid: int) -> int | None:
    """The worker among the children of a process that runs the command line."""
    for child in children(pid):
        if "worker_process" in command_line(child):
            return child
    return None


def is_compiling(pid: int) -> bool:
    """Whether clang has been loaded into a process."""
    try:
        return "libbcc" in Path(f"/proc/{pid}/maps").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def own_programs() -> set[int]:
    """The ids of the programs that descriptors of this process refer to."""
    found = set()
    for info in Path("/proc/self/fdinfo").iterdir():
        try:
            lines = info.read_text().splitlines()
        except FileNotFoundError:
            continue
        found |= {int(line.split()[1]) for line in lines if line.startswith("prog_id:")}
    return found


def loaded_programs() -> set[int]:
    """The ids of all programs in the kernel, by bpftool."""
    argv = ["bpftool", "-j", "prog", "list"]
    listing = subprocess.run(argv, capture_output=True, check=True, timeout=300).stdout
    return {program["id"] for program in json.loads(listing)}


Compiling = tuple["subprocess.Popen[str]", int]


@pytest.fixture
def compiling(tmp_path: Path) -> Iterator[Compiling]:
    """A command line whose worker is in clang, which waits for the rest of the source: a pipe that
    nobody writes to.  Gives the process and the worker's pid."""
    project = copy_project(tmp_path)
    os.mkfifo(project / "bpf_c/never")
    text = (project / "bpf_c/xdp.c").read_text()
    (project / "bpf_c/xdp.c").write_text(f'#include "never"\n{text}')
    with Namespace() as ns:
        process = ns.start(*COMMAND, "xdp", "--iface", "lo", "--no-cache", "-v", cwd=project)
        worker = wait_until(lambda: find_worker(process.pid), "the worker runs", 300)
        wait_until(lambda: is_compiling(worker), "it compiles", 300)
        yield process, worker
        wait_until(lambda: not attached(ns), "nothing is attached", 60)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_worker_that_is_killed(compiling: Compiling, number: signal.Signals) -> None:
    """As the kernel does when memory runs out, or libbpf with a hostile object."""
    process, worker = compiling
    os.kill(worker, number)
    out, said = process.communicate(timeout=300)
    assert process.returncode == 1
    assert out == ""
    *_progress, error, hint = said.splitlines()
    assert error == f"error: load in the worker process: it was ended by signal {number.name}"
    assert hint.startswith("hint: try again with -v")
    assert "Traceback" not in said
    assert is_gone(worker)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_while_compiling(compiling: Compiling, number: signal.Signals) -> None:
    process, worker = compiling
    process.send_signal(number)
    out, said = process.communicate(timeout=300)
    assert process.returncode == 0
    assert out == ""
    assert [line for line in said.splitlines() if not line.startswith("hmebpf: ")] == []
    assert is_gone(worker)


def test_worker_dies_with_its_parent(compiling: Compiling) -> None:
    process, worker = compiling
    process.kill()
    process.wait()
    wait_until(lambda: is_gone(worker), "the worker is gone", 60)


def test_no_child_but_the_guard_while_a_monitor_runs() -> None:
    """The worker is reaped when it has handed over: no zombie, no 100 MB of clang."""
    with Namespace() as ns, running("xdp", "--iface", "lo", namespace=ns) as monitor:
        guards = [command_line(child) for child in children(monitor.process.pid)]
        assert "Z" not in children(monitor.process.pid).values()
        assert not any("worker_process" in line for line in guards)
        monitor.finish()
    with running("exec-monitor") as monitor:
        assert children(monitor.process.pid) == {}
        monitor.finish()


def state_of_this_process() -> tuple[list[str], dict[int, str], set[int]]:
    """What a session may leave behind: kinds of descriptors, children, programs."""
    kinds = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{fd}")
        except FileNotFoundError:
            continue  # that of the listing
        kinds.append(target.partition("[")[0] if target[0] != "/" else target)
    return sorted(kinds), children(os.getpid()), own_programs()


def open_in(ns: Namespace, **options: Any) -> Any:
    """An xdp session of this process on lo of a namespace."""
    with ns.entered():
        return open_monitor("xdp", iface="lo", **options)


def test_closed_session_leaves_nothing() -> None:
    with Namespace() as ns:
        open_in(ns).close()  # what is kept for the life of the process is there after the first
        before = state_of_this_process()
        ids: set[int] = set()
        for _ in range(3):
            with open_in(ns) as session:
                ids |= set(session.start.prog_ids)
                assert attached(ns) == set(session.start.prog_ids)
                with ns.entered():
                    session.read()
            assert not attached(ns)
        with open_monitor("exec-monitor") as session:
            ids |= set(session.start.prog_ids)
            assert own_programs() == set(session.start.prog_ids)
            session.events()
            session.read()
            assert state_of_this_process() != before
        assert state_of_this_process() == before
        wait_until(lambda: not loaded_programs() & ids, "the kernel has freed the programs", 60)


def test_failed_session_leaves_nothing() -> None:
    def fail() -> None:
        with pytest.raises(InterfaceNotFound):
            open_monitor("xdp", iface="hm-none")
        with pytest.raises(UsageError):
            open_monitor("exec-monitor", uid="hm-nobody")

    fail()
    before = state_of_this_process()
    fail()
    assert state_of_this_process() == before


def test_closing_twice_and_cancelling() -> None:
    with Namespace() as ns:
        session = open_in(ns)
        session.close()
        session.close()
        before = state_of_this_process()
        with ns.entered():
            opening = Opening(monitors.load("xdp"), {"iface": ["lo"]}, True)
            opening.cancel()
            opening.cancel()
        assert state_of_this_process() == before
        assert not attached(ns)


def test_two_sessions_at_once_in_one_process() -> None:
    with Namespace() as one, Namespace() as two:
        with open_in(one) as first, open_in(two) as second, open_monitor("exec-monitor") as third:
            one.run("ping", "-q", "-i", "0.002", "-c", "7", "127.0.0.1")
            two.run("ping", "-q", "-i", "0.002", "-c", "11", "127.0.0.1")
            sessions = (first, second, third)
            ids = [number for each in sessions for number in each.start.prog_ids]
            assert len(set(ids)) == len(ids), "each has programs of its own"
            with one.entered():
                assert first.read().totals["packets"] == 14
            with two.entered():
                assert second.read().totals["packets"] == 22
            pings = [
                e for e in third.events() if e.fields["comm"] == "ping" and not e.fields["ret"]
            ]
            assert len(pings) >= 2
        assert not attached(one) and not attached(two)


def test_sessions_from_threads() -> None:
    """Opened at the same time, each in a thread that ends before its session does."""
    with Namespace() as ns:
        opened: list[Any] = []
        failed: list[BaseException] = []

        def open_one(name: str) -> None:
            try:
                opened.append(open_in(ns) if name == "xdp" else open_monitor(name))
            except BaseException as error:
                failed.append(error)
                raise

        names = ("xdp", "exec-monitor", "net-monitor")
        threads = [threading.Thread(target=open_one, args=(name,)) for name in names]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(300)
        assert failed == []
        assert sorted(session.monitor.name for session in opened) == sorted(names)
        subprocess.run(["true"], check=True)
        for session in opened:
            with ns.entered():
                assert session.read().totals
            session.close()
        assert not attached(ns)


def ask(request: dict[str, Any]) -> Worker:
    """A worker that has been asked."""
    worker = Worker()
    try:
        worker.ask(request)
    except BaseException:
        worker.close()
        raise
    return worker


def test_worker_that_cannot_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    request = {"do": "load", "log": 0, "elsewhere": False}
    before = state_of_this_process()
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    with pytest.raises(WorkerError, match=r"start the worker .*No such file") as caught:
        ask(request)
    assert "/no/such/python" in str(caught.value.remedy)
    monkeypatch.undo()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = {int(name) for name in os.listdir("/proc/self/fd")}
    free = [number for number in range(soft) if number not in used]
    try:
        for room in range(12):  # wherever on the way the limit is met
            resource.setrlimit(resource.RLIMIT_NOFILE, (free[room], hard))
            try:
                ask(request).close()
            except WorkerError as error:
                assert "Too many open files" in str(error)
                assert "ulimit -n" in str(error.remedy)
            else:
                assert room > 3
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert state_of_this_process() == before


def test_worker_that_fails_by_a_bug_is_an_error_with_its_last_words() -> None:
    """A traceback in the worker is details; the last line of it the cause."""
    request = {"do": "monitor", "log": 0, "elsewhere": False, "monitor": "no-such"}
    request |= {"options": {}, "rung": None, "use_cache": True, "sampled": False}
    with ask(request) as worker, pytest.raises(WorkerError) as caught:
        worker.result(lambda *hold: None, lambda kind, text: None)
    assert str(caught.value) == (
        "load in the worker process: it ended with status 1 (KeyError: 'no-such')"
    )
    assert str(caught.value.details).startswith("Traceback")
    assert isinstance(caught.value, HmebpfError)


def test_works_from_a_directory_that_was_removed(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    code = f"import os; os.chdir({str(gone)!r}); os.rmdir({str(gone)!r})\n" + (
        "from hypermesh_ebpf import InterfaceNotFound, open_monitor\n"
        "try: open_monitor('xdp', iface='hm-none')\n"
        "except InterfaceNotFound as error: print(error)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.stderr == ""
    assert done.stdout.startswith("find interface 'hm-none': ")


def test_nothing_is_inherited_by_programs_started_meanwhile() -> None:
    """A child that kept a copy of an attachment would keep the hook attached."""
    code = (
        "import os\n"
        "for fd in os.listdir('/proc/self/fd'):\n"
        "    if os.path.lexists(f'/proc/self/fd/{fd}'):\n"
        "        print(os.readlink(f'/proc/self/fd/{fd}'))"
    )
    with open_monitor("exec-monitor") as session:
        argv = [sys.executable, "-S", "-c", code]
        done = subprocess.run(argv, capture_output=True, text=True, check=True, close_fds=False)
        session.read()
    assert done.stdout
    assert "bpf" not in done.stdout
    assert "perf_event" not in done.stdout


RETURN_2 = bytes.fromhex("b7000000020000009500000000000000")


def test_worker_that_ended_or_died_between_requests_is_replaced() -> None:
    """Left alone it ends by itself; the next request is answered by another one."""
    with Namespace() as ns, ns.entered(), create_os_abstraction() as os_:
        first = os_.load_ebpf_program(RETURN_2)
        worker = wait_until(lambda: find_worker(os.getpid()), "there is a worker", 60)
        wait_until(lambda: children(os.getpid())[worker] == "Z", "it ended by itself", 60)
        os_.attach_ebpf_monitor(first, "xdp:lo")
        os_.load_ebpf_program(RETURN_2)
        second = wait_until(lambda: find_worker(os.getpid()), "there is another", 60)
        assert second != worker
        os.kill(second, signal.SIGKILL)
        # All its threads: a first one that has ended is a zombie at once.
        ended = os.WEXITED | os.WNOHANG | os.WNOWAIT
        wait_until(lambda: os.waitid(os.P_PID, second, ended), "it is dead", 60)
        os_.load_ebpf_program(RETURN_2)
        assert len(os_.list_programs()) == 3
    assert find_worker(os.getpid()) is None


def test_worker_outlives_the_thread_that_started_it() -> None:
    """A request from a thread that ended must not end the worker of another request."""
    with create_os_abstraction() as os_:
        thread = threading.Thread(target=os_.load_ebpf_program, args=(RETURN_2,))
        thread.start()
        thread.join()
        worker = find_worker(os.getpid())
        os_.load_ebpf_program(RETURN_2)
        assert find_worker(os.getpid()) == worker
