"""The objects that clang made of the examples and of tests/bpf: found in build/, or built now."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import pytest

from hypermesh_ebpf.errors import MissingDependency
from hypermesh_ebpf.image import clang

ROOT = Path(__file__).parents[1]
_PATIENCE = 600.0


@lru_cache(maxsize=1)
def _built() -> Path:
    """build/, up to date where there is a clang; inside a virtual machine it is the host's."""
    if "HMEBPF_VM_KERNEL" in os.environ and (ROOT / "build/tests").is_dir():
        return ROOT / "build"
    try:
        clang.find_clang()
    except MissingDependency as error:
        if not (ROOT / "build/tests").is_dir():
            pytest.skip(f"{error.cause}: no objects in build/")
    else:
        script = [sys.executable, str(ROOT / "scripts/build-objects")]
        subprocess.run(script, check=True, timeout=_PATIENCE, capture_output=True)
    return ROOT / "build"


def object_path(name: str) -> Path:
    """build/tests/NAME.o, made of tests/bpf/NAME.bpf.c; skips the test where there is no clang."""
    return _built() / "tests" / f"{name}.o"


def example_path(name: str) -> Path:
    """build/NAME.o, made of examples/NAME.bpf.c."""
    return _built() / f"{name}.o"
