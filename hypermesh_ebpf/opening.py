"""A monitor's start: the worker and the guard at work, before there is a session.

    with open_monitor("xdp", iface=("lo",)) as session:
        print(session.read().totals)

Apart from :mod:`hypermesh_ebpf.session`, so that the worker is asked before this process imports
what reading and drawing take.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from hypermesh_ebpf import log, monitors
from hypermesh_ebpf.errors import UsageError
from hypermesh_ebpf.worker import Report, Worker, unpack_monitor

if TYPE_CHECKING:
    from hypermesh_ebpf.guard import Guard
    from hypermesh_ebpf.monitors.declaration import Monitor, Option, Options
    from hypermesh_ebpf.session import Session


def complete_options(monitor: Monitor, given: Mapping[str, Any]) -> dict[str, Any]:
    """The user's options with defaults filled in; a single value will do where several may be.

    Raises UsageError for an option that is unknown, missing, or of a value that it cannot have.
    """
    declared = {option.name: option for option in monitor.options}
    unknown = sorted(set(given) - set(declared) - {"events"})
    if unknown:
        raise UsageError(
            f"{monitor.name}: option {unknown[0]!r}",
            "there is no such option",
            f"see `hmebpf {monitor.name} --help`",
        )
    options = {n: _check(monitor, o, given.get(n, o.default)) for n, o in declared.items()}
    return {**options, "events": bool(given.get("events", monitor.events == "always"))}


def _check(monitor: Monitor, option: Option, value: Any) -> Any:
    """The value if the option can have it; a tuple where several are allowed, each once."""
    several: tuple[Any, ...] = (value,)
    if option.multiple and isinstance(value, (tuple, list)):
        several = tuple(dict.fromkeys(value))
    if value is None or several == ():
        cause = "it is required" if option.required else None
    elif not all(isinstance(each, option.kind) for each in several):
        cause = f"not of type {option.kind.__name__}: {value!r}"
    elif option.choices and not set(several) <= set(option.choices):
        cause = f"{value!r} is not one of {', '.join(option.choices)}"
    else:
        cause = None
    if cause:
        what = f"{monitor.name}: option {option.name!r}"
        raise UsageError(what, cause, f"see `hmebpf {monitor.name} --help`")
    return several if option.multiple and value is not None else value


def open_monitor(
    name: str,
    *,
    rung: str | None = None,
    use_cache: bool = True,
    report: Report | None = None,
    **options: Any,
) -> Session:
    """Load and attach a bundled monitor; a context manager.

    ``options`` are the monitor's own, by name (``iface=("lo",)``, ``by="source"``), and
    ``events=True`` for a monitor that has events and does not always show them.  ``rung`` asks
    for one rung of its ladder and no other.  ``report`` is told of progress and of what degrades.
    Raises any HmebpfError.
    """
    if name not in monitors.names():
        known = ", ".join(monitors.names())
        raise UsageError(f"monitor {name!r}", "there is no such monitor", f"known: {known}")
    monitor = monitors.load(name)
    opening = Opening(monitor, complete_options(monitor, options), use_cache, rung)
    return opening.finish(report)


class Opening:
    """A session on its way: the worker runs while the caller imports what it will need.

    Made in one step and finished in another; whoever does not finish it calls :meth:`cancel`.
    """

    def __init__(
        self,
        monitor: Monitor,
        options: Options,
        use_cache: bool,
        rung: str | None = None,
        *,
        sampled: bool = False,
    ) -> None:
        """``sampled``: with programs for :meth:`~hypermesh_ebpf.session.Session.sample_one_in`."""
        self._monitor, self._options = monitor, options
        if rung is not None and rung not in (known := [each.name for each in monitor.rungs]):
            raise UsageError(
                f"rung {rung!r} of {monitor.name}",
                "there is no such rung",
                f"known: {', '.join(known)}",
            )
        self._guard: Guard | None = None
        request = {
            "do": "monitor",
            "log": log.level(),
            "elsewhere": False,
            "monitor": monitor.name,
            "options": options,
            "rung": rung,
            "use_cache": use_cache,
            "sampled": sampled,
        }
        self._undo = ExitStack()
        self._worker = Worker()
        try:
            self._worker.ask(request)
            if any(hook.kind == "xdp" for each in monitor.rungs for hook in each.hooks):
                from hypermesh_ebpf.guard import Guard

                self._guard = self._undo.enter_context(Guard.start())
        except BaseException:
            self._worker.close()
            raise
        # Undone first: a worker in the midst of attaching must be gone when the guard detaches.
        self._undo.push(self._worker)

    def cancel(self) -> None:
        """End the worker, and take off what it may have attached."""
        self._undo.close()

    def finish(self, report: Report | None = None) -> Session:
        """Wait until everything is attached; the session.  Raises what opening failed with."""
        report = report or (lambda kind, text: None)
        with self._undo as undo:
            from hypermesh_ebpf.bpf.programs import close_all, close_attachments
            from hypermesh_ebpf.host.mark import mark_process
            from hypermesh_ebpf.session import Session

            if self._guard:
                from hypermesh_ebpf import ledger

                for line in ledger.sweep():
                    report("note", line)
            loaded = unpack_monitor(*self._worker.result(self._hold, report))
            undo.callback(log.info, "detached from %s", ", ".join(loaded.hooks))
            undo.callback(close_all, loaded.descriptors())
            undo.callback(close_attachments, loaded.attachments())
            self._worker.close()
            undo.callback(os.close, mark_process())
            session = Session(self._monitor, self._options, loaded, self._guard)
            session._stack.push(undo.pop_all().__exit__)
            return session

    def _hold(self, place: Mapping[str, Any], prog_fd: int) -> None:
        from hypermesh_ebpf.attach.hold import Hold
        from hypermesh_ebpf.guards import hold_recorded

        assert self._guard is not None
        hold_recorded(self._guard, Hold.from_dict(place, prog_fd))
