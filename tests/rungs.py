"""One rung of a monitor's ladder for a test, or a skip with the reason why this kernel lacks it."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from hypermesh_ebpf.host.ladder import probe_rung
from hypermesh_ebpf.monitors.declaration import Rung


def find_rung(rungs: Mapping[str, Rung], name: str) -> Rung:
    """The rung of that name, if it can run here; virtual machines run the others."""
    found = rungs[name]
    available = probe_rung(found)
    if not available.available:
        pytest.skip(f"rung {found.name}: {available.reason}")
    return found
