"""The worker: what is heavy or dangerous, in a process that does not live long.

It serves one request after another from its parent and ends when nobody asked for
:data:`_IDLE_SECONDS`.  A request is one message with "do", "log" (the level that the parent listens
to, 0 for none) and "elsewhere" (the first descriptor is a network namespace to be in);
:mod:`worker_monitor` and :mod:`worker_programs` say what else is in it::

    {"do": "monitor", ...}   choose the rung, build, load and attach a bundled monitor
    {"do": "load", ...}      a user's own source becomes maps and programs
    {"do": "attach", ...}    loaded programs are attached
    {"do": "swap", ...}      another program takes the place of one of ours

The answer is any number of ``progress``, ``note`` and ``log`` messages, ``hold`` before each attach
that outlives its maker (answered by ``held``), and at last ``done`` or ``error``.
"""

from __future__ import annotations

import _thread
import os
import select
import socket
from collections.abc import Mapping
from typing import Any

from hypermesh_ebpf import log
from hypermesh_ebpf.channel import LEFT_ALONE, PROGRAMS, Channel
from hypermesh_ebpf.errors import HmebpfError, MissingPrivilege, describe_errno, from_dict

_IDLE_SECONDS = 3.0
_CLONE_NEWNET = 0x40000000


def main(channel_fd: int, task: str = "") -> None:
    """Serve the parent's requests over the inherited socket.

    With a ``task`` the first one is known and will come: get ready for it.
    """
    _thread.start_new_thread(_end_with_parent, (channel_fd,))
    channel = Channel(socket.socket(fileno=channel_fd))
    talk = Talk(channel)
    poll = select.poll()
    poll.register(channel_fd, select.POLLIN)
    patience: float | None = _IDLE_SECONDS * 1000
    if task:
        _get_ready(task)
        patience = None  # it will ask, or end; it may also be stopped in between
    while poll.poll(patience):
        patience = _IDLE_SECONDS * 1000
        received = channel.receive()
        if received is None:
            break
        request, descriptors = received
        try:
            _serve(talk, request, descriptors)
        except HmebpfError as error:
            channel.send({"type": "error", "error": error.as_dict()})
        finally:
            for fd in descriptors:
                os.close(fd)
    # Not sys.exit: handlers registered by libraries must not undo what was handed over.
    os._exit(LEFT_ALONE)


def _get_ready(task: str) -> None:
    """Import what it takes to load users' programs, or a monitor, and to attach it."""
    if task == PROGRAMS:
        from hypermesh_ebpf import worker_programs  # noqa: F401
    else:
        from hypermesh_ebpf import worker_monitor

        worker_monitor.get_ready(task)


def _end_with_parent(channel_fd: int) -> None:
    """End at once when the other end of the channel is closed, in the midst of clang if need be.

    Not PR_SET_PDEATHSIG: that follows the thread that started this process, and threads end.
    """
    poll = select.poll()
    poll.register(channel_fd, 0)  # POLLHUP comes unasked
    poll.poll()
    os._exit(1)


class Talk:
    """What a server says to the parent while it is at it."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    def progress(self, text: str) -> None:
        """For a person who waits."""
        self._channel.send({"type": "progress", "text": text})

    def note(self, text: str) -> None:
        """For everybody: something is not as good as it could be."""
        self._channel.send({"type": "note", "text": text})

    def hold(self, place: Mapping[str, Any], prog_fd: int) -> None:
        """Come back when the guard holds the program.  Raises what the parent met."""
        self._channel.send({"type": "hold", **place}, [prog_fd])
        received = self._channel.receive()
        if received is None:
            os._exit(1)  # the parent is gone, and with it the reason to attach
        answer, _none = received
        if answer["type"] == "error":
            raise from_dict(answer["error"])

    def done(self, answer: Mapping[str, Any], descriptors: list[int]) -> None:
        """The answer, with copies of these descriptors."""
        self._channel.send({"type": "done", **answer}, descriptors)

    def log(self, line: dict[str, Any]) -> None:
        self._channel.send(line)


def _serve(talk: Talk, request: dict[str, Any], descriptors: list[int]) -> None:
    if request["elsewhere"]:
        _enter_network_namespace(descriptors[0])
        descriptors = descriptors[1:]
    if request["log"] and not log.level():
        from hypermesh_ebpf.bpf.libbpf import libbpf

        log.send_to(talk.log, request["log"])
        libbpf.cache_clear()  # what was got ready before did not know that somebody listens
    if request["do"] == "monitor":
        from hypermesh_ebpf import worker_monitor

        worker_monitor.serve(talk, request)
    else:
        from hypermesh_ebpf import worker_programs

        worker_programs.SERVERS[request["do"]](talk, request, descriptors)


def _enter_network_namespace(fd: int) -> None:
    """setns(2), for this process alone."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(fd, _CLONE_NEWNET):
        number = ctypes.get_errno()
        raise MissingPrivilege(
            "enter the network namespace in which a program was attached",
            describe_errno(number),
            "call it in that namespace, or run it as root",
            errno=number,
        )
