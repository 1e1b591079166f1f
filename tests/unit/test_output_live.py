"""The live table, on a real pseudo-terminal whose output a small terminal emulator reads."""

import fcntl
import os
import pty
import queue
import re
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
import unicodedata
from itertools import pairwise
from pathlib import Path

import pytest

from hypermesh_ebpf.metrics.sample import Degraded, End, Event, Histogram, Loss, Sample, Start
from hypermesh_ebpf.monitors.declaration import Column, Monitor
from hypermesh_ebpf.output.events import EventLines
from hypermesh_ebpf.output.grid import Grid, line_cells
from hypermesh_ebpf.output.sink import OutputClosed, open_sink

ROOT = Path(__file__).parents[2]

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
        Column("bytes_per_s", "bytes/s", "byte_rate"),
    ),
    key=lambda options: ("source",),
    counters=("packets", "bytes"),
    headline="packets",
    event_columns=(Column("pid", "pid"), Column("comm", "comm"), Column("args", "args")),
    events="option",
)


class Screen:
    """Enough of a terminal: text, CR, LF, cursor up, home, erase line and below, colours.

    Anything else that it is sent is an error.  ``history`` is what scrolled off the top.
    """

    def __init__(self, columns, rows):
        self.columns, self.rows = columns, rows
        self.lines = [[" "] * columns for _ in range(rows)]
        self.history = []
        self.x = self.y = 0
        self.styled = []

    def feed(self, data):
        for part in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|[\s\S]", data):
            if part == "\r":
                self.x = 0
            elif part == "\n":
                self._line_feed()
            elif len(part) > 1:
                self._control(part[2:-1], part[-1])
            else:
                self._put(part)

    def _line_feed(self):
        if self.y == self.rows - 1:
            self.history.append("".join(self.lines.pop(0)).rstrip())
            self.lines.append([" "] * self.columns)
        else:
            self.y += 1

    def _control(self, argument, letter):
        if letter == "A":
            self.y = max(self.y - int(argument), 0)
        elif letter == "H" and not argument:
            self.x = self.y = 0
        elif letter == "K" and not argument:
            self.lines[self.y][self.x :] = [" "] * (self.columns - self.x)
        elif letter == "J" and not argument:
            self.lines[self.y][self.x :] = [" "] * (self.columns - self.x)
            for y in range(self.y + 1, self.rows):
                self.lines[y] = [" "] * self.columns
        elif letter == "m":
            self.styled.append(argument)
        else:
            raise AssertionError(f"the terminal does not know {argument}{letter}")

    def _put(self, character):
        assert unicodedata.category(character)[0] != "C", f"control character {character!r}"
        width = 2 if unicodedata.east_asian_width(character) in "WF" else 1
        assert self.x + width <= self.columns, "the line is wider than the terminal"
        self.lines[self.y][self.x : self.x + width] = [character] + [""] * (width - 1)
        self.x += width

    def shown(self):
        return ["".join(line).rstrip() for line in self.lines]

    def text(self):
        return "\n".join(self.shown())


