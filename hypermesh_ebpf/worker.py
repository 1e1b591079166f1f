"""The process boundary, seen from the parent: start a worker, ask it, take over its descriptors.

The worker is a fresh interpreter, never a fork: the host program may have threads.  It compiles or
finds the image, loads, attaches and hands the descriptors over; the parent then holds everything by
descriptor.  A worker serves one request after another and ends when it is left alone for a moment,
when its parent closes it, or when its parent dies.
"""

from __future__ import annotations

import errno
import os
import select
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hypermesh_ebpf import log, spawn
from hypermesh_ebpf.bpf.spec import MapSpec
from hypermesh_ebpf.channel import LEFT_ALONE, Channel
from hypermesh_ebpf.errors import HmebpfError, WorkerError, from_dict
from hypermesh_ebpf.metrics.sample import Degraded

_SILENCE_SECONDS = 600.0  # clang in an emulated machine is slow; a hang is forever
_REPORT_REMEDY = "try again with -v; if it happens again, report it with that output"


@dataclass(frozen=True, slots=True)
class LoadedProgram:
    """A program in the kernel, by descriptor."""

    name: str
    kind: str
    id: int
    tag: str
    fd: int


@dataclass(frozen=True, slots=True)
class LoadedTarget:
    """What was loaded for one target: its maps (spec, descriptor), programs and attachments.

    ``ifindex`` is that of the interface where the target is one.
    """

    name: str
    maps: tuple[tuple[MapSpec, int], ...]
    programs: tuple[LoadedProgram, ...]
    attachments: tuple[int, ...]
    ifindex: int | None


@dataclass(frozen=True, slots=True)
class Loaded:
    """Everything a worker made for a monitor; the descriptors are the receiver's to close.

    ``attached_at`` is when the last hook was attached, as time.monotonic() counts.
    """

    targets: tuple[LoadedTarget, ...]
    hooks: tuple[str, ...]
    degraded: Degraded | None
    attached_at: float

    def attachments(self) -> list[int]:
        """The descriptors that keep programs attached."""
        return [fd for target in self.targets for fd in target.attachments]

    def descriptors(self) -> list[int]:
        """Those of programs and maps."""
        programs = [program.fd for target in self.targets for program in target.programs]
        return programs + [fd for target in self.targets for _spec, fd in target.maps]


Hold = Callable[[Mapping[str, Any], int], None]
"""Called before an attach that outlives its maker, with the place and a program descriptor."""
Report = Callable[[str, str], None]
"""Told ("progress" or "note", text) while a worker is at it."""
Answer = tuple[dict[str, Any], list[int]]
"""A worker's answer and the descriptors that came with it, now the receiver's to close."""


def network_namespace() -> int:
    """The calling thread's, by inode."""
    return os.stat("/proc/thread-self/ns/net").st_ino


class WorkerLeft(Exception):
    """The worker had ended, left alone, before the request reached it: ask another one."""


