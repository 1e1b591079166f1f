"""What runs on this host: every program, map and link of the kernel, and how they belong together.

The kernel knows its objects one by one.  Who holds them is in /proc, where they are pinned in
bpffs, what they are attached to in four other places; :func:`read_objects` puts it together.

*Ours* is what is pinned below bpffs' ``hmebpf`` directory, what the ledger names, and what a
process of ours holds: one that runs hmebpf, or that uses its library (it keeps a descriptor called
``hmebpf`` as its mark).
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from hypermesh_ebpf.bpf import info
from hypermesh_ebpf.bpf.info import MapInfo, ProgramInfo
from hypermesh_ebpf.bpf.link_info import LinkInfo, read_link
from hypermesh_ebpf.errors import HmebpfError, MissingPrivilege, describe_errno
from hypermesh_ebpf.host import chains, pins
from hypermesh_ebpf.host.attachment import Attachment
from hypermesh_ebpf.host.attachments import read_attachments
from hypermesh_ebpf.host.holders import Holder, Holders, read_holders
from hypermesh_ebpf.host.object_names import name_map, name_program, resolve_btf
from hypermesh_ebpf.host.users import name_user

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Program:
    """A program.  ``name`` is the whole one; ``members`` those of a chain of ours, else None.

    ``run_count`` and ``run_time_ns`` are None unless statistics are on or have been.
    """

    id: int
    name: str
    ours: bool
    info: ProgramInfo
    run_count: int | None
    run_time_ns: int | None
    members: tuple[str, ...] | None
    attachments: tuple[Attachment, ...]
    processes: tuple[Holder, ...]
    pins: tuple[str, ...]

    @property
    def mean_ns(self) -> float | None:
        """How long a run takes; None where nothing is known of any run."""
        if not self.run_count or self.run_time_ns is None:
            return None
        return self.run_time_ns / self.run_count

    def as_dict(self) -> dict[str, Any]:
        """As ``hmebpf list -o json`` writes it."""
        about = self.info
        return {
            "id": self.id,
            "type": about.type,
            "name": self.name,
            "tag": about.tag,
            "ours": self.ours,
            "loaded_at": about.loaded_at,
            "uid": about.uid,
            "user": name_user(about.uid),
            "gpl": about.gpl,
            "run_count": self.run_count,
            "run_time_ns": self.run_time_ns,
            "mean_ns": round(self.mean_ns, 1) if self.mean_ns is not None else None,
            "missed": about.missed,
            "map_ids": about.map_ids,
            "members": self.members,
            "attachments": [each.as_dict() for each in self.attachments],
            "processes": _name_processes(self.processes),
            "pins": self.pins,
            "translated_bytes": about.xlated_bytes,
            "jited_bytes": about.jited_bytes,
            "verified_instructions": about.verified_instructions,
            "memlock_bytes": about.memlock,
            "btf_id": about.btf_id or None,
        }


@dataclass(frozen=True, slots=True)
class MapObject:
    """A map, and the programs that use it."""

    id: int
    name: str
    ours: bool
    info: MapInfo
    program_ids: tuple[int, ...]
    processes: tuple[Holder, ...]
    pins: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """As ``hmebpf list -o json`` writes it."""
        about = self.info
        return {
            "id": self.id,
            "type": about.type,
            "name": self.name,
            "ours": self.ours,
            "key_bytes": about.key_size,
            "value_bytes": about.value_size,
            "max_entries": about.max_entries,
            "flags": about.flags,
            "frozen": about.frozen,
            "memlock_bytes": about.memlock,
            "program_ids": self.program_ids,
            "processes": _name_processes(self.processes),
            "pins": self.pins,
            "btf_id": about.btf_id or None,
        }


@dataclass(frozen=True, slots=True)
class Link:
    """A link, and the attachment that it holds."""

    id: int
    ours: bool
    info: LinkInfo
    program_name: str
    attachment: Attachment | None
    processes: tuple[Holder, ...]
    pins: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """As ``hmebpf list -o json`` writes it."""
        return {
            "id": self.id,
            "type": self.info.type,
            "ours": self.ours,
            "program_id": self.info.prog_id,
            "program_name": self.program_name or None,
            "attachment": self.attachment.as_dict() if self.attachment else None,
            "details": self.info.details,
            "processes": _name_processes(self.processes),
            "pins": self.pins,
        }


def _name_processes(holders: Iterable[Holder]) -> list[dict[str, Any]]:
    return [{"pid": holder.pid, "comm": holder.comm} for holder in holders]


@dataclass(frozen=True, slots=True)
class Objects:
    """Everything that was found at a time (seconds since the epoch).

    ``programs``, ``maps`` and ``links`` are None where this process may not see them;
    ``statistics``: whether runs are counted now.
    """

    time: float
    statistics: bool
    programs: tuple[Program, ...] | None
    maps: tuple[MapObject, ...] | None
    links: tuple[Link, ...] | None
    attachments: tuple[Attachment, ...]
    refusal: MissingPrivilege | None = field(default=None, compare=False)

    def program(self, number: int) -> Program | None:
        """The program of that id, None without one."""
        return next((each for each in self.programs or () if each.id == number), None)


@dataclass(slots=True)
class _Found:
    """What the kernel's own lists gave, before it is put together."""

    programs: dict[int, ProgramInfo] = field(default_factory=dict)
    names: dict[int, str] = field(default_factory=dict)
    members: dict[int, tuple[str, ...]] = field(default_factory=dict)
    maps: dict[int, MapInfo] = field(default_factory=dict)
    map_names: dict[int, str] = field(default_factory=dict)
    links: dict[int, LinkInfo] = field(default_factory=dict)
    sockmaps: dict[int, int] = field(default_factory=dict)


