"""Both readers of a perf buffer give exactly the records that a program made, on every CPU."""

from __future__ import annotations

import os
import platform
import select
import struct
import threading
from collections.abc import Iterator

import pytest

from hypermesh_ebpf.bpf import map_types, maps, perf_buffer
from hypermesh_ebpf.bpf.perf_buffer import PerfBuffer, read_online_cpus
from hypermesh_ebpf.bpf.spec import MapSpec
from hypermesh_ebpf.errors import MapError
from hypermesh_ebpf.image.image import Image
from tests.compiler import Programs, compile_text, loaded, new_map, run_program

vm_wide = pytest.mark.vm_wide
IN_ORDER = pytest.param(
    True,
    id="mapped",
    marks=pytest.mark.skipif(platform.machine() != "x86_64", reason="reads x86-64's memory order"),
)
both_readers = pytest.mark.parametrize("in_order", [IN_ORDER, pytest.param(False, id="libbpf")])

PRIME = 9973
WORDS = 32

# Record n of a producer holds its number, its CPU, the time and the words n, n + 1, ... as far as
# its size goes.  What finds no room is counted.
SOURCE = """
struct record { u64 producer; u64 cpu; u64 time; u64 words[32]; };
BPF_ARRAY(next, u64, 4);
BPF_ARRAY(scratch, struct record, 4);
BPF_ARRAY(lost, u64, 4);
BPF_PERF_OUTPUT(events);

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
	record->producer = producer;
	record->cpu = bpf_get_smp_processor_id();
	record->time = bpf_ktime_get_ns();
#pragma unroll
	for (int i = 0; i < 32; i++)
		record->words[i] = n + i;
	u64 size = 32 + (n * 7 & 127) + (n & 64);
	if (events.perf_submit(ctx, record, size)) {
		u64 *count = lost.lookup(&producer);
		if (count)
			(*count)++;
	}
	return XDP_PASS;
}
"""


def words(n: int) -> bytes:
    """What the program writes behind the time."""
    return struct.pack(f"={WORDS}Q", *range(n, n + WORDS))[: 8 + (n * 7 & 127) + (n & 64)]


@pytest.fixture(scope="module")
def image() -> Image:
    return compile_text(SOURCE)


class Producer:
    """The program, loaded, and the map that it writes into."""

    def __init__(self, programs: Programs) -> None:
        self._programs = programs
        self.map_fd = programs.maps["events"].fd

    def produce(self, count: int, producer: int = 0) -> None:
        assert run_program(self._programs.programs["produce"], bytes([producer]), count) == 2

    def produce_on(self, cpu: int, count: int, producer: int = 0) -> None:
        """The same on one CPU."""

        def run() -> None:
            os.sched_setaffinity(0, {cpu})
            self.produce(count, producer)

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()

    def count(self, name: str, producer: int = 0) -> int:
        found: int = self._programs.maps[name].items()[producer][1]
        return found


@pytest.fixture
def source(image: Image) -> Iterator[Producer]:
    with loaded(image) as programs:
        yield Producer(programs)


@pytest.fixture
def events(source: Producer, in_order: bool) -> Iterator[PerfBuffer]:
    buffer = PerfBuffer(source.map_fd, in_order=in_order)
    yield buffer
    buffer.close()


def numbers(records: list[bytes], producer: int = 0) -> list[int]:
    """The numbers of a producer's records, each of which must be as it was written."""
    found = []
    for raw in records:
        of, _cpu, _time, n = struct.unpack_from("=QQQQ", raw)
        assert raw[24:].startswith(words(n))
        assert len(raw) - 24 - len(words(n)) < 8, "filled up to a multiple of 8 at most"
        if of == producer:
            found.append(n)
    return found


@vm_wide
@both_readers
def test_records_come_in_order_whole_and_once(source: Producer, events: PerfBuffer) -> None:
    """Of any size, past the end of the buffer many times."""
    assert events.read() == []
    made = seen_bytes = 0
    while made < PRIME:
        count = min(1 + made % 397, PRIME - made)
        source.produce(count)
        records = events.read()
        assert numbers(records) == list(range(made, made + count))
        made += count
        seen_bytes += sum(map(len, records))
    assert seen_bytes > 4 * perf_buffer.PAGES * 4096, "the buffer was filled several times"
    assert events.read() == []
    assert events.lost == source.count("lost") == 0


@vm_wide
@both_readers
def test_records_of_all_cpus_come_in_the_order_of_time(
    source: Producer, events: PerfBuffer
) -> None:
    cpus = sorted(os.sched_getaffinity(0))
    for n in range(53):
        source.produce_on(cpus[-1 - n % len(cpus)], 1)
    records = events.read()
    assert numbers(records) == list(range(53))
    heads = [struct.unpack_from("=QQQ", raw) for raw in records]
    assert {cpu for _producer, cpu, _time in heads} == set(cpus)
    times = [time for _producer, _cpu, time in heads]
    assert times == sorted(times)


@vm_wide
@both_readers
def test_readable_while_there_are_records(source: Producer, events: PerfBuffer) -> None:
    poll = select.poll()
    poll.register(events.fileno(), select.POLLIN)
    assert poll.poll(0) == []
    for n in range(3):
        source.produce(1)
        assert poll.poll(60_000)
        assert numbers(events.read()) == [n]
        assert poll.poll(0) == []


