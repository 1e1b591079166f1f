"""What a refresh costs the tool itself: CPU time of its process, with maps that grow.

In table mode, on a terminal of 140 columns and 50 lines, one refresh a second, 40 rows shown; every
row has other numbers at each reading.
"""

from __future__ import annotations

import fcntl
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from benchmarks.measure import OURS, Result, Settings, say
from benchmarks.peers import ROOT, bcc_script, environment, hmebpf

TITLE = "CPU of the tool at each refresh (1 s, 40 rows shown)"
_ROWS = (10, 100, 1000, 10_000, 65_536)
_BUDGET_ROWS, _BUDGET_S = 1000, 0.010  # 1 % of a core
_DRAWN = b"\x1b[J"  # once in every frame
_BCC = "BCC script"
_WINDOW = 3  # refreshes in a round
_PAUSE = 0.3  # from a frame into the rest of its second


class Tool:
    """A command on a terminal of its own, which counts its frames."""

    def __init__(self, command: Sequence[str]) -> None:
        self.frames = 0
        self.said = b""
        master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("4H", 50, 140, 0, 0))
        env = {**environment(), "TERM": "xterm-256color"}
        self._process = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave, env=env, start_new_session=True
        )
        os.close(slave)
        self._master = master
        threading.Thread(target=self._drain, daemon=True).start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def _drain(self) -> None:
        try:
            while data := os.read(self._master, 1 << 16):
                self.frames += data.count(_DRAWN)
                self.said = (self.said + data)[-4096:]
        except OSError:
            return  # the other end is gone

    def await_frames(self, count: int, patience: float = 60.0) -> None:
        """Wait for so many more.  Raises RuntimeError where they do not come."""
        wanted, end = self.frames + count, time.monotonic() + patience
        while self.frames < wanted:
            if self._process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"{self._process.args}: {self.said.decode(errors='replace')}")
            time.sleep(0.01)

    def cpu_seconds(self) -> float:
        """The time that all its threads ran so far."""
        tasks = Path(f"/proc/{self._process.pid}/task").iterdir()
        return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9

    def mark(self) -> tuple[int, float]:
        """Frames and CPU seconds so far."""
        return self.frames, self.cpu_seconds()

    def __enter__(self) -> Tool:
        return self

    def __exit__(self, *exc: object) -> None:
        self._process.send_signal(signal.SIGINT)
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._master)


def _measure(tools: Mapping[str, Tool]) -> dict[str, float]:
    """CPU seconds of a refresh of each, over some of them, all tools at once: they mostly sleep."""
    for each in tools.values():
        each.await_frames(1)
    time.sleep(_PAUSE)
    before = {name: each.mark() for name, each in tools.items()}
    for each in tools.values():
        each.await_frames(_WINDOW)
    time.sleep(_PAUSE)
    figures = {}
    for name, each in tools.items():
        frames, cpu = each.mark()
        figures[name] = (cpu - before[name][1]) / (frames - before[name][0])
    return figures


def _fill(undo: ExitStack, tool: Tool, name: str, rows: int) -> None:
    """Fill the tool's map of that name, and keep it changing."""
    filler = undo.enter_context(
        subprocess.Popen(
            [sys.executable, "-m", "benchmarks.mapfill", str(tool.pid), name, str(rows)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": f"{ROOT / 'scripts'}:{ROOT}"},
        )
    )
    assert filler.stdout is not None
    assert filler.stdin is not None
    undo.callback(filler.stdin.close)
    if filler.stdout.readline() != b"filled\n":
        raise RuntimeError(f"map {name} was not filled")


_XDP = hmebpf("xdp", "--iface", "lo", "--by", "source", "--top", "40")
_OURS = {
    # On the loopback of a network namespace of its own: nobody else's program is there.
    "xdp --by source": (["unshare", "--net", "--", *_XDP], "keys"),
    "net-monitor": (hmebpf("net-monitor", "--top", "40"), "rows"),
}


def run(settings: Settings) -> Iterator[Result]:
    """xdp against a BCC script that prints the top of items(); net-monitor alone."""
    for title, (command, name) in _OURS.items():
        for rows in _ROWS:
            if title == "net-monitor" and rows > 8000:
                continue  # its map has room for 8,192
            say(f"{title}, {rows} rows")
            with ExitStack() as undo:
                contenders: dict[str, Tool] = {}
                if title != "net-monitor":
                    contenders[_BCC] = undo.enter_context(Tool(bcc_script("top_rows")))
                    contenders[_BCC].await_frames(1)
                    _fill(undo, contenders[_BCC], "keys", rows)
                contenders[OURS] = undo.enter_context(Tool(command))
                contenders[OURS].await_frames(2)
                _fill(undo, contenders[OURS], name, rows)
                for tool in contenders.values():
                    tool.await_frames(2)
                figures: dict[str, list[float]] = {}
                for _ in range(settings.rounds):
                    for each, figure in _measure(contenders).items():
                        figures.setdefault(each, []).append(figure)
            yield Result(
                f"{title}, {rows:,} rows",
                "s",
                figures,
                against=_BCC if _BCC in figures else None,
                limit=_BUDGET_S if rows == _BUDGET_ROWS else None,
            )
