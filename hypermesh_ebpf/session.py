"""A session: image loaded, hooks attached, maps readable; closing it leaves the system as it was.

    with open_monitor("xdp", iface=("lo",)) as session:
        print(session.read().totals)

Everything that has to be undone is on one ExitStack: the guard (which takes XDP programs off), the
descriptors (closing the last copy detaches and frees), the ring buffers' mappings.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

from hypermesh_ebpf import log, monitors
from hypermesh_ebpf.attach.hold import Hold
from hypermesh_ebpf.bpf import maps as bpf_maps
from hypermesh_ebpf.bpf.maps import Map
from hypermesh_ebpf.bpf.programs import close_all, close_attachments
from hypermesh_ebpf.bpf.ring import RingBuffer
from hypermesh_ebpf.errors import UsageError
from hypermesh_ebpf.host.mark import mark_process
from hypermesh_ebpf.metrics.rates import Rates
from hypermesh_ebpf.metrics.sample import Event, Loss, Sample, Start
from hypermesh_ebpf.monitors.declaration import Monitor, Option, Options
from hypermesh_ebpf.watching import count_missed, require_attached
from hypermesh_ebpf.worker import Loaded, LoadedTarget, Report, Worker, unpack_monitor

# A caller who reads samples alone does not make the process grow.
_MOST_PENDING = 100_000


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
        self, monitor: Monitor, options: Options, use_cache: bool, rung: str | None = None
    ) -> None:
        self._monitor, self._options = monitor, options
        if rung is not None and rung not in (known := [each.name for each in monitor.rungs]):
            raise UsageError(
                f"rung {rung!r} of {monitor.name}",
                "there is no such rung",
                f"known: {', '.join(known)}",
            )
        self._guard = None
        request = {
            "do": "monitor",
            "log": log.level(),
            "elsewhere": False,
            "monitor": monitor.name,
            "options": options,
            "rung": rung,
            "use_cache": use_cache,
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
        from hypermesh_ebpf.guards import hold_recorded

        assert self._guard is not None
        hold_recorded(self._guard, Hold.from_dict(place, prog_fd))


class Session:
    """A monitor that runs.  Not for several threads at once; made by :func:`open_monitor`."""

    def __init__(
        self, monitor: Monitor, options: Options, loaded: Loaded, guard: Any | None
    ) -> None:
        self.monitor, self.options = monitor, options
        self._loaded, self._guard = loaded, guard
        self._stack = ExitStack()
        maps = {target.name: _open_maps(target) for target in loaded.targets}
        self._collector = monitor.collector(options, maps)
        self.rings = [ring for target in loaded.targets for ring in self._open_rings(target)]
        self._rates = Rates()
        self._pending: list[Event] = []
        self._attached = self._read_at = loaded.attached_at
        names = [target.name for target in loaded.targets]
        self.target: str | list[str] = names[0] if len(names) == 1 else names
        self.start = Start(
            time=time.time(),
            monitor=monitor.name,
            target=self.target,
            hooks=loaded.hooks,
            degraded=loaded.degraded,
            prog_ids=tuple(p.id for target in loaded.targets for p in target.programs),
        )

    def _open_rings(self, target: LoadedTarget) -> list[RingBuffer]:
        rings = []
        for spec, fd in target.maps:
            if spec.type == bpf_maps.RINGBUF:
                ring = RingBuffer(fd, spec.max_entries)
                self._stack.callback(ring.close)
                rings.append(ring)
        return rings

    @property
    def guard(self) -> Any | None:
        """The guard that detaches if this process dies; None where the kernel does so itself."""
        return self._guard

    def events(self) -> list[Event]:
        """What happened since the last call, oldest first.

        All of it for who calls this after each :meth:`read`; else the last 100,000 and what came
        since.
        """
        self._drain()
        found, self._pending = self._pending, []
        return found

    def _drain(self) -> None:
        """Take what is in the ring buffers, for a caller of events()."""
        decode, name = self._collector.decode, self.monitor.name
        for ring in self.rings:
            for record in ring.read():
                fields = decode(record)
                if fields is not None:
                    moment = fields.pop("time")
                    self._pending.append(Event(moment, name, fields))

    def read(self) -> Sample:
        """A reading of everything counted since attach, with rates since the last reading.

        Raises MapError; TargetGone when an interface that was watched is no longer there.
        """
        self._check_targets()
        del self._pending[:-_MOST_PENDING]  # not what comes now: that may be more in a storm
        self._drain()
        reading = self._collector.collect()
        now = time.monotonic()
        totals, rows = self._rates.apply(
            reading.totals,
            reading.rows,
            self.monitor.key(self.options),
            self.monitor.counters,
            now - self._read_at,
        )
        self._read_at = now
        return Sample(
            time=time.time(),
            monitor=self.monitor.name,
            target=self.target,
            elapsed_s=round(now - self._attached, 3),
            totals=totals,
            rows=rows,
            loss=Loss(reading.events_lost, reading.map_full, self._missed()),
            histograms=reading.histograms,
        )

    def close(self) -> None:
        """Detach, and free everything.  Raises DetachError if something of ours stays attached."""
        self._stack.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _missed(self) -> int | None:
        programs = [program for target in self._loaded.targets for program in target.programs]
        return count_missed([(program.kind, program.fd) for program in programs])

    def _check_targets(self) -> None:
        for target in self._loaded.targets:
            if target.ifindex is not None:
                (program,) = target.programs
                require_attached(Hold(target.ifindex, target.name, program.id, program.fd))


def _open_maps(target: LoadedTarget) -> dict[str, Map]:
    """The target's readable maps by name."""
    return {spec.name: Map(spec, fd) for spec, fd in target.maps if spec.type != bpf_maps.RINGBUF}
