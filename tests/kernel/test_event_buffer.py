"""The library's ring and perf buffers: values, bytes and columns of known numbers of execs."""

from __future__ import annotations

import os
import select
import subprocess
from collections.abc import Iterator

import pytest

from hypermesh_ebpf import EbpfAbstraction, InvalidHandle, UsageError, create_os_abstraction

EXECS = 7

SOURCE = """
struct event { u32 pid; u32 uid; u64 product; char comm[16]; };
BUFFER
TRACEPOINT_PROBE(sched, sched_process_exec) {
    struct event event = {};
    event.pid = bpf_get_current_pid_tgid() >> 32;
    event.uid = bpf_get_current_uid_gid();
    event.product = event.pid * 0x100000001ULL;
    bpf_get_current_comm(&event.comm, sizeof(event.comm));
    if (event.comm[0] == 'h' && event.comm[1] == 'm' && event.comm[2] == '_')
        SEND_IT;
    return 0;
}
"""
RING = SOURCE.replace("BUFFER", "BPF_RINGBUF_OUTPUT(events, 8);").replace(
    "SEND_IT", "events.ringbuf_output(&event, sizeof(event), 0)"
)
PERF = SOURCE.replace("BUFFER", "BPF_PERF_OUTPUT(events);").replace(
    "SEND_IT", "events.perf_submit(args, &event, sizeof(event))"
)
buffers = pytest.mark.parametrize("source", [RING, PERF], ids=["ring", "perf"])


@pytest.fixture
def os_() -> Iterator[EbpfAbstraction]:
    with create_os_abstraction() as abstraction:
        yield abstraction


@pytest.fixture(scope="module")
def named(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A program called hm_true: the kernel takes a process's name from the file it executes."""
    path = tmp_path_factory.mktemp("bin") / "hm_true"
    path.symlink_to("/bin/true")
    return str(path)


def execute(path: str) -> list[int]:
    """Run it a known number of times; the processes' numbers."""
    pids = []
    for _ in range(EXECS):
        process = subprocess.Popen([path])
        assert process.wait() == 0
        pids.append(process.pid)
    return pids


@buffers
def test_values_bytes_and_columns_of_what_happened(
    os_: EbpfAbstraction, source: str, named: str
) -> None:
    handle = os_.load_ebpf_program(source=source)
    os_.attach_ebpf_monitor(handle)
    with os_.open_ebpf_events(handle, "events") as events:
        pids = execute(named)
        poll = select.poll()
        poll.register(events.fileno(), select.POLLIN)
        assert poll.poll(60_000)
        assert [value["pid"] for value in events.read()] == pids
        assert 0 < events.fill < 1

        pids = execute(named)
        columns = events.read_columns()
        assert columns["pid"].tolist() == pids
        assert columns["product"].tolist() == [pid * 0x100000001 for pid in pids]
        assert set(columns["uid"].tolist()) == {os.getuid()}
        assert columns["comm"].tolist() == [b"hm_true"] * EXECS
        assert events.short == 0

        pids = execute(named)
        assert [int.from_bytes(raw[:4], "little") for raw in events.read_bytes()] == pids
        assert events.read_columns()["pid"].tolist() == []
        assert events.lost == (None if source is RING else 0)


@buffers
def test_closed_with_its_handle(os_: EbpfAbstraction, source: str) -> None:
    before = len(os.listdir("/proc/self/fd"))
    handle = os_.load_ebpf_program(source=source)
    events = os_.open_ebpf_events(handle)  # the only one
    os_.unload_ebpf_program(handle)
    for read in (events.read, events.read_bytes, events.read_columns, events.fileno):
        with pytest.raises(InvalidHandle, match="read events: it was closed"):
            read()
    events.close()
    with pytest.raises(InvalidHandle):
        os_.open_ebpf_events(handle)
    assert len(os.listdir("/proc/self/fd")) <= before + 2  # the worker and the guard may stay


def test_a_buffer_that_is_not_there(os_: EbpfAbstraction) -> None:
    handle = os_.load_ebpf_program(source="int f(struct xdp_md *ctx) { return XDP_PASS; }")
    with pytest.raises(UsageError, match="it has no ring or perf buffer"):
        os_.open_ebpf_events(handle)
    two = RING.replace(");\nTRACE", ");\nBPF_RINGBUF_OUTPUT(more, 8);\nTRACE")
    handle = os_.load_ebpf_program(source=two)
    with pytest.raises(UsageError, match="several buffers: events, more") as caught:
        os_.open_ebpf_events(handle)
    assert caught.value.remedy == "name one of them"
    with pytest.raises(UsageError, match="'other': there is no such buffer") as caught:
        os_.open_ebpf_events(handle, "other")
    assert caught.value.remedy == "known: events, more"
    with (
        os_.open_ebpf_events(handle, "more") as more,
        pytest.raises(UsageError, match="the type of its records is not known") as caught,
    ):
        more.read_columns()
    assert "read_bytes" in str(caught.value.remedy)
    assert more.name == "more"
