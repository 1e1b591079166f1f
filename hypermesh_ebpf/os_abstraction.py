"""The library's front door: load a program, attach it, read its metrics, unload it.

    from hypermesh_ebpf import EbpfAttachType, create_os_abstraction

    with create_os_abstraction() as os_:
        handle = os_.load_ebpf_program(Path("xdp_packet_counter.o").read_bytes())
        os_.attach_ebpf_monitor(handle, EbpfAttachType.xdp(iface="lo"))
        print(os_.read_ebpf_metrics(handle).values["packets_processed"])

Handles are opaque, many at once, and may be used from several threads.  Every value comes from the
kernel: from the programs' maps, or, for a program without maps, from the kernel's own count of its
runs.
"""

from __future__ import annotations

import itertools
import os
import platform
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hypermesh_ebpf import log
from hypermesh_ebpf.attach_type import EbpfAttachType
from hypermesh_ebpf.bpf.programs import read_program_info
from hypermesh_ebpf.bpf.statistics import switch_statistics_on
from hypermesh_ebpf.errors import HmebpfError, InvalidHandle, NotAttached, Unsupported, UsageError
from hypermesh_ebpf.loader import Loader
from hypermesh_ebpf.program_set import Attached, Program, ProgramSet, Source
from hypermesh_ebpf.worker import Report

if TYPE_CHECKING:
    from hypermesh_ebpf.bpf.columns import MapColumns
    from hypermesh_ebpf.event_buffer import EventBuffer

HISTORY = 300
"""How many readings each program keeps."""

MOST_ENTRIES = 100_000
"""How many entries of one map a reading takes; more are counted in ``entries_left_out``."""

_numbers = itertools.count(1)


@dataclass(frozen=True, slots=True)
class EbpfHandle:
    """A loaded program set; good for the abstraction that gave it out, until it is unloaded."""

    number: int


@dataclass(frozen=True, slots=True)
class EbpfMetrics:
    """One reading of a program's maps.

    ``metric_type`` is "counter", "gauge" (a value fell since an earlier reading, or the caller
    said so at load) or "histogram" (every map is one).  ``values`` has every number of every map by
    name; None means that the kernel does not tell.  ``metadata`` has attach_type, hook,
    kernel_version, program_id and program_tag, and function, or category and name, where the attach
    point has them.
    """

    name: str
    metric_type: str
    values: Mapping[str, float | int | None]
    timestamp_ms: int
    metadata: Mapping[str, str | int]


@dataclass(frozen=True, slots=True)
class LoadedProgram:
    """What :meth:`EbpfAbstraction.list_programs` tells of one program.

    ``attached`` are its attach points as text; ``id`` and ``tag`` are the kernel's, None before the
    program is loaded (see load_ebpf_program).
    """

    handle: EbpfHandle
    set: str
    name: str
    id: int | None
    tag: str | None
    attached: tuple[str, ...]


@dataclass(eq=False, slots=True)
class _Loaded:
    """A handle's programs, and what was read of them."""

    programs: ProgramSet
    metric_type: str | None
    stats_fd: int | None = None
    buffers: list[EventBuffer] = field(default_factory=list)
    lock: Any = field(default_factory=threading.RLock)
    history: deque[EbpfMetrics] = field(default_factory=lambda: deque(maxlen=HISTORY))


def create_os_abstraction(*, report: Report | None = None) -> EbpfAbstraction:
    """The abstraction of this operating system.

    ``report`` is told ("progress" or "note", text).  Raises Unsupported anywhere but on Linux.
    """
    if sys.platform != "linux":
        raise Unsupported(
            "create the eBPF abstraction", f"{sys.platform} has no eBPF", "run it on Linux"
        )
    log.configure()
    return EbpfAbstraction(report or (lambda kind, text: None))


