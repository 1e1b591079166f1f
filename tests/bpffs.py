"""A mount namespace of its own that has the BPF file system mounted, for the tests of pins.

    with Bpffs() as bpffs:
        bpffs.hmebpf("pin", "prog:12", "mine")
        bpffs.run("ls", "/sys/fs/bpf/hmebpf/mine")

Nothing of it is seen outside, and all pins are gone with it.
"""

from __future__ import annotations

import os
import subprocess
from typing import Any

import pytest

from tests.running import COMMAND, ROOT

_PATIENCE = 300.0  # an emulated machine takes its time


class Bpffs:
    """A process that stays in the namespace until the end; skips where none can be made."""

    def __enter__(self) -> Bpffs:
        self._process = subprocess.Popen(
            ["unshare", "-m", "sh", "-c", "mount -t bpf bpf /sys/fs/bpf && echo ready && cat"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout and self._process.stderr
        if self._process.stdout.readline() != "ready\n":
            reason = self._process.stderr.read().strip()
            self._close()
            pytest.skip(f"the BPF file system cannot be mounted here: {reason}")
        return self

    def __exit__(self, *exc: object) -> None:
        self._close()

    def _close(self) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._process.stderr):
            if stream:
                stream.close()

    def run(self, *argv: str, net: str | None = None) -> subprocess.CompletedProcess[str]:
        """A command inside, to its end; ``net`` is the path of a network namespace for it."""
        enter = ["nsenter", f"--mount=/proc/{self._process.pid}/ns/mnt", f"--wd={ROOT}"]
        return subprocess.run(
            [*enter, *([f"--net={net}"] if net else []), "--", *argv],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_PATIENCE,
            env=dict(os.environ),
        )

    def hmebpf(self, *words: str, **options: Any) -> subprocess.CompletedProcess[str]:
        """The command line inside; never fails by itself."""
        return self.run(*COMMAND, *words, **options)
