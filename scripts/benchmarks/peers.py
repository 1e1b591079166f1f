"""The peers: BCC scripts and bpftrace, each a process of its own, as hmebpf is."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = Path(__file__).resolve().parent / "scripts"
HMEBPF = (str(ROOT / ".venv/bin/python"), str(ROOT / ".venv/bin/hmebpf"))
"""The tool as scripts/hmebpf starts it, without that script's own milliseconds."""
BCC_PYTHON = "/usr/bin/python3"
"""The distribution's own interpreter, for which python3-bpfcc is."""


def hmebpf(*arguments: str) -> list[str]:
    """A command line of ours."""
    return [*HMEBPF, *arguments]


def bcc_script(name: str, *arguments: str) -> list[str]:
    """A command line of one of the BCC scripts beside this file."""
    return [BCC_PYTHON, str(SCRIPTS / f"{name}.py"), *arguments]


def bpftrace(program: str, *arguments: str) -> list[str]:
    """A command line of bpftrace."""
    return ["bpftrace", *arguments, "-e", program]


def environment(cache: Path | None = None) -> dict[str, str]:
    """What all contenders run with.

    BCC gets our light headers, as no others are installed: its best case.  ``cache`` is where
    hmebpf keeps its images; the user's own place by default.
    """
    extra = {"BCC_KERNEL_SOURCE": str(ROOT / "hypermesh_ebpf/image"), "PYTHONUNBUFFERED": "1"}
    if cache is not None:
        extra["XDG_CACHE_HOME"] = str(cache)
    return {**os.environ, **extra}


def has(command: Sequence[str]) -> bool:
    """Whether the program of a command line is installed."""
    return any((Path(folder) / command[0]).exists() for folder in os.get_exec_path())
