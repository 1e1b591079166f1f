"""The owner's side of the guard: start it, hand it programs to hold, let it take them off.

    with Guard.start() as guard:
        guard.hold(hold, ledger_path)               # before the attach: no unguarded moment
        ...                                         # attach, monitor
                                                    # leaving: the guard removes, and says so

Nothing here imports pyroute2 or starts a thread.  What the guard does is in
:mod:`hypermesh_ebpf.guard_process`.
"""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import itertools
import os
import select
import signal
import socket
import struct
import sys
import threading
from dataclasses import dataclass

from hypermesh_ebpf import guard_process as protocol
from hypermesh_ebpf.attach.hold import Hold, TcFilter
from hypermesh_ebpf.errors import DetachError, GuardError, describe_errno

_ANSWER_SECONDS = 10.0  # others can hold the network configuration lock for long
_ATTEMPTS = 3
_INTERRUPTS = (signal.SIGINT, signal.SIGTERM)
_START_REMEDY = "check `ulimit -u` and free memory, then try again"

_MEANINGS = {
    protocol.REMOVED: "removed",
    protocol.MOVED: "moved",
    protocol.NOT_OURS: "not ours",
    protocol.GONE: "gone",
    protocol.FAILED: "failed",
}
_NO_FILTER = TcFilter(0, 0, 0, False)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one program that was held.

    ``what`` is "removed", "moved" (removed, in another network namespace), "not ours" (it had been
    taken off or replaced already), "gone" (no such interface any more) or "failed"; ``cause`` has
    the kernel's words.  ``kind`` is "xdp" or "tc".
    """

    ifindex: int
    what: str
    errno: int = 0
    cause: str = ""
    kind: str = "xdp"


@dataclass(frozen=True, slots=True)
class _Held:
    """A hold under the number by which the guard knows it, with a descriptor of our own."""

    number: int
    hold: Hold
    prog_fd: int
    ledger_path: str | None


class Guard:
    """A running guard process and what it holds.  Safe to use from several threads.

    A guard that was killed is replaced by the next :meth:`hold`, :meth:`release` or
    :meth:`replace_if_dead`; the owner keeps duplicates of the descriptors for that.
    """

    def __init__(self) -> None:
        self._held: list[_Held] = []
        self._numbers = itertools.count(1)
        self._lock = threading.RLock()
        self._owner = os.getpid()
        self._socket: socket.socket | None = None
        self._ready = False
        self._over = False
        self._pid = -1

    @classmethod
    def start(cls) -> Guard:
        """Start a guard for this process.  Comes back at once; :meth:`hold` waits until it works.

        Start it before privileges are dropped: the guard keeps those that it was started with.
        Raises GuardError.
        """
        guard = cls()
        guard._spawn()
        return guard

    @property
    def pid(self) -> int:
        """The guard's process id (another one after it was replaced)."""
        return self._pid

    def fileno(self) -> int:
        """For poll: readable when the guard died, then call :meth:`replace_if_dead`.

        Ask again after that: the number may have changed.
        """
        return self._live_socket().fileno()

    def hold(self, hold: Hold, ledger_path: str | None) -> None:
        """From when this returns, the guard removes this program from this interface at our end.

        ``ledger_path`` is the entry that it deletes then.  Raises GuardError.
        """
        with self._lock:
            if self._over:
                raise GuardError("use the guard", "it was released already")
            held = _Held(next(self._numbers), hold, os.dup(hold.prog_fd), ledger_path)
            self._held.append(held)
            try:
                # A guard that had to be replaced was told of this hold with the others.
                if not self.replace_if_dead() and not self._tell(held):
                    self._respawn()
            except BaseException:
                self._forget(held)
                raise

    def drop(self, hold: Hold) -> None:
        """Hold that program no longer: another one has its place, or it was never attached.

        Its ledger entry is deleted.  Raises GuardError.
        """
        with self._lock:
            held = self._find(hold)
            if held is None:
                return
            message = protocol.NUMBERED.pack(protocol.DROP, held.number)
            self._forget(held)
            # A guard that had to be replaced was told of the others only.
            if self.replace_if_dead() or self._exchange(message) is None:
                self.replace_if_dead()
                if held.ledger_path:
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(held.ledger_path)

    def remove(self, hold: Hold) -> Outcome | None:
        """Have this one program removed now; what became of it, None if it is not held.

        Raises DetachError when it could not be removed (it is held on then), GuardError.
        """
        with self._lock:
            held = self._find(hold)
            if held is None:
                return None
            message = protocol.NUMBERED.pack(protocol.REMOVE, held.number)
            for _ in range(_ATTEMPTS):
                self.replace_if_dead()
                answer = self._exchange(message)
                if answer is not None:
                    break
            else:
                raise GuardError(
                    f"detach {hold.kind} from {_name(hold.ifindex)}",
                    f"the guard died {_ATTEMPTS} times",
                    "run `hmebpf cleanup` as root",
                )
            outcome = _decode(answer, hold)
            if outcome.what == "failed":
                raise _detach_error([outcome])
            self._forget(held)
            return outcome

    def _find(self, hold: Hold) -> _Held | None:
        """What is held of that; nothing in a forked child, and nothing after the release."""
        if self._over or os.getpid() != self._owner:
            return None
        return next((held for held in self._held if held.hold == hold), None)

    def _forget(self, held: _Held) -> None:
        self._held.remove(held)
        os.close(held.prog_fd)

    def replace_if_dead(self) -> bool:
        """If the guard is dead, start another that holds the same.  True if that was needed."""
        with self._lock:
            if self._over or not self._is_dead():
                return False
            self._respawn()
            return True

    def release(self) -> list[Outcome]:
        """Have all programs removed and the guard ended; what became of each.

        Does nothing the second time, and in a forked child.  Raises DetachError when something of
        ours could not be removed (everything else was), GuardError when no guard could be had.
        """
        with self._lock:
            if self._over or os.getpid() != self._owner:
                return []
            self._over = True
            try:
                outcomes = self._released()
            finally:
                self._bury()
                for held in self._held:
                    os.close(held.prog_fd)
                self._held.clear()
        failed = [outcome for outcome in outcomes if outcome.what == "failed"]
        if failed:
            raise _detach_error(failed)
        return outcomes

    def __enter__(self) -> Guard:
        return self

    def __exit__(self, *exc: object) -> None:
        self.release()

    def _live_socket(self) -> socket.socket:
        if self._socket is None:
            raise GuardError("use the guard", "there is none")
        return self._socket

    def _spawn(self) -> None:
        """Start the process: own session, /dev/null for output, the socket as its only input."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        argv = [sys.executable, "-I", "-S", _program(), str(os.getpid())]
        try:
            self._pid = os.posix_spawn(
                sys.executable,
                argv,
                os.environ,
                file_actions=[
                    (os.POSIX_SPAWN_DUP2, theirs.fileno(), 0),
                    (os.POSIX_SPAWN_OPEN, 1, "/dev/null", os.O_RDWR, 0),
                    (os.POSIX_SPAWN_DUP2, 1, 2),
                ],
                setsid=True,  # kill -9 -PGID, Ctrl-C and SIGHUP do not reach it
                setsigmask=signal.valid_signals(),
            )
        except (OSError, TypeError, ValueError) as error:  # no sys.executable when embedded
            ours.close()
            raise GuardError("start the guard", str(error), _START_REMEDY) from error
        finally:
            theirs.close()
        ours.settimeout(_ANSWER_SECONDS)
        self._socket, self._ready = ours, False

    def _respawn(self) -> None:
        for _ in range(_ATTEMPTS):
            self._bury()
            self._spawn()
            if all(self._tell(held) for held in self._held):
                return
        raise GuardError("start the guard", f"it died {_ATTEMPTS} times", _START_REMEDY)

    def _bury(self) -> None:
        """Close the socket, at which a living guard ends, and reap the process."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        if self._pid > 0:
            with contextlib.suppress(ChildProcessError):  # the host program may have reaped it
                os.waitpid(self._pid, 0)
            self._pid = -1

    def _is_dead(self) -> bool:
        if self._socket is None:
            return True
        poll = select.poll()
        poll.register(self._socket, select.POLLHUP)
        return bool(poll.poll(0))

    def _tell(self, held: _Held) -> bool:
        """Hand one program over and wait for the answer; False when the guard is dead."""
        place = held.hold.filter or _NO_FILTER
        message = protocol.HOLD_HEADER.pack(
            protocol.HOLD,
            held.number,
            held.hold.ifindex,
            place.parent,
            place.priority,
            place.handle,
            place.clsact_ours,
        )
        answer = self._exchange(message + os.fsencode(held.ledger_path or ""), held.prog_fd)
        if answer is None:
            return False
        if len(answer) != protocol.HELD.size:
            raise GuardError("speak with the guard", f"it answered {answer!r}")
        _, number = protocol.HELD.unpack(answer)
        if number:
            raise GuardError("hand a program to the guard", describe_errno(number), errno=number)
        return True

    def _exchange(self, message: bytes, *descriptors: int) -> bytes | None:
        """Send a message and wait for the answer; None when the guard is dead.

        Not to be interrupted: an answer that nobody reads would be taken for the next one's.
        """
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _INTERRUPTS)
        try:
            self._await_ready()
            socket.send_fds(self._live_socket(), [message], descriptors)
            return self._receive()
        except ConnectionError:
            return None
        except BaseException:  # another thread took the signal: what is unread goes with the guard
            self._bury()
            raise
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def _await_ready(self) -> None:
        if not self._ready:
            self._ready = self._receive() == protocol.READY

    def _receive(self) -> bytes:
        """One message.  ConnectionError when the guard is dead, or silent for so long (stopped?)
        that it has to be replaced."""
        try:
            message = self._live_socket().recv(8192)
        except TimeoutError:
            try:
                os.kill(self._pid, signal.SIGKILL)  # our child and not reaped: the pid is its own
            except (ProcessLookupError, PermissionError):  # it has privileges that we dropped
                self._pid = -1
            message = b""
        if not message:
            raise ConnectionResetError(errno.ECONNRESET, "the guard is dead")
        return message

    def _released(self) -> list[Outcome]:
        """Ask for the removal; a guard that dies over it is replaced and asked again."""
        if not self._held:
            return []
        try:
            for _ in range(_ATTEMPTS):
                if self._is_dead():
                    self._respawn()
                with contextlib.suppress(ConnectionError):
                    self._await_ready()
                    self._live_socket().send(protocol.RELEASE)
                    return [_decode(self._receive(), held.hold) for held in self._held]
                self._bury()
            raise GuardError("keep the guard", f"it died {_ATTEMPTS} times")
        except GuardError as error:
            raise GuardError(
                f"detach {self._held[0].hold.kind}", str(error), "run `hmebpf cleanup` as root"
            ) from error


