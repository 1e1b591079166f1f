"""exec-monitor against known executions, on every rung that this kernel has."""

from __future__ import annotations

import os
import shutil
import stat
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hypermesh_ebpf import open_monitor
from hypermesh_ebpf.monitors import load
from hypermesh_ebpf.monitors.declaration import Rung
from hypermesh_ebpf.session import Session
from tests.loaded import load_rung
from tests.rungs import find_rung

MONITOR = load("exec-monitor")
RUNGS = {rung.name: rung for rung in MONITOR.rungs}
PRIME = 211


# What these share with the others is shown on every kernel; the rest of their C is the same text.
NEED_OTHER_KERNELS = ("kprobe", "fentry")


@pytest.fixture(params=[name for name in RUNGS if name not in NEED_OTHER_KERNELS])
def rung(request: pytest.FixtureRequest) -> Rung:
    """Each rung that every kernel with BTF has."""
    return find_rung(RUNGS, request.param)


@pytest.fixture(params=RUNGS)
def every_rung(request: pytest.FixtureRequest) -> Rung:
    """All of them; kprobe and fentry run in the virtual machines."""
    return find_rung(RUNGS, request.param)


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """A copy of ``true`` under a name that nothing else on the machine has."""
    path = tmp_path / f"hmt{os.getpid() % 10**6}"
    shutil.copy("/bin/true", path)
    return path


@pytest.fixture
def session(rung: Rung, program: Path) -> Iterator[Session]:
    """The monitor on one rung, seeing only the copy of ``true``."""
    with open_monitor("exec-monitor", rung=rung.name, comm=program.name) as session:
        yield session


def collect(session: Session) -> list[dict[str, Any]]:
    """All events so far, as plain dictionaries."""
    return [dict(event.fields) for event in session.events()]


def spawn(path: Path, *args: str) -> int:
    """Run a program to its end; its pid."""
    process = subprocess.Popen([str(path), *args])
    process.wait()
    return process.pid


@pytest.mark.vm_too
def test_fields_that_rungs_share_are_equal(every_rung: Rung, program: Path) -> None:
    rung, args = every_rung, ["plain", "", "two words", "naïve", "new\nline", "x" * 200]
    with open_monitor("exec-monitor", rung=rung.name, comm=program.name) as session:
        pid = spawn(program, *args)
        (event,) = collect(session)
    truth = {
        "pid": pid,
        "ppid": os.getpid(),
        "parent": Path("/proc/self/comm").read_text().rstrip("\n"),
        "uid": os.getuid(),
        "user": "root",
        "comm": program.name,
        "filename": str(program),
        "args": [str(program), *args],
        "args_truncated": False,
        "ret": 0,
        "error": None,
        "container": None,
        "call": "execve",
    }
    expected = {name: value for name, value in truth.items() if name in rung.fields}
    assert {name: event[name] for name in expected} == expected
    for name in set(truth) - set(rung.fields):
        assert event[name] is None, f"{name} is unknown on this rung and must be null"


def test_count_is_exact(session: Session, program: Path) -> None:
    pids = {spawn(program, str(number)) for number in range(PRIME)}
    events = collect(session)
    assert len(events) == PRIME
    assert {event["pid"] for event in events} == pids
    sample = session.read()
    assert sample.totals["execs"] == PRIME
    assert [row["execs"] for row in sample.rows] == [PRIME]
    assert not sample.loss.any()


@pytest.mark.vm_too
def test_failures_carry_their_errno(every_rung: Rung, tmp_path: Path) -> None:
    rung = every_rung
    if "failed execs" in rung.lost:
        with open_monitor("exec-monitor", rung=rung.name, pid=os.getpid()) as session:
            assert fail_to_exec(tmp_path / "missing") == "ENOENT"
            assert collect(session) == []
        return
    unreadable = tmp_path / "not-executable"
    unreadable.write_text("text")
    # A forked child's pid is not known beforehand: filter by the failure itself.
    with open_monitor("exec-monitor", rung=rung.name, failed=True) as session:
        assert fail_to_exec(tmp_path / "missing") == "ENOENT"
        assert fail_to_exec(unreadable) == "EACCES"
        events = [e for e in collect(session) if e["filename"].startswith(str(tmp_path))]
    assert [(Path(e["filename"]).name, e["error"], e["ret"]) for e in events] == [
        ("missing", "ENOENT", -2),
        ("not-executable", "EACCES", -13),
    ]
    assert [e["args"] for e in events] == [
        [str(tmp_path / "missing"), "argument"],
        [str(unreadable), "argument"],
    ]


def fail_to_exec(path: Path) -> str:
    """Exec something in a child, which has to fail; the errno's name."""
    code = (
        "import errno, os, sys\n"
        "try: os.execv(sys.argv[1], [sys.argv[1], 'argument'])\n"
        "except OSError as e: print(errno.errorcode[e.errno])"
    )
    return subprocess.check_output([sys.executable, "-S", "-c", code, path], text=True).strip()


