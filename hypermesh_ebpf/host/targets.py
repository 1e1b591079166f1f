"""What an attach point names, found on this machine: interfaces, cgroups, tracepoints, functions.

What is not there is answered with what is there and sounds like it.
"""

from __future__ import annotations

import errno
import os
import socket

from hypermesh_ebpf.errors import (
    AttachError,
    HookUnsupported,
    InterfaceNotFound,
    Unsupported,
    describe_errno,
)
from hypermesh_ebpf.host import filesystems
from hypermesh_ebpf.spelling import find_close

_NAMES_SHOWN = 12


def find_interface(name: str) -> int:
    """The ifindex of a network interface.  Raises InterfaceNotFound, naming those that exist."""
    try:
        return socket.if_nametoindex(name)
    except (OSError, ValueError) as error:
        names = [found for _, found in socket.if_nameindex()]
        close = find_close(name, names, 3, 0.5)
        names = close + [other for other in names if other not in close]
        more = len(names) - _NAMES_SHOWN
        remedy = "interfaces here: " + ", ".join(names[:_NAMES_SHOWN])
        raise InterfaceNotFound(
            f"find interface {name!r}",
            "no such interface in this network namespace",
            f"{remedy} and {more} more (`ip -br link`)" if more > 0 else remedy,
            errno=errno.ENODEV,
        ) from error


def find_cgroup(path: str) -> str:
    """The directory of a cgroup (version 2); a relative path is one below the hierarchy's root.

    Raises AttachError for what is none, HookUnsupported where no cgroup2 is mounted.
    """
    what = f"find cgroup {path}"
    if not os.path.isabs(path):
        root = filesystems.find_mount(filesystems.CGROUP2.magic)
        if root is None:
            raise HookUnsupported(
                what,
                "no cgroup2 file system is mounted",
                "mount it: `sudo mkdir -p /sys/fs/cgroup/unified && "
                "sudo mount -t cgroup2 cgroup2 /sys/fs/cgroup/unified`",
            )
        path = os.path.join(root, path)
    try:
        os.stat(path)
    except OSError as error:
        raise AttachError(
            what,
            describe_errno(error.errno or 0),
            f"those that there are: {_groups_beside(path)}",
            errno=error.errno,
        ) from error
    if not os.path.isdir(path) or filesystems.magic_of(path) != filesystems.CGROUP2.magic:
        root = filesystems.find_mount(filesystems.CGROUP2.magic) or "/sys/fs/cgroup"
        raise AttachError(
            what,
            "it is not the directory of a cgroup (version 2)",
            f"take one below {root}: `find {root} -type d`",
        )
    return path


def _groups_beside(path: str) -> str:
    """The groups in the directory of one that is not there, closest first."""
    parent, name = os.path.split(path.rstrip("/"))
    try:
        names = [entry.name for entry in os.scandir(parent) if entry.is_dir()]
    except OSError:
        return f"`find {filesystems.find_mount(filesystems.CGROUP2.magic)} -type d`"
    close = find_close(name, names, 3, 0.5)
    shown = close or sorted(names)[:_NAMES_SHOWN]
    return ", ".join(os.path.join(parent, each) for each in shown) or f"none in {parent}"


def close_tracepoints(tracepoint: str) -> list[str]:
    """Tracepoints of this kernel whose names are like this one, the likeliest first."""
    category, _, name = tracepoint.rpartition(":")
    try:
        events = filesystems.open_tracefs()
        directory = os.open("events", os.O_RDONLY | os.O_DIRECTORY, dir_fd=events)
    except (OSError, Unsupported):
        return []
    try:
        categories = [entry.name for entry in os.scandir(directory) if entry.is_dir()]
        same = [category] if category in categories else categories
        known = [f"{group}:{event}" for group in same for event in _events_of(directory, group)]
    finally:
        os.close(directory)
    if exact := [each for each in known if each.endswith(f":{name}")]:
        return exact[:3]
    if category:
        return find_close(tracepoint, known, 3, 0.6)
    by_name = {each.partition(":")[2]: each for each in known}
    close = find_close(name, by_name, 3, 0.6)
    return [by_name[each] for each in close]


def _events_of(directory: int, group: str) -> list[str]:
    fd = os.open(group, os.O_RDONLY | os.O_DIRECTORY, dir_fd=directory)
    try:
        return [entry.name for entry in os.scandir(fd) if entry.is_dir()]
    finally:
        os.close(fd)
