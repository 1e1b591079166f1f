"""Where a section can attach without touching the machine: network namespaces, control groups."""

from __future__ import annotations

import ctypes
import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_CLONE_NEWNET = 0x40000000
_LIBC = ctypes.CDLL(None, use_errno=True)


@contextmanager
def network(pairs: int = 0) -> Iterator[list[str]]:
    """A network namespace for this thread and what it starts, lo up; gone on leaving.

    Gives the names of ``pairs`` veth interfaces, each with its other end in the same namespace.
    """
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    try:
        _check(_LIBC.unshare(_CLONE_NEWNET))
        names = [f"v{number}" for number in range(pairs)]
        commands = ["link set lo up"]
        for name in names:
            commands.append(f"link add {name} type veth peer name {name}p")
            commands += [f"link set {name} up", f"link set {name}p up"]
        subprocess.run(["ip", "-batch", "-"], input="\n".join(commands), text=True, check=True)
        yield names
    finally:
        _check(_LIBC.setns(home, _CLONE_NEWNET))
        os.close(home)


@contextmanager
def control_group() -> Iterator[Path | None]:
    """A control group of version 2 without processes, mounted for this process alone; None where
    the kernel has none to mount."""
    with tempfile.TemporaryDirectory() as root:
        if subprocess.run(["mount", "-t", "cgroup2", "none", root]).returncode:
            yield None
            return
        group = Path(root) / f"hmebpf-bench-{os.getpid()}"
        try:
            group.mkdir()
            yield group
        finally:
            group.rmdir()
            subprocess.run(["umount", root], check=True)


def _check(result: int) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
