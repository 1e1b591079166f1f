"""ELF objects: opened, relocated (CO-RE) and loaded by libbpf, handed on by descriptor.

libbpf resolves sections, BPF-to-BPF calls, externs and global data, makes the maps and loads the
programs.  What comes out is what every other source gives: maps with typed keys and values, and
programs with the instructions that the kernel was given, from which a chain can be built.

Runs in the worker process only: libbpf crashes on some damaged objects.
"""

from __future__ import annotations

import ctypes as ct
import fcntl
import os
import resource
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from hypermesh_ebpf.attach_type import EbpfAttachType
from hypermesh_ebpf.bpf.btf import Btf
from hypermesh_ebpf.bpf.libbpf import check, libbpf
from hypermesh_ebpf.bpf.programs import program_type, read_program_info
from hypermesh_ebpf.bpf.spec import MapSpec, ProgramSpec
from hypermesh_ebpf.errors import (
    LoadError,
    MalformedObject,
    MissingBtf,
    UsageError,
    describe_errno,
)
from hypermesh_ebpf.image import elf_errors, sections
from hypermesh_ebpf.image.bytecode import map_references
from hypermesh_ebpf.image.elf_file import check_object, is_elf, read_sections
from hypermesh_ebpf.image.elf_maps import ObjectMaps, read_program_arrays
from hypermesh_ebpf.image.image import LoadedSource

__all__ = ["SECONDS", "check_object", "is_elf", "load_object"]

_INSTRUCTION = 8
_ADDRESS_SPACE = 8 << 30

SECONDS = 300
"""CPU time that loading one object may take; a large one in an emulated machine needs a minute."""


class _OpenOpts(ct.Structure):
    """struct bpf_object_open_opts of libbpf 1.0."""

    _fields_ = [
        ("sz", ct.c_size_t),
        ("object_name", ct.c_char_p),
        ("relaxed_maps", ct.c_bool),
        ("pin_root_path", ct.c_char_p),
        ("removed", ct.c_uint32),
        ("kconfig", ct.c_char_p),
        ("btf_custom_path", ct.c_char_p),
    ]


def load_object(
    data: bytes,
    name: str,
    settings: Mapping[str, str],
    attach: Mapping[str, EbpfAttachType],
    maps: Mapping[str, int] | None = None,
    *,
    strict: bool = True,
) -> LoadedSource:
    """Load an object's maps and programs; the descriptors are the caller's.

    ``settings`` are global variables and their values as text (:mod:`.settings`), ``attach`` the
    attach points of programs by name, where they are known: they decide what the section's name
    leaves open and the target of fentry, fexit and LSM programs.  With ``strict`` a name that no
    program has is an error.  ``maps`` are descriptors to take for maps of these names instead of
    making new ones.

    A program whose section's name says nothing is left out, with a note, unless ``attach`` tells
    its hook.  A map whose source pins it by name is taken from there, or made and pinned there.

    Raises MalformedObject, ForeignObject, UsageError (a setting, an attach point), VerifierError,
    MissingBtf, HookUnsupported, Unsupported, MissingPrivilege, PinError, LoadError.
    """
    license_ = _read_license(data)
    with _limited_resources(), elf_errors.listen() as said, _open(data, name, said) as handle:
        try:
            lib = libbpf()
            programs = _Programs(name, list(_each(lib.bpf_object__next_program, handle)))
            programs.prepare(attach, strict)
            own_maps = ObjectMaps(
                name, list(_each(lib.bpf_object__next_map, handle)), _read_btf(handle, name)
            )
            own_maps.prepare(maps or {})
            own_maps.set_variables(settings)
        except OSError as error:
            raise elf_errors.open_error(name, error.errno or 0, said) from error
        result = lib.bpf_object__load(handle)
        if result < 0:
            raise elf_errors.load_error(name, -result, said, programs.points)
        made = own_maps.made()
        specs = programs.made({fd: index for index, (_spec, fd) in enumerate(made)})
        notes = (*programs.notes, *own_maps.notes)
        return _hand_over(name, license_, made, specs, notes)


@contextmanager
def _limited_resources() -> Iterator[None]:
    """Bound what a hostile object can make libbpf use: CPU time and address space.

    The kernel ends a process that goes on for longer (SIGXCPU); lower limits stay.
    """
    used = resource.getrusage(resource.RUSAGE_SELF)
    limits = {
        resource.RLIMIT_CPU: int(used.ru_utime + used.ru_stime) + SECONDS,
        resource.RLIMIT_AS: _ADDRESS_SPACE,
    }
    before = {kind: resource.getrlimit(kind) for kind in limits}
    for kind, (soft, hard) in before.items():
        lowest = min(each for each in (soft, hard, limits[kind]) if each != resource.RLIM_INFINITY)
        resource.setrlimit(kind, (lowest, hard))
    try:
        yield
    finally:
        for kind, both in before.items():
            resource.setrlimit(kind, both)


