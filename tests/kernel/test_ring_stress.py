"""Producers at full speed on all CPUs: each record is received right and in order, or counted."""

from __future__ import annotations

import itertools
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from hypermesh_ebpf.bpf.record_columns import RecordColumns
from hypermesh_ebpf.bpf.ring import RingBuffer
from hypermesh_ebpf.bpf.types import parse_type
from hypermesh_ebpf.image.image import Image
from tests.compiler import Programs, compile_text, loaded, run_program
from tests.kernel.test_ring import both_readers

PRODUCERS = 3
BATCH = 1009  # a prime number of records in one system call
MOST_ROUNDS = 2000
TIMES = 20  # the ring is to be filled
FACTOR = 0x9E3779B97F4A7C15

# Record n of a producer: its number, n, n * FACTOR, and words of n as far as its size goes.
# Records are of one size, of many, or of one size and every other one discarded.  What finds no
# room is counted.  A ring of two pages is full after some 200 records.
SOURCE = """
struct record { u64 producer; u64 number; u64 product; u64 words[29]; };
BPF_ARRAY(next, u64, 4);
BPF_ARRAY(scratch, struct record, 4);
BPF_ARRAY(lost, u64, 4);
BPF_ARRAY(discarded, u64, 4);
BPF_RINGBUF_OUTPUT(ring, 2);

static __always_inline u32 producer_of(struct xdp_md *ctx)
{
	u32 *packet = (u32 *)(long)ctx->data;
	return (void *)(packet + 1) > (void *)(long)ctx->data_end ? 0 : *packet & 3;
}

int fixed(struct xdp_md *ctx)
{
	u32 producer = producer_of(ctx);
	u64 *next_number = next.lookup(&producer);
	u64 *count = lost.lookup(&producer);
	if (!next_number || !count)
		return XDP_ABORTED;
	u64 number = (*next_number)++;
	u64 *record = ring.ringbuf_reserve(32);
	if (!record) {
		(*count)++;
		return XDP_PASS;
	}
	record[0] = producer;
	record[1] = number;
	record[2] = number * FACTORULL;
	record[3] = number;
	ring.ringbuf_submit(record, 0);
	return XDP_PASS;
}

int half(struct xdp_md *ctx)
{
	u32 producer = producer_of(ctx);
	u64 *next_number = next.lookup(&producer);
	u64 *count = lost.lookup(&producer);
	u64 *unwanted = discarded.lookup(&producer);
	if (!next_number || !count || !unwanted)
		return XDP_ABORTED;
	u64 number = (*next_number)++;
	u64 *record = ring.ringbuf_reserve(32);
	if (!record) {
		(*count)++;
		return XDP_PASS;
	}
	record[0] = producer;
	record[1] = number;
	record[2] = number & 1 ? 0 : number * FACTORULL;
	record[3] = number;
	if (number & 1) {
		ring.ringbuf_discard(record, 0);
		(*unwanted)++;
	} else {
		ring.ringbuf_submit(record, 0);
	}
	return XDP_PASS;
}

int mixed(struct xdp_md *ctx)
{
	u32 producer = producer_of(ctx);
	u64 *next_number = next.lookup(&producer);
	u64 *count = lost.lookup(&producer);
	struct record *record = scratch.lookup(&producer);
	if (!next_number || !count || !record)
		return XDP_ABORTED;
	u64 number = (*next_number)++;
	record->producer = producer;
	record->number = number;
	record->product = number * FACTORULL;
#pragma unroll
	for (int i = 0; i < 29; i++)
		record->words[i] = number;
	u64 size = 24 + (number * 13 & 127) + (number & 64);
	if (ring.ringbuf_output(record, size, 0))
		(*count)++;
	return XDP_PASS;
}
""".replace("FACTOR", hex(FACTOR))


def size_of(shape: str, number: int) -> int:
    """How long the program makes its record."""
    return 24 + (number * 13 & 127) + (number & 64) if shape == "mixed" else 32


@pytest.fixture(scope="module")
def image() -> Image:
    return compile_text(SOURCE)


@dataclass
class Taken:
    """What a reader got: the numbers of each producer's records, as they came."""

    shape: str
    numbers: list[list[int]]
    bytes: int = 0

    def add(self, producer: int, number: int, product: int) -> None:
        assert product == number * FACTOR & (1 << 64) - 1
        self.numbers[producer].append(number)
        self.bytes += 8 + size_of(self.shape, number)


def take_bytes(ring: RingBuffer, taken: Taken) -> None:
    for raw in ring.read():
        producer, number, product = struct.unpack_from("=QQQ", raw)
        rest = size_of(taken.shape, number) - 24
        assert raw[24:] == (struct.pack("=Q", number) * (rest // 8 + 1))[:rest]
        taken.add(producer, number, product)


def take_items(ring: RingBuffer, taken: Taken) -> None:
    for items in ring.unpack(struct.Struct("=QQQ")):
        assert isinstance(items, tuple)
        taken.add(*items)


RECORD = parse_type(
    [
        "record",
        [[name, "unsigned long long"] for name in ("producer", "number", "product")],
        "struct",
    ],
    24,
)


def take_columns(ring: RingBuffer, taken: Taken) -> None:
    columns = RecordColumns(RECORD)
    found = ring.read_columns(columns)
    assert columns.short == 0
    for items in zip(*(found[name].tolist() for name in RECORD.members), strict=True):
        taken.add(*items)


@pytest.fixture
def programs(image: Image) -> Iterator[Programs]:
    with loaded(image) as programs:
        yield programs


@both_readers
@pytest.mark.parametrize("take", [take_bytes, take_items, take_columns])
@pytest.mark.parametrize("shape", ["fixed", "half", "mixed"])
def test_every_record_is_received_or_counted(
    programs: Programs, shape: str, take: Callable[[RingBuffer, Taken], None], in_order: bool
) -> None:
    spec = programs.maps["ring"].spec
    ring = RingBuffer(programs.maps["ring"].fd, spec.max_entries, in_order=in_order)
    taken = Taken(shape, [[] for _ in range(PRODUCERS)])

    made = [0] * PRODUCERS
    enough = threading.Event()

    def produce(producer: int) -> None:
        while not enough.is_set() and made[producer] < MOST_ROUNDS * BATCH:
            run_program(programs.programs[shape], bytes([producer]), BATCH)
            made[producer] += BATCH

    threads = [threading.Thread(target=produce, args=(n,)) for n in range(PRODUCERS)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        take(ring, taken)
        if taken.bytes > TIMES * spec.max_entries:
            enough.set()
    take(ring, taken)
    ring.close()
    assert enough.is_set()

    counts = {
        name: [count for _key, count in programs.maps[name].items()]
        for name in ("next", "lost", "discarded")
    }
    for producer, numbers in enumerate(taken.numbers):
        gone = counts["lost"][producer] + counts["discarded"][producer]
        assert counts["next"][producer] == made[producer]
        assert len(numbers) + gone == made[producer]
        assert all(before < after for before, after in itertools.pairwise(numbers))
        if shape == "half":
            assert not any(number & 1 for number in numbers)
