"""Every kind of hook but the network's: a known number of events is counted, then nothing is left.

The second source is the kernel's own count of the program's runs, and what procfs knows.  Kinds
that this kernel has not are tested in the virtual machines.
"""

from __future__ import annotations

import ctypes
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from hypermesh_ebpf.attach import Attachment, attach
from hypermesh_ebpf.attach_type import EbpfAttachType
from hypermesh_ebpf.bpf.programs import close_attachments
from hypermesh_ebpf.errors import AttachError, HookUnsupported
from hypermesh_ebpf.host import executables, filesystems
from hypermesh_ebpf.host.hooks import probe_hook, require_hook
from tests.counting import Counter, needs_initial_pids, wait_until_freed

pytestmark = [pytest.mark.kernel, pytest.mark.vm_too, needs_initial_pids]

PRIME = 101
_LIBC = ctypes.CDLL(None)
_ROOM = ctypes.create_string_buffer(64)
_LIBC.a64l.argtypes = [ctypes.c_char_p]
_PYTHON = "/usr/bin/python3"  # the distribution's, built with static probes

parse = EbpfAttachType.parse


def ask_interval() -> None:
    _LIBC.sched_rr_get_interval(0, _ROOM)


def ask_scheduler() -> None:
    os.sched_getscheduler(0)


def rename() -> None:
    _LIBC.prctl(15, b"hm_renamed", 0, 0, 0)  # PR_SET_NAME


def convert() -> None:
    _LIBC.a64l(b"x")


def never(hold: object) -> None:
    raise AssertionError("nothing of this kind outlives its maker")


@pytest.fixture
def counter() -> Iterator[Counter]:
    with Counter() as made:
        yield made


def require(text: str) -> str:
    """The target as this machine knows it; skips where the kernel has no such kind."""
    point = parse(text)
    found = probe_hook(point.kind)
    if not found.available:
        pytest.skip(f"{point.kind}: {found.reason}")
    return require_hook(point)


def is_link(fd: int) -> bool:
    return "link_id:" in Path(f"/proc/self/fdinfo/{fd}").read_text()


def do_attach(
    point: EbpfAttachType, fd: int, prog_id: int, *, pinnable: bool = False
) -> Attachment:
    """As the worker does it: where tracefs is not mounted, in a thread with mounts of its own."""

    def run() -> Attachment:
        filesystems.enter_private_mounts()
        return attach(point, fd, prog_id, never, pinnable=pinnable)

    with ThreadPoolExecutor(1) as pool:
        made = pool.submit(run).result()
    assert not made.held
    assert made.descriptors
    return made


@dataclass(frozen=True)
class Case:
    """A hook whose event we can make happen in this very process."""

    point: str
    fire: Callable[[], Any]
    is_perf: bool = True  # attached by a perf event, so that links came with Linux 5.15 only


CASES = [
    Case("tracepoint:syscalls:sys_enter_sched_rr_get_interval", ask_interval),
    Case("raw_tracepoint:task_rename", rename, is_perf=False),
    Case("raw_tracepoint:task:task_rename", rename, is_perf=False),
    Case("kprobe:syscall:sched_rr_get_interval", ask_interval),
    Case("kretprobe:syscall:sched_rr_get_interval", ask_interval),
    Case("fentry:syscall:sched_rr_get_interval", ask_interval, is_perf=False),
    Case("fexit:syscall:sched_rr_get_interval", ask_interval, is_perf=False),
    Case("lsm:task_getscheduler", ask_scheduler, is_perf=False),
    Case("uprobe:c:a64l", convert),
    Case("uretprobe:libc.so.6:a64l", convert),
    Case(f"uprobe:c:a64l,pid={os.getpid()}", convert),
]