class EbpfAbstraction:
    """eBPF on Linux; made by :func:`create_os_abstraction`, closed as a context manager."""

    def __init__(self, report: Report) -> None:
        self._loader = Loader(report)
        self._lock = threading.RLock()
        self._loaded: dict[EbpfHandle, _Loaded] = {}
        self._unloaded: set[EbpfHandle] = set()

    def platform(self) -> str:
        """ "linux"."""
        return sys.platform

    def is_ebpf_supported(self) -> bool:
        """Whether a program can be loaded here, by this process: it is tried.

        ``hmebpf check-system`` says why not.
        """
        try:
            from hypermesh_ebpf.host import trials

            os.close(trials.load_program(trials.SOCKET_FILTER))
        except (OSError, HmebpfError):
            return False
        return True

    def load_ebpf_program(
        self,
        program: bytes | os.PathLike[str] | str | None = None,
        *,
        source: str | None = None,
        name: str | None = None,
        settings: Mapping[str, str] | None = None,
        flags: Sequence[str] = (),
        metric_type: str | None = None,
    ) -> EbpfHandle:
        """Load an ELF object or raw bytecode (bytes, or a path), or C (a path, or ``source``).

        Raw bytecode and C functions that do not say where they run get their type, and are loaded,
        at attach.  ``settings`` are values for an object's global variables, ``flags`` arguments
        for the C compiler.  Raises InvalidProgram, CompileError, VerifierError, LoadError,
        MissingPrivilege, Unsupported, UsageError.
        """
        if (program is None) == (source is None):
            raise UsageError(
                "load a program", "give either a program or C source", "load_ebpf_program(data)"
            )
        _require_texts(settings or {}, flags)
        if metric_type not in (None, "counter", "gauge", "histogram"):
            raise UsageError(
                f"metric type {metric_type!r}", "there is none", "use counter, gauge or histogram"
            )
        if source is not None:
            made = Source("c", name or "program.c", source.encode(errors="surrogateescape"))
        elif isinstance(program, (bytes, bytearray, memoryview)):
            made = Source.of(bytes(program), name or "program")
        else:
            made = Source.read(Path(program or ""))
        programs = self._loader.load(made, settings=settings or {}, flags=flags)
        handle = EbpfHandle(next(_numbers))
        with self._lock:
            self._loaded[handle] = _Loaded(programs, metric_type)
        return handle

    def attach_ebpf_monitor(
        self,
        handle: EbpfHandle,
        attach_type: EbpfAttachType | str | None = None,
        *,
        program: str | None = None,
        position: int | None = None,
    ) -> None:
        """Let a program of the handle run at an attach point.

        Without ``attach_type`` every program is attached where its source says.  ``program`` names
        one where several fit.  ``position`` is its place among our programs on the same interface
        (default: the last).  Raises InvalidHandle, AlreadyAttached, HookUnsupported,
        MissingPrivilege, InterfaceNotFound, InterfaceBusy, AttachError, VerifierError, UsageError.
        """
        if position is not None and position < 0:
            raise UsageError(f"attach at position {position}", "positions count from 0", "0")
        with self._using(handle, "attach") as loaded:
            wanted = self._wanted(loaded.programs, attach_type, program)
            if not loaded.programs.maps and loaded.stats_fd is None:
                loaded.stats_fd = switch_statistics_on()
            done: list[tuple[Program, Attached]] = []
            try:
                for each, point in wanted:
                    done.append((each, self._loader.attach(each, point, position=position)))
            except BaseException:  # all or none
                for each, attached in reversed(done):
                    self._loader.detach(each, attached)
                raise

    def detach_ebpf_monitor(self, handle: EbpfHandle, *, program: str | None = None) -> None:
        """Take the handle's programs (or one of them) off; they stay loaded.

        Raises InvalidHandle, NotAttached, DetachError.
        """
        with self._using(handle, "detach") as loaded:
            chosen = [loaded.programs.find(program)] if program else loaded.programs.programs
            attached = [each for each in chosen if each.attached]
            if not attached:
                raise _not_attached("detach", loaded.programs)
            for each in attached:
                self._loader.detach(each)

    def reorder_ebpf_monitors(
        self, attach_type: EbpfAttachType | str, handles: Sequence[EbpfHandle]
    ) -> None:
        """Run the programs of one interface in the order of these handles, in one step.

        Raises InvalidHandle, UsageError unless exactly the programs that run there are named.
        """
        point = _point(attach_type)
        sets = [self._get(handle, "reorder").programs for handle in handles]
        here = self._loader.members(point)
        order = [[each for each in here if each.owner is programs] for programs in sets]
        if not all(order):
            names = ", ".join(each.spec.name for each in here) or "none"
            raise UsageError(
                f"reorder the programs of {point}",
                "these are not the programs that run there",
                f"name the handles of: {names}",
            )
        self._loader.reorder(point, [each for group in order for each in group])

    def read_ebpf_metrics(self, handle: EbpfHandle) -> EbpfMetrics:
        """Every number of the handle's maps, now; ``probe_hits`` for a program without maps.

        Raises InvalidHandle, NotAttached, MapError.
        """
        with self._using(handle, "read") as loaded:
            places = [(each, list(each.attached)) for each in loaded.programs.programs]
            places = [(each, attached) for each, attached in places if attached]
            if not places:
                raise _not_attached("read", loaded.programs)
            values, left_out = self._read_values(loaded, [each for each, _attached in places])
            program, attached = places[0]
            metrics = EbpfMetrics(
                name=loaded.programs.name,
                metric_type=_metric_type(loaded, values),
                values=values,
                timestamp_ms=time.time_ns() // 1_000_000,
                metadata=_metadata(program, attached[0], left_out),
            )
            loaded.history.append(metrics)
            return metrics

    def read_ebpf_columns(self, handle: EbpfHandle, name: str) -> MapColumns:
        """All entries of one of the handle's maps, now, as numpy arrays.

        Raises InvalidHandle; UsageError where the handle has no map of that name; MapError, also
        for a map that has no entries to read: a ring buffer, a queue.
        """
        from hypermesh_ebpf.bpf.maps import TypedMap

        with self._using(handle, "read") as loaded:
            maps = {spec.name: (spec, fd) for spec, fd in loaded.programs.maps}
            if name not in maps:
                raise UsageError(
                    f"read map {name!r} of {loaded.programs.name}",
                    "it has no map of that name",
                    f"its maps: {', '.join(sorted(maps)) or 'none'}",
                )
            return TypedMap(*maps[name]).columns()

    def open_ebpf_events(self, handle: EbpfHandle, name: str | None = None) -> EventBuffer:
        """The handle's ring or perf buffer of that name, or its only one, to be read.

        It is closed with the handle at the latest.  Raises InvalidHandle, UsageError where there is
        no such buffer, MapError, MissingPrivilege.
        """
        from hypermesh_ebpf.event_buffer import EventBuffer, choose_buffer

        with self._using(handle, "open the events of") as loaded:
            buffer = EventBuffer(*choose_buffer(loaded.programs.maps, name, loaded.programs.name))
            loaded.buffers.append(buffer)
            return buffer

    def last_ebpf_metrics(self, handle: EbpfHandle) -> EbpfMetrics | None:
        """The last reading, without another one; None before the first.  Raises InvalidHandle."""
        with self._using(handle, "read") as loaded:
            return loaded.history[-1] if loaded.history else None

    def ebpf_metrics_history(self, handle: EbpfHandle) -> list[EbpfMetrics]:
        """The last readings, at most :data:`HISTORY`, oldest first.  Raises InvalidHandle."""
        with self._using(handle, "read") as loaded:
            return list(loaded.history)

    def unload_ebpf_program(self, handle: EbpfHandle) -> None:
        """Detach and free.  Does nothing for a handle that was unloaded already.

        Raises InvalidHandle for one that was never given out, DetachError.
        """
        with self._lock:
            if _is_hashable(handle) and handle in self._unloaded:
                return
        with self._using(handle, "unload") as loaded, ExitStack() as undo:
            with self._lock:
                del self._loaded[handle]
                self._unloaded.add(handle)
            if loaded.stats_fd is not None:
                undo.callback(os.close, loaded.stats_fd)
            undo.callback(self._loader.unload, loaded.programs)
            for buffer in loaded.buffers:
                undo.callback(buffer.close)

    def list_programs(self) -> list[LoadedProgram]:
        """All programs of all handles.  ``hmebpf list`` shows everybody's."""
        with self._lock:
            return [
                LoadedProgram(
                    handle,
                    loaded.programs.name,
                    each.spec.name,
                    each.id,
                    each.tag,
                    tuple(str(attached.point) for attached in each.attached),
                )
                for handle, loaded in self._loaded.items()
                for each in loaded.programs.programs
            ]

    def close(self) -> None:
        """Unload everything.  Raises DetachError."""
        with self._lock:
            loaded, self._loaded = self._loaded, {}
            self._unloaded |= set(loaded)
        # Not under our lock: the loader's holder may be waiting for it, in a report to the caller.
        with ExitStack() as undo:
            for each in loaded.values():
                if each.stats_fd is not None:
                    undo.callback(os.close, each.stats_fd)
            undo.callback(self._loader.close)
            for buffer in (buffer for each in loaded.values() for buffer in each.buffers):
                undo.callback(buffer.close)

    def __enter__(self) -> EbpfAbstraction:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @contextmanager
    def _using(self, handle: EbpfHandle, verb: str) -> Iterator[_Loaded]:
        """What belongs to a handle, for one thread at a time."""
        loaded = self._get(handle, verb)
        with loaded.lock:
            if self._get(handle, verb) is not loaded:  # unloaded while we waited
                raise _invalid(handle, verb)
            yield loaded

    def _get(self, handle: EbpfHandle, verb: str) -> _Loaded:
        with self._lock:
            try:
                return self._loaded[handle]
            except (KeyError, TypeError):
                raise _invalid(handle, verb) from None

    def _read_values(
        self, loaded: _Loaded, attached: Sequence[Program]
    ) -> tuple[dict[str, float | int | None], int | None]:
        """Every number, and how many entries were not read (None: an unknown number)."""
        from hypermesh_ebpf.bpf.maps import TypedMap, read_numbers

        programs = loaded.programs
        if programs.maps:
            numbers, left_out = read_numbers(
                [TypedMap(spec, fd) for spec, fd in programs.maps], MOST_ENTRIES
            )
            return {**numbers}, left_out
        if loaded.stats_fd is None or any(self._loader.is_composed(each) for each in attached):
            return {"probe_hits": None}, 0
        runs = [read_program_info(each.fd).run_count for each in attached if each.fd is not None]
        return {"probe_hits": sum(runs)}, 0

    def _wanted(
        self, programs: ProgramSet, attach_type: EbpfAttachType | str | None, name: str | None
    ) -> list[tuple[Program, EbpfAttachType]]:
        """Which programs are to be attached where."""
        if attach_type is not None:
            point = _point(attach_type)
            return [(programs.find(name) if name else programs.choose(point), point)]
        chosen = [programs.find(name)] if name else programs.programs
        return [(each, programs.default_point(each)) for each in chosen]


