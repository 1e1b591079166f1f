"""Both readers of a ring buffer give exactly the records that a program made."""

from __future__ import annotations

import mmap
import os
import platform
import select
import struct
import threading
from collections.abc import Iterator

import pytest

from hypermesh_ebpf.bpf import maps
from hypermesh_ebpf.bpf.ring import RingBuffer
from hypermesh_ebpf.bpf.spec import MapSpec
from hypermesh_ebpf.errors import MapError
from hypermesh_ebpf.image.image import Image
from tests.compiler import Programs, compile_text, loaded, new_map, run_program

vm_too = pytest.mark.vm_too
IN_ORDER = pytest.param(
    True,
    id="mapped",
    marks=pytest.mark.skipif(platform.machine() != "x86_64", reason="reads x86-64's memory order"),
)
both_readers = pytest.mark.parametrize("in_order", [IN_ORDER, pytest.param(False, id="libbpf")])

WORDS = 32

# Record n of a producer holds its number and the words n, n + 1, ... as far as its size goes.
# Every fifth is reserved and discarded; what finds no room is counted.
SOURCE = """
struct record { u64 producer; u64 words[32]; };
BPF_ARRAY(next, u64, 4);
BPF_ARRAY(scratch, struct record, 4);
BPF_ARRAY(lost, u64, 4);
BPF_ARRAY(discarded, u64, 4);
BPF_RINGBUF_OUTPUT(ring, PAGES);

int produce(struct xdp_md *ctx)
{
	u32 *packet = (u32 *)(long)ctx->data;
	if ((void *)(packet + 1) > (void *)(long)ctx->data_end)
		return XDP_ABORTED;
	u32 producer = *packet & 3;
	u64 *number = next.lookup(&producer);
	struct record *record = scratch.lookup(&producer);
	if (!number || !record)
		return XDP_ABORTED;
	u64 n = (*number)++;
	if (n % 5 == 4) {
		struct record *unwanted = ring.ringbuf_reserve(sizeof(*unwanted));
		if (unwanted)
			ring.ringbuf_discard(unwanted, 0);
		u64 *count = unwanted ? discarded.lookup(&producer) : lost.lookup(&producer);
		if (count)
			(*count)++;
		return XDP_PASS;
	}
	record->producer = producer;
#pragma unroll
	for (int i = 0; i < 32; i++)
		record->words[i] = n + i;
	u64 size = 16 + (n * 7 & 127) + (n & 64);
	if (ring.ringbuf_output(record, size, 0)) {
		u64 *count = lost.lookup(&producer);
		if (count)
			(*count)++;
	}
	return XDP_PASS;
}
"""


def record(producer: int, n: int) -> bytes:
    """What the program makes."""
    size = 16 + (n * 7 & 127) + (n & 64)
    return struct.pack(f"={WORDS + 1}Q", producer, *range(n, n + WORDS))[:size]


@pytest.fixture(scope="module")
def image() -> Image:
    return compile_text(SOURCE.replace("PAGES", "4"))


class Producer:
    """The program, loaded, and the ring that it fills."""

    def __init__(self, programs: Programs, in_order: bool) -> None:
        self._programs = programs
        spec = programs.maps["ring"].spec
        self.size, self.descriptor = spec.max_entries, programs.maps["ring"].fd
        self.ring = RingBuffer(self.descriptor, self.size, in_order=in_order)

    def produce(self, count: int, producer: int = 0) -> None:
        assert run_program(self._programs.programs["produce"], bytes([producer]), count) == 2

    def count(self, name: str, producer: int = 0) -> int:
        found: int = self._programs.maps[name].items()[producer][1]
        return found


@pytest.fixture
def source(image: Image, in_order: bool) -> Iterator[Producer]:
    with loaded(image) as programs:
        producer = Producer(programs, in_order)
        yield producer
        producer.ring.close()


@vm_too
@both_readers
def test_records_come_in_order_whole_and_once(source: Producer) -> None:
    """Of any size, past the end of the ring many times, without the discarded ones."""
    assert source.ring.read() == []
    made = 0
    for count in [0, 1, 2, 3, 50, 7, 61, 4, 5] * 5:
        if count:
            source.produce(count)
        wanted = [record(0, n) for n in range(made, made + count) if n % 5 != 4]
        assert source.ring.read() == wanted
        made += count
    assert made * 100 > 3 * source.size, "the ring was filled several times"
    assert source.ring.read() == []
    assert source.count("discarded") == made // 5
    assert source.count("lost") == 0


