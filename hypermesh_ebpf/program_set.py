"""Users' own programs as values: where they come from, what became of them in the kernel."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hypermesh_ebpf.attach_type import EbpfAttachType
from hypermesh_ebpf.bpf.programs import program_type
from hypermesh_ebpf.bpf.spec import MapSpec, ProgramSpec, pack_program, unpack_program
from hypermesh_ebpf.errors import InvalidProgram, UsageError


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
        except (OSError, ValueError) as error:  # a NUL in the path
            cause = error.strerror if isinstance(error, OSError) else str(error)
            raise UsageError(f"read {path}", cause, f"look: `ls -l {path}`") from error
        if path.suffix in (".c", ".h"):
            return cls("c", path.name, data, path.absolute())
        return cls.of(data, path.name)

    @classmethod
    def of(cls, data: bytes, name: str = "program") -> Source:
        """Of an object or of bytecode in memory, looked at before the kernel sees it.

        Raises InvalidProgram.
        """
        from hypermesh_ebpf.image import bytecode, elf

        try:
            if elf.is_elf(data):
                elf.check_object(data)
                return cls("elf", name, data)
            bytecode.check_bytecode(data)
        except InvalidProgram as error:
            error.what = f"load {name}"
            raise
        return cls("bytecode", name, data)


@dataclass(eq=False, slots=True)
class Program:
    """A program of a set.

    ``fd``, ``id`` and ``tag`` are None before it is loaded, which is at the attach where only that
    tells its type; ``made_for`` is the place it was loaded for then.
    """

    spec: ProgramSpec
    owner: ProgramSet
    fd: int | None = None
    id: int | None = None
    tag: str | None = None
    attached: list[Attached] = field(default_factory=list)
    made_for: EbpfAttachType | None = None

    def adopt(self, told: Mapping[str, Any], fd: int, point: EbpfAttachType) -> None:
        """Take what the kernel has: the same program, or one loaded for another kind of place."""
        if told["id"] == self.id or self.attached:
            os.close(fd)
            return
        if self.fd is not None:
            os.close(self.fd)
        self.fd, self.id, self.tag, self.made_for = fd, told["id"], told["tag"], point


@dataclass(eq=False, slots=True)
class Attached:
    """Where a program runs: the point asked for, and the hook that it got ("xdp:generic").

    ``place`` tells the places at which programs compose from one another, () elsewhere; ``netns``
    is the network namespace's inode.
    """

    point: EbpfAttachType
    hook: str
    descriptors: tuple[int, ...]
    place: tuple[str | int, ...] = ()
    netns: int = 0


@dataclass(eq=False, slots=True)
class ProgramSet:
    """Maps and programs of one source, in the kernel by descriptor.

    ``tail_called`` are the programs that stand in a program array: they need no hook of their own.
    """

    name: str
    license: str
    maps: tuple[tuple[MapSpec, int], ...]
    programs: list[Program] = field(default_factory=list)
    tail_called: tuple[str, ...] = ()

    def descriptors(self) -> list[int]:
        """Those of its programs and maps."""
        programs = [program.fd for program in self.programs if program.fd is not None]
        return [*programs, *(fd for _spec, fd in self.maps)]

    def attached(self) -> list[Attached]:
        """All its programs' attachments."""
        return [each for program in self.programs for each in program.attached]

    def find(self, name: str) -> Program:
        """The program of that name.  Raises UsageError, naming those that there are."""
        for program in self.programs:
            if program.spec.name == name:
                return program
        known = ", ".join(program.spec.name for program in self.programs) or "none"
        raise UsageError(f"program {name!r} of {self.name}", "there is none", f"known: {known}")

    def fits(self, point: EbpfAttachType) -> bool:
        """Whether one of the programs can be attached there."""
        return any(_fits(program.spec, point) for program in self.programs)

    def choose(self, point: EbpfAttachType) -> Program:
        """The program that is meant for an attach point.

        The one whose source names this very point, else the only one of this kind, or the only
        one of them that runs nowhere yet.  Raises UsageError where none or several fit.
        """
        exact = [p for p in self.programs if _names(p.spec.attach, point)]
        fitting = exact or [p for p in self.programs if _fits(p.spec, point)]
        what = f"attach {self.name} to {point}"
        if not fitting:
            kinds = ", ".join(f"{p.spec.name} ({p.spec.kind})" for p in self.programs) or "none"
            raise UsageError(what, f"it has no {point.kind} program", f"it has: {kinds}")
        free = [program for program in fitting if not program.attached]
        if len(fitting) == 1 or len(free) == 1:
            return (free or fitting)[0]
        names = ", ".join(program.spec.name for program in fitting)
        raise UsageError(what, f"several programs fit: {names}", "name one of them")

    def default_point(self, program: Program) -> EbpfAttachType:
        """Where the program's source says that it runs.  Raises UsageError if it does not."""
        if program.spec.attach is None or not _is_whole(program.spec.attach):
            kind = program.spec.kind
            example = EbpfAttachType.example(kind) if kind else "kprobe:FUNCTION"
            raise UsageError(
                f"attach program {program.spec.name} of {self.name}",
                "its source does not say where",
                f"name an attach point: `--attach {program.spec.name}={example}`",
            )
        return EbpfAttachType.parse(program.spec.attach)


