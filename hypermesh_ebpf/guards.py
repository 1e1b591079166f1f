"""A process's guards, one for each network namespace it attached something in, and the ledger.

Whatever is held is written into the ledger first: guard and owner may die together.
"""

from __future__ import annotations

from contextlib import ExitStack

from hypermesh_ebpf import ledger
from hypermesh_ebpf.attach.hold import Hold
from hypermesh_ebpf.guard import Guard
from hypermesh_ebpf.worker import Report


def hold_recorded(guard: Guard, hold: Hold, netns: int | None = None) -> None:
    """Write an attachment into the ledger and let the guard hold it, before it exists.

    ``netns`` is the interface's network namespace, if that is not this thread's.
    """
    entry = ledger.record(hold, netns)
    try:
        guard.hold(hold, str(entry))
    except BaseException:
        entry.unlink(missing_ok=True)
        raise


class Guards:
    """Guards by network namespace.  A guard is started, and the ledger swept, when it is needed."""

    def __init__(self, report: Report) -> None:
        self._report = report
        self._guards: dict[int, Guard] = {}

    @property
    def first(self) -> Guard | None:
        """The first that was needed; None where none was."""
        return next(iter(self._guards.values()), None)

    def hold(self, hold: Hold, netns: int) -> None:
        """Hold an attachment that is about to be made.  Raises GuardError, HmebpfError."""
        if netns not in self._guards:
            self._guards[netns] = Guard.start()
            for line in ledger.sweep():
                self._report("note", line)
        hold_recorded(self._guards[netns], hold, netns)

    def drop(self, hold: Hold | None, netns: int) -> None:
        """Hold it no longer: another program has its place, or it was never attached."""
        if hold is not None:
            self._guards[netns].drop(hold)

    def remove(self, hold: Hold | None, netns: int) -> None:
        """Have it taken off now.  Raises DetachError."""
        if hold is not None:
            self._guards[netns].remove(hold)

    def close(self) -> None:
        """Have everything taken off, and end them.  Raises DetachError."""
        guards, self._guards = self._guards, {}
        with ExitStack() as undo:
            for guard in guards.values():
                undo.push(guard)
