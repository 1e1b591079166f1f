"""The maps and events of users' programs, in every output: many maps, none, huge, unreadable."""

from __future__ import annotations

import csv
import io
import json
import struct
import time
from collections.abc import Sequence
from typing import Any

import pytest

from hypermesh_ebpf import program_view
from hypermesh_ebpf.bpf import map_types
from hypermesh_ebpf.bpf.maps import TypedMap
from hypermesh_ebpf.bpf.spec import PERF_COUNTERS, MapSpec
from hypermesh_ebpf.errors import MapError
from hypermesh_ebpf.host.kallsyms import KernelSymbols
from hypermesh_ebpf.metrics.sample import End, Loss, Sample, Start
from hypermesh_ebpf.output.frame import Frame
from hypermesh_ebpf.output.grid import line_cells
from hypermesh_ebpf.output.sink import open_sink
from hypermesh_ebpf.program_view import make_view

U16, U32, U64 = (
    {"kind": "int", "name": f"u{8 * size}", "size": size, "signed": False} for size in (2, 4, 8)
)
CHAR = {"kind": "int", "name": "char", "size": 1, "signed": True}
COMM = {"kind": "array", "element": CHAR, "count": 16}


def structure(**members: Any) -> dict[str, Any]:
    """A packed structure of these members."""
    found, at = [], 0
    for name, type_ in members.items():
        found.append({"name": name, "type": type_, "offset": 8 * at})
        count = type_.get("count", 1)
        at += count * type_["element"]["size"] if "element" in type_ else type_["size"]
    return {"kind": "struct", "name": "s", "size": at, "members": found}


FLOW = structure(source=U32, comm=COMM, port=structure(local=U16, remote=U16))
HITS = structure(packets=U64, bytes=U64, last_ns=U64)


def spec(name: str, key: Any = U32, value: Any = U64, kind: int = 1, **more: Any) -> MapSpec:
    size = more.pop("entries", 1024)
    key_size, value_size = (each["size"] if each else 4 for each in (key, value))
    flags = more.pop("flags", 0)
    return MapSpec(name, kind, key_size, value_size, size, flags, key, value, **more)


class Entries:
    """What a reading of a map gives, already decoded."""

    def __init__(self, pairs: Sequence[tuple[Any, Any]]) -> None:
        self._pairs = pairs

    def __len__(self) -> int:
        return len(self._pairs)

    @property
    def identities(self) -> list[str]:
        return [repr(key) for key, _value in self._pairs]

    def values(self, member: str) -> list[Any]:
        return [value[member] if member else value for _key, value in self._pairs]

    def items(self) -> Sequence[tuple[Any, Any]]:
        return self._pairs

    def places_of_set(self) -> list[int]:
        return list(range(len(self)))

    def select(self, places: Sequence[int]) -> Entries:
        return Entries([self._pairs[place] for place in places])


