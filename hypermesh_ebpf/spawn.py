"""The worker as a process: started, and for a command that will need one, started ahead.

A monitor's start waits for its worker, and the worker for its imports.  So the command line starts
it before anything else: while this process reads its options and imports what it will draw with,
the worker, on another processor, gets ready for what it will be asked.  Nothing is imported here
that starting a process can do without.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import subprocess
import sys
from typing import NamedTuple

# -I and -S: neither the working directory nor site-packages' .pth files have a say in what root
# runs.
_BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from hypermesh_ebpf.worker_process import main; main(int(sys.argv[2]), sys.argv[3])"
)


class Spawned(NamedTuple):
    """A worker that was started: the process, our end of its channel, and what it says."""

    process: subprocess.Popen[bytes]
    channel: socket.socket
    said: int


_ahead: list[Spawned] = []  # one at most


def spawn(task: str = "") -> Spawned:
    """Start a worker; returns at once.  Raises OSError.

    With a ``task`` - :data:`hypermesh_ebpf.channel.PROGRAMS` or a monitor's name - it gets ready
    for that and waits, for as long as this process lives, to be asked.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    said = -1
    try:
        with theirs:
            said = os.memfd_create("worker-stderr")
            return Spawned(_start(theirs.fileno(), said, task), ours, said)
    except BaseException:
        ours.close()
        if said >= 0:
            os.close(said)
        raise


def spawn_ahead(task: str) -> None:
    """Start a worker for whoever calls :func:`take` next.

    Does nothing if it cannot be had now: whoever needs one tries again, and says why there is none.
    """
    try:
        _ahead.append(spawn(task))
    except OSError:
        return


def take() -> Spawned:
    """The worker that was started ahead, or a new one.  Raises OSError."""
    return _ahead.pop() if _ahead else spawn()


def _start(channel_fd: int, said_fd: int, task: str) -> subprocess.Popen[bytes]:
    here = os.readlink("/proc/self/cwd")  # which may be deleted by now
    path = json.dumps([entry or here for entry in sys.path])
    # Where this process was started with 0, 1 or 2 closed, the channel may have that number, which
    # in the worker is another file's.
    passed = fcntl.fcntl(channel_fd, fcntl.F_DUPFD_CLOEXEC, 3)
    try:
        return subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _BOOT, path, str(passed), task],
            stdin=subprocess.DEVNULL,
            stdout=said_fd,
            stderr=said_fd,
            pass_fds=[passed],
            start_new_session=True,  # Ctrl-C is for the parent to handle
        )
    finally:
        os.close(passed)
