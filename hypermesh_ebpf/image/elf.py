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
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from hypermesh_ebpf.attach_type import EbpfAttachType
from hypermesh_ebpf.bpf.btf import DATASEC, STRUCT, TYPEDEF, UNION, Btf
from hypermesh_ebpf.bpf.libbpf import check, libbpf
from hypermesh_ebpf.bpf.programs import program_type, read_program_info
from hypermesh_ebpf.bpf.spec import MapSpec, ProgramSpec
from hypermesh_ebpf.bpf.types import describe
from hypermesh_ebpf.errors import LoadError, MalformedObject, UsageError, describe_errno
from hypermesh_ebpf.image import elf_errors, sections
from hypermesh_ebpf.image.bytecode import map_references
from hypermesh_ebpf.image.elf_file import check_object, is_elf, read_sections
from hypermesh_ebpf.image.image import LoadedSource
from hypermesh_ebpf.image.settings import split_path, unknown_variable, write_setting

__all__ = ["check_object", "is_elf", "limit_resources", "load_object"]

# BPF_MAP_TYPE_* (include/uapi/linux/bpf.h)
_PROG_ARRAY, _PERF_EVENT_ARRAY, _STRUCT_OPS, _RINGBUF = 3, 4, 26, 27
_EVENT_BUFFERS = (_PERF_EVENT_ARRAY, _RINGBUF)
_INSTRUCTION = 8
_SEARCHED = 4096  # entries of a program array that are looked at
_MEGABYTE = 1 << 20


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
) -> LoadedSource:
    """Load an object's maps and programs; the descriptors are the caller's.

    ``settings`` are global variables and their values as text (:mod:`.settings`), ``attach`` the
    attach points of programs by name, where they are known: they decide what the section's name
    leaves open and the target of fentry, fexit and LSM programs.  ``maps`` are descriptors to take
    for maps of these names instead of making new ones.

    A program whose section's name says nothing is left out, with a note, unless ``attach`` tells
    its hook.  A map whose source pins it by name is taken from there, or made and pinned there.

    Raises MalformedObject, ForeignObject, UsageError (a setting, an attach point), VerifierError,
    MissingBtf, HookUnsupported, Unsupported, MissingPrivilege, PinError, LoadError.
    """
    license_ = _read_license(data)
    with elf_errors.listen() as said, _open(data, name, said) as handle:
        source = _Object(handle, name)
        source.prepare_programs(attach)
        source.prepare_maps(maps or {})
        source.set_variables(settings)
        result = libbpf().bpf_object__load(handle)
        if result < 0:
            raise elf_errors.load_error(name, -result, said, source.points)
        return source.hand_over(license_)


def limit_resources(seconds: int = 120, megabytes: int = 4096) -> None:
    """Bound what a hostile object can make this process use: CPU time and address space.

    For the worker, before it opens what it does not trust; the kernel ends a process that goes on.
    """
    with suppress(ValueError, OSError):  # a lower limit is set already
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (megabytes * _MEGABYTE, megabytes * _MEGABYTE))


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


