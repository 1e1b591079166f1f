"""The machine that was measured, and the versions of what was compared."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from datetime import date
from pathlib import Path

from hypermesh_ebpf import __version__

_PACKAGES = ("python3-bpfcc", "libbpf1", "bpftrace", "bpftool")


def describe_machine() -> dict[str, str]:
    """Date, kernel, processor, and the versions of hmebpf and its peers."""
    said = Path("/proc/cpuinfo").read_text()
    model = re.search(r"model name\s*: (.*)", said)
    memory = re.search(r"MemTotal:\s*(\d+)", Path("/proc/meminfo").read_text())
    return {
        "date": date.today().isoformat(),
        "kernel": f"{platform.release()} {platform.machine()}",
        "processor": f"{os.cpu_count()} x {model[1] if model else platform.processor()}",
        "memory": f"{int(memory[1]) / 2**20:.0f} GiB" if memory else "unknown",
        "hmebpf": f"{__version__}, Python {platform.python_version()}",
        "peers": ", ".join(f"{name} {_version(name)}" for name in _PACKAGES),
    }


def _version(package: str) -> str:
    command = ["dpkg-query", "-W", "-f", "${Version}", package]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() or "absent"
