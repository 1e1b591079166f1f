"""require_hook: every attach point that cannot be is refused before anything is loaded, with words
that help.  What kernels lack is simulated where this one has it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hypermesh_ebpf.attach_type import KINDS, EbpfAttachType
from hypermesh_ebpf.errors import (
    AttachError,
    HmebpfError,
    HookUnsupported,
    InterfaceNotFound,
    MissingPrivilege,
    UsageError,
)
from hypermesh_ebpf.host import hooks
from hypermesh_ebpf.host.executables import find_file
from hypermesh_ebpf.host.hooks import Availability, probe_hook, require_hook
from hypermesh_ebpf.host.report import ATTACH_TYPES

pytestmark = pytest.mark.kernel

POINTS = {
    "xdp": "xdp:lo",
    "tc": "tc:lo,direction=egress",
    "kprobe": "kprobe:do_exit",
    "kretprobe": "kretprobe:do_exit",
    "tracepoint": "tracepoint:sched:sched_process_exec",
    "raw_tracepoint": "raw_tracepoint:sched_process_exec",
    "fentry": "fentry:do_exit",
    "fexit": "fexit:do_exit",
    "uprobe": "uprobe:c:getppid",
    "uretprobe": "uretprobe:c:getppid",
    "usdt": "usdt:c:libc:setjmp",
    "perf_event": "perf_event:cpu-clock",
    "lsm": "lsm:file_open",
    "cgroup": "cgroup:/sys/fs/cgroup",
}


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    probe_hook.cache_clear()
    yield
    probe_hook.cache_clear()


def refuse(text: str, kind: type[HmebpfError]) -> HmebpfError:
    with pytest.raises(kind) as caught:
        require_hook(EbpfAttachType.parse(text))
    assert caught.value.cause
    assert caught.value.remedy
    return caught.value


@pytest.mark.parametrize("kind", KINDS)
def test_kind_that_the_kernel_lacks_is_told_with_its_minimum(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    minimums = {"xdp": "4.8", "tc": "4.13", "lsm": "5.7", "fentry": "5.5", "kprobe": "4.4"}
    lacking = Availability(False, "it is not in this kernel", "boot another one")
    monkeypatch.setattr(hooks, "probe_hook", lambda *arguments: lacking)
    error = refuse(POINTS[kind], HookUnsupported)
    assert error.exit_code == 3
    assert error.what == f"attach to {POINTS[kind]}"
    assert (error.cause or "").startswith("it is not in this kernel; ")
    assert f"{kind} needs Linux {minimums.get(kind, '')}" in (error.cause or "")
    release = os.uname().release.split("-")[0]
    assert f"this is {'.'.join(release.split('.')[:2])}." in (error.cause or "")
    assert error.remedy == "boot another one"


def test_kind_that_wants_a_privilege(monkeypatch: pytest.MonkeyPatch) -> None:
    lacking = Availability(False, "lacks CAP_BPF", "run it as root", privilege=True)
    monkeypatch.setattr(hooks, "probe_hook", lambda *arguments: lacking)
    error = refuse("xdp:lo", MissingPrivilege)
    assert error.cause == "lacks CAP_BPF"


def test_targets_are_resolved() -> None:
    for kind in ("xdp", "tc", "tracepoint", "raw_tracepoint", "perf_event"):
        point = EbpfAttachType.parse(POINTS[kind])
        assert require_hook(point) == point.target
    assert require_hook(EbpfAttachType.parse(POINTS["uprobe"])) == f"{find_file('c')}:getppid"
    assert require_hook(EbpfAttachType.parse("perf_event:")) == "cpu-clock"


@pytest.mark.parametrize("kind", ["xdp", "tc"])
def test_no_such_interface(kind: str) -> None:
    error = refuse(f"{kind}:lo0", InterfaceNotFound)
    assert (error.remedy or "").startswith("interfaces here: lo")


@pytest.mark.parametrize(
    ("point", "closest"),
    [
        ("tracepoint:sched:sched_proces_exec", "sched:sched_process_exec"),
        ("tracepoint:shed:sched_process_exec", "sched:sched_process_exec"),
        ("tracepoint:syscalls:sys_enter_exeve", "syscalls:sys_enter_execve"),
        ("raw_tracepoint:sched_proces_exec", "sched_process_exec"),
    ],
)
def test_no_such_tracepoint_names_close_ones(point: str, closest: str) -> None:
    error = refuse(point, HookUnsupported)
    assert "this kernel has no " in (error.cause or "")
    assert closest in (error.remedy or "")
    assert "needs Linux" not in (error.cause or ""), "the kind is there, only the name is not"


@pytest.mark.vm_too
@pytest.mark.parametrize("kind", ["kprobe", "fentry", "lsm"])
def test_no_such_function_names_close_ones(kind: str) -> None:
    if not (found := probe_hook(kind)).available:
        pytest.skip(f"{kind}: {found.reason}")
    wrong, right = ("file_opem", "file_open") if kind == "lsm" else ("do_exxit", "do_exit")
    error = refuse(f"{kind}:{wrong}", HookUnsupported)
    assert wrong in str(error)
    assert right in (error.remedy or "")


def test_offsets_that_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hooks, "probe_hook", lambda *arguments: Availability(True))
    error = refuse("kprobe:do_exit+four", UsageError)
    assert str(error) == "function do_exit+four: 'four' is no number"
    error = refuse("kretprobe:do_exit+4", UsageError)
    assert "a return has no offset" in str(error)


def test_perf_events_that_are_not() -> None:
    error = refuse("perf_event:cpu-clok", UsageError)
    assert "cpu-clock" in (error.remedy or "")
    error = refuse("perf_event:nonsense-of-all-kinds", UsageError)
    assert "page-faults" in (error.remedy or "")


def test_hardware_event_where_there_is_no_counter() -> None:
    if Path("/sys/bus/event_source/devices/cpu").exists():
        assert require_hook(EbpfAttachType.perf_event("cycles")) == "cycles"
        return
    for name in ("cycles", "L1-dcache-load-misses", "r01c2"):
        error = refuse(f"perf_event:{name}", HookUnsupported)
        assert "no such hardware counter" in (error.cause or "")
        assert error.remedy == "sample cpu-clock instead"


def test_files_and_functions_that_are_not_there() -> None:
    assert "nosuchfile" in str(refuse("uprobe:/nosuchfile:main", AttachError))
    assert "no such function" in str(refuse("uprobe:c:nosuchfunction", AttachError))
    assert "no such function" in str(refuse("uretprobe:c:nosuchfunction", AttachError))
    error = refuse("usdt:c:nosuch:probe", AttachError)
    assert "static probe" in str(error)


def test_what_is_no_cgroup() -> None:
    assert "not the directory of a cgroup" in str(refuse("cgroup:/proc", AttachError))
    assert "not the directory of a cgroup" in str(refuse("cgroup:/etc/passwd", AttachError))
    assert "ENOENT" in str(refuse("cgroup:/sys/fs/cgroup/nosuch", AttachError))


def test_no_cgroup2_is_mounted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hypermesh_ebpf.host.filesystems.find_mount", lambda magic: None)
    found = probe_hook("cgroup")
    assert not found.available
    assert "mount -t cgroup2" in (found.remedy or "")


def test_without_privileges() -> None:
    code = """
import sysconfig
from hypermesh_ebpf.attach_type import EbpfAttachType
from hypermesh_ebpf.errors import MissingPrivilege
from hypermesh_ebpf.host.hooks import require_hook
for text in ("xdp:lo", "tc:lo", "uprobe:c:getppid", "perf_event:cpu-clock", "tracepoint:a:b"):
    try:
        require_hook(EbpfAttachType.parse(text))
    except MissingPrivilege as error:
        print(text, error, "|", error.remedy)
"""
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        ["setpriv", "--bounding-set=-all", "--inh-caps=-all", sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": root},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.count("Operation not permitted (EPERM): lacks CAP_") == 5, done.stderr
    assert "sudo" in done.stdout


def test_check_system_keeps_its_ten() -> None:
    assert set(ATTACH_TYPES) < set(KINDS)
    assert len(ATTACH_TYPES) == 10
