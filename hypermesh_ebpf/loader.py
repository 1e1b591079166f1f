"""Users' own programs: loaded from any source, attached, composed, taken off again.

    with Loader() as loader:
        programs = loader.load(Source.read(Path("count.o")))
        loader.attach(programs.find("count"), EbpfAttachType.xdp("lo"))

One worker process builds, loads and attaches for all of them and ends when it is idle; guards hold
what the kernel would not take off by itself.  Safe to use from several threads.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from hypermesh_ebpf import log
from hypermesh_ebpf.attach.hold import Hold
from hypermesh_ebpf.attach_type import EbpfAttachType
from hypermesh_ebpf.bpf.chain import Chain, Member, close_chain, load_chain
from hypermesh_ebpf.bpf.info import read_fdinfo
from hypermesh_ebpf.bpf.programs import (
    close_all,
    close_attachments,
    load_program,
    read_program_info,
)
from hypermesh_ebpf.errors import (
    AlreadyAttached,
    AttachError,
    HmebpfError,
    InvalidHandle,
    NotAttached,
    TargetGone,
    UsageError,
    WorkerError,
)
from hypermesh_ebpf.guards import Guards
from hypermesh_ebpf.host.mark import mark_process
from hypermesh_ebpf.program_set import (
    Attached,
    Program,
    ProgramSet,
    Source,
    is_made_for,
    tell_program,
    unpack_set,
)
from hypermesh_ebpf.watching import require_attached
from hypermesh_ebpf.worker import Answer, Report, Workers, network_namespace
from hypermesh_ebpf.worker import Hold as HoldCallback

if TYPE_CHECKING:
    from hypermesh_ebpf.guard import Guard

_SILENCE_SECONDS = 60.0  # libbpf can be made to loop by a hostile object
_COMPILE_SECONDS = 600.0  # clang in an emulated machine is slow


@dataclass(eq=False, slots=True)
class Composition:
    """The programs of one XDP or TC place, in their order, and what keeps them there.

    ``chain`` is what the kernel runs where there are several; ``held`` what the guard takes off.
    """

    members: list[Program]
    attached: Attached
    held: Hold | None
    chain: Chain | None = None

    def disown(self, programs: ProgramSet) -> None:
        """Know no more of the members of a set that is given back."""
        self.members = [member for member in self.members if member.owner is not programs]

    @property
    def head(self) -> int:
        """The program that the interface has."""
        if self.chain is not None:
            return self.chain.head_fd
        (member,) = self.members
        assert member.fd is not None
        return member.fd


def _refuse_to_hold(place: Mapping[str, Any], prog_fd: int) -> None:
    """For requests that attach nothing."""
    raise WorkerError("speak with the worker", "it attaches unasked", "report it")


class Loader:
    """Loads and attaches; a context manager that takes everything off again.

    ``report`` is told ("progress" or "note", text) while something is compiled or degrades.
    """

    def __init__(self, report: Report = lambda kind, text: None) -> None:
        self._report = report
        self._lock = threading.RLock()
        self._workers = Workers(report)
        self._mark = mark_process()
        self._owner = os.getpid()
        self._closed = False
        self._guards = Guards(report)
        self._namespaces: dict[int, int] = {}  # descriptors, by inode
        self._sets: list[ProgramSet] = []
        self._places: dict[tuple[str | int, ...], Composition] = {}

    @property
    def guard(self) -> Guard | None:
        """The guard, where something is attached that the kernel would not take off by itself."""
        return self._guards.first

    def load(
        self,
        source: Source,
        *,
        settings: Mapping[str, str] = {},
        attach: Mapping[str, EbpfAttachType] = {},
        points: Sequence[EbpfAttachType] = (),
        strict: bool = True,
        flags: Sequence[str] = (),
        use_cache: bool = True,
    ) -> ProgramSet:
        """Make the source's maps and load its programs.

        ``settings`` gives values for the object's global variables, ``attach`` attach points other
        than the source's own, by program name, ``points`` those of which this machine has to have
        the hooks (nothing is loaded else), ``flags`` arguments for the C compiler.  With ``strict``
        a name in ``attach`` that no program of an object has is an error.
        Raises CompileError, InvalidProgram, VerifierError, LoadError, Unsupported, UsageError,
        WorkerError.
        """
        self._require_ours("load")
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
            "points": [str(point) for point in points],
            "strict": strict,
            "flags": list(flags),
            "use_cache": use_cache,
        }
        silence = _COMPILE_SECONDS if source.form == "c" else _SILENCE_SECONDS
        with self._lock, _in_memory(source.data) as memory:
            answer, descriptors = self._ask(request, [memory], silence=silence)
            loaded = unpack_set(answer, descriptors)
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
            self._require_ours("attach")
            if program.owner not in self._sets:
                raise InvalidHandle(
                    f"attach {program.spec.name}", "it was unloaded", "load it once more"
                )
            place = _place(point)
            if (place or point) in [each.place or each.point for each in program.attached]:
                raise AlreadyAttached(
                    f"attach {program.spec.name} to {point}",
                    "it is attached there already",
                    "detach it first, or load the program once more",
                )
            if program.attached and not is_made_for(program, point):
                raise AlreadyAttached(
                    f"attach {program.spec.name} to {point}",
                    f"it is attached to {program.attached[0].point}, as another type of program",
                    "detach it first, or load the program once more",
                )
            here = self._places.get(place)
            if here is not None and self._is_gone(here):
                self._forget(here)
                here = None
            if here is None:
                attached = self._attach_first(program, point, pinnable)
                program.attached.append(attached)
                return attached
            _require_same_way(here.attached, point)
            members = list(here.members)
            members.insert(len(members) if position is None else max(position, 0), program)
            try:
                self._rebuild(here, members)
            finally:
                if program in here.members:
                    program.attached.append(here.attached)
            return here.attached

    def detach(self, program: Program, attached: Attached | None = None) -> None:
        """Take a program off, wherever it is attached or from one place.

        Raises NotAttached, DetachError, AttachError where another one's program is in the way.
        """
        with self._lock:
            self._require_ours("detach")
            if not program.attached:
                raise NotAttached(
                    f"detach {program.spec.name}", "it is attached nowhere", "attach it first"
                )
            for each in [attached] if attached is not None else program.attached[::-1]:
                self._detach_one(program, each)
                log.info("detached %s from %s", program.spec.name, each.hook)

    def _detach_one(self, program: Program, attached: Attached) -> None:
        here = self._places.get(attached.place)
        if here is None or len(here.members) == 1:
            self._detach_last(attached)
            program.attached.remove(attached)
            return
        try:
            self._rebuild(here, [each for each in here.members if each is not program])
        except (AttachError, TargetGone):
            if not self._is_gone(here):
                raise
            self._forget(here)  # somebody took it off, or the interface is gone
        finally:
            if program not in here.members and attached in program.attached:
                program.attached.remove(attached)

    def _is_gone(self, here: Composition) -> bool:
        """Whether what we attached there is certainly not there any more."""
        if here.held is None or here.attached.netns != network_namespace():
            return False
        return not _is_there(here.held)

    def _forget(self, here: Composition) -> None:
        """Give up a place from which somebody else took our programs."""
        self._places.pop(here.attached.place, None)
        for member in here.members:
            member.attached.remove(here.attached)
        here.members = []
        self._guards.remove(here.held, here.attached.netns)
        close_attachments(here.attached.descriptors)
        if here.chain is not None:
            close_chain(here.chain)

    def members(self, point: EbpfAttachType) -> list[Program]:
        """The programs that run at an XDP or TC place, in their order."""
        with self._lock:
            here = self._places.get(_place(point))
            return list(here.members) if here else []

    def is_composed(self, program: Program) -> bool:
        """Whether it runs together with others, so that the kernel counts its runs with theirs."""
        with self._lock:
            places = [self._places.get(each.place) for each in program.attached]
            return any(here is not None and len(here.members) > 1 for here in places)

    def chains(self) -> list[Chain]:
        """What the kernel runs at the places that have several programs."""
        with self._lock:
            return [here.chain for here in self._places.values() if here.chain is not None]

    def reorder(self, point: EbpfAttachType, programs: Sequence[Program]) -> None:
        """Run the programs of a place in another order, in one step.

        Raises UsageError unless they are exactly those that run there.
        """
        with self._lock:
            here = self._places.get(_place(point))
            members = here.members if here else []
            if here is None or sorted(map(id, members)) != sorted(map(id, programs)):
                names = ", ".join(program.spec.name for program in members) or "none"
                raise UsageError(
                    f"reorder the programs of {point}",
                    "these are not the programs that run there",
                    f"name each once: {names}",
                )
            self._rebuild(here, list(programs))

    def check_places(self) -> None:
        """Look whether what a guard holds is still attached, in this thread's network namespace.

        Raises TargetGone.
        """
        with self._lock:
            for here in self._places.values():
                if here.held is not None and here.attached.netns == network_namespace():
                    require_attached(here.held)

    def unload(self, programs: ProgramSet) -> None:
        """Detach what is attached and give everything back.  Does nothing the second time."""
        with self._lock:
            if programs not in self._sets:
                return
            self._sets.remove(programs)
            with ExitStack() as undo:
                undo.callback(close_all, programs.descriptors())
                for here in self._places.values():  # whatever a failed detach leaves behind
                    undo.callback(here.disown, programs)
                for program in programs.programs:
                    if program.attached and os.getpid() == self._owner:
                        undo.callback(self.detach, program)

    def close(self) -> None:
        """Take everything off, and end worker and guards.  Raises DetachError."""
        with self._lock, ExitStack() as undo:
            self._closed = True
            sets, self._sets = self._sets, []
            for programs in sets:
                undo.callback(close_all, programs.descriptors())
            if self._mark >= 0:
                undo.callback(os.close, self._mark)
                self._mark = -1
            undo.callback(close_all, list(self._namespaces.values()))
            self._namespaces.clear()
            for here in self._places.values():
                if here.chain is not None:
                    undo.callback(close_chain, here.chain)
            self._places.clear()
            undo.callback(self._guards.close)
            attached = {id(each): each for each in itertools.chain(*(p.attached() for p in sets))}
            for each in attached.values():
                undo.callback(log.info, "detached from %s", each.hook)
            undo.callback(
                close_attachments, [fd for each in attached.values() for fd in each.descriptors]
            )
            undo.callback(self._workers.close)

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _require_ours(self, verb: str) -> None:
        """Raise UsageError in a forked child, which must not touch its parent's attachments, and
        after close()."""
        if os.getpid() != self._owner:
            raise UsageError(
                f"{verb} in a forked process",
                "what is loaded belongs to the process that loaded it",
                "make another with create_os_abstraction() in the child",
            )
        if self._closed:
            raise UsageError(verb, "it is closed", "make another with create_os_abstraction()")

    def _ask(
        self,
        request: Mapping[str, Any],
        descriptors: Sequence[int],
        *,
        hold: HoldCallback = _refuse_to_hold,
        silence: float = _SILENCE_SECONDS,
        netns: int | None = None,
    ) -> Answer:
        """The worker's answer; ``netns`` is where the attachment is that it is about."""
        with self._lock:
            place = (netns, self._namespaces[netns]) if netns is not None else None
            return self._workers.ask(request, descriptors, hold, silence=silence, netns=place)

    def _attach_first(self, program: Program, point: EbpfAttachType, pinnable: bool) -> Attached:
        """Attach where none of ours is yet."""
        told, descriptors = tell_program(program)
        request = {"do": "attach", "point": str(point), "pinnable": pinnable, "program": told}
        netns = network_namespace()
        if _place(point) and netns not in self._namespaces:
            self._namespaces[netns] = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        held: Hold | None = None

        def hold(data: Mapping[str, Any], prog_fd: int) -> None:
            nonlocal held
            wanted = Hold.from_dict(data, prog_fd)
            self._guards.hold(wanted, netns)
            held = wanted

        try:
            answer, (fd, *attachments) = self._ask(request, descriptors, hold=hold)
        except BaseException:
            self._guards.remove(held, netns)
            raise
        program.adopt(answer, fd, point)
        place = _place(point)
        attached = Attached(point, answer["hook"], tuple(attachments), place, netns)
        if place:
            self._places[place] = Composition([program], attached, held)
        return attached

    def _rebuild(self, here: Composition, members: list[Program]) -> None:
        """Put these members in the place of those that run, in one step."""
        point = here.attached.point
        for member in members:
            self._load_now(member, point)
        chain = None
        if len(members) > 1:
            chain = load_chain([_member(program) for program in members], point.kind)
            if chain.note:
                self._report("note", f"{point}: chained by tail calls ({chain.note})")
        old_head, old_held = here.head, here.held
        new = Composition(members, here.attached, None, chain)
        netns = here.attached.netns
        try:
            if old_held is not None:  # held before it is there: no unguarded moment
                prog_id = read_program_info(new.head).id
                hold = dataclasses.replace(old_held, prog_id=prog_id, prog_fd=new.head)
                self._guards.hold(hold, netns)
                new.held = hold
            request = {
                "do": "swap",
                "point": str(point),
                "hold": asdict(old_held) if old_held else None,
            }
            self._ask(request, [old_head, new.head, *here.attached.descriptors], netns=netns)
        except BaseException as error:
            # Only a refusal proves that nothing changed: a worker that died may have swapped.
            refused = isinstance(error, HmebpfError) and not isinstance(error, WorkerError)
            if refused or not self._runs(new):
                self._guards.drop(new.held if refused else None, netns)  # in doubt both are held
                if chain is not None:
                    close_chain(chain)
                raise
            self._take_over(here, new)
            if not isinstance(error, WorkerError):
                raise
            return
        self._take_over(here, new)

    def _take_over(self, here: Composition, new: Composition) -> None:
        """The new programs run: what the old ones needed can go."""
        old_held, old_chain = here.held, here.chain
        here.members, here.held, here.chain = new.members, new.held, new.chain
        self._guards.drop(old_held, here.attached.netns)
        if old_chain is not None:
            close_chain(old_chain)

    def _runs(self, new: Composition) -> bool:
        """Whether the kernel runs these programs at their place, as far as it can be asked."""
        if new.held is not None:
            return new.attached.netns == network_namespace() and _is_there(new.held)
        prog_id = str(read_program_info(new.head).id)
        return all(read_fdinfo(fd).get("prog_id") == prog_id for fd in new.attached.descriptors)

    def _load_now(self, program: Program, point: EbpfAttachType) -> None:
        """A member of a chain has its type by now."""
        if program.fd is None or not is_made_for(program, point):
            maps = [fd for _spec, fd in program.owner.maps]
            fd = load_program(program.spec, point.kind, program.owner.license, maps)
            info = read_program_info(fd)
            program.adopt({"id": info.id, "tag": info.tag}, fd, point)

    def _detach_last(self, attached: Attached) -> None:
        """Take the only program off a place."""
        here = self._places.get(attached.place)
        self._guards.remove(here.held if here else None, attached.netns)
        self._places.pop(attached.place, None)
        close_attachments(attached.descriptors)


