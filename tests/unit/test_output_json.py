"""JSON lines: what a script that reads them may rely on."""

import io
import json
import os
from collections import ChainMap
from datetime import datetime, timezone

import pytest

from hypermesh_ebpf.metrics.sample import (
    Degraded,
    End,
    Event,
    Histogram,
    Loss,
    Overhead,
    Sample,
    Start,
)
from hypermesh_ebpf.output.json import JsonSink, format_time
from hypermesh_ebpf.output.writer import OutputClosed, Writer

NOON = datetime(2026, 11, 23, 14, 0, 0, 123456, tzinfo=timezone.utc).timestamp()


@pytest.fixture
def out():
    return io.StringIO()


@pytest.fixture
def sink(out):
    return JsonSink(Writer(out))


def lines(out):
    """Every line as one object; a line that is no strict JSON fails."""

    def refuse(word):
        raise ValueError(word)

    assert out.getvalue().endswith("\n")
    return [json.loads(line, parse_constant=refuse) for line in out.getvalue().splitlines()]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (NOON, "2026-11-23T14:00:00.123456Z"),
        (1_800_000_000, "2027-01-15T08:00:00.000000Z"),
        (0.5, "1970-01-01T00:00:00.500000Z"),
    ],
)
def test_times_are_rfc_3339_in_utc_with_microseconds(seconds, text):
    assert format_time(seconds) == text


def test_start(sink, out):
    degraded = Degraded(3, "tracepoint", ("failed execs",), "no kprobes")
    sink.start(Start(NOON, "xdp", "lo", ("xdp:generic",), None, (303,)))
    sink.start(Start(NOON, "xdp", ["lo", "eth1"], (), degraded, ()))
    first, second = lines(out)
    assert first == {
        "type": "start",
        "time": "2026-11-23T14:00:00.123456Z",
        "monitor": "xdp",
        "target": "lo",
        "hooks": ["xdp:generic"],
        "degraded": None,
        "prog_ids": [303],
    }
    assert second["target"] == ["lo", "eth1"]
    assert second["degraded"] == {
        "rung": 3,
        "hook": "tracepoint",
        "lost": ["failed execs"],
        "reason": "no kprobes",
    }


def test_sample_has_all_rows_and_unknown_is_null(sink, out):
    rows = [{"source": f"10.0.0.{number}", "packets": number} for number in range(1000)]
    totals = {"packets": 499_500, "packets_per_s": 0.125}
    loss = Loss(events_lost=0, map_full=2, missed=None)
    sink.sample(Sample(NOON, "xdp", "lo", 1.00049, totals, rows, loss))
    (line,) = lines(out)
    assert line.pop("rows") == rows
    assert line == {
        "type": "sample",
        "time": "2026-11-23T14:00:00.123456Z",
        "monitor": "xdp",
        "target": "lo",
        "elapsed_s": 1.0,
        "totals": totals,
        "loss": {"events_lost": 0, "map_full": 2, "missed": None},
    }


def test_histograms_come_when_there_are_any(sink, out):
    histogram = Histogram("packet_size", "bytes", ((64, 127, 5), (128, 255, 1)))
    sink.sample(Sample(NOON, "xdp", "lo", 1.0, {}, [], Loss(), (histogram,)))
    assert lines(out)[0]["histograms"] == [
        {"name": "packet_size", "unit": "bytes", "buckets": [[64, 127, 5], [128, 255, 1]]}
    ]


def test_events_are_flat_and_keep_their_order(sink, out):
    events = [
        Event(NOON, "exec-monitor", {"pid": pid, "args": ["a", "b c"]}) for pid in range(2500)
    ]
    sink.events(events)
    got = lines(out)
    assert [line["pid"] for line in got] == list(range(2500))
    assert list(got[0]) == ["type", "time", "monitor", "pid", "args"]
    assert got[0]["type"] == "event"
    assert got[0]["args"] == ["a", "b c"]