@pytest.mark.parametrize("pinnable", [False, True])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.point.partition(",")[0])
def test_counts_every_event_and_leaves_nothing(
    counter: Counter, case: Case, pinnable: bool
) -> None:
    target = require(case.point)
    point = parse(case.point)
    fd, prog_id = counter.load(point, target, tgid=os.getpid())
    case.fire()
    started = time.perf_counter()
    try:
        made = do_attach(point, fd, prog_id, pinnable=pinnable)
    except HookUnsupported as error:
        if pinnable and case.is_perf and "Linux 5.15" in str(error):
            assert error.remedy == "attach it without --pin; or boot Linux 5.15 or newer"
            return
        raise
    attached = time.perf_counter()
    for _ in range(PRIME):
        case.fire()
    assert counter.read() == PRIME
    if not pinnable:
        assert counter.runs(fd) >= PRIME  # of all processes
    else:
        assert all(map(is_link, made.descriptors))
    closing = time.perf_counter()
    close_attachments(made.descriptors)
    print(
        f"{point.kind}: attach {(attached - started) * 1000:.1f} ms, "
        f"detach {(time.perf_counter() - closing) * 1000:.1f} ms"
    )
    case.fire()
    assert counter.read() == PRIME
    assert ours_in_tracefs() == []


def ours_in_tracefs() -> list[str]:
    """Entries in kprobe_events and uprobe_events, which would outlive every process."""
    found = []
    for name in ("kprobe_events", "uprobe_events"):
        with suppress(FileNotFoundError):
            found += filesystems.read_tracefs(name).splitlines()
    return [line for line in found if "hmebpf" in line]


@pytest.mark.parametrize("kind", ["uprobe", "uretprobe"])
def test_a_refused_probe_leaves_nothing(kind: str, counter: Counter) -> None:
    """libbcc, refused an event for a process that is gone, left an entry in uprobe_events."""
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    point = parse(f"{kind}:c:a64l,pid={child.pid}")
    fd, prog_id = counter.load(parse(f"{kind}:c:a64l"))
    with pytest.raises(AttachError) as caught:
        do_attach(point, fd, prog_id)
    assert caught.value.remedy
    assert ours_in_tracefs() == []


def test_program_is_freed_when_hook_and_program_are_closed() -> None:
    with Counter() as counter:
        point = parse("raw_tracepoint:task_rename")
        fd, prog_id = counter.load(point, tgid=os.getpid())
        made = do_attach(point, fd, prog_id)
    rename()  # it still runs: the attachment holds it
    close_attachments(made.descriptors)
    wait_until_freed(prog_id)


def test_kprobe_inside_a_function(counter: Counter) -> None:
    """Where instructions begin is the compiler's choice: the first place behind the entry."""
    target = require("kprobe:syscall:sched_rr_get_interval")
    refused = []
    for offset in range(1, 16):
        point = EbpfAttachType.kprobe("syscall:sched_rr_get_interval", offset)
        assert require_hook(point) == f"{target}+{offset}"
        fd, prog_id = counter.load(point, tgid=os.getpid())
        try:
            made = do_attach(point, fd, prog_id)
        except AttachError as error:
            refused.append(error.cause)
            continue
        break
    for _ in range(PRIME):
        ask_interval()
    assert counter.read() == PRIME
    close_attachments(made.descriptors)
    assert made.hook == f"kprobe:{target}+{offset}"
    assert set(refused) <= {"no instruction begins at this offset (EILSEQ)"}


def test_uprobe_at_a_file_offset_of_every_process(counter: Counter) -> None:
    path = executables.find_file("c")
    offset = executables.find_offset(path, "a64l")
    point = EbpfAttachType.uprobe(path, offset=offset)
    fd, prog_id = counter.load(point)
    made = do_attach(point, fd, prog_id)
    code = "import ctypes; f = ctypes.CDLL(None).a64l\nfor _ in range(23): f(b'x')"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert counter.read() == 23
    close_attachments(made.descriptors)


def test_uprobe_of_another_process_only(counter: Counter) -> None:
    with subprocess.Popen(["sleep", "1000"]) as other:
        point = EbpfAttachType.uprobe("c", "a64l", pid=other.pid)
        fd, prog_id = counter.load(point)
        made = do_attach(point, fd, prog_id)
        convert()
        assert counter.read() == 0
        close_attachments(made.descriptors)
        other.kill()


_COLLECTOR = """
import gc, sys
gc.disable()
print("ready", flush=True)
for line in sys.stdin:
    for _ in range(int(line)):
        gc.collect()
    print("done", flush=True)
"""


