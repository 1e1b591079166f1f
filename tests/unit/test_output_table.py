"""Plain tables: what somebody who pipes the output into grep or a file sees."""

import io
import itertools
import re
import time
from dataclasses import replace

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
from hypermesh_ebpf.monitors.declaration import Column, Monitor
from hypermesh_ebpf.output.frame import Frame
from hypermesh_ebpf.output.sink import open_sink

XDP = Monitor(
    "xdp",
    "",
    "xdp.c",
    rungs=(),
    collector=None,
    columns=lambda options: (
        Column("source", "source"),
        Column("packets", "packets", "count"),
        Column("packets_per_s", "packets/s", "rate", share=True),
        Column("bytes", "bytes", "bytes"),
    ),
    key=lambda options: ("source",),
    counters=("packets", "bytes"),
    headline="packets",
)
EXEC = Monitor(
    "exec-monitor",
    "",
    "exec.c",
    rungs=(),
    collector=None,
    columns=lambda options: (Column("comm", "comm"), Column("execs", "execs", "count")),
    key=lambda options: ("comm",),
    counters=("execs",),
    event_columns=(
        Column("pid", "pid"),
        Column("comm", "comm"),
        Column("args", "args"),
        Column("took_ns", "took", "ns"),
    ),
    events="always",
)
EVIL = "evil\x1b[2J\n[red]" + b"\xff".decode("utf-8", "surrogateescape")
EVIL_SHOWN = "evil\\x1b[2J\\n[red]\\xff"


def open_table(out, monitor=XDP, top=40, show_events=False):
    return open_sink("table", monitor, {}, interval=1, top=top, stream=out, show_events=show_events)


def start(monitor="xdp", degraded=None):
    return Start(time.time(), monitor, "lo", ("xdp:generic",), degraded, (1,))


def row(source, packets, rate=0.0, size=100):
    bytes_ = None if packets is None else packets * size
    return {"source": source, "packets": packets, "packets_per_s": rate, "bytes": bytes_}


def sample(rows, totals=None, loss=None, histograms=(), monitor="xdp"):
    return Sample(time.time(), monitor, "lo", 2.0, totals or {}, rows, loss or Loss(), histograms)


def end(loss=None, reason="duration", monitor="xdp"):
    return End(time.time(), monitor, "lo", reason, loss or Loss())


def show(*samples, monitor=XDP, top=40, degraded=None):
    out = io.StringIO()
    sink = open_table(out, monitor, top)
    sink.start(start(degraded=degraded))
    for each in samples:
        sink.sample(each)
    return out.getvalue()


def test_every_refresh_is_printed_whole_and_without_escape_codes():
    text = show(*[sample([row("10.0.0.1", count)], {"packets": count}) for count in (3, 7)])
    assert text.count("xdp  lo  xdp:generic") == 2
    assert "packets 3" in text
    assert "packets 7" in text
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", text)
    assert all(line == line.rstrip() for line in text.splitlines())


def test_numbers_are_exact_and_line_up_under_their_headings():
    rows = [row("10.0.0.1", 12_345_678, 1234.5), row("fe80::1", 5, 0.5)]
    text = show(sample(rows, {"packets": 12_345_683, "packets_per_s": 1235.0}))
    heading, first, second = text.splitlines()[2:5]
    assert heading.split() == ["source", "packets", "packets/s", "bytes", "share"]
    assert first.split() == ["10.0.0.1", "12345678", "1234.5", "1234567800", "100.0%"]
    assert second.split() == ["fe80::1", "5", "0.5", "500", "0.0%"]
    for word in ("packets", "packets/s", "bytes"):
        right = re.search(rf"{word}(?= |$)", heading).end()
        assert first[right - 1] not in " "
        assert first[right : right + 1] in (" ", "")


@pytest.mark.parametrize(
    ("overhead", "line"),
    [
        (Overhead(None, 1.0, 1.0, False), "overhead  - % of a CPU, limit 1 %"),
        (Overhead(0.832, 0.5, 1.0, False), "overhead  0.832 % of a CPU, limit 0.5 %"),
        (
            Overhead(0.832, 1.0, 0.25, True),
            "SAMPLED  1 event in 4 taken, counts are estimates  "
            "overhead  0.832 % of a CPU, limit 1 %",
        ),
        (
            Overhead(0.1, 1.0, 1.0, True),
            "overhead  0.1 % of a CPU, limit 1 %  counts are estimates: events were sampled before",
        ),
    ],
)
def test_overhead_has_a_line_above_the_losses(overhead, line):
    lines = show(replace(sample([row("s", 1)]), overhead=overhead)).splitlines()
    assert lines[-3] == line
    assert lines[-2].startswith("no loss")


