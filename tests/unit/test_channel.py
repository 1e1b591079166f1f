"""Messages with descriptors, between two ends in one process."""

from __future__ import annotations

import os
import resource
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hypermesh_ebpf.channel import Channel
from hypermesh_ebpf.errors import WorkerError


class Ends:
    """The two ends of a channel; ``raw`` is the socket behind the left one."""

    def __init__(self) -> None:
        self.raw, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.left, self.right = Channel(self.raw), Channel(other)

    def receive(self) -> tuple[dict[str, Any], list[int]]:
        received = self.right.receive()
        assert received is not None
        return received


@pytest.fixture
def ends() -> Iterator[Ends]:
    """A channel; at the end no descriptor may be left that was not there before."""
    before = open_descriptors()
    ends = Ends()
    yield ends
    ends.left.close()
    ends.right.close()
    assert open_descriptors() == before


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_messages_come_in_order_and_unchanged(ends: Ends) -> None:
    messages = [{"type": "a", "n": 1}, {"text": "naïve \0 ☃ \udc80"}, {}, {"deep": [[{"x": None}]]}]
    for message in messages:
        ends.left.send(message)
    assert [ends.receive() for _ in messages] == [(message, []) for message in messages]


def test_large_message(ends: Ends) -> None:
    """A verifier's log: far beyond what a socket takes, and nobody reads yet."""
    message = {"log": "0123456789abcdef" * (1 << 20)}
    ends.left.send(message)
    assert ends.receive() == (message, [])


@pytest.mark.parametrize("count", [1, 249, 250, 251, 253, 254, 700])
def test_many_descriptors_in_order(ends: Ends, count: int, tmp_path: Path) -> None:
    """SCM_RIGHTS takes 253 at a time."""
    files = [os.open(tmp_path / str(number), os.O_CREAT | os.O_RDWR) for number in range(7)]
    sent = [files[number * number % 7] for number in range(count)]
    ends.left.send({"count": count}, sent)
    message, received = ends.receive()
    assert message == {"count": count}
    assert [os.fstat(fd).st_ino for fd in received] == [os.fstat(fd).st_ino for fd in sent]
    assert not set(received) & set(files), "copies; the sender's stay open"
    assert not any(os.get_inheritable(fd) for fd in received)
    for fd in received + files:
        os.close(fd)


def test_both_directions(ends: Ends) -> None:
    ends.left.send({"ask": 1})
    assert ends.receive() == ({"ask": 1}, [])
    ends.right.send({"answer": 2})
    assert ends.left.receive() == ({"answer": 2}, [])


def test_peer_that_is_gone(ends: Ends) -> None:
    ends.left.send({"last": "words"})
    ends.left.close()
    assert ends.receive() == ({"last": "words"}, []), "what it said before is still heard"
    assert ends.right.receive() is None
    with pytest.raises(ConnectionError):
        ends.right.send({"to": "nobody"}, [0])


def test_peer_that_dies_in_the_middle_of_a_message(ends: Ends) -> None:
    socket.send_fds(ends.raw, [b"M"], [0] * 100)
    ends.left.close()
    assert ends.right.receive() is None


@pytest.mark.parametrize("content", [None, b"", b"{", b"\xff\xfe"])
def test_message_that_is_none(ends: Ends, content: bytes | None, tmp_path: Path) -> None:
    """An error, and the descriptors that came with it are closed."""
    (tmp_path / "message").write_bytes(content or b"")
    with open(tmp_path / "message", "rb") as file:
        if content is None:
            ends.raw.send(b"L")
        else:
            socket.send_fds(ends.raw, [b"L"], [file.fileno(), 0, 0, 0])
    with pytest.raises(WorkerError, match="it sent no valid message") as caught:
        ends.right.receive()
    assert caught.value.remedy


def test_too_many_open_files(ends: Ends) -> None:
    """The kernel drops the descriptors that do not fit; half a message would be misread."""
    ends.left.send({"count": 100}, [0] * 100)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = {int(name) for name in os.listdir("/proc/self/fd")}
    twentieth_free = [number for number in range(soft) if number not in used][20]
    resource.setrlimit(resource.RLIMIT_NOFILE, (twentieth_free, hard))
    try:
        with pytest.raises(WorkerError, match="may open no more files") as caught:
            ends.right.receive()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert "ulimit -n" in str(caught.value.remedy)
