"""Control groups by the id that programs see, and the container that a path names.

``bpf_get_current_cgroup_id`` gives the inode number of the group's directory in the cgroup2
hierarchy (kernfs ids, Linux 5.5 on 64-bit machines).
"""

from __future__ import annotations

import os
import re
import time

from hypermesh_ebpf.host.filesystems import find_mount

_CGROUP2_MAGIC = 0x63677270  # include/uapi/linux/magic.h
_CONTAINER = re.compile(r"(?<![0-9a-f])([0-9a-f]{64})(?![0-9a-f])")
_SHORT = 12  # what docker ps and podman ps show
_REFRESH_SECONDS = 1.0


class CgroupPaths:
    """Looks ids up in the mounted cgroup2 hierarchy, which is walked again for an unknown one.

    At most once a second: an id whose group is gone already would else cost a walk each time.
    """

    def __init__(self) -> None:
        self._root = find_mount(_CGROUP2_MAGIC)
        self._paths: dict[int, str] = {}
        self._walked = float("-inf")

    def find(self, cgroup_id: int) -> str | None:
        """The group's path below the hierarchy's root ("/system.slice/ssh.service"), or None."""
        if cgroup_id not in self._paths and self._root is not None:
            now = time.monotonic()
            if now - self._walked >= _REFRESH_SECONDS:
                self._walked = now
                self._walk(self._root)
        return self._paths.get(cgroup_id)

    def _walk(self, root: str) -> None:
        for path, _directories, _files in os.walk(root):
            try:
                number = os.stat(path).st_ino
            except FileNotFoundError:
                continue  # removed while we walk
            self._paths[number] = path[len(root) :] or "/"


def find_container(path: str | None) -> str | None:
    """The short id of the container that a control group's path names, None if it names none."""
    match = _CONTAINER.search(path) if path else None
    return match[1][:_SHORT] if match else None
