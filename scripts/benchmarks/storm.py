"""Events taken without loss: while processes start as fast as they can, and at a paced rate.

Every contender writes a line for each event into a file.  In the exec storm some thousand processes
are executed and as many lines have to come; the tool's CPU seconds are divided by them.  In the
ring storm a process makes a system call that does nothing at a given rate for a second, and the
rate is doubled, then bisected, until a line is missing.  Buffers have 1 MiB.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.measure import Result, Settings, say, take_turns
from benchmarks.peers import HMEBPF, ROOT, SCRIPTS, bcc_script, bpftrace, environment, hmebpf

TITLE = "Events taken without loss"

_EXECS, _SPAWNERS = 2000, 2
_LEAST, _MOST = 12_500, 3_200_000  # events per second
_BISECTIONS = 2
_CALLBACK, _BPFTRACE = "BCC callback", "bpftrace"


def run(settings: Settings) -> Iterator[Result]:
    """The exec storm's lines, then the ring storm's."""
    with tempfile.TemporaryDirectory() as folder:
        yield from _run_execs(settings, Path(folder))
        yield from _run_rates(settings, Path(folder))


@dataclass(slots=True)
class Tool:
    """A contender that runs and writes lines into a file."""

    process: subprocess.Popen[bytes]
    output: Path
    _read: int = 0
    _lines: dict[bytes, int] = field(default_factory=dict)

    def count(self, word: bytes) -> int:
        """Lines so far that have the word in them; look for the same one each time."""
        with self.output.open("rb") as file:
            file.seek(self._read)
            whole, newline, _rest = file.read().rpartition(b"\n")
        self._read += len(whole + newline)
        found = sum(word in line for line in whole.split(b"\n")) if whole else 0
        self._lines[word] = self._lines.get(word, 0) + found
        return self._lines[word]

    def last_number(self, word: bytes) -> int:
        """What a script that counts by itself wrote last."""
        words = self.output.read_bytes().split()
        return int(words[-1]) if words else 0

    def cpu(self) -> float:
        """CPU seconds that the process has taken, to the nanosecond: clock_getcpuclockid(3)."""
        return time.clock_gettime(~self.process.pid << 3 | 2)


@contextmanager
def _running(command: Sequence[str], folder: Path) -> Iterator[Tool]:
    output = folder / "output"
    # 256 pages for each CPU: as much as the others' one ring has
    settings = {**environment(), "BPFTRACE_PERF_RB_PAGES": "256", "PYTHONPATH": str(ROOT)}
    del settings["PYTHONUNBUFFERED"]  # lines of a callback go to the file in blocks
    with output.open("wb") as file, (folder / "errors").open("wb") as errors:
        process = subprocess.Popen(command, stdout=file, stderr=errors, env=settings)
    try:
        yield Tool(process, output)
    finally:
        process.terminate()
        process.wait()


def _wait(ready: Callable[[], bool], what: str, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > deadline:
            raise RuntimeError(f"{what} was waited for in vain")
        time.sleep(0.05)


def _settled(count: Callable[[], int], wanted: int, patience: float = 1.0) -> int:
    """The count when it has reached what is wanted, or does not grow any more."""
    last, changed = count(), time.monotonic()
    while last < wanted and time.monotonic() - changed < patience:
        time.sleep(0.05)
        if (now := count()) != last:
            last, changed = now, time.monotonic()
    return last


# -- the exec storm

_SPAWNER = """
import os, sys
path, count = sys.argv[1], int(sys.argv[2])
for _ in range(count):
    os.waitpid(os.posix_spawn(path, [path], {}), 0)
