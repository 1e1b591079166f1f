"""Users' own programs: loaded from any source, attached, composed, taken off again.

    with Loader() as loader:
        programs = loader.load(Source.read(Path("count.o")))
        loader.attach(programs.find("count"), EbpfAttachType.xdp("lo"))

One worker process builds, loads and attaches for all of them and ends when it is idle; one guard
holds what the kernel would not take off by itself.  Safe to use from several threads.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from hypermesh_ebpf import log
from hypermesh_ebpf.attach_type import EbpfAttachType
from hypermesh_ebpf.bpf.spec import MapSpec, ProgramSpec
from hypermesh_ebpf.errors import (
    AlreadyAttached,
    HmebpfError,
    NotAttached,
    UsageError,
    WorkerError,
)
from hypermesh_ebpf.worker import Answer, Report, Worker, WorkerLeft

_SILENCE_SECONDS = 60.0  # libbpf can be made to loop by a hostile object
_COMPILE_SECONDS = 600.0  # clang in an emulated machine is slow


@dataclass(frozen=True, slots=True)
class Source:
    """What a program is made of: the bytes of an ELF object, of raw bytecode, or a C text."""

    form: str
    name: str
    data: bytes
    path: Path | None = None

    @classmethod
    def read(cls, path: Path) -> Source:
        """The file's: C by its suffix, ELF by its first bytes, bytecode else.

        Raises UsageError for a file that cannot be read, InvalidProgram for what is no program.
        """
        try:
            data = path.read_bytes()
        except OSError as error:
            raise UsageError(f"read {path}", error.strerror, f"look: `ls -l {path}`") from error
        if path.suffix in (".c", ".h"):
            return cls("c", path.name, data, path.absolute())
        return cls.of(data, path.name)

    @classmethod
    def of(cls, data: bytes, name: str = "program") -> Source:
        """Of an object or of bytecode in memory, looked at before the kernel sees it.

        Raises InvalidProgram.
        """
        from hypermesh_ebpf.image import bytecode, elf

        if elf.is_elf(data):
            elf.check_object(data)
            return cls("elf", name, data)
        bytecode.check_bytecode(data)
        return cls("bytecode", name, data)


@dataclass(eq=False, slots=True)
class Program:
    """A program of a set.

    ``fd``, ``id`` and ``tag`` are None before it is loaded, which is at the attach where only that
    tells its type.
    """

    spec: ProgramSpec
    owner: ProgramSet
    fd: int | None = None
    id: int | None = None
    tag: str | None = None
    attached: Attached | None = None


@dataclass(eq=False, slots=True)
class Attached:
    """Where a program runs: the point asked for, and the hook that it got ("xdp:generic")."""

    point: EbpfAttachType
    hook: str
    descriptors: tuple[int, ...]


@dataclass(eq=False, slots=True)
class ProgramSet:
    """Maps and programs of one source, in the kernel by descriptor."""

    name: str
    license: str
    maps: tuple[tuple[MapSpec, int], ...]
    programs: list[Program] = field(default_factory=list)

    def find(self, name: str) -> Program:
        """The program of that name.  Raises UsageError, naming those that there are."""
        for program in self.programs:
            if program.spec.name == name:
                return program
        known = ", ".join(program.spec.name for program in self.programs) or "none"
        raise UsageError(f"program {name!r} of {self.name}", "there is none", f"known: {known}")

    def choose(self, point: EbpfAttachType) -> Program:
        """The program that is meant for an attach point.

        The one whose source names this very point, else the only one of this kind that is not
        attached yet.  Raises UsageError where none or several fit, AlreadyAttached.
        """
        exact = [p for p in self.programs if p.spec.attach == str(point)]
        fitting = exact or [p for p in self.programs if _fits(p.spec, point)]
        what = f"attach {self.name} to {point}"
        if not fitting:
            kinds = ", ".join(f"{p.spec.name} ({p.spec.kind})" for p in self.programs) or "none"
            raise UsageError(what, f"it has no {point.kind} program", f"it has: {kinds}")
        free = [program for program in fitting if program.attached is None]
        if not free:
            taken = fitting[0].attached
            raise AlreadyAttached(
                what,
                f"program {fitting[0].spec.name} is attached to {taken.point if taken else point}",
                "detach it first, or load the program once more",
            )
        if len(free) > 1:
            names = ", ".join(program.spec.name for program in free)
            raise UsageError(what, f"several programs fit: {names}", "name one of them")
        return free[0]


_PROBES = ("kprobe", "kretprobe", "uprobe", "uretprobe", "usdt")


def _fits(spec: ProgramSpec, point: EbpfAttachType) -> bool:
    """Whether a program can be attached there: kprobes and uprobes share one program type."""
    if spec.kind is None or spec.kind == point.kind:
        return True
    return spec.kind in _PROBES and point.kind in _PROBES


class Loader:
    """Loads and attaches; a context manager that takes everything off again.

    ``report`` is told ("progress" or "note", text) while something is compiled or degrades.
    """

    def __init__(self, report: Report = lambda kind, text: None) -> None:
        self._report = report
        self._lock = threading.RLock()
        self._worker: Worker | None = None
        self._guard: Any = None
        self._sets: list[ProgramSet] = []
        self._chains: dict[tuple[str, ...], Chain] = {}

    @property
    def guard(self) -> Any | None:
        """The guard, where something is attached that the kernel would not take off by itself."""
        return self._guard

    def load(
        self,
        source: Source,
        *,
        settings: Mapping[str, str] = {},
        attach: Mapping[str, EbpfAttachType] = {},
        flags: Sequence[str] = (),
        use_cache: bool = True,
    ) -> ProgramSet:
        """Make the source's maps and load its programs.

        ``settings`` gives values for the object's global variables, ``attach`` attach points other
        than the source's own, by program name, ``flags`` arguments for the C compiler.
        Raises CompileError, InvalidProgram, VerifierError, LoadError, Unsupported, UsageError,
        WorkerError.
        """
        if source.form != "elf" and source.form != "c" and settings:
            name = next(iter(settings))
            raise UsageError(
                f"set {name}", "bytecode has no global variables", "give an ELF object or C"
            )
        request = {
            "do": "load",
            "form": source.form,
            "name": source.name,
            "path": str(source.path) if source.path else None,
            "settings": dict(settings),
            "attach": {name: str(point) for name, point in attach.items()},
            "flags": list(flags),
            "use_cache": use_cache,
        }
        memory = os.memfd_create("source")
        try:
            with open(memory, "wb", closefd=False) as file:
                file.write(source.data)
            silence = _COMPILE_SECONDS if source.form == "c" else _SILENCE_SECONDS
            answer, descriptors = self._ask(request, [memory], silence)
        finally:
            os.close(memory)
        loaded = _unpack(answer, descriptors)
        with self._lock:
            self._sets.append(loaded)
        return loaded

    def attach(
        self,
        program: Program,
        point: EbpfAttachType,
        *,
        position: int | None = None,
        pinnable: bool = False,
    ) -> Attached:
        """Let a program run at an attach point, from now until it is detached.

        Several programs of ours at one XDP or TC place run one after another: ``position`` is this
        one's among them (default: the last).  ``pinnable`` asks for an attachment that a pin can
        keep.  Raises AlreadyAttached, HookUnsupported, MissingPrivilege, InterfaceBusy,
        AttachError, VerifierError.
        """
        with self._lock:
            if program.attached is not None:
                raise AlreadyAttached(
                    f"attach {program.spec.name} to {point}",
                    f"it is attached to {program.attached.point}",
                    "detach it first, or load the program once more",
                )
            chain = self._chains.get(_place(point))
            if chain is not None:
                members = list(chain.members)
                members.insert(len(members) if position is None else position, program)
                self._rebuild(chain, members)
            else:
                self._attach_first(program, point, pinnable)
            assert program.attached is not None
            log.info("attached %s to %s", program.spec.name, program.attached.hook)
            return program.attached

    def detach(self, program: Program) -> None:
        """Take a program off.  Raises NotAttached, DetachError."""
        with self._lock:
            if program.attached is None:
                raise NotAttached(f"detach {program.spec.name}", "it is attached nowhere")
            point = program.attached.point
            chain = self._chains.get(_place(point))
            if chain is not None and len(chain.members) > 1:
                self._rebuild(chain, [member for member in chain.members if member is not program])
            else:
                self._detach_last(program, chain)
            program.attached = None
            log.info("detached %s from %s", program.spec.name, point)

    def members(self, point: EbpfAttachType) -> list[Program]:
        """The programs that run at an XDP or TC place, in their order."""
        with self._lock:
            chain = self._chains.get(_place(point))
            return list(chain.members) if chain else []

    def reorder(self, point: EbpfAttachType, programs: Sequence[Program]) -> None:
        """Run the programs of a place in another order, in one step.

        Raises UsageError unless they are exactly those that run there.
        """
        with self._lock:
            chain = self._chains.get(_place(point))
            members = chain.members if chain else []
            if set(members) != set(programs) or len(members) != len(programs) or not chain:
                names = ", ".join(program.spec.name for program in members) or "none"
                raise UsageError(
                    f"reorder the programs of {point}",
                    "these are not the programs that run there",
                    f"name each once: {names}",
                )
            self._rebuild(chain, list(programs))

    def unload(self, programs: ProgramSet) -> None:
        """Detach what is attached and give everything back.  Does nothing the second time."""
        with self._lock:
            if programs not in self._sets:
                return
            self._sets.remove(programs)
            with ExitStack() as undo:
                for _spec, fd in programs.maps:
                    undo.callback(os.close, fd)
                for program in programs.programs:
                    if program.fd is not None:
                        undo.callback(os.close, program.fd)
                for program in programs.programs:
                    if program.attached is not None:
                        undo.callback(self.detach, program)

    def close(self) -> None:
        """Take everything off, and end worker and guard.  Raises DetachError."""
        with self._lock, ExitStack() as undo:
            if self._worker is not None:
                undo.callback(self._worker.close)
                self._worker = None
            if self._guard is not None:
                undo.push(self._guard)
            for programs in self._sets:
                undo.callback(self.unload, programs)

    def __enter__(self) -> Loader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _ask(
        self, request: dict[str, Any], descriptors: Sequence[int], silence: float = _SILENCE_SECONDS
    ) -> Answer:
        """The worker's answer; a worker that had ended by itself is replaced."""
        with self._lock:
            while True:
                worker = self._worker or Worker()
                self._worker = None  # until it has answered: whoever failed is not asked again
                try:
                    worker.ask({**request, "log": log.level()}, descriptors)
                    answer = worker.result(self._hold, self._report, silence)
                except WorkerLeft:
                    worker.close()
                    continue
                except HmebpfError as error:
                    if isinstance(error, WorkerError):
                        worker.close()
                    else:
                        self._worker = worker
                    raise
                except BaseException:
                    worker.close()
                    raise
                self._worker = worker
                return answer

    def _attach_first(self, program: Program, point: EbpfAttachType, pinnable: bool) -> None:
        """Attach where none of ours is yet."""
        if point.kind in ("xdp", "tc") and not point.option("link"):
            self._start_guard()
        told, descriptors = _tell(program)
        request = {
            "do": "attach",
            "point": str(point),
            "pinnable": pinnable,
            "program": told,
        }
        answer, (fd, *attachments) = self._ask(request, descriptors)
        program.adopt(answer, fd)
        program.attached = Attached(point, answer["hook"], tuple(attachments))
        place = _place(point)
        if place:
            self._chains[place] = Chain([program], program.attached, answer["hold"])

    def _start_guard(self) -> None:
        if self._guard is None:
            from hypermesh_ebpf import ledger
            from hypermesh_ebpf.guard import Guard

            self._guard = Guard.start()
            for line in ledger.sweep():
                self._report("note", line)


def _tell(program: Program) -> tuple[dict[str, Any], list[int]]:
    """A program for a message, and the descriptors that go with it."""
    maps = [fd for _spec, fd in program.owner.maps]
    told = {
        "spec": pack_program(program.spec),
        "license": program.owner.license,
        "fd": program.fd is not None,
        "maps": len(maps),
    }
    return told, [program.fd, *maps] if program.fd is not None else maps


def _unpack(answer: Mapping[str, Any], descriptors: Sequence[int]) -> ProgramSet:
    """The answer to a load; descriptors come in the order in which it names their owners."""
    following = iter(descriptors)
    maps = tuple((MapSpec(**spec), next(following)) for spec in answer["maps"])
    made = ProgramSet(answer["name"], answer["license"], maps)
    for told in answer["programs"]:
        fd = next(following) if told["loaded"] else None
        spec = unpack_program(told["spec"])
        made.programs.append(Program(spec, made, fd, told["id"], told["tag"]))
    return made
