"""Contenders as processes: started on a pipe or a terminal, watched, interrupted, weighed."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

_PATIENCE_SECONDS = 60.0


class Running:
    """A process that wrote what it was waited for; what it writes from then on is thrown away.

    ``seconds`` is the time from before its start to when that text could be read.
    """

    def __init__(self, process: subprocess.Popen[bytes], output: int, seconds: float) -> None:
        self.process, self.seconds = process, seconds
        self._drain = threading.Thread(target=_read_to_end, args=(output,), daemon=True)
        self._drain.start()

    def interrupt(self) -> float:
        """Ctrl-C; seconds until the process is gone."""
        begin = time.perf_counter()
        self.process.send_signal(signal.SIGINT)
        self.process.wait(_PATIENCE_SECONDS)
        return time.perf_counter() - begin

    def memory(self, field: str = "Pss") -> float:
        """Memory of it and its descendants in MiB.  "Pss": of what n processes share each has a
        nth; "Rss": each has all of it.  /proc/PID/smaps_rollup, since Linux 4.14.
        """
        return _memory(self.process.pid, field)

    def cpu(self) -> float:
        """CPU seconds of it and its living descendants so far."""
        ticks = 0
        for pid in _tree(self.process.pid):
            if fields := _stat(pid):
                ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")

    def _end(self) -> None:
        """In order if it can: what an XDP script attached would stay."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.wait(_PATIENCE_SECONDS)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self._drain.join(_PATIENCE_SECONDS)


@contextmanager
def running(
    command: Sequence[str],
    until: str,
    *,
    env: Mapping[str, str],
    terminal: bool = False,
    started: Callable[[int], None] = lambda pid: None,
) -> Iterator[Running]:
    """A process from when it wrote what matches the pattern ``until``; ended on leaving.

    ``terminal`` gives it a terminal to write to.  ``started`` is told its process id.  Raises
    RuntimeError, with what it wrote, if it ends or says nothing for a minute instead.
    """
    ours, theirs = pty.openpty() if terminal else os.pipe()
    begin = time.perf_counter()
    process = subprocess.Popen(
        command,
        stdin=theirs if terminal else subprocess.DEVNULL,
        stdout=theirs,
        stderr=theirs if terminal else subprocess.STDOUT,
        env=env,
        start_new_session=True,
    )
    os.close(theirs)
    started(process.pid)
    try:
        _read_until(ours, re.compile(until.encode()), command)
    except BaseException:
        process.kill()
        process.wait()
        os.close(ours)
        raise
    run = Running(process, ours, time.perf_counter() - begin)
    try:
        yield run
    finally:
        run._end()


def time_to(command: Sequence[str], until: str, *, env: Mapping[str, str], **how: bool) -> float:
    """Seconds from the start of a process to when it has written that; it is let end by itself."""
    with running(command, until, env=env, **how) as run:
        try:
            run.process.wait(_PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"{' '.join(command)} does not end") from None
        return run.seconds


def peak_to(command: Sequence[str], until: str, *, env: Mapping[str, str], **how: bool) -> float:
    """The most memory, as PSS in MiB, of a process and its descendants together until it has
    written that; looked at every few milliseconds."""
    most, over = [0.0], threading.Event()

    def look(pid: int) -> None:
        while not over.wait(0.002):
            most.append(_memory(pid, "Pss"))

    def begin(pid: int) -> None:
        threading.Thread(target=look, args=(pid,), daemon=True).start()

    with running(command, until, env=env, started=begin, **how):
        over.set()
    return max(most)


def time_whole(command: Sequence[str], env: Mapping[str, str]) -> float:
    """Seconds from the start of a process to its end; its output is thrown away."""
    begin = time.perf_counter()
    subprocess.run(command, env=env, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - begin


def _read_until(output: int, until: re.Pattern[bytes], command: Sequence[str]) -> None:
    said = b""
    poll = select.poll()
    poll.register(output, select.POLLIN)
    while not until.search(said):
        more = _read(output) if poll.poll(_PATIENCE_SECONDS * 1000) else b""
        if not more:
            words = said.decode(errors="replace")[-2000:]
            raise RuntimeError(f"{' '.join(command)} never wrote {until.pattern!r}: {words}")
        said += more


def _read(output: int) -> bytes:
    try:
        return os.read(output, 1 << 16)
    except OSError:  # EIO: a terminal of which the other side is closed
        return b""


def _read_to_end(output: int) -> None:
    while _read(output):
        pass
    os.close(output)


def _tree(pid: int) -> list[int]:
    """A process and its descendants."""
    parents = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit() and (fields := _stat(int(entry))):
            parents[int(entry)] = int(fields[1])
    tree = [pid]
    for each in tree:
        tree += [child for child, parent in parents.items() if parent == each]
    return tree


def _memory(pid: int, field: str) -> float:
    return sum(_field(each, "smaps_rollup", field) for each in _tree(pid)) / 1024


def _field(pid: int, file: str, name: str) -> int:
    """A line "Name:  123 kB" of a file of a process; 0 if it is gone."""
    try:
        text = Path(f"/proc/{pid}/{file}").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    found = re.search(rf"^{name}:\s+(\d+) kB", text, re.M)
    return int(found[1]) if found else 0


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat after the name, or none: state, parent, ..."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []
