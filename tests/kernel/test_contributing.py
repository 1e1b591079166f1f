"""The recipe for adding a monitor, as CONTRIBUTING.md gives it, followed to the letter."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from tests.running import ROOT, running

PRIME = 101


def test_recipe_for_a_monitor_works(tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"
    for folder in ("hypermesh_ebpf", "bpf_c"):
        shutil.copytree(ROOT / folder, checkout / folder)
    page = (ROOT / "CONTRIBUTING.md").read_text()
    (source,) = re.findall(r"```c\n(.*?)```", page, re.S)
    (declaration,) = re.findall(r"```python\n(.*?)```", page, re.S)
    (checkout / "bpf_c/fork_monitor.c").write_text(source)
    (checkout / "hypermesh_ebpf/monitors/fork_monitor.py").write_text(declaration)

    # A command that nothing else on this machine is called, and that forks a known number of times.
    name = f"hmf{os.getpid() % 10**6}"
    forker = f"import os\nfor _ in range({PRIME}):\n os.fork() or os._exit(0)\n os.wait()"
    code = f"open('/proc/self/comm', 'w').write('{name}')\n{forker}"
    with running("fork-monitor", cwd=checkout) as monitor:
        subprocess.run([sys.executable, "-S", "-c", code], check=True)
        monitor.finish()
    forks = {row["comm"]: row["forks"] for row in monitor.last["rows"]}
    assert forks[name] == PRIME
    assert monitor.last["totals"]["forks"] >= PRIME

    report = subprocess.run(
        [sys.executable, "-m", "hypermesh_ebpf", "check-system", "-o", "json"],
        cwd=checkout,
        capture_output=True,
        text=True,
    )
    assert json.loads(report.stdout)["monitors"]["fork-monitor"]["runs"] is True