def _point(attach_type: EbpfAttachType | str) -> EbpfAttachType:
    if isinstance(attach_type, EbpfAttachType):
        return attach_type
    if not isinstance(attach_type, str):
        raise UsageError(
            f"attach to {attach_type!r}", "it is no attach point", 'EbpfAttachType.xdp("lo")'
        )
    return EbpfAttachType.parse(attach_type)


def _require_texts(settings: Mapping[str, str], flags: Sequence[str]) -> None:
    """Settings and flags cross a process boundary: texts, and several flags, not one."""
    given: list[object] = [value for pair in settings.items() for value in pair]
    wrong = [value for value in given if not isinstance(value, str)]
    if wrong:
        raise UsageError(f"set {wrong[0]!r}", "it is no text", 'settings={"variable": "42"}')
    if isinstance(flags, str):
        raise UsageError(f"flags {flags!r}", "it is one text", 'flags=["-DNAME=1"]')


def _is_hashable(handle: object) -> bool:
    return type(handle).__hash__ is not None


def _invalid(handle: object, verb: str) -> InvalidHandle:
    return InvalidHandle(
        f"{verb} {handle!r}",
        "no loaded program has this handle",
        "use the handle that load_ebpf_program gave, before it is unloaded",
    )


def _not_attached(verb: str, programs: ProgramSet) -> NotAttached:
    return NotAttached(
        f"{verb} {programs.name}", "it is attached nowhere", "call attach_ebpf_monitor first"
    )