def test_end(sink, out):
    sink.end(End(NOON, "xdp", "lo", "duration", Loss(1, 2, 3)))
    assert lines(out) == [
        {
            "type": "end",
            "time": "2026-11-23T14:00:00.123456Z",
            "monitor": "xdp",
            "target": "lo",
            "reason": "duration",
            "loss": {"events_lost": 1, "map_full": 2, "missed": 3},
        }
    ]


def test_overhead_is_told_where_it_is_limited(sink, out):
    overhead = Overhead(0.832, 1.0, 0.25, True)
    sink.sample(Sample(NOON, "xdp", "lo", 1.0, {}, [], Loss(), overhead=overhead))
    sink.sample(
        Sample(NOON, "xdp", "lo", 1.0, {}, [], Loss(), overhead=Overhead(None, 1, 1, False))
    )
    sink.end(End(NOON, "xdp", "lo", "overhead", Loss(), overhead))
    first, second, last = lines(out)
    expected = {"percent": 0.832, "limit": 1.0, "sampled": 0.25, "estimated": True}
    assert first["overhead"] == last["overhead"] == expected
    assert second["overhead"]["percent"] is None, "not measured yet is no 0"
    assert last["reason"] == "overhead"


def test_no_events_is_no_line(sink, out):
    sink.events([])
    assert out.getvalue() == ""


NAMES = ["größe", "名前", "a\nb", "\x1b[31m", 'a"b\\c', "\U0001f600", "\x9b0m", ""]


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_text_comes_back_as_it_was(out, name, terminal):
    JsonSink(Writer(out), terminal=terminal).events([Event(NOON, "m", {"comm": name})])
    assert lines(out)[0]["comm"] == name
    assert out.getvalue().count("\n") == 1
    assert out.getvalue().isascii() or not terminal


@pytest.mark.parametrize("terminal", [False, True])
def test_names_that_are_no_utf8_differ_and_are_valid_json(out, terminal):
    names = [b"a\xff", b"a\xfe", b"\xc3\x28"]
    sink = JsonSink(Writer(out), terminal=terminal)
    sink.events(
        [Event(NOON, "m", {"comm": name.decode("utf-8", "surrogateescape")}) for name in names]
    )
    assert [line["comm"] for line in lines(out)] == ["a\\xff", "a\\xfe", "\\xc3("]


def test_number_that_is_none_is_null(sink, out):
    sink.events([Event(NOON, "m", {"ratio": float("nan"), "deep": [{"x": float("inf")}], "n": 1})])
    assert lines(out)[0]["ratio"] is None
    assert lines(out)[0]["deep"] == [{"x": None}]
    assert lines(out)[0]["n"] == 1


def test_any_mapping_may_be_a_row(sink, out):
    row = ChainMap({"packets": 1}, {"comm": b"sh"})
    sink.sample(Sample(NOON, "m", "lo", 1.0, row, [row], Loss()))
    assert lines(out)[0]["rows"] == [{"packets": 1, "comm": "sh"}]
    assert lines(out)[0]["totals"] == {"packets": 1, "comm": "sh"}


def test_output_is_utf8_in_any_locale(tmp_path):
    with open(tmp_path / "out", "w", encoding="latin-1") as stream:
        JsonSink(Writer(stream)).events([Event(NOON, "m", {"comm": "µ名"})])
    assert json.loads((tmp_path / "out").read_bytes().decode("utf-8"))["comm"] == "µ名"


def test_events_that_nobody_can_read_any_more_are_counted_as_lost():
    read, write = os.pipe()
    with open(write, "w") as stream:
        sink = JsonSink(Writer(stream))
        sink.events([Event(NOON, "m", {"pid": 1})] * 3)
        assert sink.lost == 0
        os.close(read)
        with pytest.raises(OutputClosed):
            sink.events([Event(NOON, "m", {"pid": 1})] * 2503)
        assert sink.lost == 2503
        sink.end(End(NOON, "m", "lo", "output", Loss()))
        sink.close()