def _read_license(data: bytes) -> str:
    """The object's licence; checks the object.  Raises MalformedObject, ForeignObject."""
    for section in read_sections(data):
        if section.name == "license":
            return section.content.rstrip(b"\0").decode(errors="replace")
    return ""


@contextmanager
def _open(data: bytes, name: str, said: list[elf_errors.Line]) -> Iterator[int]:
    lib = libbpf()
    # The name of .bss and its like in the kernel begins with it, so no dots.
    stem = Path(name).name.split(".")[0] or "object"
    options = _OpenOpts(sz=ct.sizeof(_OpenOpts), object_name=os.fsencode(stem))
    btf = os.environ.get("HMEBPF_BTF")
    if btf:
        options.btf_custom_path = os.fsencode(btf)
    handle = lib.bpf_object__open_mem(data, len(data), ct.byref(options))
    if not handle:
        raise elf_errors.open_error(name, ct.get_errno(), said)
    try:
        yield handle
    finally:
        lib.bpf_object__close(handle)


def _each(following: Callable[[int, int | None], int | None], handle: int) -> Iterator[int]:
    """libbpf's programs or maps of an object."""
    item = following(handle, None)
    while item:
        yield item
        item = following(handle, item)


def _read_btf(handle: int, name: str) -> Btf | None:
    """An object's own types.  Raises MalformedObject."""
    btf, size = libbpf().bpf_object__btf(handle), ct.c_uint32()
    raw = libbpf().btf__raw_data(btf, ct.byref(size)) if btf else None
    try:
        return Btf.from_bytes(ct.string_at(raw, size.value)) if raw else None
    except MissingBtf as error:
        raise elf_errors.open_error(name, error.errno or 0, []) from error