def test_duration_is_that_of_the_call(session: Session, rung: Rung, program: Path) -> None:
    spawn(program)
    (event,) = collect(session)
    if "duration_ns" in rung.fields:
        # No exec is faster than the page faults it causes, and none here waits for a minute.
        assert 10_000 < event["duration_ns"] < 60e9
    else:
        assert event["duration_ns"] is None


def test_long_arguments_are_cut_and_marked(session: Session, program: Path) -> None:
    spawn(program, *["y" * 100] * 200)
    (event,) = collect(session)
    assert event["args_truncated"] is True
    assert event["args"][1:-1] == ["y" * 100] * (len(event["args"]) - 2)
    assert len(event["args"]) > 30


def test_execveat_is_seen(session: Session, rung: Rung, program: Path) -> None:
    code = "import os, sys; fd = os.open(sys.argv[1], os.O_RDONLY); os.execve(fd, ['x', 'y'], {})"
    process = subprocess.Popen([sys.executable, "-S", "-c", code, program])
    assert process.wait() == 0
    # The name of a program that was executed by descriptor is the descriptor's, until Linux 6.14.
    with open_monitor("exec-monitor", rung=rung.name) as everything:
        process = subprocess.Popen([sys.executable, "-S", "-c", code, program])
        assert process.wait() == 0
        events = [e for e in collect(everything) if e["pid"] == process.pid]
    assert events[-1]["args"] == ["x", "y"]
    assert events[-1]["call"] == ("execveat" if "call" in rung.fields else None)
    assert events[-1]["ret"] == 0


def test_exec_by_a_thread_that_is_not_the_leader(session: Session, program: Path) -> None:
    """It takes over the leader's thread id on the way: entry and return have different ones."""
    code = (
        "import os, sys, threading\n"
        "threading.Thread(target=os.execv, args=(sys.argv[1], [sys.argv[1], 'late'])).start()\n"
        "threading.Event().wait()"
    )
    process = subprocess.Popen([sys.executable, "-S", "-c", code, program])
    assert process.wait() == 0
    (event,) = collect(session)
    assert (event["pid"], event["args"]) == (process.pid, [str(program), "late"])


def test_arguments_that_are_not_in_memory_yet(rung: Rung, program: Path, tmp_path: Path) -> None:
    """Strings in a mapped file whose pages nobody has touched: a probe cannot fault them in."""
    strings = tmp_path / "strings"
    strings.write_bytes(bytes(program) + b"\0" + b"from a cold page\0")
    code = (
        "import ctypes, mmap, sys\n"
        "file = open(sys.argv[1], 'rb')\n"
        "first = file.read().index(0) + 1\n"
        "libc = ctypes.CDLL(None)\n"
        "libc.mmap.restype = ctypes.c_void_p\n"
        "at = libc.mmap(None, ctypes.c_size_t(4096), mmap.PROT_READ, mmap.MAP_PRIVATE,"
        " file.fileno(), ctypes.c_long(0))\n"
        "argv = (ctypes.c_void_p * 3)(at, at + first, None)\n"
        "libc.execve(ctypes.c_void_p(at), argv, None)\n"
        "sys.exit(1)\n"
    )
    with open_monitor("exec-monitor", rung=rung.name, comm=program.name) as session:
        process = subprocess.Popen([sys.executable, "-S", "-c", code, strings])
        assert process.wait() == 0
        (event,) = collect(session)
    if rung.needs_btf:
        assert event["filename"] == str(program)
        assert event["args"] == [str(program), "from a cold page"]
        assert event["args_truncated"] is False
    else:
        assert event["args_truncated"] is True


def test_script_shows_what_its_caller_passed(rung: Rung, tmp_path: Path) -> None:
    script = tmp_path / "hmscript"
    script.write_text("#!/bin/sh\nexit 0\n")
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    with open_monitor("exec-monitor", rung=rung.name, comm=script.name) as session:
        spawn(script, "a")
        (event,) = collect(session)
    assert event["filename"] == str(script)
    passed = [str(script), "a"]
    own = "a script's own arguments" in rung.lost
    assert event["args"] == (["/bin/sh", *passed] if own else passed)


def test_filters_by_user_and_process(rung: Rung, program: Path) -> None:
    program.parent.chmod(0o755)
    for folder in program.parents:
        if folder == Path("/"):
            break
        folder.chmod(folder.stat().st_mode | stat.S_IXOTH)
    with open_monitor("exec-monitor", rung=rung.name, uid="65534") as session:
        subprocess.run(["setpriv", "--reuid=65534", "--clear-groups", program], check=True)
        spawn(program)
        events = collect(session)
    assert [event["uid"] for event in events if event["comm"] == program.name] == [65534]
    assert {event["uid"] for event in events} == {65534}
    chain = f"import os; os.execv({str(program)!r}, ['again'])"
    process = subprocess.Popen(
        [sys.executable, "-S", "-c", f"input(); {chain}"], stdin=subprocess.PIPE
    )
    with open_monitor("exec-monitor", rung=rung.name, pid=process.pid) as session:
        spawn(program)
        process.communicate(b"\n")
        events = collect(session)
    assert [(event["pid"], event["args"]) for event in events] == [(process.pid, ["again"])]