@vm_too
@both_readers
def test_readable_while_there_are_records(source: Producer) -> None:
    poll = select.poll()
    poll.register(source.ring.fileno(), select.POLLIN)
    assert poll.poll(0) == []
    source.produce(1)
    assert poll.poll(60_000)
    assert source.ring.read() == [record(0, 0)]
    assert poll.poll(0) == []


@vm_too
@both_readers
def test_what_finds_no_room_is_counted_and_the_rest_is_whole(source: Producer) -> None:
    source.produce(1000)
    lost = source.count("lost")
    assert lost > 500
    got = source.ring.read()
    assert got == [r for n in range(1000) if n % 5 != 4 and (r := record(0, n)) in got]
    assert len(got) + lost + source.count("discarded") == 1000
    assert sum(map(len, got)) <= source.size
    assert source.ring.read() == []
    source.produce(10)  # there is room again
    assert source.ring.read() == [record(0, n) for n in range(1000, 1010) if n % 5 != 4]


@both_readers
def test_nothing_is_torn_at_full_speed(source: Producer) -> None:
    """Two threads produce as fast as they can: each record is right and in order, or counted."""
    rounds, batch = 25, 1000
    seen: dict[int, int] = {0: -1, 1: -1}
    received = {0: 0, 1: 0}

    def take() -> None:
        for raw in source.ring.read():
            producer, n = struct.unpack_from("=QQ", raw)
            assert raw == record(producer, n)
            assert n > seen[producer]
            seen[producer] = n
            received[producer] += 1

    def produce(producer: int) -> None:
        for _ in range(rounds):
            source.produce(batch, producer)

    threads = [threading.Thread(target=produce, args=(number,)) for number in seen]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        take()
    take()
    for producer, count in received.items():
        gone = source.count("lost", producer) + source.count("discarded", producer)
        assert count + gone == rounds * batch
        assert count > 0


@both_readers
def test_one_read_ends_although_records_keep_coming(source: Producer) -> None:
    """Or a storm of events would keep the table from being drawn until it is over."""
    thread = threading.Thread(target=source.produce, args=(1_000_000,))  # in one system call
    thread.start()
    most = 0
    while thread.is_alive():
        # Each record has a header of 8 bytes; the last one may go past the limit.
        most = max(most, sum(8 + len(raw) for raw in source.ring.read()))
    thread.join()
    assert 0 < most <= source.size + 272


@vm_too
@both_readers
def test_map_that_is_no_ring_is_an_error(in_order: bool) -> None:
    spec = MapSpec("hm_test", maps.ARRAY, 4, 8, 4096, 0, None, None)
    with (
        new_map(spec) as map_,
        pytest.raises(MapError, match=r"map the ring buffer into memory: .*\(E") as caught,
    ):
        RingBuffer(map_.fd, 4096, in_order=in_order)
    assert caught.value.remedy


@pytest.mark.parametrize("in_order", [IN_ORDER])
def test_records_that_were_overwritten_are_an_error(source: Producer) -> None:
    """As in a ring that does not wait for its reader: here it is the reader who goes back."""
    for _ in range(20):
        source.produce(50)
        source.ring.read()
    fd = source.descriptor
    with mmap.mmap(fd, mmap.PAGESIZE, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE) as page:
        page[:8] = bytes(8)
    with pytest.raises(MapError, match="were overwritten before they were read") as caught:
        source.ring.read()
    assert "BPF_F_RB_OVERWRITE" in str(caught.value.remedy)


@both_readers
def test_close_gives_everything_back(image: Image, in_order: bool) -> None:
    def mappings() -> int:
        with open("/proc/self/maps") as file:
            return sum("bpf-map" in line for line in file)

    with loaded(image) as programs:
        before = len(os.listdir("/proc/self/fd")), mappings()
        ring = RingBuffer(programs.maps["ring"].fd, programs.maps["ring"].spec.max_entries)
        assert mappings() > before[1]
        ring.read()
        ring.close()
        assert (len(os.listdir("/proc/self/fd")), mappings()) == before