def read_objects() -> Objects:
    """Look at everything.  What this process may not see is None; see :attr:`Objects.refusal`."""
    found, refusal = _Found(), None
    holders = read_holders()
    try:
        try:
            _read_each("program", partial(_take_program, found))
            _read_each("map", partial(_take_map, found))
            _read_each("link", partial(_take_link, found))
        except PermissionError as error:
            refusal = _refuse(error)
        seen = read_attachments(
            found.links.values(),
            holders,
            None if refusal else {number: p.type for number, p in found.programs.items()},
            found.sockmaps,
            resolve_btf,
            {number: p.attach_btf for number, p in found.programs.items()},
        )
    finally:
        for fd in found.sockmaps.values():
            os.close(fd)
    return _join(found, holders, pins.read_pins(), seen, refusal)


def require_objects(kind: str = "programs") -> Objects:
    """The same, and MissingPrivilege where this process may not see them."""
    objects = read_objects()
    if objects.refusal is not None:
        objects.refusal.what = f"list the {kind} of this host"
        raise objects.refusal
    return objects


def _refuse(error: OSError) -> MissingPrivilege:
    return MissingPrivilege(
        "list the programs of this host",
        f"{describe_errno(error.errno or errno.EPERM)}: needs CAP_SYS_ADMIN",
        "run it as root: `sudo hmebpf list`; without root, `hmebpf list attachments` shows what "
        "is on the network interfaces",
        errno=error.errno,
    )


def _read_each(kind: str, take: Callable[[int, int], None]) -> None:
    """Hand each object's id and descriptor to ``take``.  Raises PermissionError."""
    try:
        ids = list(info.each_id(kind))
    except PermissionError:
        raise
    except OSError as error:
        if error.errno == errno.EINVAL:  # before Linux 4.13 (programs, maps) and 5.8 (links)
            return
        raise
    for number in ids:
        try:
            fd = info.open_by_id(kind, number)
        except (FileNotFoundError, BlockingIOError):
            continue  # gone since the list was read, or (EAGAIN, a link) not quite made yet
        try:
            take(number, fd)
        finally:
            os.close(fd)


def _take_program(found: _Found, number: int, fd: int) -> None:
    about = found.programs[number] = info.read_program(fd)
    found.names[number] = name_program(fd, about)
    members = chains.read_members(fd, about)
    if members:
        found.members[number] = members


def _take_map(found: _Found, number: int, fd: int) -> None:
    about = found.maps[number] = info.read_map(fd)
    found.map_names[number] = name_map(about)
    if about.type in ("sockmap", "sockhash"):
        found.sockmaps[number] = os.dup(fd)