class _Programs:
    """The programs of an open object, by libbpf's ``handles``, on their way into the kernel.

    ``points`` are the attach points known for them, by name; ``notes`` what the user should hear.
    """

    def __init__(self, name: str, handles: list[int]) -> None:
        self._lib, self._name, self._programs = libbpf(), name, handles
        self._kinds: dict[int, tuple[str | None, str | None]] = {}
        self.notes: list[str] = []
        self.points: dict[str, EbpfAttachType] = {}

    def prepare(self, attach: Mapping[str, EbpfAttachType], strict: bool) -> None:
        """Decide what each program is for, before anything is loaded."""
        names = [self._program_name(program) for program in self._programs]
        if not names:
            raise MalformedObject(
                f"load {self._name}",
                "there is no program in it",
                'give a function a section: SEC("xdp") int NAME(struct xdp_md *ctx) {...}',
            )
        for name in attach if strict else ():
            if name not in names:
                raise UsageError(
                    f"attach {name}",
                    f"{self._name} has no program of that name, but {', '.join(names)}",
                    f"--attach {names[0]}=KIND:TARGET",
                )
        left_out = []
        for name, program in zip(names, self._programs, strict=True):
            reason = self._prepare(name, program, attach.get(name))
            if reason:
                left_out.append((name, reason))
                check(self._lib.bpf_program__set_autoload(program, False))
        if len(left_out) == len(names):
            name, (cause, remedy) = left_out[0]
            raise UsageError(f"load program {name} of {self._name}", cause, remedy)
        self.notes += [f"program {name} is left out: {why}" for name, (why, _hint) in left_out]

    def _prepare(
        self, name: str, program: int, point: EbpfAttachType | None
    ) -> tuple[str, str] | None:
        """Set a program's type and target; or (why it cannot be loaded, what to do)."""
        section = self._lib.bpf_program__section_name(program).decode(errors="replace")
        place = sections.parse_section(section)
        type_ = self._lib.bpf_program__type(program)
        if point is None and not self._lib.bpf_program__autoload(program):
            return (
                f'it is to be loaded on request only (its section is "?{section.lstrip("?")}")',
                f"--attach {name}=KIND:TARGET",
            )
        if point is not None:
            self._set_point(name, program, point, section)
            check(self._lib.bpf_program__set_autoload(program, True))
            self._kinds[program] = (point.kind, str(point))
            self.points[name] = point
            return None
        if place is None:
            if not type_:
                return (
                    f'its section is named "{section}", which says nothing about where it runs',
                    f"--attach {name}=KIND:TARGET, or name the section as libbpf does: "
                    'SEC("xdp"), SEC("kprobe/FUNCTION"), ...',
                )
            self._kinds[program] = (None, None)
            kind = self._lib.libbpf_bpf_prog_type_str(type_)
            self.notes.append(
                f'program {name} is loaded; its section "{section}" is one that hmebpf cannot '
                f"attach ({kind.decode() if kind else f'type {type_}'})"
            )
            return None
        assert place.kind is not None
        if not type_ or type_ == sections.SCHED_ACT:  # cls_bpf, by which we attach, takes no other
            found, expected = program_type(place.kind)
            check(self._lib.bpf_program__set_type(program, found))
            check(self._lib.bpf_program__set_expected_attach_type(program, expected))
        if place.attach is None and (
            place.kind in sections.NEEDS_TARGET or self._is_tp_btf(program)
        ):
            return (
                f'its section "{section}" names no target, which a {place.kind} program is '
                "loaded for",
                f'--attach {name}={place.kind}:TARGET, or name it: SEC("{section}/TARGET")',
            )
        self._kinds[program] = (place.kind, place.attach)
        if place.attach and ":," not in place.attach:
            self.points[name] = EbpfAttachType.parse(place.attach)
        return None

    def _program_name(self, program: int) -> str:
        name: bytes = self._lib.bpf_program__name(program)
        return name.decode(errors="replace")

    def _is_tp_btf(self, program: int) -> bool:
        type_ = self._lib.bpf_program__type(program)
        expected = self._lib.bpf_program__expected_attach_type(program)
        return bool((type_, expected) == (sections.TRACING, sections.TRACE_RAW_TP))

    def _set_point(self, name: str, program: int, point: EbpfAttachType, section: str) -> None:
        """Make a program one for this attach point.  Raises UsageError where it is another's."""
        type_ = self._lib.bpf_program__type(program)
        wanted, expected = program_type(point)
        by_btf = self._is_tp_btf(program) and point.kind == "raw_tracepoint"
        if by_btf or (type_, wanted) == (sections.RAW_TRACEPOINT_WRITABLE, sections.RAW_TRACEPOINT):
            pass  # other ways to the same hook
        elif type_ in (0, wanted) or (type_, wanted) == (sections.SCHED_ACT, sections.SCHED_CLS):
            check(self._lib.bpf_program__set_type(program, wanted))
            check(self._lib.bpf_program__set_expected_attach_type(program, expected))
        else:
            place = sections.parse_section(section)
            kind = place.kind if place and place.kind else "another kind of"
            raise UsageError(
                f"attach {name} to {point}",
                f'it is a {kind} program, by its section "{section}"',
                f"--attach {name}={kind}:TARGET" if place else "write a program of that kind",
            )
        if by_btf or point.kind in sections.NEEDS_TARGET:
            from hypermesh_ebpf.host.hooks import require_hook

            # Asked first: libbpf (1.1) leaves descriptors open if it does not find the target.
            target = require_hook(point)
            result = self._lib.bpf_program__set_attach_target(program, 0, target.encode())
            if result < 0:
                raise elf_errors.target_error(name, point, -result)

    def made(self, places: Mapping[int, int]) -> list[tuple[ProgramSpec, int]]:
        """The programs that are in the kernel now, with libbpf's descriptors of them.

        ``places`` gives a map's index by its descriptor.
        """
        found = ((program, self._lib.bpf_program__fd(program)) for program in self._programs)
        return [(self._program_spec(program, places), fd) for program, fd in found if fd >= 0]

    def _program_spec(self, program: int, places: Mapping[int, int]) -> ProgramSpec:
        """The program as the kernel was given it, relocated and with its functions behind it."""
        lib = self._lib
        size = _INSTRUCTION * lib.bpf_program__insn_cnt(program)
        code = ct.string_at(lib.bpf_program__insns(program), size)
        kind, attach = self._kinds[program]
        return ProgramSpec(
            self._program_name(program),
            code,
            tuple((offset, places[fd]) for offset, _variant, fd in map_references(code)),
            kind,
            attach,
        )


def _hand_over(
    name: str,
    license_: str,
    maps: list[tuple[MapSpec, int]],
    programs: list[tuple[ProgramSpec, int]],
    notes: tuple[str, ...],
) -> LoadedSource:
    """What was made, by descriptors of the caller's own: libbpf closes its with the object."""
    reached = read_program_arrays(maps)
    called = [spec.name for spec, fd in programs if reached and read_program_info(fd).id in reached]
    copies = iter(_duplicate([fd for _spec, fd in (*maps, *programs)]))
    return LoadedSource(
        name,
        license_,
        tuple((spec, next(copies)) for spec, _fd in maps),
        tuple((spec, next(copies)) for spec, _fd in programs),
        notes,
        tuple(called),
    )


def _duplicate(descriptors: list[int]) -> list[int]:
    """Descriptors that outlive libbpf's object: close-on-exec, and all or none."""
    made: list[int] = []
    try:
        for fd in descriptors:
            made.append(fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3))
    except OSError as error:
        for fd in made:
            os.close(fd)
        raise LoadError(
            "keep what was loaded",
            describe_errno(error.errno or 0),
            "allow more open files: `ulimit -n 4096`",
            errno=error.errno,
        ) from error
    return made
