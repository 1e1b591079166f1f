"""Control groups by the id that programs see, and the container that a path names.

``bpf_get_current_cgroup_id`` gives the inode number of the group's directory in the cgroup2
hierarchy (kernfs ids, Linux 5.5 on 64-bit machines).
"""

from __future__ import annotations

import ctypes
import os
import re
import time
from functools import lru_cache

_FILEID_KERNFS = 0xFE  # include/linux/exportfs.h: the handle is the id
_CONTAINER = re.compile(r"(?<![0-9a-f])([0-9a-f]{64})(?![0-9a-f])")
_SHORT = 12  # what docker ps and podman ps show
_MOST = 10_000
_REFRESH_SECONDS = 1.0


class _Handle(ctypes.Structure):
    """struct file_handle of open_by_handle_at(2), for kernfs."""

    _fields_ = (
        ("handle_bytes", ctypes.c_uint32),
        ("handle_type", ctypes.c_int),
        ("id", ctypes.c_uint64),
    )


class CgroupPaths:
    """Looks ids up in the mounted cgroup2 hierarchy.

    By file handle where CAP_DAC_READ_SEARCH allows it; else by walking the hierarchy again for an
    unknown id, at most once a second: one whose group is gone would else cost a walk each time.
    """

    def __init__(self) -> None:
        from hypermesh_ebpf.host.filesystems import CGROUP2, find_mount

        self._root = find_mount(CGROUP2.magic)
        self._paths: dict[int, str | None] = {}
        self._walked = float("-inf")

    def find(self, cgroup_id: int) -> str | None:
        """The group's path below the hierarchy's root ("/system.slice/ssh.service"), or None."""
        if self._root is None:
            return None
        if cgroup_id not in self._paths:
            if len(self._paths) >= _MOST:
                self._paths.clear()
            try:
                self._paths[cgroup_id] = _open_by_id(self._root, cgroup_id)
            except PermissionError:
                self._walk(self._root)
        return self._paths.get(cgroup_id)

    def _walk(self, root: str) -> None:
        now = time.monotonic()
        if now - self._walked < _REFRESH_SECONDS:
            return
        self._walked = now
        for path, _directories, _files in os.walk(root):
            try:
                number = os.stat(path).st_ino
            except FileNotFoundError:
                continue  # removed while we walk
            self._paths[number] = path[len(root) :] or "/"


def _open_by_id(root: str, cgroup_id: int) -> str | None:
    """The path of one group, None if there is none of that id.  Raises PermissionError."""
    libc = ctypes.CDLL(None, use_errno=True)
    mount = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        handle = _Handle(8, _FILEID_KERNFS, cgroup_id)
        fd = libc.open_by_handle_at(mount, ctypes.byref(handle), os.O_PATH)
        if fd < 0:
            if ctypes.get_errno() == 1:
                raise PermissionError(1, "open_by_handle_at")
            return None
        try:
            return os.readlink(f"/proc/self/fd/{fd}")[len(root) :] or "/"
        finally:
            os.close(fd)
    finally:
        os.close(mount)


@lru_cache(maxsize=1024)
def find_container(path: str | None) -> str | None:
    """The short id of the container that a control group's path names, None if it names none."""
    match = _CONTAINER.search(path) if path else None
    return match[1][:_SHORT] if match else None