@contextmanager
def _in_memory(data: bytes) -> Iterator[int]:
    """A memory file with these bytes.  Raises WorkerError where none can be had."""
    try:
        memory = os.memfd_create("source")
    except OSError as error:
        raise WorkerError(
            "hand a program over", str(error), "allow more open files: `ulimit -n 4096`"
        ) from error
    try:
        with open(memory, "wb", closefd=False) as file:
            file.write(data)
        yield memory
    finally:
        os.close(memory)


def _require_same_way(there: Attached, point: EbpfAttachType) -> None:
    """Programs of one place are attached in one way.  Raises UsageError for another one."""
    for name, value in point.given:
        same = there.hook == f"xdp:{value}" if name == "mode" else there.point.option(name) == value
        if name in ("link", "mode") and not same:
            raise UsageError(
                f"attach to {point}",
                f"our programs are there by {there.point} ({there.hook}), and this one joins them",
                f"give it as {there.point}",
            )


def _is_there(hold: Hold | None) -> bool:
    """Whether a program is attached where it is held to be."""
    if hold is None:
        return False
    try:
        require_attached(hold)
    except TargetGone:
        return False
    return True


def _place(point: EbpfAttachType) -> tuple[str | int, ...]:
    """What tells places at which programs compose; of no account for other kinds."""
    if point.kind == "xdp":
        return ("xdp", point.target, network_namespace())
    if point.kind == "tc":
        direction, priority = point.option("direction"), point.option("priority")
        return ("tc", point.target, direction, priority or 0, network_namespace())
    return ()


def _member(program: Program) -> Member:
    maps = [fd for _spec, fd in program.owner.maps]
    return Member(program.spec, maps, program.owner.license, program.fd)