@vm_wide
@pytest.mark.parametrize("kernel_counts", [True, False], ids=["counted", "told by records"])
@both_readers
def test_what_finds_no_room_is_counted_and_the_rest_is_whole(
    source: Producer, in_order: bool, kernel_counts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A page for each CPU: the kernel's count is the program's own."""
    if not kernel_counts:  # as before Linux 6.0: a format that no kernel has
        monkeypatch.setattr(perf_buffer, "_FORMAT_LOST", 1 << 40)
    buffer = PerfBuffer(source.map_fd, pages=1, in_order=in_order)
    try:
        (cpu, *_) = os.sched_getaffinity(0)
        source.produce_on(cpu, 1009)
        lost = source.count("lost")
        assert lost > 900
        got = numbers(buffer.read())
        assert got == list(range(1009 - lost)), "the oldest stay"
        source.produce_on(cpu, 1)  # there is room again
        assert numbers(buffer.read()) == [1009]
        assert buffer.lost == lost
        assert buffer.read() == []
        assert buffer.lost == lost
    finally:
        buffer.close()
    assert buffer.lost == lost


@both_readers
def test_nothing_is_torn_at_full_speed(source: Producer, events: PerfBuffer) -> None:
    """Two threads produce as fast as they can: each record is right and in order, or counted."""
    received: dict[int, list[int]] = {0: [], 1: []}

    def take() -> None:
        records = events.read()
        for producer, found in received.items():
            found.extend(numbers(records, producer))

    def produce(producer: int) -> None:
        os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[-producer]})
        for _ in range(25):
            source.produce(1000, producer)

    threads = [threading.Thread(target=produce, args=(number,)) for number in received]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        take()
    take()
    for cpu in os.sched_getaffinity(0):  # libbpf, and older kernels, tell it with the next record
        source.produce_on(cpu, 1, 2)
    events.read()
    for producer, found in received.items():
        assert found == sorted(set(found))
        assert found
        assert len(found) + source.count("lost", producer) == 25_000
    assert events.lost == source.count("lost", 0) + source.count("lost", 1)


@both_readers
def test_one_read_ends_although_records_keep_coming(source: Producer, events: PerfBuffer) -> None:
    """Or a storm of events would keep the table from being drawn until it is over."""
    thread = threading.Thread(target=source.produce, args=(300_000,))  # in one system call
    thread.start()
    most = 0
    while thread.is_alive():
        most = max(most, sum(map(len, events.read())))
    thread.join()
    assert 0 < most <= len(read_online_cpus()) * perf_buffer.PAGES * 4096


@vm_wide
@pytest.mark.skipif(platform.machine() != "x86_64", reason="libbpf's reader does not follow CPUs")
def test_cpu_that_goes_and_comes_back(source: Producer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its records and losses are kept, and it is read again.  (No CPU is switched off for this.)"""
    cpus = read_online_cpus()
    if len(cpus) < 2:
        pytest.skip("needs two CPUs")
    last = cpus[-1]
    buffer = PerfBuffer(source.map_fd, pages=1, in_order=True)
    try:
        source.produce_on(last, 101)
        lost = source.count("lost")
        assert lost
        monkeypatch.setattr(perf_buffer, "read_online_cpus", lambda: cpus[:-1])
        descriptors = len(os.listdir("/proc/self/fd"))
        assert numbers(buffer.read()) == list(range(101 - lost))
        assert len(os.listdir("/proc/self/fd")) < descriptors
        source.produce_on(last, 1)
        assert buffer.read() == []
        monkeypatch.undo()
        assert buffer.read() == []
        source.produce_on(last, 1)
        assert numbers(buffer.read()) == [102]
        assert buffer.lost == lost
    finally:
        buffer.close()


@vm_wide
def test_map_for_fewer_cpus_than_there_are(image: Image) -> None:
    spec = MapSpec("hm_test", map_types.PERF_EVENT_ARRAY, 4, 4, 1, 0, None, None)
    with new_map(spec) as map_:
        buffer = PerfBuffer(map_.fd)
        assert buffer.read() == []
        buffer.close()


@vm_wide
@both_readers
def test_map_that_is_no_perf_buffer_is_an_error(in_order: bool) -> None:
    spec = MapSpec("hm_test", maps.ARRAY, 4, 8, 4, 0, None, None)
    before = len(os.listdir("/proc/self/fd"))
    with new_map(spec) as map_:
        with pytest.raises(MapError, match=r"open the perf buffer: .*\(E"):
            PerfBuffer(map_.fd, in_order=in_order)
        untouched = [(struct.pack("=I", n), bytes(8)) for n in range(4)]
        assert map_.items() == untouched
    assert len(os.listdir("/proc/self/fd")) == before


@both_readers
def test_close_gives_everything_back(source: Producer, in_order: bool) -> None:
    def mappings() -> int:
        with open("/proc/self/maps") as file:
            return sum("[perf_event]" in line for line in file)

    before = len(os.listdir("/proc/self/fd")), mappings()
    buffer = PerfBuffer(source.map_fd, in_order=in_order)
    assert mappings() > before[1]
    source.produce(1)
    buffer.read()
    buffer.close()
    buffer.close()
    assert (len(os.listdir("/proc/self/fd")), mappings()) == before
    source.produce(1)
    assert source.count("lost") == 1, "and the program is told that nobody reads"
