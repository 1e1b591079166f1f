"""Choosing among the host's objects: by interface, type and owner, or one by id, name or pin."""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from hypermesh_ebpf.attach_type import KINDS
from hypermesh_ebpf.bpf.names import LINK_TYPES, MAP_TYPES, PROGRAM_TYPES
from hypermesh_ebpf.errors import InterfaceNotFound, ObjectNotFound, UsageError
from hypermesh_ebpf.host import pins
from hypermesh_ebpf.host.objects import Link, MapObject, Objects, Program
from hypermesh_ebpf.spelling import find_close

_NAMES_SHOWN = 12
_PREFIXES = {"prog": "program", "program": "program", "map": "map", "link": "link"}
T = TypeVar("T")
Object = Program | MapObject | Link


@dataclass(frozen=True, slots=True)
class Selection:
    """What to keep: what is on an interface, of a type (of any kind of object), ours alone."""

    iface: str | None = None
    type: str | None = None
    ours: bool = False

    def check(self) -> None:
        """Raises UsageError for a type that no object can have, InterfaceNotFound."""
        known = {*PROGRAM_TYPES, *MAP_TYPES, *LINK_TYPES, *KINDS} - {"unspec"}
        if self.type is not None and self.type not in known:
            close = find_close(self.type, sorted(known), 4, 0.5)
            raise UsageError(
                f"--type {self.type}",
                "no program, map, link or attachment is of that type",
                f"did you mean {', '.join(close)}?" if close else "for instance xdp, hash, kprobe",
            )
        if self.iface is not None:
            require_interface(self.iface)

    def apply(self, objects: Objects) -> Objects:
        """The objects that are meant; maps and links with the programs that they belong to."""
        attachments = objects.attachments
        programs = objects.programs
        maps, links = objects.maps, objects.links
        if self.iface is not None:
            attachments = tuple(
                each for each in attachments if each.iface == self.iface and each.netns is None
            )
            there = {each.program_id for each in attachments}
            held = {each.link_id for each in attachments}
            programs = _keep(programs, lambda each: each.id in there)
            maps = _keep(maps, lambda each: bool(there & set(each.program_ids)))
            links = _keep(links, lambda each: each.id in held)
        if self.ours:
            mine = {each.id for each in objects.programs or () if each.ours}
            attachments = tuple(each for each in attachments if each.program_id in mine)
            programs = _keep(programs, lambda each: each.ours)
            maps = _keep(maps, lambda each: each.ours)
            links = _keep(links, lambda each: each.ours or each.info.prog_id in mine)
        if self.type is not None:
            wanted = self.type
            links = _keep(
                links,
                lambda each: (
                    each.info.type == wanted
                    or (each.attachment is not None and each.attachment.kind == wanted)
                ),
            )
            held = {each.id for each in links or ()}
            programs = _keep(programs, lambda each: each.info.type == wanted) or ()
            there = {each.id for each in programs}
            attachments = tuple(
                each
                for each in attachments
                if each.kind == wanted or each.link_id in held or each.program_id in there
            )
            there |= {each.program_id for each in attachments}
            programs = _keep(objects.programs, lambda each: each.id in there)
            maps = _keep(maps, lambda each: each.info.type == wanted)
        return replace(objects, programs=programs, maps=maps, links=links, attachments=attachments)


def select_set(objects: Objects, name: str) -> Objects:
    """What one of our pinned sets keeps."""
    directory = pins.find_directory()
    below = f"{directory}/{name}/"

    def is_in(paths: Sequence[str]) -> bool:
        return any(path.startswith(below) for path in paths)

    programs = _keep(objects.programs, lambda each: is_in(each.pins))
    there = {each.id for each in programs or ()}
    return replace(
        objects,
        programs=programs,
        maps=_keep(objects.maps, lambda each: is_in(each.pins)),
        links=_keep(objects.links, lambda each: is_in(each.pins)),
        attachments=tuple(each for each in objects.attachments if each.program_id in there),
    )


def _keep(items: tuple[T, ...] | None, wanted: Callable[[T], bool]) -> tuple[T, ...] | None:
    return None if items is None else tuple(each for each in items if wanted(each))


def require_interface(name: str) -> int:
    """The ifindex of an interface.  Raises InterfaceNotFound, naming those that there are."""
    try:
        return socket.if_nametoindex(name)
    except (OSError, ValueError) as error:
        names = [found for _, found in socket.if_nameindex()]
        close = find_close(name, names, 3, 0.5)
        shown = (close + [other for other in names if other not in close])[:_NAMES_SHOWN]
        raise InterfaceNotFound(
            f"find interface {name!r}",
            "no such interface in this network namespace",
            "interfaces here: " + ", ".join(shown),
            errno=errno.ENODEV,
        ) from error


def find_object(objects: Objects, text: str, kinds: Sequence[str] = ()) -> Object:
    """The one object that ``text`` names: "12", "prog:12", "map:7", "link:3", a name or a pin.

    ``kinds`` ("program", "map", "link") are those that can be meant, all by default.  Raises
    ObjectNotFound, UsageError where several have that id or name.
    """
    kinds = kinds or ("program", "map", "link")
    matches = _find(objects, text, kinds)
    if len(matches) == 1:
        return matches[0]
    if matches:
        choices = ", ".join(f"`{spell(each)}`" for each in matches)
        raise UsageError(f"find {text!r}", f"there are {len(matches)} of that", f"say {choices}")
    what = " or ".join(kinds) if len(kinds) < 3 else "program, map or link"
    raise ObjectNotFound(
        f"find {text!r}",
        f"there is no {what} of that id, name or pin",
        _suggest(objects, text, kinds),
    )


def _find(objects: Objects, text: str, kinds: Sequence[str]) -> list[Object]:
    candidates = [each for each in _all(objects) if kind_of(each) in kinds]
    prefix, colon, rest = text.partition(":")
    if colon and prefix in _PREFIXES:
        candidates = [each for each in candidates if kind_of(each) == _PREFIXES[prefix]]
        text = rest
    if not text:
        return []
    if text.startswith("/"):
        return [each for each in candidates if text in each.pins]
    if text.isdecimal():
        return [each for each in candidates if each.id == int(text)]
    named = [each for each in candidates if name_of(each) == text]
    # What the kernel cut is what other tools show.
    return named or [
        each for each in candidates if isinstance(each, Program) and each.info.name == text
    ]


def _all(objects: Objects) -> Iterable[Object]:
    yield from objects.programs or ()
    yield from objects.maps or ()
    yield from objects.links or ()


def _suggest(objects: Objects, text: str, kinds: Sequence[str]) -> str:
    names = sorted({name_of(each) for each in _all(objects) if kind_of(each) in kinds} - {""})
    close = find_close(text, names + pins.list_sets(), 3, 0.6)
    if close:
        return f"did you mean {', '.join(close)}? `hmebpf list` shows all"
    return "`hmebpf list` shows what there is"


def kind_of(each: Object) -> str:
    """ "program", "map" or "link"."""
    if isinstance(each, Program):
        return "program"
    return "map" if isinstance(each, MapObject) else "link"


def name_of(each: Object) -> str:
    """An object's name; links have none."""
    return "" if isinstance(each, Link) else each.name


def spell(each: Object) -> str:
    """The text by which an object is found for sure: "prog:12"."""
    kind = kind_of(each)
    return f"{'prog' if kind == 'program' else kind}:{each.id}"