def test_counts_by_parent_and_file(rung: Rung, program: Path) -> None:
    for by, expected in (
        ("filename", {"filename": str(program)}),
        ("uid", {"uid": os.getuid(), "user": "root"}),
        ("comm", {"comm": program.name}),
    ):
        with open_monitor("exec-monitor", rung=rung.name, comm=program.name, by=by) as session:
            for _ in range(7):
                spawn(program)
            session.events()
            (row,) = session.read().rows
        assert {name: row[name] for name in expected} == expected
        assert row["execs"] == 7


def test_threads_that_exec_at_once_are_told_apart(session: Session, program: Path) -> None:
    """Calls under way at the same time do not overwrite each other's arguments."""
    ready = threading.Barrier(8)

    def work(name: int) -> None:
        ready.wait()
        for number in range(13):
            spawn(program, f"{name}.{number}")

    threads = [threading.Thread(target=work, args=(name,)) for name in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seen = sorted(event["args"][1] for event in collect(session))
    assert seen == sorted(f"{name}.{number}" for name in range(8) for number in range(13))


@pytest.mark.vm_too
def test_32_bit_callers_are_seen_where_promised(every_rung: Rung, tmp_path: Path) -> None:
    """A static 32-bit program that execs /bin/true by int 0x80."""
    rung = every_rung
    path = tmp_path / "exec32"
    path.write_bytes(make_elf32(b"/bin/true", b"from32"))
    path.chmod(0o755)
    with open_monitor("exec-monitor", rung=rung.name) as session:
        try:
            process = subprocess.Popen([path])
        except OSError as error:
            pytest.skip(f"this kernel runs no 32-bit programs: {error}")
        assert process.wait() == 0
        events = [e for e in collect(session) if e["pid"] == process.pid]
    # Where the second is lost, it must not be taken for the end of the first.
    assert (events[0]["filename"], events[0]["ret"]) == (str(path), 0)
    if "execs by 32-bit programs" in rung.lost:
        assert len(events) == 1
    else:
        assert [event["filename"] for event in events[1:]] == ["/bin/true"]
        assert events[1]["args"] == ["/bin/true", "from32"]


def make_elf32(path: bytes, argument: bytes) -> bytes:
    """An i386 executable: execve(path, {path, argument, NULL}, NULL), then exit(1)."""
    base, header = 0x08048000, 52 + 32
    code_size = 31
    strings = base + header + code_size
    second = strings + len(path) + 1
    argv = second + len(argument) + 1
    code = b"\xb8\x0b\x00\x00\x00"  # mov eax, 11 (execve)
    code += b"\xbb" + struct.pack("<I", strings)  # mov ebx, path
    code += b"\xb9" + struct.pack("<I", argv)  # mov ecx, argv
    code += b"\x31\xd2\xcd\x80"  # xor edx, edx; int 0x80
    code += b"\xb8\x01\x00\x00\x00\xbb\x01\x00\x00\x00\xcd\x80"  # exit(1)
    assert len(code) == code_size
    data = path + b"\0" + argument + b"\0" + struct.pack("<III", strings, second, 0)
    size = header + len(code) + len(data)
    ident = b"\x7fELF\x01\x01\x01" + bytes(9)
    elf = ident + struct.pack(
        "<HHIIIIIHHHHHH", 2, 3, 1, base + header, 52, 0, 0, 52, 32, 1, 0, 0, 0
    )
    elf += struct.pack("<IIIIIIII", 1, 0, base, base, size, size, 7, 4096)
    return elf + code + data


def test_tasks_that_share_a_place_are_all_counted() -> None:
    """The array of places made so small that all execs meet in one of them."""
    rung = find_rung(RUNGS, "tracepoint")

    def spawn_some(path: str) -> None:
        for _ in range(PRIME):
            os.waitpid(os.posix_spawn(path, ["true"], os.environ), 0)

    with load_rung(MONITOR, rung, {"PLACES": 1}, comm="true") as maps:
        threads = [threading.Thread(target=spawn_some, args=("/bin/true",)) for _ in range(7)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        counts = [count for _key, count in maps["counts"].items()]
        ((_index, place),) = maps["places"].items()
    assert counts[0] >= 7 * PRIME  # others on this machine may run it, too
    assert counts[1] == counts[3] == 0  # FAILED, INFLIGHT_FULL
    assert place.claims <= 1  # that of somebody else's exec, just now