class Kernel:
    """What is in the maps, in place of the kernel."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.entries: dict[str, Any] = {}
        self.records: dict[int, list[bytes]] = {}
        kernel = self

        def entries(self: TypedMap, limit: int | None = None) -> Any:
            found = kernel.entries.get(self.spec.name, [])
            if isinstance(found, Exception):
                raise found
            self.left_out = 0 if limit is None else max(len(found) - limit, 0)
            return found[:limit]

        class Buffer:
            lost = 3

            def __init__(self, fd: int, size: int = 0) -> None:
                self.fd = fd

            def fileno(self) -> int:
                return self.fd

            def unpack(self, layout: struct.Struct) -> list[tuple[Any, ...] | bytes]:
                records = kernel.records.pop(self.fd, [])
                size, unpack = layout.size, layout.unpack_from
                return [unpack(raw) if len(raw) >= size else raw for raw in records]

            def close(self) -> None:
                kernel.records.clear()

        def read(self: TypedMap, limit: int | None = None) -> Entries:
            return Entries(entries(self, limit))

        monkeypatch.setattr(TypedMap, "entries", entries)
        monkeypatch.setattr(TypedMap, "read", read)
        monkeypatch.setattr(program_view, "PerfBuffer", Buffer)
        monkeypatch.setattr(program_view, "RingBuffer", type("Ring", (Buffer,), {}))


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    return Kernel(monkeypatch)


def sample_of(collector: Any, when: float = 0.0) -> Sample:
    reading = collector.collect()
    return Sample(
        when or time.time(),
        "prog.c",
        "lo",
        1.0,
        reading.totals,
        reading.rows,
        Loss(reading.events_lost, reading.map_full, None),
        reading.histograms,
        reading.tables,
    )


def view(*specs: MapSpec) -> Any:
    return make_view([(each, 100 + index) for index, each in enumerate(specs)], "prog.c")


def show(kind: str, specs: Any, *, top: int = 40, times: int = 1, events: bool = False) -> str:
    monitor, collector = view(*specs)
    out = io.StringIO()
    sink = open_sink(kind, monitor, {}, interval=1, top=top, stream=out, show_events=events)
    sink.start(Start(time.time(), "prog.c", "lo", ("xdp:generic",), None, (1,)))
    for _ in range(times):
        sink.events(collector.events())
        sink.sample(sample_of(collector))
    sink.end(End(time.time(), "prog.c", "lo", "count", Loss()))
    return out.getvalue()


def section(text: str, name: str) -> list[list[str]]:
    """The words of each line of a table, from its title to the blank line."""
    lines = text.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith(f"{name}  "))
    rest = [line.split() for line in lines[first:]]
    return rest[: rest.index([])]


def test_every_map_is_a_table_with_its_own_columns(kernel: Kernel) -> None:
    kernel.entries = {
        "flows": [
            (
                {"source": 1, "comm": "curl", "port": {"local": 4, "remote": 80}},
                {"packets": 12_345_678, "bytes": 2048, "last_ns": 7},
            )
        ],
        "hits": [(3, 5), (4, 6)],
        "total": [(0, {"packets": 1, "bytes": 2, "last_ns": 3})],
    }
    text = show(
        "table",
        [
            spec("flows", FLOW, HITS),
            spec("hits"),
            spec("total", U32, HITS, map_types.ARRAY, entries=1),
        ],
    )
    title, heading, row = section(text, "flows")
    assert title == ["flows", "hash", "1", "entry"]
    assert heading[:6] == ["source", "comm", "port.local", "port.remote", "packets", "packets/s"]
    assert row[:5] == ["1", "curl", "4", "80", "12345678"], "exact into a pipe"
    assert [row[0] for row in section(text, "hits")] == ["hits", "key", "4", "3"]
    assert section(text, "total")[1][0] == "packets", "a single entry needs no key"


def test_names_that_key_and_value_share_are_told_apart(kernel: Kernel) -> None:
    kernel.entries = {"pids": [({"pid": 1}, {"pid": 2, "hits": 3})]}
    text = show("table", [spec("pids", structure(pid=U32), structure(pid=U32, hits=U64))])
    _title, heading, row = section(text, "pids")
    assert heading[:3] == ["key.pid", "value.pid", "hits"]
    assert row[:3] == ["1", "2", "3"]


def test_empty_unreadable_and_failing_maps_say_so(kernel: Kernel) -> None:
    kernel.entries = {
        "broken": MapError("read map broken", "Operation not permitted (EPERM)", "be root"),
        "fine": [(1, 1)],
    }
    specs = [
        spec("empty"),
        spec("also_empty"),
        spec("broken"),
        spec("later", None, U32, map_types.QUEUE),
        spec("cycles", None, PERF_COUNTERS | {"size": 4}, map_types.PERF_EVENT_ARRAY),
        spec("fine"),
    ]
    text = show("table", specs)
    assert "nothing in empty, also_empty yet" in text
    assert "broken  hash  not shown: Operation not permitted (EPERM)" in text
    assert "later  queue  not shown: reading an element would take it" in text
    assert section(text, "fine")[2][:2] == ["1", "1"]


def test_counters_of_the_program_are_no_buffer_of_events(kernel: Kernel) -> None:
    counters = spec("cycles", None, None, map_types.PERF_EVENT_ARRAY)
    counters = MapSpec(**{**_as_dict(counters), "value_desc": PERF_COUNTERS})
    _monitor, collector = view(counters)
    assert not collector.rings
    (table,) = sample_of(collector).tables
    assert "counters" in str(table.reason)


def _as_dict(each: MapSpec) -> dict[str, Any]:
    return {name: getattr(each, name) for name in each.__dataclass_fields__}


def test_constants_of_the_program_are_no_news(kernel: Kernel) -> None:
    kernel.entries = {".rodata": [(0, 5)], "hits": [(1, 2)]}
    constants = spec(".rodata", kind=map_types.ARRAY, entries=1, flags=map_types.RDONLY_PROG)
    text = show("table", [constants, spec("hits")])
    assert "rodata" not in text
    assert "hits" in text


def test_zeros_of_an_array_are_counted_and_not_shown(kernel: Kernel) -> None:
    kernel.entries = {"slots": [(index, 9 if index == 77 else 0) for index in range(1024)]}
    specs = [spec("slots", kind=map_types.ARRAY)]
    lines = section(show("table", specs), "slots")
    assert lines[0] == ["slots", "array", "1", "entry,", "1,023", "more", "are", "zero"]
    assert [line[:2] for line in lines[2:]] == [["77", "9"]]
    (line,) = [json.loads(each) for each in show("json", specs).splitlines() if '"sample"' in each]
    assert [row["key"] for row in line["rows"]] == [77]


def test_ten_thousand_entries_are_capped_in_tables_only(kernel: Kernel) -> None:
    kernel.entries = {"many": [(index, index) for index in range(10_000)]}
    specs = [spec("many")]
    text = show("table", specs, top=5)
    lines = section(text, "many")
    assert lines[0] == ["many", "hash", "10,000", "entries"]
    assert [line[0] for line in lines[2:]] == ["9999", "9998", "9997", "9996", "9995", "..."]
    assert "... 9,995 more" in text
    (line,) = [json.loads(each) for each in show("json", specs).splitlines() if '"sample"' in each]
    assert len(line["rows"]) == 10_000
    assert len(show("csv", specs).splitlines()) == 10_001


def test_entries_that_were_not_read_are_told(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hypermesh_ebpf.program_tables.MOST_ENTRIES", 10)
    kernel.entries = {"many": [(index, index) for index in range(25)]}
    specs = [spec("many"), spec("later", None, U32, map_types.QUEUE)]
    assert "10 entries, 15 more were not read" in show("table", specs)
    sample = next(json.loads(e) for e in show("json", specs).splitlines() if '"sample"' in e)
    assert sample["left_out"] == {"many": 15}
    assert sample["not_shown"] == {"later": map_types.UNREADABLE[map_types.QUEUE]}


def test_json_keeps_what_is_nested(kernel: Kernel) -> None:
    key = {"source": 1, "comm": "a\u540d", "port": {"local": 4, "remote": 80}}
    kernel.entries = {
        "flows": [(key, {"packets": 1, "bytes": 2, "last_ns": 3})],
        "lists": [(1, [1, 2, {"x": 3}])],
    }
    text = show("json", [spec("flows", FLOW, HITS), spec("lists", value=None)])
    sample = next(json.loads(each) for each in text.splitlines() if '"sample"' in each)
    flow, listed = sample["rows"]
    assert flow["map"] == "flows"
    assert flow["key"] == key
    assert flow["value"] == {"packets": 1, "bytes": 2, "last_ns": 3}
    assert set(flow["value_per_s"]) == {"packets", "bytes"}, "a time has no rate"
    assert listed == {"map": "lists", "key": 1, "value": [1, 2, {"x": 3}]}
    assert sample["totals"] == {}
    assert sample["loss"] == {"events_lost": 0, "map_full": None, "missed": None}


def test_csv_has_one_header_for_all_maps_whatever_is_seen(kernel: Kernel) -> None:
    specs = [spec("flows", FLOW, HITS), spec("hits")]
    header = show("csv", specs).splitlines()[0]
    assert header == (
        "time,target,map,key.source,key.comm,key.port.local,key.port.remote,value.packets,"
        "value.packets_per_s,value.bytes,value.bytes_per_s,value.last_ns,key,value,value_per_s"
    )
    key = {"source": 1, "comm": 'a,"\nb', "port": {"local": 4, "remote": 80}}
    kernel.entries = {
        "flows": [(key, {"packets": 1, "bytes": 2, "last_ns": 3})],
        "hits": [(7, 8)],
    }
    flow, hits = list(csv.DictReader(io.StringIO(show("csv", specs))))
    assert (flow["map"], flow["key.comm"], flow["value.bytes"]) == ("flows", 'a,"\\nb', "2")
    assert flow["key"] == flow["value"] == ""
    assert (hits["map"], hits["key"], hits["value"], hits["key.comm"]) == ("hits", "7", "8", "")
    assert hits["target"] == "lo"


def test_rates_are_of_what_came_since_the_view_was_made(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A map that was pinned, or that has counted for a while, is no burst."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    kernel.entries = {"hits": [(1, 1000)], "times": [(1, 5)], "start": [(1, 6)]}
    kernel.entries["flows"] = [({"a": [1]}, {"packets": 10, "pid": 3})]
    flows = spec("flows", structure(a=U32), structure(packets=U64, pid=U64))
    _monitor, collector = view(spec("hits"), flows, spec("start"))
    now[0] += 2.0
    kernel.entries |= {"hits": [(1, 1010), (2, 4)]}
    kernel.entries["flows"] = [({"a": [1]}, {"packets": 4, "pid": 9})]
    rows = {(row["map"], str(row["key"])): row for row in sample_of(collector).rows}
    assert rows["hits", "1"]["value_per_s"] == 5.0
    assert rows["hits", "2"]["value_per_s"] == 2.0, "what was not there before began with 0"
    assert rows["flows", "{'a': [1]}"]["value_per_s"] == {"packets": 2.0}, "made anew"
    assert "value_per_s" not in rows["start", "1"], "a map of times counts nothing"


@pytest.mark.parametrize("width", [20, 33, 80, 200])
@pytest.mark.parametrize("height", [4, 7, 12, 24, 50])
def test_tables_share_a_terminal_of_any_size(kernel: Kernel, width: int, height: int) -> None:
    flows = [
        (
            {"source": index, "comm": "名前プロセス", "port": {"local": 1, "remote": 2}},
            {"packets": index, "bytes": 2, "last_ns": 3},
        )
        for index in range(100)
    ]
    kernel.entries = {
        "flows": flows,
        "hits": [(index, index) for index in range(5)],
        "third": [(index, index) for index in range(30)],
        "dist": [(index, index) for index in range(20)],
    }
    specs = [
        spec("flows", FLOW, HITS),
        spec("hits"),
        spec("third"),
        spec("dist", kind=map_types.ARRAY, entries=64, histogram=True),
        spec("empty"),
        spec("later", None, U32, map_types.QUEUE),
    ]
    monitor, collector = view(*specs)
    frame = Frame(monitor, {}, interval=1, top=20, exact=False, ascii=False)
    frame.start(Start(0.0, "prog.c", "lo", ("xdp:generic",), None, (1,)))
    frame.sample(sample_of(collector, 1.0))
    lines = frame.lines(width, height)
    assert len(lines) <= height
    assert all(line_cells(line) <= width for line in lines)
    text = ["".join(part for part, _style in line) for line in lines]
    assert "loss" in text[-1]
    if height >= 24:
        for name in ("flows", "hits", "third", "dist", "later"):
            assert any(line.startswith(name) for line in text), name
        assert len([line for line in text if line.strip()]) >= height - 6, "room is used"
    if height >= 7:
        assert any(line.startswith("flows") for line in text)


def test_no_maps_at_all_is_no_trouble(kernel: Kernel) -> None:
    monitor, collector = view()
    assert monitor.events == "never"
    frame = Frame(monitor, {}, interval=1, top=20, exact=False, ascii=False)
    frame.start(Start(0.0, "prog.c", "lo", ("xdp:generic",), None, (1,)))
    frame.sample(sample_of(collector, 1.0))
    assert len(frame.lines(80, 24)) >= 2
    for kind in ("table", "json", "csv"):
        assert show(kind, [])


# -- histograms


def test_histogram_of_bcc_is_drawn_by_powers_of_two(kernel: Kernel) -> None:
    kernel.entries = {
        "size_bytes": [(slot, {1: 3, 7: 30, 8: 15}.get(slot, 0)) for slot in range(64)]
    }
    text = show("table", [spec("size_bytes", kind=map_types.ARRAY, entries=64, histogram=True)])
    bars = section(text, "size_bytes")
    assert bars[0][:3] == ["size_bytes", "p50", "108"]
    assert bars[1][:2] == ["0-1", "3"], "log2 of 0 and 1 is the same"
    assert [bar[:2] for bar in bars[-2:]] == [["64-127", "30"], ["128-255", "15"]]
    assert "entries" not in text, "not a table as well"


def test_histograms_by_key_have_a_title_each(kernel: Kernel) -> None:
    key = structure(disk=COMM, slot=U64)
    kernel.entries = {
        "dist": [
            ({"disk": "sda", "slot": 3}, 5),
            ({"disk": "vdb", "slot": 4}, 6),
            ({"disk": "sda", "slot": 2}, 7),
        ]
    }
    specs = [spec("dist", key, histogram=True)]
    text = show("table", specs)
    assert "dist sda" in text and "dist vdb" in text
    sample = next(json.loads(e) for e in show("json", specs).splitlines() if '"sample"' in e)
    assert sample["histograms"] == [
        {"name": "dist", "unit": "", "buckets": [[2, 3, 7], [4, 7, 5]], "key": {"disk": "sda"}},
        {"name": "dist", "unit": "", "buckets": [[8, 15, 6]], "key": {"disk": "vdb"}},
    ]
    assert len(sample["rows"]) == 3


def test_slots_of_a_value_are_a_histogram(kernel: Kernel) -> None:
    """As libbpf's tools count: slot n holds from 2**n on, beside other members."""
    value = structure(slots={"kind": "array", "element": U32, "count": 8}, comm=COMM)
    kernel.entries = {"hists": [(1, {"slots": [1, 0, 5, 0, 0, 0, 0, 0], "comm": "sh"})]}
    specs = [spec("hists", U32, value)]
    sample = next(json.loads(e) for e in show("json", specs).splitlines() if '"sample"' in e)
    assert sample["histograms"] == [
        {"name": "hists", "unit": "", "buckets": [[0, 1, 1], [2, 3, 0], [4, 7, 5]]}
    ]
    text = show("table", specs)
    assert section(text, ["hists", "hash"][0])[1] == ["key", "comm"]