class Terminal:
    """A pseudo-terminal of some size, its screen, and a sink that draws on it."""

    def __init__(self, columns=100, rows=30):
        self.master, slave = pty.openpty()
        attributes = termios.tcgetattr(slave)
        attributes[1] &= ~termios.OPOST  # the bytes as they were written
        termios.tcsetattr(slave, termios.TCSANOW, attributes)
        self.stream = os.fdopen(slave, "w", encoding="utf-8")
        self.raw = ""
        self._arrived = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._keep_reading)
        self._reader.start()  # a terminal takes what it is sent, looked at or not
        self.resize(columns, rows)

    def resize(self, columns, rows):
        fcntl.ioctl(self.stream, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        self.screen = Screen(columns, rows)

    def _keep_reading(self):
        try:
            while data := os.read(self.master, 65536):
                self._arrived.put(data)
        except OSError:  # EIO: the other side is closed
            self._arrived.put(b"")

    def read(self):
        """The screen, after all that was drawn so far."""
        os.write(self.stream.fileno(), b"\0")  # nothing that is drawn holds one
        data = b""
        while not data.endswith(b"\0"):
            data += self._arrived.get()
        text = data[:-1].decode()
        self.raw += text
        # Without OPOST a line feed does not return the carriage; the screen does it.
        self.screen.feed(text.replace("\n", "\r\n"))
        return self.screen

    def open(self, top=40, show_events=False):
        return open_sink(
            "table", XDP, {}, interval=1, top=top, stream=self.stream, show_events=show_events
        )

    def close(self):
        self.stream.close()
        self._reader.join()
        os.close(self.master)


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    terminals = []

    def make(*size):
        terminals.append(Terminal(*size))
        return terminals[-1]

    yield make
    for each in terminals:
        each.close()


@pytest.fixture
def opened(terminal):
    """Opens a sink on a new terminal and closes it in the end."""
    sinks = []

    def make(*size, **options):
        term = terminal(*size)
        sinks.append(term.open(**options))
        return term, sinks[-1]

    yield make
    for sink in sinks:
        sink.close()


START = Start(time.time(), "xdp", "lo", ("xdp:generic",), None, (1,))


def row(source, packets, rate=1.0):
    return {
        "source": source,
        "packets": packets,
        "packets_per_s": rate,
        "bytes": packets * 100,
        "bytes_per_s": rate * 100,
    }


def sample(count=3, packets=1000, loss=None, histograms=(), rate=50.0):
    rows = [row(f"10.0.0.{number}", packets - number) for number in range(count)]
    totals = {"packets": packets, "packets_per_s": rate, "bytes": 5, "bytes_per_s": 1.0}
    return Sample(time.time(), "xdp", "lo", 2.0, totals, rows, loss or Loss(), histograms)


def end(reason="interrupt"):
    return End(time.time(), "xdp", "lo", reason, Loss())


def events(first, last):
    return [
        Event(time.time(), "xdp", {"pid": pid, "comm": "sh", "args": [f"event{pid}"]})
        for pid in range(first, last)
    ]


def test_what_is_attached_shows_before_the_first_reading(opened):
    term, sink = opened()
    sink.start(START)
    assert term.read().shown()[:2] == ["xdp  lo  xdp:generic", "waiting for the first reading"]


def test_a_refresh_takes_the_place_of_the_one_before(opened):
    term, sink = opened()
    term.stream.write("$ hmebpf xdp\n")
    term.stream.flush()
    sink.start(START)
    for packets in (1000, 2000, 30):
        sink.sample(sample(packets=packets))
    shown = term.read().shown()
    assert shown[0] == "$ hmebpf xdp", "what was on the screen stays"
    assert shown[1].startswith("xdp  lo  xdp:generic")
    assert term.screen.text().count("xdp:generic") == 1
    assert "packets 30 " in term.screen.text()
    assert "1,000" not in term.screen.text()
    assert not term.screen.history


def test_shorter_frame_leaves_nothing_of_the_longer_one(opened):
    term, sink = opened()
    sink.start(START)
    sink.sample(sample(count=20))
    sink.sample(sample(count=1))
    assert len(re.findall(r"10\.0\.0\.", term.read().text())) == 1
    assert term.screen.shown()[-10:] == [""] * 10


HISTOGRAMS = tuple(
    Histogram(f"{name}_latency", "ns", tuple((2**n, 2 ** (n + 1) - 1, n) for n in range(9, 20)))
    for name in ("connect", "send", "recv")
)


@pytest.mark.parametrize("columns", [20, 40, 60, 80, 120, 200])
@pytest.mark.parametrize("rows", [5, 10, 24, 60])
@pytest.mark.parametrize("degraded", [None, Degraded(3, "tracepoint", ("x " * 60,), "no kprobes")])
def test_every_size_shows_the_title_and_the_loss_and_breaks_no_line(
    opened, columns, rows, degraded
):
    """The screen refuses a line that is too wide, and a frame too high would scroll."""
    term, sink = opened(columns, rows)
    sink.start(Start(time.time(), "xdp", "lo", ("xdp:generic",), degraded, (1,)))
    for _ in range(3):
        sink.sample(sample(count=100, histograms=HISTOGRAMS))
    shown = term.read().shown()
    assert shown[0].startswith("xdp  lo")
    assert not term.screen.history
    assert any(line.startswith("no loss") for line in shown)


def test_narrow_terminal_loses_the_least_important_columns_first(opened):
    headings = []
    for columns in (100, 60, 50, 40, 20):
        term, sink = opened(columns, 30)
        sink.start(START)
        sink.sample(sample())
        heading = next(line for line in term.read().shown() if line.startswith("source"))
        headings.append(heading.split())
    assert headings[0] == ["source", "packets", "packets/s", "bytes", "bytes/s", "share"]
    for wider, narrower in pairwise(headings):
        assert len(narrower) <= len(wider)
        assert narrower == [word for word in headings[0] if word in narrower]
    assert headings[-1] == ["source", "packets"]


def test_what_names_a_row_goes_last_wherever_it_stands():
    columns = (Column("n", "calls", "count"), Column("b", "bytes", "bytes"), Column("comm", "comm"))
    for width, headings in ((40, "calls bytes comm"), (15, "calls comm"), (7, "comm")):
        grid = Grid(columns, ("comm",), exact=False, ascii=False)
        heading, lines = grid.lines([{"n": 5, "b": 7, "comm": "bash"}], width)
        assert " ".join("".join(text for text, _ in heading).split()) == headings
        assert all(line_cells(line) <= width for line in lines)


@pytest.mark.parametrize(
    ("columns", "heading"),
    [
        (120, "time pid comm took file args"),
        (80, "time pid comm took file args"),
        (75, "time pid comm took args"),
        (60, "time pid comm args"),
        (40, "time args"),
    ],
)
def test_events_keep_their_arguments_on_a_narrow_terminal(columns, heading):
    event_columns = (
        Column("pid", "pid"),
        Column("comm", "comm"),
        Column("took_ns", "took", "ns"),
        Column("filename", "file"),
        Column("args", "args"),
    )
    monitor = Monitor(
        "e", "", "e.c", (), None, lambda o: (), lambda o: (), (), "", (), event_columns
    )
    fields = {"pid": 7, "comm": "bash", "took_ns": 1, "filename": "/usr/bin/bash" * 3}
    event = Event(0.0, "e", {**fields, "args": [f"{number}" for number in range(999)]})
    lines = EventLines(monitor, exact=False, ascii=False).lines([event], columns, 40)
    assert " ".join("".join(text for text, _ in lines[0]).split()) == heading
    assert len(re.search("0 1 2 .*…", "".join(text for text, _ in lines[1]))[0]) >= 12
    assert all(line_cells(line) <= columns for line in lines)


def test_rows_that_do_not_fit_are_counted(opened):
    for rows, top in ((24, 40), (60, 10), (60, 40)):
        term, sink = opened(100, rows, top=top)
        sink.start(START)
        sink.sample(sample(count=1000))
        shown = len(re.findall(r"^10\.0\.0\.", term.read().text(), re.MULTILINE))
        more = re.search(r"… (\S+) more", term.screen.text())
        assert shown + int(more[1]) == 1000
        assert 10 <= shown <= top


def test_sparkline_shows_the_rates_so_far(opened):
    term, sink = opened()
    sink.start(START)
    for rate in (0.0, 10.0, 80.0, None, 40.0):
        sink.sample(sample(rate=rate))
    assert "packets ▁▂█ ▅  max 80/s" in term.read().text()


def test_histograms_stand_side_by_side_or_shrink_to_a_line(opened):
    term, sink = opened(200, 50)
    sink.start(START)
    sink.sample(sample(histograms=HISTOGRAMS))
    titles = [line for line in term.read().shown() if "latency" in line]
    assert len(titles) == 1
    assert re.findall(r"(\w+) latency", titles[0]) == ["connect", "send", "recv"]
    assert "512ns..1µs" in term.screen.text()
    term, sink = opened(100, 20)
    sink.start(START)
    sink.sample(sample(histograms=HISTOGRAMS))
    titles = [line for line in term.read().shown() if "latency" in line]
    assert [title.split()[0] for title in titles] == ["connect", "send", "recv"]
    assert all("p99" in title for title in titles)


def test_loss_is_red_and_no_loss_green(opened):
    term, sink = opened()
    sink.start(START)
    sink.sample(sample())
    term.read()
    assert "\x1b[32mno loss" in term.raw
    sink.sample(sample(loss=Loss(7, 0, None)))
    term.read()
    assert re.search(r"\x1b\[1;31mLOSS", term.raw)
    assert "events lost 7" in term.screen.text()


def test_no_color_is_honoured(opened, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    term, sink = opened()
    sink.start(START)
    sink.sample(sample(loss=Loss(7, 0, None)))
    codes = {code for argument in term.read().styled for code in argument.split(";")}
    assert codes <= {"0", "1", "2"}, "bold and dim are no colours"


def test_nothing_about_the_terminal_is_changed(opened):
    """No hidden cursor, no other screen, no modes: a kill -9 leaves nothing to put right."""
    before = None
    term, sink = opened()
    before = termios.tcgetattr(term.stream)
    sink.start(START)
    sink.sample(sample())
    assert termios.tcgetattr(term.stream) == before
    term.read()
    assert set(re.findall(r"\x1b\[?[0-9;?]*(.)", term.raw)) <= set("AHJKm")
    assert "?" not in "".join(re.findall(r"\x1b[^A-Za-z]*", term.raw))


def test_hostile_names_are_shown_and_not_obeyed(opened):
    """The screen refuses every control character and unknown sequence."""
    term, sink = opened(show_events=True)
    evil = "\x1b[2J\x9b1m\n\u202e" + b"\xff".decode("utf-8", "surrogateescape")
    sink.start(Start(time.time(), "xdp", evil, (evil,), Degraded(2, evil, (evil,), evil), ()))
    rows = [row(evil, 1)]
    totals = {"packets": 1}
    sink.sample(Sample(time.time(), "xdp", evil, 1.0, totals, rows, Loss(), ()))
    time.sleep(0.02)
    sink.events([Event(0.0, "xdp", {"pid": 1, "comm": evil, "args": [evil]})])
    sink.end(End(time.time(), "xdp", evil, "count", Loss()))
    assert "\\x1b[2J\\x9b1m\\n\\u202e\\xff" in term.read().text()


def test_resize_draws_the_screen_anew_at_once(opened):
    """The handler is called by the signal, without another sample."""
    term, sink = opened(120, 40)
    sink.start(START)
    sink.sample(sample(count=30))
    term.read()
    for columns, rows in ((40, 40), (150, 12), (60, 24)):
        term.resize(columns, rows)
        # A terminal that became narrower wraps what was there: any rubbish may be on it.
        term.screen.lines = [list("rubbish".ljust(columns)) for _ in range(rows)]
        term.screen.y = rows - 1
        signal.raise_signal(signal.SIGWINCH)
        assert "rubbish" not in term.read().text()
        assert term.screen.shown()[0].startswith("xdp  lo")
        assert not term.screen.history


def test_resize_is_noticed_without_the_signal_too(terminal):
    """A sink in another thread than the main one has no handler, and leaves the process's alone."""
    term = terminal(120, 40)
    before = signal.getsignal(signal.SIGWINCH)

    def run():
        sink = term.open()
        sink.start(START)
        assert signal.getsignal(signal.SIGWINCH) == before
        sink.sample(sample())
        term.read()
        term.resize(40, 20)
        sink.sample(sample())
        sink.close()

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert term.read().shown()[0].startswith("xdp  lo")


def test_signal_handlers_are_as_before_in_the_end(terminal):
    numbers = (signal.SIGWINCH, signal.SIGCONT)
    before = [signal.getsignal(number) for number in numbers]
    sink = terminal().open()
    sink.start(START)
    assert [signal.getsignal(number) for number in numbers] != before
    for _ in range(2):
        sink.close()
        assert [signal.getsignal(number) for number in numbers] == before


def test_process_that_was_stopped_draws_below_what_the_shell_wrote(opened):
    term, sink = opened()
    sink.start(START)
    sink.sample(sample())
    term.stream.write("$ fg\n")
    term.stream.flush()
    signal.raise_signal(signal.SIGCONT)
    shown = term.read().shown()
    assert "$ fg" in shown
    assert shown[shown.index("$ fg") + 1].startswith("xdp  lo")


def test_last_table_stays_and_one_line_sums_up(opened):
    term, sink = opened()
    sink.start(START)
    sink.sample(sample(packets=1994))
    sink.end(end())
    shown = [line for line in term.read().shown() if line]
    assert shown[-2].startswith("no loss")
    assert shown[-1] == "xdp on lo, 2.0 s, 1,994 packets, 5 B, no loss, interrupted"
    assert "1,994" in shown[1]
    assert term.screen.x == 0, "the prompt comes on a line of its own"


def test_events_scroll_into_the_history_above_the_table(opened):
    term, sink = opened(100, 24, show_events=True)
    sink.start(START)
    sink.sample(sample())
    for first in range(0, 60, 3):
        time.sleep(0.02)
        sink.events(events(first, first + 3))
    sink.sample(sample())
    screen = term.read()
    seen = re.findall(r"event(\d+)", "\n".join([*screen.history, *screen.shown()]))
    assert [int(pid) for pid in seen] == list(range(60)), "each once, in order"
    assert len(re.findall("xdp:generic", screen.text())) == 1
    assert not any("xdp:generic" in line for line in screen.history)
    headings = [line for line in screen.shown() if line.split()[:2] == ["time", "pid"]]
    assert headings, "a heading is always in sight"


def test_burst_of_events_shows_its_end_and_how_many_were_left_out(opened):
    term, sink = opened(100, 24, show_events=True)
    sink.start(START)
    sink.sample(sample())
    time.sleep(0.02)
    sink.events(events(0, 5000))
    screen = term.read()
    text = "\n".join([*screen.history, *screen.shown()])
    seen = [int(pid) for pid in re.findall(r"event(\d+)", text)]
    left_out = int(re.search(r"\.\.\. (\S+) more events", text)[1].replace(",", ""))
    assert seen == list(range(left_out, 5000))
    assert 10 < len(seen) < 100
    assert sink.lost == 0


def test_resize_shows_the_last_events_again(opened):
    term, sink = opened(100, 24, show_events=True)
    sink.start(START)
    sink.sample(sample())
    time.sleep(0.02)
    sink.events(events(0, 10))
    term.read()
    term.resize(70, 30)
    signal.raise_signal(signal.SIGWINCH)
    assert re.findall(r"event(\d+)", term.read().text()) == [str(pid) for pid in range(10)]
    assert not term.screen.history


def test_terminal_that_was_closed_ends_the_run(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    master, slave = pty.openpty()
    with os.fdopen(slave, "w", encoding="utf-8") as stream:
        sink = open_sink("table", XDP, {}, interval=1, top=5, stream=stream, show_events=True)
        sink.start(START)
        os.close(master)
        time.sleep(0.02)
        with pytest.raises(OutputClosed):
            sink.events(events(0, 11))
        assert sink.lost == 11
        sink.end(end())
        sink.close()


JOB = """
import os, sys
sys.path.insert(0, {root!r})
from tests.unit.test_output_live import *
sink = open_sink("table", XDP, {{}}, interval=1, top=5, stream=sys.stdout, show_events=False)
if {background}:
    os.setpgid(0, 0)  # the shell does this for every job, and makes no job of its own of this one
sink.start(START)
sink.sample(sample())
"""
SHELL = """
import os, subprocess, sys
os.open(os.ttyname(1), os.O_RDWR)  # a session's first terminal becomes its own
sys.exit(subprocess.run([sys.executable, "-c", {job!r}]).returncode)
"""


@pytest.mark.parametrize("background", [False, True])
def test_process_in_the_background_draws_nothing(terminal, background):
    term = terminal()
    job = JOB.format(root=str(ROOT), background=background)
    subprocess.run(
        [sys.executable, "-c", SHELL.format(job=job)],
        stdout=term.stream,
        start_new_session=True,
        check=True,
    )
    assert ("xdp:generic" in term.read().text()) is not background
    assert not background or term.raw == ""


def test_kernels_own_console_gets_no_characters_that_it_has_not(terminal, monkeypatch):
    monkeypatch.setenv("TERM", "linux")
    term = terminal()
    sink = term.open()
    sink.start(START)
    for _ in range(3):
        sink.sample(sample(count=100, histograms=HISTOGRAMS))
    sink.close()
    assert term.read().text().isascii()
    assert "#" in term.screen.text()
