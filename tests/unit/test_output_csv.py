"""CSV: one header, one kind of record, one line each."""

import csv
import io
import os
from dataclasses import replace
from datetime import datetime, timezone

import pytest

from hypermesh_ebpf.metrics.sample import End, Event, Loss, Overhead, Sample, Start
from hypermesh_ebpf.monitors.declaration import Column, Monitor, Rung
from hypermesh_ebpf.output.sink import OutputClosed, open_sink

NOON = datetime(2026, 11, 23, 14, 0, 0, 5, tzinfo=timezone.utc).timestamp()
TIME = "2026-11-23T14:00:00.000005Z"
START = Start(NOON, "m", "lo", (), None, ())
END = End(NOON, "m", "lo", "count", Loss())

MONITOR = Monitor(
    "m",
    "",
    "m.c",
    rungs=(Rung("a", (), ("pid", "comm", "args")), Rung("b", (), ("pid", "cgroup"))),
    collector=None,
    columns=lambda options: (
        *((Column("iface", "interface"),) if options.get("many") else ()),
        Column("comm", "comm"),
        Column("packets", "packets", "count"),
        Column("errors", "errors", "count"),
    ),
    key=lambda options: ("iface", "comm") if options.get("many") else ("comm",),
    counters=("packets",),
    event_columns=(Column("time", "time", "time"), Column("comm", "comm"), Column("args", "args")),
    events="option",
)


def open_csv(stream, options=None, **how):
    how = {"show_events": False, **how}
    return open_sink("csv", MONITOR, options or {}, interval=1, top=1, stream=stream, **how)


def sample(rows, target="lo"):
    return Sample(NOON, "m", target, 1.0, {}, rows, Loss())


def read(stream):
    """The records by header, after a look at how the lines end."""
    assert "\r" not in stream.getvalue()
    return list(csv.DictReader(io.StringIO(stream.getvalue())))


def test_samples_are_a_record_for_each_row():
    out = io.StringIO()
    sink = open_csv(out)
    sink.start(START)
    sink.sample(sample([]))
    rows = [{"comm": "sh", "packets": 3, "errors": None, "packets_per_s": 1.5}]
    sink.sample(sample([*rows, {**rows[0], "comm": "ls"}]))
    sink.events([Event(NOON, "m", {"comm": "not asked for"})])
    sink.end(END)
    assert out.getvalue().splitlines() == [
        "time,target,comm,packets,errors,packets_per_s",
        f"{TIME},lo,sh,3,,1.5",
        f"{TIME},lo,ls,3,,1.5",
    ]


def test_share_of_events_taken_is_the_last_column_where_overhead_is_limited():
    out = io.StringIO()
    sink = open_csv(out, limited=True)
    sink.start(START)
    for share in (1.0, 0.25):
        overhead = Overhead(None, 1.0, share, share < 1)
        sink.sample(replace(sample([{"comm": "sh", "packets": 8}]), overhead=overhead))
    assert out.getvalue().splitlines() == [
        "time,target,comm,packets,errors,packets_per_s,sampled",
        f"{TIME},lo,sh,8,,,1.0",
        f"{TIME},lo,sh,8,,,0.25",
    ]


def test_event_says_how_many_it_stands_for_where_overhead_is_limited():
    out = io.StringIO()
    sink = open_csv(out, show_events=True, limited=True)
    sink.start(START)
    sink.events([Event(NOON, "m", {"pid": 7}), Event(NOON, "m", {"pid": 8, "stands_for": 4})])
    assert [(each["pid"], each["stands_for"]) for each in read(out)] == [("7", "1"), ("8", "4")]


def test_several_interfaces_are_told_apart():
    out = io.StringIO()
    sink = open_csv(out, {"many": True})
    sink.start(START)
    rows = [{"iface": name, "comm": "sh", "packets": 1} for name in ("lo", "eth1")]
    sink.sample(sample(rows, target=["lo", "eth1"]))
    assert [(each["target"], each["iface"]) for each in read(out)] == [
        ("lo", "lo"),
        ("eth1", "eth1"),
    ]


def test_events_have_the_fields_of_every_rung_whatever_this_one_gives():
    out = io.StringIO()
    sink = open_csv(out, show_events=True)
    sink.start(START)
    sink.events([Event(NOON, "m", {"pid": 7, "comm": "sh", "args": ["sh", "-c", "echo a b"]})])
    sink.sample(sample([{"comm": "sh", "packets": 3}]))
    assert out.getvalue().splitlines()[0] == "time,comm,args,pid,cgroup"
    assert read(out) == [
        {"time": TIME, "comm": "sh", "args": "sh -c 'echo a b'", "pid": "7", "cgroup": ""}
    ]


def test_monitor_that_is_for_events_shows_them_unasked():
    out = io.StringIO()
    monitor = Monitor("m", "", "m.c", (), None, lambda o: (), lambda o: (), events="always")
    sink = open_sink("csv", monitor, {}, interval=1, top=1, stream=out, show_events=False)
    sink.start(START)
    sink.events([Event(NOON, "m", {})])
    assert out.getvalue() == f"time\n{TIME}\n"


@pytest.mark.parametrize(
    ("value", "cell"),
    [
        ('a,b"c', 'a,b"c'),
        ("two\nlines\x1b[31m", "two\\nlines\\x1b[31m"),
        (b"\xff".decode("utf-8", "surrogateescape"), "\\xff"),
        ("größe", "größe"),
        (True, "true"),
        (0, "0"),
        (None, ""),
    ],
)
def test_every_record_is_one_line(value, cell):
    out = io.StringIO()
    sink = open_csv(out)
    sink.start(START)
    sink.sample(sample([{"comm": value, "packets": 1}]))
    assert out.getvalue().count("\n") == 2
    assert read(out)[0]["comm"] == cell


def test_events_that_nobody_can_read_any_more_are_counted_as_lost():
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as stream:
        sink = open_csv(stream, show_events=True)
        with pytest.raises(OutputClosed):
            sink.events([Event(NOON, "m", {})] * 17)
        assert sink.lost == 17
        sink.end(END)
        sink.close()