# -- events

EVENT = structure(pid=U32, type=U16, port=structure(local=U16, remote=U16), comm=COMM)
RECORD = struct.pack("=IHHH16s", 4711, 2, 80, 443, b"sh\x1b[2J")


def ring(name: str, value: Any = EVENT) -> MapSpec:
    return MapSpec(name, map_types.RINGBUF, 0, 0, 4096, 0, None, value)


def perf(name: str, value: Any = EVENT) -> MapSpec:
    return MapSpec(name, map_types.PERF_EVENT_ARRAY, 4, 4, 2, 0, None, value)


def test_events_of_one_buffer_have_its_columns(kernel: Kernel) -> None:
    specs = [perf("events")]
    kernel.records = {100: [RECORD + bytes(6)]}
    heading, line = show("table", specs).splitlines()[1:3]
    assert heading.split() == ["time", "pid", "type_", "port.local", "port.remote", "comm"]
    # No text that a terminal obeys: the bytes of what cannot be printed.
    assert line.split()[1:5] == ["4711", "2", "80", "443"]
    assert "\x1b" not in line
    kernel.records = {100: [RECORD + bytes(6)]}
    event = next(json.loads(e) for e in show("json", specs).splitlines() if '"event"' in e)
    del event["time"], event["comm"]
    assert event == {
        "type": "event",
        "monitor": "prog.c",
        "map": "events",
        "pid": 4711,
        "type_": 2,
        "port": {"local": 80, "remote": 443},
    }


