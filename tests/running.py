"""The command line as a user runs it: ``hmebpf MONITOR ... -o json`` in a process of its own.

with running("exec-monitor", "--comm", "true") as monitor:      # attached when this is entered
    subprocess.run(["true"])
    objects = monitor.finish()                                  # Ctrl-C, and all that it wrote
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.netns import Namespace

ROOT = Path(__file__).parents[1]
COMMAND = (sys.executable, "-m", "hypermesh_ebpf")
_PATIENCE = 300.0  # an emulated machine takes its time


def run_cli(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """One call of the command line to its end; never fails by itself."""
    options.setdefault("stdin", subprocess.DEVNULL)
    options.setdefault("env", {**os.environ, **options.pop("extra_env", {})})
    return subprocess.run(
        [*COMMAND, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=_PATIENCE,
        **options,
    )


class Running:
    """A monitor that is attached, writing JSON lines."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.objects: list[dict[str, Any]] = []

    def read(self) -> dict[str, Any] | None:
        """The next object that it writes; None at the end."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            return None
        self.objects.append(json.loads(line))
        return self.objects[-1]

    def read_until(self, kind: str) -> dict[str, Any]:
        """The next object of that type."""
        while (found := self.read()) is not None:
            if found["type"] == kind:
                return found
        assert self.process.stderr is not None
        raise AssertionError(f"no {kind} came: {self.objects} {self.process.stderr.read()}")

    def finish(self, number: int = signal.SIGINT) -> list[dict[str, Any]]:
        """Stop it with a signal; everything it wrote.  Fails unless it ended in order."""
        self.process.send_signal(number)
        while self.read() is not None:
            pass
        assert self.process.wait(_PATIENCE) == 0
        assert self.objects[-1]["type"] == "end"
        return self.objects

    @property
    def start(self) -> dict[str, Any]:
        return next(o for o in self.objects if o["type"] == "start")

    @property
    def events(self) -> list[dict[str, Any]]:
        return [o for o in self.objects if o["type"] == "event"]

    @property
    def last(self) -> dict[str, Any]:
        """The last sample."""
        return [o for o in self.objects if o["type"] == "sample"][-1]


@contextmanager
def running(
    *arguments: str, namespace: Namespace | None = None, **options: Any
) -> Iterator[Running]:
    """Start a monitor with ``-o json`` and wait until it is attached; killed at the end."""
    argv = [*COMMAND, *arguments, "-o", "json"]
    options.setdefault("cwd", ROOT)
    if namespace is not None:
        process = namespace.start(*argv, **options)
    else:
        for stream in ("stdin", "stdout", "stderr"):
            options.setdefault(stream, subprocess.PIPE)
        process = subprocess.Popen(argv, text=True, **options)
    monitor = Running(process)
    try:
        monitor.read_until("start")
        yield monitor
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream is not None:
                stream.close()
