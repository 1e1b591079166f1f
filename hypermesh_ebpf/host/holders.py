"""Which processes hold BPF objects: descriptors of programs, maps, links and perf events in /proc.

A program lives as long as something refers to it; what that is, only a look at every process's
descriptors tells (/proc/PID/fd, proc_pid_fd(5)).  Others' can be read with CAP_SYS_PTRACE alone.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from hypermesh_ebpf.bpf.info import STATS_SYSCTL, identify
from hypermesh_ebpf.host.mark import MARK

_MARK_LINK = f"/memfd:{MARK} (deleted)"
_STATISTICS = "anon_inode:bpf-stats"
_PERF_EVENT = "anon_inode:[perf_event]"


@dataclass(frozen=True, slots=True)
class Holder:
    """A process that holds a descriptor; ``ours`` if it runs hmebpf or uses its library."""

    pid: int
    comm: str
    ours: bool


@dataclass(frozen=True, slots=True)
class Holders:
    """All descriptors of BPF objects that this process may see.

    ``objects`` is by ("program", id); ``perf_events`` are (process, its descriptor);
    ``namespaces`` the network namespaces of all processes by inode, with one process in each;
    ``statistics``: run statistics are switched on, by the sysctl or by a process that asked.
    """

    objects: dict[tuple[str, int], tuple[Holder, ...]]
    perf_events: tuple[tuple[Holder, int], ...] = ()
    namespaces: dict[int, int] = field(default_factory=dict)
    statistics: bool = False


def read_holders() -> Holders:
    """Look at every process (a few microseconds for each of its descriptors)."""
    objects: dict[tuple[str, int], list[Holder]] = {}
    perf_events: list[tuple[Holder, int]] = []
    namespaces: dict[int, int] = {}
    statistics = _sysctl_is_on()
    for name in os.listdir("/proc"):
        if not name.isdecimal():
            continue
        pid = int(name)
        with suppress(OSError):  # another user's, or gone
            namespaces.setdefault(os.stat(f"/proc/{pid}/ns/net").st_ino, pid)
        links = _read_links(pid)
        found = {fd: link for fd, link in links.items() if link.startswith("anon_inode:")}
        found = {fd: link for fd, link in found.items() if "bpf" in link or link == _PERF_EVENT}
        if not found:
            continue
        holder = _describe(pid, _MARK_LINK in links.values())
        for fd, link in found.items():
            if link == _PERF_EVENT:
                perf_events.append((holder, fd))
            elif link == _STATISTICS:
                statistics = True
            else:
                key = _identify(pid, fd)
                if key and holder not in objects.setdefault(key, []):
                    objects[key].append(holder)
    held = {key: tuple(sorted(who, key=lambda each: each.pid)) for key, who in objects.items()}
    return Holders(held, tuple(perf_events), namespaces, statistics)


def _sysctl_is_on() -> bool:
    try:
        return Path(STATS_SYSCTL).read_text().strip() == "1"
    except OSError:  # before Linux 5.1 there are no statistics
        return False


def _read_links(pid: int) -> dict[int, str]:
    """What each descriptor of a process refers to; empty for another user's or one that is gone."""
    try:
        directory = os.open(f"/proc/{pid}/fd", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return {}
    found = {}
    try:
        for name in os.listdir(directory):
            try:
                found[int(name)] = os.readlink(name, dir_fd=directory)
            except OSError:  # closed meanwhile
                continue
    except OSError:
        return {}
    finally:
        os.close(directory)
    found.pop(directory if pid == os.getpid() else -1, None)
    return found


def _describe(pid: int, marked: bool) -> Holder:
    try:
        comm = Path(f"/proc/{pid}/comm").read_text(errors="replace").rstrip("\n")
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return Holder(pid, "?", marked)
    named = any(b"hypermesh_ebpf" in word or word.endswith(b"/hmebpf") for word in words)
    return Holder(pid, comm, marked or named)


def _identify(pid: int, fd: int) -> tuple[str, int] | None:
    try:
        with open(f"/proc/{pid}/fdinfo/{fd}") as file:
            lines = [line.partition(":") for line in file]
    except OSError:
        return None
    return identify({name: value.strip() for name, _, value in lines})