@pytest.mark.parametrize("height", [4, 6, 12, 40])
def test_sampling_is_never_what_has_no_room(height):
    frame = Frame(XDP, {}, interval=1, top=40, exact=False, ascii=False)
    frame.start(start())
    rows = [row(f"s{number}", number) for number in range(50)]
    frame.sample(replace(sample(rows), overhead=Overhead(2.0, 1.0, 0.125, True)))
    lines = ["".join(text for text, _style in line) for line in frame.lines(79, height)]
    assert len(lines) <= height
    assert lines[-2].startswith("SAMPLED  1 event in 8 taken, counts are estimates")
    assert lines[-1].startswith("no loss")


def test_sampling_is_told_among_events_when_it_changes():
    out = io.StringIO()
    sink = open_table(out, EXEC)
    sink.start(start("exec-monitor"))
    for share in (1.0, 0.25, 0.25, 1.0):
        overhead = Overhead(2.0, 1.0, share, share < 1)
        sink.sample(replace(sample([], monitor="exec-monitor"), overhead=overhead))
    lines = [line for line in out.getvalue().splitlines() if "overhead" in line]
    assert [line.startswith("SAMPLED  1 event in 4 taken") for line in lines] == [True, False]


def test_summary_tells_what_became_estimates_and_why_it_stopped():
    out = io.StringIO()
    sink = open_table(out)
    sink.start(start())
    sink.end(replace(end(reason="overhead"), overhead=Overhead(2.0, 1.0, 1 / 64, True)))
    assert out.getvalue().splitlines()[-1] == (
        "xdp on lo, no loss, counts are estimates, stopped by --max-overhead"
    )


def test_nothing_is_cut_however_long():
    name = "x" * 500
    assert name in show(sample([row(name, 1)]))


def test_busiest_rows_come_first_and_the_others_are_counted():
    rows = [row(f"s{number}", number, rate=float(number % 10)) for number in range(1234)]
    lines = show(sample(rows), top=3).splitlines()
    shown = [line.split()[0] for line in lines if line.startswith("s") and "source" not in line]
    assert shown == ["s1229", "s1219", "s1209"], "by rate, then by count"
    assert "... 1,231 more" in lines


def test_unknown_is_a_dash_and_never_zero():
    text = show(sample([row("a", None, None)], {"packets": None}, Loss(0, None, None)))
    assert text.splitlines()[2 + 1].split()[:4] == ["a", "-", "-", "-"]
    assert "packets -" in text
    assert "no loss  events lost 0  map full -  missed -" in text


def test_loss_is_shown_at_every_refresh():
    text = show(sample([]), sample([], loss=Loss(12345, 1, None)))
    assert "no loss  events lost 0  map full 0  missed -" in text
    assert "LOSS  events lost 12345  map full 1  missed -" in text


def test_other_totals_are_shown_when_there_are_any():
    text = show(sample([], {"packets": 5, "fragments": 2, "truncated": 0}))
    assert "fragments 2" in text
    assert "truncated" not in text


def test_degraded_run_says_what_is_lost_and_why():
    degraded = Degraded(3, "tracepoint", ("failed execs", "durations"), "no kprobes here")
    text = show(sample([]), degraded=degraded)
    assert (
        "degraded to rung 3, tracepoint: without failed execs, durations (no kprobes here)" in text
    )


def test_histogram_bars_are_as_long_as_their_counts():
    histogram = Histogram("frame_size", "bytes", ((64, 127, 30), (128, 255, 0), (256, 511, 10)))
    lines = show(sample([], histograms=(histogram,))).splitlines()
    at = next(index for index, line in enumerate(lines) if line.startswith("frame size"))
    bars = [line.split() for line in lines[at + 1 : at + 4]]
    assert [bar[:2] for bar in bars] == [["64-127", "30"], ["128-255", "0"], ["256-511", "10"]]
    assert len(bars[0][2]) == 3 * len(bars[2][2])
    assert len(bars[1]) == 2
    assert re.search(r"p50 \d+ B  p95 \d+ B  p99 \d+ B", lines[at])


def test_hostile_names_are_shown_and_not_obeyed():
    text = show(sample([row(EVIL, 1)]))
    assert EVIL_SHOWN in text
    assert "\x1b" not in text
    out = io.StringIO()
    sink = open_table(out, EXEC)
    sink.events([Event(0.0, "exec-monitor", {"comm": EVIL, "args": [EVIL]})])
    assert out.getvalue().count(EVIL_SHOWN) == 2
    assert "\x1b" not in out.getvalue()


def test_wide_characters_keep_columns_aligned():
    text = show(sample([row("名前プロセス", 11), row("abcd", 22)]))
    narrow, wide = [line for line in text.splitlines() if line.startswith(("名前", "abcd"))]
    # A wide character takes two cells.
    assert wide.index("11") + 6 == narrow.index("22")


def test_stream_that_is_not_utf8_gets_ascii(tmp_path):
    with open(tmp_path / "out", "w", encoding="latin-1") as stream:
        sink = open_table(stream)
        sink.start(start())
        histogram = Histogram("latency", "ns", ((1024, 2047, 1),))
        sink.sample(sample([row("µ名", 1)], histograms=(histogram,)))
        sink.end(end())
    text = (tmp_path / "out").read_bytes()
    assert b"\\xb5\\u540d" in text
    assert text.isascii()


