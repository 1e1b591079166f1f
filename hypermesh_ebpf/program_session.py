"""Users' programs as a session: loaded, attached, read like a monitor; or pinned, to outlive us.

What :mod:`hypermesh_ebpf.run` needs of a session is here, with the maps' own tables and events.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hypermesh_ebpf.attach_type import EbpfAttachType
from hypermesh_ebpf.bpf.chain import NAME as CHAIN
from hypermesh_ebpf.bpf.info import read_run_statistics
from hypermesh_ebpf.bpf.programs import read_program_info
from hypermesh_ebpf.bpf.spec import MapSpec
from hypermesh_ebpf.bpf.statistics import switch_statistics_on
from hypermesh_ebpf.errors import UsageError
from hypermesh_ebpf.guard import Guard
from hypermesh_ebpf.loader import Loader
from hypermesh_ebpf.metrics.event_log import EventLog
from hypermesh_ebpf.metrics.sample import Loss, Row, Sample, Start
from hypermesh_ebpf.program_set import Program, ProgramSet, Source
from hypermesh_ebpf.program_view import make_view
from hypermesh_ebpf.watching import count_missed
from hypermesh_ebpf.worker import Report


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the user asked for: files, attach points (of a program, or of whichever fits), ..."""

    files: tuple[str, ...]
    attach: tuple[tuple[str | None, EbpfAttachType], ...] = ()
    settings: Mapping[str, str] = field(default_factory=dict)
    flags: tuple[str, ...] = ()
    name: str | None = None
    use_cache: bool = True
    events: bool = True

    @property
    def title(self) -> str:
        """What they are called on screen."""
        return self.name or " ".join(Path(file).name for file in self.files)


class ProgramSession:
    """Users' programs that run; made by :func:`open_programs`, closed as a context manager."""

    def __init__(
        self, loader: Loader, sets: Sequence[ProgramSet], title: str, *, events: bool = True
    ) -> None:
        self._loader = loader
        self.monitor, self._collector = make_view(_name_maps(sets), title, events=events)
        self.options: Mapping[str, Any] = {"events": bool(self._collector.rings)}
        self.rings = self._collector.rings
        attached = [each for programs in sets for each in programs.attached()]
        hooks = tuple(dict.fromkeys(each.hook for each in attached))
        targets = tuple(dict.fromkeys(_watched(each.point) for each in attached))
        self.target: str | list[str] = targets[0] if len(targets) == 1 else list(targets)
        self._attached_at = time.monotonic()
        self._statistics = -1
        if not any(programs.maps for programs in sets):
            self._statistics = switch_statistics_on() or -1
        self._programs = [p for programs in sets for p in programs.programs if p.attached]
        ids = tuple(program.id for program in self._programs if program.id is not None)
        self.start = Start(time.time(), title, self.target, hooks, None, ids)

    @property
    def guard(self) -> Guard | None:
        """The guard that detaches if this process dies; None where the kernel does so itself."""
        return self._loader.guard

    def events(self) -> EventLog:
        """What came in ring and perf buffers since the last call."""
        return self._collector.events()

    def read(self) -> Sample:
        """What is in the maps now.  Raises MapError, TargetGone."""
        self._loader.check_places()
        self._collector.drain()
        reading = self._collector.collect()
        missed = count_missed(
            [(p.attached[0].point.kind, p.fd) for p in self._programs if p.fd is not None]
        )
        return Sample(
            time=time.time(),
            monitor=self.monitor.name,
            target=self.target,
            elapsed_s=round(time.monotonic() - self._attached_at, 3),
            totals=self._count_runs() or reading.totals,
            rows=reading.rows,
            loss=Loss(reading.events_lost, reading.map_full, missed),
            histograms=reading.histograms,
            tables=reading.tables,
        )

    def _count_runs(self) -> Row:
        """What a program without maps has to show: the kernel's own count of its runs."""
        if self._statistics < 0:
            return {}
        alone = [p for p in self._programs if not self._loader.is_composed(p)]
        runs = [read_program_info(p.fd).run_count for p in alone if p.fd is not None]
        return {"probe_hits": sum(runs)} if len(runs) == len(self._programs) else {}

    def run_time_ns(self) -> int:
        """For how long its programs have run, all together; counted while statistics are on."""
        alone = [p.fd for p in self._programs if not self._loader.is_composed(p)]
        heads = [chain.head_fd for chain in self._loader.chains()]  # in whose time the others run
        return sum(read_run_statistics(fd)[1] for fd in [*alone, *heads] if fd is not None)

    def sample_one_in(self, number: int) -> bool:
        """False: programs of the user's are run as they are."""
        return False

    def close(self) -> None:
        """Detach, and free everything.  Raises DetachError."""
        with ExitStack() as undo:
            if self._statistics >= 0:
                undo.callback(os.close, self._statistics)
                self._statistics = -1
            undo.callback(self._loader.close)
            undo.callback(self._collector.close)

    def __enter__(self) -> ProgramSession:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def open_programs(wanted: Wanted, report: Report) -> ProgramSession:
    """Load and attach what is wanted.  Raises any HmebpfError; nothing is left then."""
    with ExitStack() as undo:
        loader = undo.enter_context(Loader(report))
        sets = _load_all(loader, wanted)
        for program, point in _plan(sets, wanted.attach):
            loader.attach(program, point)
        session = ProgramSession(loader, sets, wanted.title, events=wanted.events)
        undo.pop_all()
        return session


