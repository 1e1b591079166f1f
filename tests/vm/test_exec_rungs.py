"""What exec-monitor's best rungs must do on kernels that have them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from hypermesh_ebpf import open_monitor
from hypermesh_ebpf.host.ladder import probe_rung
from hypermesh_ebpf.monitors import load

MANY = 61  # far more than the sleeping calls that a kretprobe can follow on two CPUs
WARNED = 1 << 9  # TAINT_WARN (Documentation/admin-guide/tainted-kernels.rst)


@pytest.mark.parametrize("rung", ["kprobe", "fentry", "tracepoint"])
def test_many_execs_that_sleep_at_once(rung: str, tmp_path: Path) -> None:
    """Each execs a file of its own that is in no cache: all of them wait for it inside execve."""
    (declared,) = (each for each in load("exec-monitor").rungs if each.name == rung)
    found = probe_rung(declared)
    assert found.available, found.reason
    programs = [tmp_path / f"hm{number}" for number in range(MANY)]
    for program in programs:
        shutil.copy("/bin/true", program)
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")
    tainted = int(Path("/proc/sys/kernel/tainted").read_text())
    with open_monitor("exec-monitor", rung=rung, by="filename") as session:
        children = []
        for program in programs:
            child = os.fork()
            if child == 0:
                os.execv(program, [program.name])
            children.append(child)
        for child in children:
            os.waitpid(child, 0)
        events = session.events()
        sample = session.read()
    seen = [e.fields["filename"] for e in events if str(tmp_path) in e.fields["filename"]]
    lost = set(map(str, programs)) - set(seen)
    assert len(seen) == MANY - len(lost), "no exec is reported twice"
    if rung == "fentry":
        # On a preemptible kernel an entry is skipped while another task is preempted inside the
        # program: that is lost, and counted.
        assert len(lost) <= (sample.loss.missed or 0)
    else:
        assert lost == set()
    # "missed" also counts what was skipped at one hook and made up for at the next.
    assert (sample.loss.events_lost, sample.loss.map_full) == (0, 0)
    now = int(Path("/proc/sys/kernel/tainted").read_text())
    assert now & WARNED == tainted & WARNED, "loading the programs made the kernel warn"