def _program() -> str:
    """What the guard runs: the compiled file if it is there and up to date, else the source.

    Compiling would cost the guard 5 ms and a megabyte.  Python does not compare a compiled file
    that it is told to run with its source, so we do, by the header of PEP 552.
    """
    source = protocol.__file__
    try:
        compiled = importlib.util.cache_from_source(source)
        with open(compiled, "rb") as file:
            header = file.read(16)
    except (OSError, NotImplementedError):
        return source
    status = os.stat(source)
    state = struct.pack("<III", 0, int(status.st_mtime) & 0xFFFFFFFF, status.st_size & 0xFFFFFFFF)
    return compiled if header == importlib.util.MAGIC_NUMBER + state else source


def _decode(message: bytes, hold: Hold) -> Outcome:
    try:
        what, ifindex, number = protocol.OUTCOME.unpack_from(message)
    except struct.error as error:
        raise GuardError("speak with the guard", f"it answered {message!r}") from error
    words = message[protocol.OUTCOME.size :].decode(errors="replace")
    cause = words or (describe_errno(number) if number else "")
    return Outcome(ifindex, _MEANINGS[what], number, cause, hold.kind)


def _detach_error(failed: list[Outcome]) -> DetachError:
    places = dict.fromkeys(f"{outcome.kind} from {_name(outcome.ifindex)}" for outcome in failed)
    return DetachError(
        f"detach {', '.join(places)}",
        "; ".join(dict.fromkeys(outcome.cause for outcome in failed)),
        "see it with `hmebpf list`, take it off with `hmebpf cleanup` as root",
        errno=failed[0].errno,
    )


def _name(ifindex: int) -> str:
    try:
        return socket.if_indextoname(ifindex)
    except OSError:
        return f"interface {ifindex}"