def _take_link(found: _Found, number: int, fd: int) -> None:
    try:
        found.links[number] = read_link(fd)
    except OSError as error:
        # Some links refuse to say more for a moment (a perf event that just went away).
        fdinfo = info.read_fdinfo(fd)
        if error.errno == errno.EPERM or "link_type" not in fdinfo:
            raise
        found.links[number] = LinkInfo(number, "unspec", int(fdinfo.get("prog_id", 0)))


def _join(
    found: _Found,
    holders: Holders,
    pinned: Sequence[pins.Pin],
    seen: Sequence[Attachment],
    refusal: MissingPrivilege | None,
) -> Objects:
    paths: dict[tuple[str, int], list[str]] = {}
    in_sets = {(pin.kind, pin.id) for pin in pinned if pin.ours}
    for pin in pinned:
        paths.setdefault((pin.kind, pin.id), []).append(pin.path)
    by_program = _group(seen, lambda each: each.program_id)
    by_link = {each.link_id: each for each in seen if each.link_id is not None}
    links_of = _group(found.links.values(), lambda each: each.prog_id)
    users_of: dict[int, list[int]] = {}
    for number, about in found.programs.items():
        for map_id in about.map_ids:
            users_of.setdefault(map_id, []).append(number)
    comms = {holder.pid: holder for group in holders.objects.values() for holder in group}
    comms |= {holder.pid: holder for holder, _fd in holders.perf_events}
    in_ledger = _ledger_programs()

    def held(kind: str, number: int) -> tuple[Holder, ...]:
        return holders.objects.get((kind, number), ())

    def is_ours(kind: str, number: int, processes: Iterable[Holder]) -> bool:
        return (kind, number) in in_sets or any(holder.ours for holder in processes)

    def make_link(number: int, about: LinkInfo) -> Link:
        processes = held("link", number)
        return Link(
            number,
            is_ours("link", number, processes),
            about,
            found.names.get(about.prog_id, ""),
            by_link.get(number),
            processes,
            tuple(paths.get(("link", number), ())),
        )

    links = {number: make_link(number, about) for number, about in found.links.items()}

    def make_program(number: int, about: ProgramInfo) -> Program:
        attached = by_program.get(number, [])
        mine = [links[each.id] for each in links_of.get(number, [])]
        # Who holds a link or a perf event that runs it keeps the program, too.
        processes = {holder.pid: holder for holder in held("program", number)}
        processes |= {holder.pid: holder for link in mine for holder in link.processes}
        processes |= {pid: comms[pid] for each in attached for pid in each.pids if pid in comms}
        everybody = tuple(processes[pid] for pid in sorted(processes))
        known = holders.statistics or about.run_count > 0
        return Program(
            number,
            found.names[number],
            number in in_ledger
            or is_ours("program", number, everybody)
            or any(link.ours for link in mine),
            about,
            about.run_count if known else None,
            about.run_time_ns if known else None,
            found.members.get(number),
            tuple(attached),
            everybody,
            tuple(paths.get(("program", number), ())),
        )

    programs = {number: make_program(number, about) for number, about in found.programs.items()}

    def make_map(number: int, about: MapInfo) -> MapObject:
        processes, users = held("map", number), users_of.get(number, [])
        ours = is_ours("map", number, processes) or any(programs[each].ours for each in users)
        return MapObject(
            number,
            found.map_names[number],
            ours,
            about,
            tuple(users),
            processes,
            tuple(paths.get(("map", number), ())),
        )

    maps = tuple(make_map(number, about) for number, about in found.maps.items())
    return Objects(
        time.time(),
        holders.statistics,
        None if refusal else tuple(programs.values()),
        None if refusal else maps,
        None if refusal else tuple(links.values()),
        tuple(seen),
        refusal,
    )


def _group(items: Iterable[T], key: Callable[[T], int]) -> Mapping[int, list[T]]:
    groups: dict[int, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def _ledger_programs() -> set[int]:
    """The programs that the ledger names, of living owners and dead ones."""
    from hypermesh_ebpf import ledger

    try:
        return {entry.prog_id for entry in ledger.entries()}
    except HmebpfError:  # a directory that is not safe to believe
        return set()
