"""Bytes to where the user wants them, and what becomes of it when that place fails.

One write is one batch of lines, handed to the kernel before :meth:`Writer.write` returns, so a
reader sees a line as soon as it is made and Python holds nothing back for the interpreter's exit.
"""

from __future__ import annotations

import errno
import os
import select
import stat
import time
from collections.abc import Callable
from typing import TextIO

from hypermesh_ebpf.errors import OutputError, describe_errno

_CHUNK = select.PIPE_BUF
"""A pipe that polls writable takes this much without blocking (pipe(7))."""
_POLL_MS = 200
_GRACE_S = 0.5

_REMEDIES = {
    errno.ENOSPC: "free space on the file system that holds the output, or write it elsewhere",
    errno.EDQUOT: "your disk quota is used up: free space, or write the output elsewhere",
    errno.EFBIG: "the file reached its size limit (see `ulimit -f`): write to another file",
    errno.EBADF: "standard output is closed: run again with `> FILE` or into a pipe",
}


class OutputClosed(Exception):
    """The reader of the output is gone (`... | head`): how a pipeline ends, no failure."""


def require_stream(stream: TextIO | None) -> TextIO:
    """The stream; sys.stdout is None when the shell closed it.  Raises OutputError."""
    if stream is None:
        raise OutputError(
            "write the output",
            "standard output is closed",
            "run again with `> FILE` or into a pipe",
        )
    return stream


class Writer:
    """Writes whole batches to ``stream``, past Python's buffers where it has a descriptor.

    A slow reader delays the caller.  Once ``stopping()`` is true, a reader that takes nothing for
    half a second counts as gone, so that Ctrl-C ends a run whose output nobody reads.
    """

    def __init__(self, stream: TextIO, stopping: Callable[[], bool] | None = None) -> None:
        self._failure: Exception | None = None
        self._stream = stream
        self._stopping = stopping or (lambda: False)
        self._fd: int | None
        try:
            stream.flush()
            self._fd = stream.fileno()
        except (AttributeError, ValueError):  # io.UnsupportedOperation: not backed by a file
            self._fd = None
        except OSError as error:
            raise self._failed(error) from error
        self._chunk: int | None = None
        self._may_block = False
        if self._fd is not None:
            mode = os.fstat(self._fd).st_mode
            self._may_block = not stat.S_ISREG(mode)
            if stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode):
                self._chunk = _CHUNK

    @property
    def gone(self) -> bool:
        """Whether a write failed, after which nothing more is written."""
        return self._failure is not None

    def write(self, data: bytes) -> None:
        """Write all of ``data`` (UTF-8).

        Raises OutputClosed if the reader is gone, OutputError if the system refuses the write;
        having raised one of them it raises it every time.
        """
        if self._failure is not None:
            raise self._failure
        try:
            if self._fd is None:
                self._stream.write(data.decode())
                self._stream.flush()
            else:
                self._write_all(self._fd, memoryview(data))
        except OSError as error:
            raise self._failed(error) from error

    def _write_all(self, fd: int, rest: memoryview) -> None:
        while rest:
            if self._may_block:
                self._wait(fd)
            try:
                rest = rest[os.write(fd, rest[: self._chunk]) :]
            except BlockingIOError:  # whoever shares the descriptor made it non-blocking
                self._may_block = True

    def _wait(self, fd: int) -> None:
        """Until ``fd`` takes bytes, or until a user who wants to stop has waited long enough."""
        poll = select.poll()
        poll.register(fd, select.POLLOUT)
        if poll.poll(0):
            return
        deadline = time.monotonic() + _GRACE_S
        while not poll.poll(_POLL_MS):
            if self._stopping():
                if time.monotonic() >= deadline:
                    raise self._give_up(OutputClosed())
            else:
                deadline = time.monotonic() + _GRACE_S

    def _failed(self, error: OSError) -> Exception:
        number = error.errno or 0
        # EIO is what writing to a terminal gives that was hung up.
        if isinstance(error, (BrokenPipeError, ConnectionResetError)) or number == errno.EIO:
            return self._give_up(OutputClosed())
        return self._give_up(
            OutputError(
                "write the output",
                describe_errno(number) if number else str(error),
                _REMEDIES.get(number, "write the output elsewhere, for instance with `> FILE`"),
                errno=number or None,
            )
        )

    def _give_up(self, failure: Exception) -> Exception:
        self._failure = failure
        silence(self._stream)
        return failure


def silence(stream: TextIO | None) -> None:
    """Point ``stream``'s descriptor at /dev/null.

    What Python still buffers for it then goes there when the interpreter exits, which otherwise
    prints "Exception ignored ... BrokenPipeError" and exits with 120 (docs.python.org, the signal
    module's note on SIGPIPE).  A stream without a descriptor is left alone.
    """
    if stream is None:
        return
    try:
        fd = stream.fileno()
    except (AttributeError, ValueError):
        return
    null = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.dup2(null, fd)
    finally:
        if null != fd:
            os.close(null)