def pin(wanted: Wanted, report: Report) -> list[str]:
    """Load, attach by kernel links, pin everything; what to tell the user.

    Raises PinError, HookUnsupported where this kernel has no link for a hook, UsageError.
    """
    from hypermesh_ebpf.host import pins

    name = wanted.name or Path(wanted.files[0]).name.partition(".")[0]
    pins.require_directory(f"pin {pins.check_name(name)}")  # before anything is attached
    with Loader(report) as loader:
        sets = _load_all(loader, wanted)
        links: list[tuple[str, int]] = []
        hooks: list[str] = []
        for program, point in _plan(sets, wanted.attach):
            attached = loader.attach(program, point, pinnable=True)
            links += [(program.spec.name, fd) for fd in attached.descriptors]
            hooks.append(attached.hook)
        # One link holds a chain, and the programs that it goes on with are in its program array.
        links = list({fd: (name, fd) for name, fd in reversed(links)}.values())
        programs: dict[str, int] = {}
        for program in itertools.chain(*(each.programs for each in sets)):
            if program.fd is not None:
                number = sum(key.partition(".")[0] == program.spec.name for key in programs)
                programs[f"{program.spec.name}.{number + 1}" if number else program.spec.name] = (
                    program.fd
                )
        maps = {spec.name: fd for spec, fd in _name_maps(sets)}
        for number, chain in enumerate(loader.chains()):
            programs[f"{CHAIN}_{number}"] = chain.head_fd
            maps |= {f"{CHAIN}_{number}_{n}": fd for n, fd in enumerate(chain.descriptors[1:])}
        path = pins.pin_set(name, programs, maps, links)
    return [
        f"pinned {name} at {path}: {', '.join(hooks)}",
        f"read it with `hmebpf dump {name}`, end it with `hmebpf unload {name}`",
    ]


def _load_all(loader: Loader, wanted: Wanted) -> list[ProgramSet]:
    """Every file's maps and programs; attach points are handed on that name a program."""
    sources = [Source.read(Path(file)) for file in wanted.files]
    named = {name: point for name, point in wanted.attach if name is not None}
    return [
        loader.load(
            source,
            settings=wanted.settings,
            attach=named,
            points=[point for _name, point in wanted.attach],
            strict=len(sources) == 1,
            flags=wanted.flags,
            use_cache=wanted.use_cache,
        )
        for source in sources
    ]


def _plan(
    sets: Sequence[ProgramSet], wanted: Sequence[tuple[str | None, EbpfAttachType]]
) -> list[tuple[Program, EbpfAttachType]]:
    """Which program goes where: as the user says, the rest as their sources say.

    Raises UsageError for a point that no program fits, and where a program has no point.
    """
    plan: list[tuple[Program, EbpfAttachType]] = []
    for name, point in wanted:
        if name is not None:
            owners = [each for each in sets if name in (p.spec.name for p in each.programs)]
            plan += [(each.find(name), point) for each in owners or sets[:1]]
            continue
        fitting = [each for each in sets if each.fits(point)]
        plan += [(each.choose(point), point) for each in fitting or sets[:1]]
    told = {id(program) for program, _point in plan}
    for programs in sets:
        for program in programs.programs:
            if id(program) not in told and program.spec.name not in programs.tail_called:
                plan.append((program, programs.default_point(program)))
    if not plan:
        names = ", ".join(programs.name for programs in sets)
        raise UsageError(f"load {names}", "there is no program in it", "see its sections")
    return plan


def _watched(point: EbpfAttachType) -> str:
    """What a program sees: an interface, a cgroup, else the whole system."""
    return point.target if point.kind in ("xdp", "tc", "cgroup") else "system"


def _name_maps(sets: Sequence[ProgramSet]) -> list[tuple[MapSpec, int]]:
    """All maps; those of several files that share a name are told apart by the files'."""
    names = [spec.name for programs in sets for spec, _fd in programs.maps]
    files = [programs.name for programs in sets]
    found = []
    for number, programs in enumerate(sets):
        owner = programs.name
        if files.count(owner) > 1:  # one file given several times
            owner += f"#{files[: number + 1].count(owner)}"
        for spec, fd in programs.maps:
            shared = names.count(spec.name) > 1
            found.append((replace(spec, name=f"{owner}:{spec.name}") if shared else spec, fd))
    return found