@pytest.mark.parametrize("of_pid", [True, False])
@pytest.mark.parametrize("pinnable", [False, True])
def test_static_probe_with_a_semaphore(counter: Counter, pinnable: bool, of_pid: bool) -> None:
    """Its code runs only while the semaphore is counted up, which is the kernel's doing here."""
    path = os.path.realpath(_PYTHON)
    try:
        (probe,) = executables.find_static_probes(path, "python", "gc__start")
    except AttachError as error:
        pytest.skip(str(error))
    assert probe.semaphore
    other = subprocess.Popen(
        [path, "-I", "-c", _COLLECTOR], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with other:
        assert other.stdin
        assert other.stdout
        assert other.stdout.readline() == "ready\n"

        def collect(times: int) -> None:
            assert other.stdin
            assert other.stdout
            print(times, file=other.stdin, flush=True)
            assert other.stdout.readline() == "done\n"

        point = EbpfAttachType.usdt(path, "python", "gc__start", pid=other.pid if of_pid else None)
        fd, prog_id = counter.load(point, tgid=other.pid)
        try:
            made = do_attach(point, fd, prog_id, pinnable=pinnable)
        except HookUnsupported as error:
            assert pinnable
            assert "Linux 5.15" in str(error)
            return
        collect(PRIME)
        assert counter.read() == PRIME
        close_attachments(made.descriptors)
        collect(7)
        assert counter.read() == PRIME
        other.stdin.close()


@pytest.mark.parametrize("pinnable", [False, True])
def test_every_context_switch_of_a_process(counter: Counter, pinnable: bool) -> None:
    """Software events but clocks count one by one; /proc counts the same."""
    point = EbpfAttachType.perf_event("context-switches", pid=os.getpid())
    fd, prog_id = counter.load(point)
    try:
        made = do_attach(point, fd, prog_id, pinnable=pinnable)
    except HookUnsupported as error:
        assert pinnable
        assert "Linux 5.15" in str(error)
        return
    before, usage = counter.read(), resource.getrusage(resource.RUSAGE_THREAD)
    for _ in range(PRIME):
        time.sleep(0.002)
    after, now = counter.read(), resource.getrusage(resource.RUSAGE_THREAD)
    switches = now.ru_nvcsw - usage.ru_nvcsw + now.ru_nivcsw - usage.ru_nivcsw
    assert switches > PRIME // 2  # a slow machine's timer may be over before it sleeps
    assert abs(after - before - switches) <= 2  # which may fall between two readings
    close_attachments(made.descriptors)


def test_samples_of_the_cpu_clock_follow_the_cpu_time(counter: Counter) -> None:
    point = EbpfAttachType.perf_event("cpu-clock", period=1_000_000, pid=os.getpid())
    fd, prog_id = counter.load(point)
    made = do_attach(point, fd, prog_id)
    started = time.thread_time()
    while time.thread_time() - started < 0.5:
        pass
    sampled = counter.read()
    close_attachments(made.descriptors)
    assert 20 < sampled < 1000  # one each millisecond of 500; emulated machines lose most


def test_every_cpu_is_sampled_and_one_if_asked(counter: Counter) -> None:
    online = os.sysconf("SC_NPROCESSORS_ONLN")
    for text, number in (("perf_event:,frequency=199", online), ("perf_event:cpu-clock,cpu=0", 1)):
        fd, prog_id = counter.load(parse(text))
        made = do_attach(parse(text), fd, prog_id)
        assert len(made.descriptors) == number
        assert made.hook == "perf_event:cpu-clock"
        close_attachments(made.descriptors)


def test_many_attachments_are_closed_together(counter: Counter) -> None:
    calls = ("accept", "bind", "listen", "kill", "sendmmsg", "tkill", "mlockall", "acct")
    descriptors: list[int] = []
    for call in calls:
        point = EbpfAttachType.tracepoint("syscalls", f"sys_enter_{call}")
        fd, prog_id = counter.load(point)
        descriptors += do_attach(point, fd, prog_id).descriptors
    close_attachments(descriptors)
    for fd in descriptors:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)
    close_attachments([])