def test_events_of_several_buffers_are_told_apart(kernel: Kernel) -> None:
    specs = [perf("events"), ring("numbers", U64), ring("bytes", None)]

    def fill() -> None:
        kernel.records = {
            100: [RECORD], 101: [struct.pack("=Q", 5)], 102: [b"\1\2\3"],
        }  # fmt: skip

    fill()
    lines = show("table", specs).splitlines()
    assert lines[1].split() == ["time", "map", "fields"]
    assert lines[2].split()[1:6] == [
        "events",
        "pid=4711",
        "type_=2",
        "port.local=80",
        "port.remote=443",
    ]
    assert lines[3].split()[1:] == ["numbers", "value=5"]
    assert lines[4].split()[1:] == ["bytes", "data=010203"]
    fill()
    header, *rows = show("csv", specs).splitlines()
    assert header == "time,map,pid,type_,port.local,port.remote,comm,value,data"
    assert rows[1].split(",")[1:] == ["numbers", "", "", "", "", "", "5", ""]


def test_record_that_is_too_short_is_shown_as_bytes(kernel: Kernel) -> None:
    kernel.records = {100: [b"\1\2"]}
    event = next(json.loads(e) for e in show("json", [ring("r")]).splitlines() if '"event"' in e)
    assert event["data"] == "0102"