class _Object:
    """An open object on its way into the kernel.

    ``points`` are the attach points known for its programs, by name.
    """

    def __init__(self, handle: int, name: str) -> None:
        self._lib, self._name = libbpf(), name
        self._programs = list(_each(self._lib.bpf_object__next_program, handle))
        self._maps = list(_each(self._lib.bpf_object__next_map, handle))
        self._btf = self._read_btf(handle)
        self._notes: list[str] = []
        self._kinds: dict[int, tuple[str | None, str | None]] = {}
        # The types that the object gave its maps; loading or resizing a map drops some of them.
        self._types = {item: self._map_types(item) for item in self._maps}
        self.points: dict[str, EbpfAttachType] = {}

    def _read_btf(self, handle: int) -> Btf | None:
        btf = self._lib.bpf_object__btf(handle)
        if not btf:
            return None
        size = ct.c_uint32()
        raw = self._lib.btf__raw_data(btf, ct.byref(size))
        return Btf.from_bytes(ct.string_at(raw, size.value)) if raw else None

    # -- programs

    def prepare_programs(self, attach: Mapping[str, EbpfAttachType]) -> None:
        """Decide what each program is for, before anything is loaded."""
        names = [self._program_name(program) for program in self._programs]
        if not names:
            raise MalformedObject(
                f"load {self._name}",
                "there is no program in it",
                'give a function a section: SEC("xdp") int NAME(struct xdp_md *ctx) {...}',
            )
        for name in attach:
            if name not in names:
                raise UsageError(
                    f"attach {name}",
                    f"{self._name} has no program of that name, but {', '.join(names)}",
                    f"attach {names[0]}, for instance",
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
        self._notes += [f"program {name} is left out: {why}" for name, (why, _hint) in left_out]

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
                f"attach {name} somewhere",
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
                    f"attach {name} somewhere, or name the section as libbpf does: "
                    'SEC("xdp"), SEC("kprobe/FUNCTION"), ...',
                )
            self._kinds[program] = (None, None)
            kind = self._lib.libbpf_bpf_prog_type_str(type_)
            self._notes.append(
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
                f'attach {name} to {place.kind}:TARGET, or name it: SEC("{section}/TARGET")',
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
                f"attach it to {kind}:TARGET" if place else "write a program of that kind",
            )
        if by_btf or point.kind in sections.NEEDS_TARGET:
            from hypermesh_ebpf.host.symbols import resolve_target

            target = resolve_target(point.target)
            result = self._lib.bpf_program__set_attach_target(program, 0, target.encode())
            if result < 0:
                raise elf_errors.target_error(name, point, -result)

    # -- maps

    def _map_name(self, item: int) -> str:
        """The map's name; of an internal one, the section's: ".bss", not "xdp_coun.bss"."""
        name: str = self._lib.bpf_map__name(item).decode(errors="replace")
        if not self._lib.bpf_map__is_internal(item):
            return name
        value = self._lib.bpf_map__btf_value_type_id(item)
        if self._btf and value and self._btf.type(value).kind == DATASEC:
            return self._btf.type(value).name
        return name[max(name.find("."), 0) :]

    def _map_types(self, item: int) -> tuple[str, int, int]:
        return (
            self._map_name(item),
            self._lib.bpf_map__btf_key_type_id(item),
            self._lib.bpf_map__btf_value_type_id(item),
        )

    def prepare_maps(self, reuse: Mapping[str, int]) -> None:
        """Buffers of events get the sizes that the kernel wants, and given maps are taken."""
        lib = self._lib
        unknown = set(reuse) - {name for name, _key, _value in self._types.values()}
        if unknown:
            raise UsageError(
                f"use a map for {sorted(unknown)[0]}",
                f"{self._name} has no map of that name",
                "maps: " + ", ".join(name for name, _key, _value in self._types.values()),
            )
        for item in self._maps:
            name, type_ = self._types[item][0], lib.bpf_map__type(item)
            if type_ in _EVENT_BUFFERS:
                # Their records' type may be declared as the value's, which the kernel refuses.
                size = 0 if type_ == _RINGBUF else 4
                if lib.bpf_map__value_size(item) != size:
                    check(lib.bpf_map__set_value_size(item, size))
                if lib.bpf_map__key_size(item) != size:
                    check(lib.bpf_map__set_key_size(item, size))
            if type_ == _STRUCT_OPS:
                self._notes.append(f"map {name} is loaded; struct_ops cannot be attached by hmebpf")
            if name in reuse:
                self._reuse(item, name, reuse[name])
            pin = self._pin_path(item)
            if pin:
                found = "is taken from" if os.path.exists(pin) else "is pinned, and stays, at"
                self._notes.append(f"map {name} {found} {pin}, as its source asks")

    def _pin_path(self, item: int) -> str:
        """Where the source wants a map to be found and kept; "" for nowhere."""
        return os.fsdecode(self._lib.bpf_map__pin_path(item) or b"")

    def _reuse(self, item: int, name: str, fd: int) -> None:
        try:
            check(self._lib.bpf_map__reuse_fd(item, fd))
        except OSError as error:
            raise LoadError(
                f"use the given map for {name}",
                describe_errno(error.errno or 0),
                "give a map of the same type and sizes",
                errno=error.errno,
            ) from error

    def set_variables(self, settings: Mapping[str, str]) -> None:
        """Write the settings into the initial values of the object's data sections."""
        if not settings:
            return
        variables = dict(self._variables())
        for path, text in settings.items():
            name, _steps = split_path(path)
            if name not in variables:
                raise unknown_variable(path, sorted(variables))
            value, type_ = variables[name]
            write_setting(value, type_, path, text)

    def _variables(self) -> Iterator[tuple[str, tuple[memoryview, dict[str, Any]]]]:
        """The name, bytes and type of each global variable that the object itself defines."""
        for item in self._maps:
            section, _key, value = self._types[item]
            if not (self._btf and value and self._lib.bpf_map__is_internal(item)):
                continue
            size = ct.c_size_t()
            start = self._lib.bpf_map__initial_value(item, ct.byref(size))
            if not start or section == ".kconfig":
                continue
            raw = memoryview((ct.c_char * size.value).from_address(start)).cast("B")
            for member in describe(self._btf, value).get("members", ()):
                yield member["name"], (raw[member["offset"] // 8 :], member["type"])

    # -- what was made

    def hand_over(self, license_: str) -> LoadedSource:
        """Everything that is in the kernel now, by descriptors of the caller's own."""
        lib = self._lib
        made = [item for item in self._maps if lib.bpf_map__fd(item) >= 0]
        places = {lib.bpf_map__fd(item): index for index, item in enumerate(made)}
        loaded = [program for program in self._programs if lib.bpf_program__fd(program) >= 0]
        specs = [self._program_spec(program, places) for program in loaded]
        numbers = [lib.bpf_program__fd(program) for program in loaded]
        called: set[int] = set()
        for item in made:
            if lib.bpf_map__type(item) == _PROG_ARRAY:
                called |= _read_program_array(lib.bpf_map__fd(item), lib.bpf_map__max_entries(item))
        tail_called = [
            spec.name
            for spec, fd in zip(specs, numbers, strict=True)
            if called and read_program_info(fd).id in called
        ]
        maps = [self._map_spec(item) for item in made]
        map_fds = _duplicate([lib.bpf_map__fd(item) for item in made])
        program_fds = _duplicate(numbers)
        return LoadedSource(
            self._name,
            license_,
            tuple(zip(maps, map_fds, strict=True)),
            tuple(zip(specs, program_fds, strict=True)),
            tuple(self._notes),
            tuple(tail_called),
        )

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

    def _map_spec(self, item: int) -> MapSpec:
        lib, (name, key, value) = self._lib, self._types[item]
        type_ = lib.bpf_map__type(item)
        if type_ in _EVENT_BUFFERS and not value:
            value = self._event_type(name)
        return MapSpec(
            name,
            type_,
            lib.bpf_map__key_size(item),
            lib.bpf_map__value_size(item),
            lib.bpf_map__max_entries(item),
            lib.bpf_map__map_flags(item),
            describe(self._btf, key) if self._btf and key else None,
            describe(self._btf, value) if self._btf and value else None,
            pinned=self._pin_path(item),
        )

    def _event_type(self, name: str) -> int:
        """The type that a buffer's records have, going by its name; 0 where none is to be found.

        For a buffer named ``events``: ``struct events``, ``event``, ``events_t``, ``event_t``,
        then the customary names.
        """
        if self._btf is None:
            return 0
        bases = [name, name.removesuffix("s"), "event", "data", "record"]
        for base in [*bases, *(f"{base}_t" for base in bases)]:
            found = self._btf.find(base, (STRUCT, UNION, TYPEDEF))
            if found and self._btf.type(self._btf.resolve(found)).kind in (STRUCT, UNION):
                return found
        return 0


def _read_program_array(fd: int, entries: int) -> set[int]:
    """The ids of the programs in a program array."""
    found, value = set(), ct.c_uint32()
    for index in range(min(entries, _SEARCHED)):
        key = ct.c_uint32(index)
        if libbpf().bpf_map_lookup_elem(fd, ct.byref(key), ct.byref(value)) == 0:
            found.add(value.value)
    return found


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