def _metric_type(loaded: _Loaded, values: Mapping[str, Any]) -> str:
    """Told by the caller, else by the maps, else by what the values did so far."""
    if loaded.metric_type is not None:
        return loaded.metric_type
    maps = loaded.programs.maps
    if maps and all(spec.histogram for spec, _fd in maps):
        return "histogram"
    before = loaded.history[-1] if loaded.history else None
    if before is None:
        return "counter"
    fell = any(
        (was := before.values.get(name)) is not None and now is not None and now < was
        for name, now in values.items()
    )
    return "gauge" if fell else before.metric_type


def _metadata(program: Program, attached: Attached, left_out: int | None) -> dict[str, str | int]:
    point = attached.point
    known: dict[str, str | int] = {
        "attach_type": point.kind,
        "hook": attached.hook,
        "kernel_version": platform.release(),
        "program": program.spec.name,
        "program_id": program.id or 0,
        "program_tag": program.tag or "",
    }
    if left_out != 0:
        known["entries_left_out"] = "unknown" if left_out is None else left_out
    if point.kind == "tracepoint":
        category, _, name = point.target.partition(":")
        return {**known, "category": category, "name": name}
    if point.kind in ("kprobe", "kretprobe", "fentry", "fexit", "lsm", "uprobe", "uretprobe"):
        return {**known, "function": point.target.rpartition(":")[2]}
    if point.kind in ("xdp", "tc"):
        return {**known, "interface": point.target}
    return {**known, "name": point.target}
