"""Taking off what is attached, and keeping or giving up what is in the kernel: for the commands.

What is not ours is left alone unless the user insists (``force``).  Each function gives a line for
everything that it did.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from typing import Any

from hypermesh_ebpf import log
from hypermesh_ebpf.attach.hold import Hold, TcFilter
from hypermesh_ebpf.attach_type import EbpfAttachType
from hypermesh_ebpf.bpf import info
from hypermesh_ebpf.bpf.libbpf import check, libbpf
from hypermesh_ebpf.errors import (
    DetachError,
    HmebpfError,
    MissingPrivilege,
    NotAttached,
    ObjectNotFound,
    describe_errno,
)
from hypermesh_ebpf.host import pins
from hypermesh_ebpf.host.attachment import Attachment, name_cgroup_point
from hypermesh_ebpf.host.objects import Link, MapObject, Objects, Program
from hypermesh_ebpf.host.selection import Object, spell

_INSIST = "--force takes it off all the same"
# The kernel's words for "this type of link cannot be detached, only closed".
_NO_DETACH = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOTSUP)


def detach_link(objects: Objects, link: Link, *, force: bool = False) -> list[str]:
    """Detach a link.  Raises DetachError, MissingPrivilege."""
    what = f"detach link {link.id}"
    program = objects.program(link.info.prog_id)
    if not (link.ours or (program and program.ours)) and not force:
        raise _not_ours(what, program)
    _end_link(what, link)
    where = f" from {link.attachment}" if link.attachment else ""
    return [f"detached program {link.info.prog_id} {link.program_name}{where}"]


def _end_link(what: str, link: Link) -> None:
    """BPF_LINK_DETACH (Linux 5.9), or the end of all that keeps a link that does not know it."""
    try:
        fd = info.open_by_id("link", link.id)
    except OSError as error:
        raise _refused(what, error) from error
    try:
        check(libbpf().bpf_link_detach(fd))
        log.info("detached link %d (program %d)", link.id, link.info.prog_id)
        return
    except OSError as error:
        if error.errno not in _NO_DETACH:
            raise _refused(what, error) from error
    finally:
        os.close(fd)
    if link.processes:
        named = ", ".join(f"{each.comm} (process {each.pid})" for each in link.processes)
        numbers = " ".join(str(each.pid) for each in link.processes)
        raise DetachError(
            what,
            f"a {link.info.type} link ends with its last descriptor, which is held by {named}",
            f"end it: `kill {numbers}`",
        )
    for path in link.pins:
        try:
            os.unlink(path)
        except OSError as error:
            raise _refused(what, error) from error


def detach_set(objects: Objects, name: str) -> list[str]:
    """Detach the programs of a pinned set; programs and maps stay pinned, and readable.

    Raises ObjectNotFound, NotAttached, PinError, DetachError, MissingPrivilege.
    """
    links = _links_of(objects, name)
    if not links:
        with pins.open_set(name):  # says so where there is no such set
            pass
        raise NotAttached(
            f"detach {name}",
            "no link of it is pinned",
            f"end it altogether: `hmebpf unload {name}`",
        )
    lines = []
    for link in links:
        lines += detach_link(objects, link, force=True)
    pins.remove_links(name)
    return lines


def _links_of(objects: Objects, name: str) -> list[Link]:
    below = f"{pins.find_directory()}/{name}/"
    return [
        link for link in objects.links or () if any(path.startswith(below) for path in link.pins)
    ]


def detach_point(objects: Objects, point: EbpfAttachType, *, force: bool = False) -> list[str]:
    """Detach our programs from an attach point (``force``: everybody's).

    Raises NotAttached, DetachError, MissingPrivilege, GuardError.
    """
    what = f"detach {point}"
    found = [each for each in objects.attachments if _is_at(each, point)]
    if not found:
        raise NotAttached(
            what, "no program is attached there", "`hmebpf list attachments` shows what is"
        )
    programs = {each.program_id: objects.program(each.program_id) for each in found}
    ours = [each for each in found if (p := programs[each.program_id]) and p.ours]
    if not ours and not force:
        raise _not_ours(what, programs[found[0].program_id])
    links = {link.id: link for link in objects.links or ()}
    lines = []
    for each in found if force else ours:
        program = programs[each.program_id]
        if each.link_id is not None:
            lines += detach_link(objects, links[each.link_id], force=True)
            continue
        if each.kind in ("xdp", "tc") and each.attach_type is None:
            _remove_by_guard(what, each)
        elif each.kind == "cgroup" or each.kind == "tc":
            _detach_program(what, each)
        else:
            raise _held(what, each, program)
        name = program.name if program else ""
        lines.append(f"detached program {each.program_id} {name} from {each}")
    return lines


def _is_at(each: Attachment, point: EbpfAttachType) -> bool:
    """Whether an attachment is at the point; what its text leaves out may be anything."""
    if each.netns is not None or (each.kind, each.target) != (point.kind, point.target):
        return False
    seen: dict[str, Any] = {n: getattr(each, n) for n in ("mode", "direction", "priority")}
    seen["link"] = each.link_id is not None
    if each.attach_type is not None and each.kind == "cgroup":
        seen["attach"] = name_cgroup_point(each.attach_type)
    return all(seen[name] == value for name, value in point.given if name in seen)


def _remove_by_guard(what: str, each: Attachment) -> None:
    """Through netlink, exactly this program: what runs are taken off with, too."""
    from hypermesh_ebpf.guard import Guard

    assert each.ifindex is not None
    try:
        fd = info.open_by_id("program", each.program_id)
    except OSError as error:
        raise _refused(what, error) from error
    place = None
    if each.kind == "tc":
        if each.parent is None or each.priority is None or each.handle is None:
            raise DetachError(what, "its place is not known", "see `tc filter show`")
        place = TcFilter(each.parent, each.priority, each.handle, False)
    try:
        with Guard.start() as guard:
            guard.hold(Hold(each.ifindex, each.iface or "", each.program_id, fd, place), None)
            outcomes = guard.release()
    finally:
        os.close(fd)
    for outcome in outcomes:
        if outcome.what not in ("removed", "moved"):
            raise DetachError(
                what,
                f"program {each.program_id} is not there any more",
                "`hmebpf list attachments` shows what is",
            )
        log.info("detached program %d from %s", each.program_id, each)


def _detach_program(what: str, each: Attachment) -> None:
    """BPF_PROG_DETACH: cgroups, and TCX without a link."""
    from hypermesh_ebpf.bpf.names import ATTACH_TYPES

    with ExitStack() as stack:
        try:
            fd = info.open_by_id("program", each.program_id)
            stack.callback(os.close, fd)
            if each.kind == "cgroup":
                target = os.open(each.target, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                stack.callback(os.close, target)
            else:
                target = each.ifindex or 0
            number = ATTACH_TYPES.index(each.attach_type or "")
            check(libbpf().bpf_prog_detach2(fd, target, number))
            log.info("detached program %d from %s", each.program_id, each)
        except OSError as error:
            raise _refused(what, error) from error


def _held(what: str, each: Attachment, program: Program | None) -> DetachError:
    pids = each.pids or tuple(holder.pid for holder in (program.processes if program else ()))
    return DetachError(
        what,
        f"a {each.kind} ends with its last descriptor, which is held by process "
        + ", ".join(map(str, pids)),
        f"end it: `kill {' '.join(map(str, pids))}`",
    )


def _not_ours(what: str, program: Program | None) -> DetachError:
    if program is None:
        return DetachError(what, "its program cannot be seen", "run it as root")
    held = ", ".join(f"{each.comm} (process {each.pid})" for each in program.processes)
    cause = f"program {program.id} {program.name} is not ours"
    if held:
        cause += f": held by {held}"
    elif program.pins:
        cause += f": pinned at {program.pins[0]}"
    return DetachError(what, cause, _INSIST)


def _refused(what: str, error: OSError) -> HmebpfError:
    number = error.errno or errno.EIO
    cause = describe_errno(number)
    if number in (errno.EPERM, errno.EACCES):
        return MissingPrivilege(what, cause, "run it as root", errno=number)
    if number == errno.ENOENT:
        return ObjectNotFound(what, cause, "`hmebpf list` shows what there is", errno=number)
    return DetachError(what, cause, "`hmebpf list` shows what there is", errno=number)


def pin_object(objects: Objects, each: Object, name: str) -> list[str]:
    """Pin a program with its maps and links, a link with its program, or a map, as a new set.

    Raises what :func:`hypermesh_ebpf.host.pins.pin_set` does; ObjectNotFound.
    """
    program: Program | None = None
    links: list[Link] = []
    if isinstance(each, Program):
        program = each
        links = [link for link in objects.links or () if link.info.prog_id == each.id]
    elif isinstance(each, Link):
        program, links = objects.program(each.info.prog_id), [each]
    map_ids = program.info.map_ids if program else ()
    maps = [m for m in objects.maps or () if m.id in map_ids or m is each]
    with ExitStack() as stack:
        programs = {program.name or str(program.id): _open(stack, program)} if program else {}
        map_fds = _by_name(maps, lambda found: _open(stack, found))
        label = program.name or str(program.id) if program else ""
        link_fds = [(label, _open(stack, link)) for link in links]
        path = pins.pin_set(name, programs, map_fds, link_fds)
    parts = [
        f"{count} {noun}{'s' if count > 1 else ''}"
        for count, noun in ((len(programs), "program"), (len(maps), "map"), (len(links), "link"))
        if count
    ]
    lines = [f"pinned {', '.join(parts)} at {path}"]
    if program:
        lines += [
            f"note: {attachment} is no link: it does not depend on the pin"
            if attachment.kind in ("xdp", "tc", "cgroup")
            else f"note: {attachment} is no link: it ends with the process that holds it"
            for attachment in program.attachments
            if attachment.link_id is None
        ]
    return lines


def _by_name(maps: Iterable[MapObject], open_: Callable[[MapObject], int]) -> dict[str, int]:
    """Descriptors by name; maps of one name are told apart by their ids."""
    found: dict[str, int] = {}
    for each in maps:
        label = each.name or f"map_{each.id}"
        found[label if label not in found else f"{label}_{each.id}"] = open_(each)
    return found


def _open(stack: ExitStack, each: Object) -> int:
    kind = (
        "program" if isinstance(each, Program) else "map" if isinstance(each, MapObject) else "link"
    )
    try:
        fd = info.open_by_id(kind, each.id)
    except OSError as error:
        raise _refused(f"open {spell(each)}", error) from error
    stack.callback(os.close, fd)
    return fd


def unload_set(objects: Objects, name: str) -> list[str]:
    """Detach everything of a pinned set and remove its pins.

    Raises ObjectNotFound, PinError, MissingPrivilege.
    """
    links = _links_of(objects, name)
    lines = []
    for link in links:
        with suppress(DetachError):  # what cannot be detached ends with its pin
            lines += detach_link(objects, link, force=True)
    pins.remove_set(name, "unload")
    if not lines and links:
        lines.append(f"detached {name}: its links ended with their pins")
    lines.append(f"unloaded {name}")
    return lines + _still_held(objects, name)


def unpin_set(objects: Objects, name: str) -> list[str]:
    """Remove a set's pins; what processes hold goes on.  Raises as :func:`unload_set`."""
    removed = pins.remove_set(name)
    return [f"unpinned {name}: {_count(removed)} removed", *_still_held(objects, name)]


def _count(paths: list[str]) -> str:
    return f"{len(paths)} pin{'' if len(paths) == 1 else 's'}"


def _still_held(objects: Objects, name: str) -> list[str]:
    """Who keeps programs of a set alive now that its pins are gone."""
    below = f"{pins.find_directory()}/{name}/"
    lines = []
    for program in objects.programs or ():
        if not any(path.startswith(below) for path in program.pins):
            continue
        others = [path for path in program.pins if not path.startswith(below)]
        held = [f"{each.comm} (process {each.pid})" for each in program.processes] + others
        if held:
            lines.append(f"note: program {program.id} {program.name} is held by {', '.join(held)}")
        # Nobody's descriptor keeps these, so no pin's end takes them off.
        lines += [
            f"note: program {program.id} {program.name} stays attached to {each}: "
            f"take it off with `hmebpf detach {each} --force`"
            for each in program.attachments
            if each.link_id is None and each.kind in ("xdp", "tc", "cgroup")
        ]
    return lines