def test_events_are_a_line_each_and_the_counts_come_once():
    out = io.StringIO()
    sink = open_table(out, EXEC)
    sink.start(start("exec-monitor"))
    args = ["sh", "-c", "x" * 300]
    for number in range(100):
        fields = {"pid": number, "comm": "sh", "args": args, "took_ns": None}
        sink.events([Event(time.time(), "exec-monitor", fields)])
    counts = [{"comm": "sh", "execs": 100}]
    for _ in range(3):
        sink.sample(sample(counts, {"execs": 100}, monitor="exec-monitor"))
    before, text = out.getvalue(), None
    sink.end(end(monitor="exec-monitor"))
    text = out.getvalue()
    assert before.count("x" * 300) == 100, "nothing is cut"
    headings = [line for line in before.splitlines() if line.split()[:2] == ["time", "pid"]]
    assert len(headings) == 3, "again every 40 lines"
    assert len(before.splitlines()) == 1 + 100 + 3, "samples do not come between events"
    assert re.search(r"^comm +execs$\n^sh +100$", text, re.MULTILINE)
    assert text.splitlines()[-1].startswith("exec-monitor on lo, 2.0 s, 100 execs, no loss")


def test_event_columns_line_up():
    out = io.StringIO()
    sink = open_table(out, EXEC)
    for pid, comm in ((1, "sh"), (123456, "systemd-journal"), (7, "sh")):
        fields = {"pid": pid, "comm": comm, "args": ["a"], "took_ns": 5}
        sink.events([Event(time.time(), "exec-monitor", fields)])
    lines = out.getvalue().splitlines()[1:]
    ends = {re.search(r"\d+(?=  s)", line).end() for line in lines}
    assert len(ends) == 1, "pids are set flush right like numbers"
    assert lines[1].index(" a ") == lines[2].index(" a "), "a column stays as wide as it became"


def test_loss_among_events_is_told_when_it_happens():
    out = io.StringIO()
    sink = open_table(out, EXEC)
    sink.start(start("exec-monitor"))
    for lost in (0, 4, 4, 9):
        sink.sample(sample([], loss=Loss(lost, 0, None), monitor="exec-monitor"))
    assert re.findall(r"LOSS  events lost (\d+)", out.getvalue()) == ["4", "9"]


def test_events_are_shown_only_where_they_are_asked_for():
    monitor = Monitor(
        "net",
        "",
        "n.c",
        (),
        None,
        EXEC.columns,
        EXEC.key,
        event_columns=EXEC.event_columns,
        events="option",
    )
    for asked, shown in ((False, 0), (True, 1)):
        out = io.StringIO()
        sink = open_table(out, monitor, show_events=asked)
        sink.events([Event(time.time(), "net", {"comm": "curl"})])
        assert out.getvalue().count("curl") == shown


@pytest.mark.parametrize(
    ("reason", "words"),
    [("duration", "duration reached"), ("interrupt", "interrupted"), ("count", "count reached")],
)
def test_summary_tells_how_much_what_was_lost_and_why_it_ended(reason, words):
    out = io.StringIO()
    sink = open_table(out)
    sink.start(start())
    sink.sample(sample([], {"packets": 1994, "bytes": 195_412}))
    sink.end(end(reason=reason))
    assert out.getvalue().splitlines()[-1] == (
        f"xdp on lo, 2.0 s, 1,994 packets, 190.8 KiB, no loss, {words}".replace("190.8", "191")
    )
    sink.end(end(Loss(3, 0, 2), reason))
    assert "LOSS: 3 events lost, 2 missed" in out.getvalue().splitlines()[-1]


def test_end_without_a_sample_is_no_trouble():
    out = io.StringIO()
    sink = open_table(out)
    sink.start(start())
    sink.end(end(reason="error"))
    assert "failed" in out.getvalue()


@pytest.mark.parametrize("term", ["dumb", ""])
def test_terminal_that_cannot_move_its_cursor_gets_the_plain_table(monkeypatch, term):
    class Teletype(io.StringIO):
        encoding = "utf-8"

        def isatty(self):
            return True

    monkeypatch.setenv("TERM", term)
    out = Teletype()
    sink = open_table(out)
    sink.start(start())
    sink.sample(sample([row("a", 1)]))
    assert "\x1b" not in out.getvalue()
    assert re.search("^a +1", out.getvalue(), re.MULTILINE)


def test_no_row_is_shown_twice_or_lost_between_top_and_more():
    for count, top in itertools.product((0, 1, 5, 6, 40), (1, 5, 40)):
        text = show(sample([row(f"s{number}", number) for number in range(count)]), top=top)
        shown = len(re.findall(r"^s\d+ ", text, re.MULTILINE))
        more = re.search(r"\.\.\. (\d+) more", text)
        assert shown + (int(more[1]) if more else 0) == count
        assert shown == min(count, top)
