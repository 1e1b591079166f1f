"""When the kernel wakes a reader of a ring buffer: what :mod:`hypermesh_ebpf.pace` rests on."""

from __future__ import annotations

import select

import pytest

from hypermesh_ebpf.bpf.ring import RingBuffer
from tests.compiler import compile_text, loaded, run_program

SOURCE = """
BPF_RINGBUF_OUTPUT(ring, 16);
int produce(struct xdp_md *ctx)
{
	u64 record = 4711;
	ring.ringbuf_output(&record, sizeof(record), 0);
	return XDP_PASS;
}
"""


@pytest.mark.vm_too
def test_the_kernel_wakes_a_reader_that_had_caught_up_and_no_other() -> None:
    """Edge-triggered, epoll reports each wake-up once, however many records there are."""
    with loaded(compile_text(SOURCE)) as programs:
        fd, size = programs.maps["ring"].fd, programs.maps["ring"].spec.max_entries
        ring = RingBuffer(fd, size)
        edges = select.epoll()
        edges.register(fd, select.EPOLLIN | select.EPOLLET)
        try:
            for _ in range(3):
                assert edges.poll(0) == []
                run_program(programs.programs["produce"])
                assert len(edges.poll(60)) == 1, "it had caught up"
                for _ in range(50):
                    run_program(programs.programs["produce"], repeat=7)
                assert edges.poll(0.1) == [], "351 records wait: nobody is told again"
                assert len(ring.read()) == 351
                assert ring.fill == 351 * 16 / size
        finally:
            edges.close()
            ring.close()


@pytest.mark.vm_too
def test_a_wake_up_needs_no_new_record_while_some_wait() -> None:
    """Level-triggered: a reader that pauses and comes back is told of what came meanwhile."""
    with loaded(compile_text(SOURCE)) as programs:
        ring = RingBuffer(programs.maps["ring"].fd, programs.maps["ring"].spec.max_entries)
        poll = select.poll()
        poll.register(ring.fileno(), select.POLLIN)
        run_program(programs.programs["produce"], repeat=5)
        assert poll.poll(0)
        assert poll.poll(0)
        assert len(ring.read()) == 5
        assert poll.poll(0) == []
        ring.close()
