"""pyroute2 loaded in part: as often as it is asked for, whatever was loaded before."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

_ROOT = Path(__file__).parents[2]


def _run(code: str) -> str:
    """In a process of its own: what is imported stays imported."""
    done = subprocess.run([sys.executable, "-c", code], cwd=_ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_iproute_can_be_loaded_again_and_again() -> None:
    said = _run(
        "from hypermesh_ebpf.attach.route import load_iproute\n"
        "first = load_iproute()\n"
        "print(first.__name__, load_iproute() is first)"
    )
    assert said == "IPRoute True"


def test_iproute_is_pyroute2s_own_where_that_was_imported() -> None:
    said = _run(
        "import pyroute2\n"
        "from hypermesh_ebpf.attach.route import load_iproute\n"
        "print(load_iproute() is pyroute2.IPRoute)"
    )
    assert said == "True"
