"""Messages with descriptors between a worker and its parent.

A message is a JSON document and any number of descriptors.  The document travels in a memory file,
so that neither a verifier's log of 10 MB nor a list of 1,000 maps meets a socket's limits;
descriptors go in batches, for SCM_RIGHTS takes 253 at a time (unix(7)).
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Sequence
from typing import Any

from hypermesh_ebpf.errors import WorkerError

PROGRAMS = "programs"
"""What a worker that is started ahead gets ready for: to load users' programs.  Any other text is
the name of a monitor."""
LEFT_ALONE = 75
"""The status with which a worker ends that nobody asked for anything."""

_BATCH = 250
_LAST, _MORE = b"L", b"M"


class Channel:
    """One end of a SOCK_SEQPACKET pair."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, message: dict[str, Any], descriptors: Sequence[int] = ()) -> None:
        """Send one message; the descriptors stay open here.

        Raises ConnectionError if the peer is gone, another OSError if a limit was reached.
        """
        memory = os.memfd_create("message")
        try:
            with open(memory, "wb", closefd=False) as file:
                file.write(json.dumps(message).encode())
            every = [memory, *descriptors]
            for at in range(0, len(every), _BATCH):
                mark = _LAST if at + _BATCH >= len(every) else _MORE
                socket.send_fds(self._socket, [mark], every[at : at + _BATCH])
        finally:
            os.close(memory)

    def receive(self) -> tuple[dict[str, Any], list[int]] | None:
        """The next message and its descriptors, now ours to close; None when the peer is gone.

        Raises WorkerError for a message that is none.
        """
        every: list[int] = []
        while True:
            try:
                mark, descriptors, flags, _address = socket.recv_fds(self._socket, 1, _BATCH)
            except ConnectionError:
                mark, descriptors, flags = b"", [], 0
            for fd in descriptors:
                # Python before 3.12 hands them out inheritable (gh-99110).
                os.set_inheritable(fd, False)
            every += descriptors
            if flags & socket.MSG_CTRUNC:
                _close(every)
                raise WorkerError(
                    "take over descriptors",
                    "this process may open no more files (RLIMIT_NOFILE)",
                    "raise the limit: `ulimit -n 4096`",
                )
            if not mark:
                _close(every)
                return None
            if mark == _LAST:
                break
        try:
            with open(every[0], "rb", closefd=False) as file:
                file.seek(0)
                message = json.load(file)
        except (IndexError, ValueError) as error:
            _close(every)
            raise WorkerError(
                "speak with the worker",
                f"it sent no valid message: {error}",
                "try again with -v; if it happens again, report it with that output",
            ) from error
        os.close(every[0])
        return message, every[1:]

    def close(self) -> None:
        self._socket.close()


def _close(descriptors: list[int]) -> None:
    for fd in descriptors:
        os.close(fd)