"""
_EXEC_TRACE = (
    'tracepoint:sched:sched_process_exec { printf("%d %d %d %s %s\\n", nsecs, pid, uid, comm,'
    " str(args->filename)); }"
)


def _run_execs(settings: Settings, folder: Path) -> Iterator[Result]:
    path = folder / "hm_storm"
    path.symlink_to("/bin/true")
    commands = {
        "hmebpf": hmebpf("exec-monitor", "-o", "json", "-i", "60"),
        _CALLBACK: bcc_script("exec_callback"),
        _BPFTRACE: bpftrace(_EXEC_TRACE),
    }
    seen: dict[str, list[float]] = {}
    rates: list[float] = []

    def storm(name: str) -> float:
        """CPU microseconds for each exec; what was seen is noted."""
        say(f"storm: execs, {name}")
        # Only there: the processes that spawn have the path among their arguments.
        word = f'"filename":"{path}"'.encode() if name == "hmebpf" else str(path).encode()
        with _running(commands[name], folder) as tool:
            spawned = [0]

            def sees() -> bool:
                subprocess.run([path], check=True)
                spawned[0] += 1
                return tool.count(word) > 0

            _wait(sees, f"{name}'s first line")
            _settled(lambda: tool.count(word), spawned[0])
            before, cpu, begin = tool.count(word), tool.cpu(), time.monotonic()
            share = str(_EXECS // _SPAWNERS)
            command = [sys.executable, "-S", "-c", _SPAWNER, str(path), share]
            spawners = [subprocess.Popen(command) for _ in range(_SPAWNERS)]
            for spawner in spawners:
                spawner.wait()
            rates.append(_EXECS / (time.monotonic() - begin))
            got = _settled(lambda: tool.count(word) - before, _EXECS)
            seen.setdefault(name, []).append(100 * got / _EXECS)
            return (tool.cpu() - cpu) / _EXECS * 1e6

    contenders = {name: lambda name=name: storm(name) for name in commands}
    rounds = take_turns(min(settings.rounds, 3), contenders, warm_up=0)
    yield Result(
        "exec storm: executions seen",
        "%",
        seen,
        against=_CALLBACK,
        limit=100.0,
        more_is_better=True,
        note=f"{sorted(rates)[len(rates) // 2]:.0f} execs/s; execsnoop-bpfcc needs kprobes",
    )
    yield Result("exec storm: CPU of the tool per execution", "us", rounds, against=_CALLBACK)


# -- the ring storm

_CALLER = """
import os, sys, time
print(os.getpid(), flush=True)
call = os.getppid
for line in sys.stdin:
    rate, slot = float(line), 0.002
    made, begin = 0, time.perf_counter()
    while (now := time.perf_counter() - begin) < 1.0:
        for _ in range(int(now * rate) - made):
            call()
        made = max(made, int(now * rate))
        time.sleep(max(slot - (time.perf_counter() - begin - now), 0))
    print(made, time.perf_counter() - begin, flush=True)
"""
_CALL_TRACE = (
    "tracepoint:syscalls:sys_enter_getppid /pid == PID/ "
    '{ @n = @n + 1; printf("%d %d %d %d %s\\n", @n, nsecs, pid, cpu, comm); }'
)


def _run_rates(settings: Settings, folder: Path) -> Iterator[Result]:
    with ExitStack() as stack:
        caller = stack.enter_context(
            subprocess.Popen(
                [sys.executable, "-S", "-c", _CALLER],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        )
        assert caller.stdin is not None
        assert caller.stdout is not None
        stack.callback(caller.stdin.close)
        pid = caller.stdout.readline().strip()
        source = str(SCRIPTS / "storm_events.c")
        own = hmebpf("run", source, "-o", "json", "-i", "60", "--cflag", f"-DPID={pid}")
        commands = {
            "columns": [HMEBPF[0], str(SCRIPTS / "storm_columns.py"), source, pid],
            "run -o json": own,
            _CALLBACK: bcc_script("storm_callback", source, pid),
            _BPFTRACE: bpftrace(_CALL_TRACE.replace("PID", pid), "-B", "full"),
        }

        def call(rate: float) -> tuple[int, float]:
            """How many calls were made in how many seconds."""
            print(rate, file=caller.stdin, flush=True)
            made, taken = caller.stdout.readline().split()
            return int(made), float(taken)

        def highest(name: str) -> float:
            say(f"storm: rates, {name}")
            with _running(commands[name], folder) as tool:
                count = tool.last_number if name == "columns" else tool.count
                # bpftrace keeps up to 4 KiB of lines to itself
                slack = 200 if name == _BPFTRACE else 0
                return _find_highest(call, lambda: count(b"python"), slack)

        alone, seconds = call(4e6)
        contenders = {name: lambda name=name: highest(name) for name in commands}
        rounds = take_turns(min(settings.rounds, 3), contenders, warm_up=0)
    for name in ("columns", "run -o json"):
        for other in (_CALLBACK, _BPFTRACE):
            yield Result(
                f"ring storm, highest rate without loss: {name}",
                "events/s",
                {name: rounds[name], other: rounds[other]},
                against=other,
                more_is_better=True,
                note=f"the caller alone makes {alone / seconds / 1e3:.0f} k calls/s",
                ours=name,
            )


def _find_highest(
    call: Callable[[float], tuple[int, float]], count: Callable[[], int], slack: int
) -> float:
    """The highest rate at which all calls of a second are counted; 0 if none is."""
    made = [0]

    def sees() -> bool:
        made[0] += call(1000.0)[0]
        return count() > 0

    _wait(sees, "the first event", 60.0)
    offset = made[0] - _settled(count, made[0])  # before it was attached

    def takes(rate: float) -> float | None:
        """The rate that was reached, if all were counted."""
        nonlocal offset
        number, seconds = call(rate)
        made[0] += number
        got = _settled(count, made[0] - offset)
        missing = made[0] - offset - got
        if missing > slack:
            offset += missing
            return None
        return number / seconds

    best, rate = 0.0, float(_LEAST)
    while rate <= _MOST and (reached := takes(rate)) is not None:
        best = max(best, reached)
        if reached < 0.9 * rate:  # the caller itself cannot call faster
            return best
        rate *= 2
    low, high = rate / 2, rate
    for _ in range(_BISECTIONS if best else 0):
        middle = (low + high) / 2
        if (reached := takes(middle)) is None:
            high = middle
        else:
            low, best = middle, max(best, reached)
    return best