def _is_whole(attach: str) -> bool:
    """Whether an attach point has a target: a source's may not ("tc:,direction=egress")."""
    return not attach.partition(":")[2].startswith(",")


def _names(attach: str | None, point: EbpfAttachType) -> bool:
    """Whether this is the attach point that the source means, as far as it says."""
    if attach is None or _is_whole(attach):
        return attach == str(point)
    kind, _, options = attach.partition(":")
    return EbpfAttachType.parse(f"{kind}:{point.target}{options}") == point


# Kinds that share a program type, or, as C for BCC, the type of their argument.
_ALIKE = (
    {"kprobe", "kretprobe", "uprobe", "uretprobe", "usdt"},
    {"tc", "cgroup"},
)


def _fits(spec: ProgramSpec, point: EbpfAttachType) -> bool:
    """Whether a program may be attached there; the kernel has the last word."""
    if spec.kind is None or spec.kind == point.kind:
        return True
    return any({spec.kind, point.kind} <= kinds for kinds in _ALIKE)


def parse_partly(attach: str | None) -> EbpfAttachType | None:
    """The attach point of a source; where it names no target, one of that type of program."""
    if attach is None or _is_whole(attach):
        return EbpfAttachType.parse(attach) if attach else None
    kind, _, options = attach.partition(":")
    return EbpfAttachType.parse(f"{kind}:any{options}")


def is_made_for(program: Program, point: EbpfAttachType) -> bool:
    """Whether the loaded program is of the type that the place wants."""
    own = program.made_for or parse_partly(program.spec.attach) or program.spec.kind
    return own is not None and program_type(own) == program_type(point)


def tell_program(program: Program) -> tuple[dict[str, Any], list[int]]:
    """A program for a message, and the descriptors that go with it."""
    maps = [fd for _spec, fd in program.owner.maps]
    told = {
        "spec": pack_program(program.spec),
        "license": program.owner.license,
        "fd": program.fd is not None,
        "made_for": str(program.made_for) if program.made_for else program.spec.attach,
        "maps": len(maps),
    }
    return told, [program.fd, *maps] if program.fd is not None else maps


def unpack_set(answer: Mapping[str, Any], descriptors: Sequence[int]) -> ProgramSet:
    """The answer to a load; descriptors come in the order in which it names their owners."""
    following = iter(descriptors)
    maps = tuple((MapSpec(**spec), next(following)) for spec in answer["maps"])
    made = ProgramSet(answer["name"], answer["license"], maps)
    made.tail_called = tuple(answer["tail_called"])
    for told in answer["programs"]:
        fd = next(following) if told["loaded"] else None
        spec = unpack_program(told["spec"])
        made.programs.append(Program(spec, made, fd, told["id"], told["tag"]))
    return made