class Worker:
    """A running worker: :meth:`ask` it, then wait for the :meth:`result`."""

    def __init__(self) -> None:
        """Start it, or take the one started ahead; returns at once.  Raises WorkerError."""
        try:
            self._process, ours, self._said = spawn.take()
        except OSError as error:
            raise WorkerError(
                "start the worker process", str(error), _start_remedy(error), errno=error.errno
            ) from error
        self._channel = Channel(ours)

    @property
    def is_alive(self) -> bool:
        """Whether the process still runs."""
        return self._process.poll() is None

    def ask(self, request: Mapping[str, Any], descriptors: Sequence[int] = ()) -> None:
        """Send a request (see worker_process) with copies of these descriptors.

        Raises WorkerError; WorkerLeft for a worker that had ended by itself.
        """
        self._send(dict(request), descriptors)

    def result(self, hold: Hold, report: Report, silence: float = _SILENCE_SECONDS) -> Answer:
        """Serve the worker until it has done what it was asked for; its answer.

        ``silence`` is how many seconds it may say nothing.  Raises what the worker failed with,
        WorkerError when it died, WorkerLeft.
        """
        while True:
            message, descriptors = self._next(silence)
            kind = message["type"]
            if kind in ("progress", "note"):
                report(kind, message["text"])
            elif kind == "log":
                log.relay(message)
            elif kind == "hold":
                self._hold(hold, message, descriptors[0])
            elif kind == "done":
                return message, descriptors
            elif kind == "error":
                raise from_dict(message["error"])

    def close(self) -> None:
        """End the worker if it still runs, and reap it."""
        self._channel.close()
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGKILL)
        self._process.wait()
        if self._said >= 0:
            os.close(self._said)
            self._said = -1

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _hold(self, hold: Hold, message: Mapping[str, Any], prog_fd: int) -> None:
        """Let the guard hold the program, and tell the worker that it may attach."""
        try:
            hold(message, prog_fd)
        except HmebpfError as error:
            self._send({"type": "error", "error": error.as_dict()})
        else:
            self._send({"type": "held"})
        finally:
            os.close(prog_fd)

    def _send(self, message: dict[str, Any], descriptors: Sequence[int] = ()) -> None:
        try:
            self._channel.send(message, descriptors)
        except ConnectionError:
            raise self._death() from None
        except OSError as error:
            raise WorkerError(
                "speak with the worker", str(error), _start_remedy(error), errno=error.errno
            ) from error

    def _next(self, silence: float) -> Answer:
        poll = select.poll()
        poll.register(self._channel.fileno(), select.POLLIN)
        if not poll.poll(silence * 1000):
            raise WorkerError(
                "load in the worker process", f"it said nothing for {silence:.0f} s", _REPORT_REMEDY
            )
        received = self._channel.receive()
        if received is None:
            raise self._death()
        return received

    def _death(self) -> Exception:
        """What became of a worker that is gone without a result."""
        self._channel.close()  # it may live and wait for us
        status = self._process.wait()
        if status == LEFT_ALONE:
            return WorkerLeft()
        if status < 0:
            cause = f"it was ended by signal {signal.Signals(-status).name}"
        else:
            cause = f"it ended with status {status}"
        with open(self._said, "rb", closefd=False) as file:
            file.seek(0)
            said = file.read().decode(errors="replace").strip()
        if said:
            cause += f" ({said.splitlines()[-1]})"
        return WorkerError(
            "load in the worker process", cause, _REPORT_REMEDY, details=said or None
        )


class Workers:
    """A worker for one request after another: kept while it lives, replaced when it does not.

    Not for several threads at once.
    """

    def __init__(self, report: Report) -> None:
        self._report = report
        self._worker: Worker | None = None
        self._netns = 0

    def ask(
        self,
        request: Mapping[str, Any],
        descriptors: Sequence[int],
        hold: Hold,
        *,
        silence: float,
        netns: tuple[int, int] | None = None,
    ) -> Answer:
        """The answer to a request, from a worker in this thread's network namespace.

        ``netns`` is (inode, descriptor) of another one to be in.  Raises what the worker failed
        with, WorkerError.
        """
        here = network_namespace()
        inode, descriptor = netns or (here, -1)
        if self._worker is not None and not (self._worker.is_alive and self._netns == inode):
            self.close()
        while True:
            elsewhere = [] if self._worker or inode == here else [descriptor]
            worker = self._worker or Worker()
            self._worker, self._netns = None, inode  # whoever fails badly is not asked again
            asked = {**request, "log": log.level(), "elsewhere": bool(elsewhere)}
            try:
                worker.ask(asked, [*elsewhere, *descriptors])
                answer = worker.result(hold, self._report, silence)
            except WorkerLeft:
                worker.close()
                continue
            except BaseException as error:
                if isinstance(error, HmebpfError) and not isinstance(error, WorkerError):
                    self._worker = worker
                else:
                    worker.close()
                raise
            self._worker = worker
            return answer

    def close(self) -> None:
        """End the worker that waits, if there is one."""
        if self._worker is not None:
            self._worker.close()
            self._worker = None


def _start_remedy(error: OSError) -> str:
    """What to do where a process or a descriptor could not be had."""
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return "allow more open files: `ulimit -n 4096`"
    if error.errno in (errno.EAGAIN, errno.ENOMEM):
        return "allow more processes (`ulimit -u`), or free memory"
    return f"see whether this user may run the interpreter: `ls -lL {sys.executable}`"


def unpack_monitor(message: Mapping[str, Any], descriptors: list[int]) -> Loaded:
    """The answer to a request for a monitor.

    Descriptors come in the order in which the message names what they stand for.
    """
    following = iter(descriptors)
    targets = tuple(
        LoadedTarget(
            target["name"],
            tuple((MapSpec(**spec), next(following)) for spec in target["maps"]),
            tuple(LoadedProgram(**program, fd=next(following)) for program in target["programs"]),
            tuple(next(following) for _ in range(target["attachments"])),
            target["ifindex"],
        )
        for target in message["targets"]
    )
    lower = message["degraded"]
    degraded = Degraded(**{**lower, "lost": tuple(lower["lost"])}) if lower else None
    return Loaded(targets, tuple(message["hooks"]), degraded, message["attached_at"])