def test_lost_records_are_known_of_perf_buffers_alone(kernel: Kernel) -> None:
    _monitor, collector = view(perf("events"), perf("more"))
    assert collector.collect().events_lost == 6
    _monitor, collector = view(perf("events"), ring("ring"))
    assert collector.collect().events_lost is None


def test_view_without_events_opens_no_buffer(kernel: Kernel) -> None:
    monitor, collector = make_view([(perf("events"), 100)], "prog.c", events=False)
    assert not collector.rings
    assert monitor.events == "never"


# -- stack traces


def test_addresses_of_the_kernel_are_named() -> None:
    lines = [
        b"ffffffff81000000 T _text",
        b"ffffffff81000100 t do_it\t[module]",
        b"ffffffff81000200 D data",
    ]
    symbols = KernelSymbols(lines)
    assert symbols.name(0xFFFFFFFF81000100) == "do_it"
    assert symbols.name(0xFFFFFFFF81000123) == "do_it+0x23"
    assert symbols.name(0xFFFFFFFF80000000) is None
    assert symbols.name(0x7F0000000000) is None, "of a process"
    assert KernelSymbols([b"0000000000000000 T _text"]).name(0xFFFFFFFF81000000) is None
    assert KernelSymbols([]).name(0xFFFFFFFF81000000) is None


def test_a_storm_between_a_sample_and_its_events_is_not_dropped(kernel: Kernel) -> None:
    """Who reads samples and events in turns gets all events; who never asks keeps few of them."""
    _monitor, collector = view(spec("events", value=U32, kind=map_types.RINGBUF))
    number = 150_000
    for _ in range(2):
        assert len(collector.events()) == 0
        kernel.records[100] = [struct.pack("=I", n) for n in range(number)]
        collector.drain()
        kernel.records[100] = [struct.pack("=I", number)]
        values = [event.fields["value"] for event in collector.events()]
        assert values == list(range(number + 1))
    for _ in range(5):
        kernel.records[100] = [bytes(4)] * number
        collector.drain()
    assert len(collector.events()) <= 2 * number
