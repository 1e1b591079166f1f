"""Pins: files of the BPF file system that keep programs, maps and links alive; ours and others'.

Ours are sets, a directory each: /sys/fs/bpf/hmebpf/NAME/{programs/PROG, maps/MAP, links/PROG-N}.
A set appears in one step, by a rename, with everything in it, or not at all.  bpffs takes no dots
in names (kernel/bpf/inode.c, bpf_lookup()): ".rodata" becomes "_rodata", as with libbpf.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hypermesh_ebpf import log
from hypermesh_ebpf.bpf import info
from hypermesh_ebpf.bpf.libbpf import check, libbpf
from hypermesh_ebpf.errors import (
    HmebpfError,
    MissingPrivilege,
    ObjectNotFound,
    PinError,
    UsageError,
    describe_errno,
)
from hypermesh_ebpf.host.filesystems import BPFFS, find_mount, magic_of, read_mounts

_OURS = "hmebpf"
_KINDS = {"programs": "program", "maps": "map", "links": "link"}
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,63}")
_UNFINISHED = re.compile(r"(?P<name>.+)~(?P<pid>\d+)")
_MOUNT = f"mount the BPF file system: `sudo mount -t bpf bpf {BPFFS.places[0]}`"


@dataclass(frozen=True, slots=True)
class Pin:
    """A file of the BPF file system and what it keeps: kind ("program", "map", "link") and id.

    ``ours``: it is in one of our sets.
    """

    path: str
    kind: str
    id: int
    ours: bool


@dataclass(slots=True)
class PinnedSet:
    """A set's descriptors by the names of their pins; a context manager that closes them."""

    name: str
    path: Path
    programs: dict[str, int] = field(default_factory=dict)
    maps: dict[str, int] = field(default_factory=dict)
    links: dict[str, int] = field(default_factory=dict)

    def close(self) -> None:
        """Close the descriptors; the pins stay."""
        for group in (self.programs, self.maps, self.links):
            while group:
                os.close(group.popitem()[1])

    def __enter__(self) -> PinnedSet:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def read_pins() -> tuple[Pin, ...]:
    """Every pin that this process can see, in all mounts of the BPF file system."""
    found: dict[str, Pin] = {}
    for mount in read_mounts():
        if mount.fstype == BPFFS.name and magic_of(mount.point) == BPFFS.magic:
            for directory, _, names in os.walk(mount.point):
                for name in names:
                    path = os.path.join(directory, name)
                    kept = _read_pin(path)
                    if kept:
                        ours = path.startswith(f"{mount.point}/{_OURS}/")
                        found[path] = Pin(path, *kept, ours)
    return tuple(found[path] for path in sorted(found))


def _read_pin(path: str) -> tuple[str, int] | None:
    """What is pinned at a path: ("map", 7); None where that is nothing, or closed to us."""
    if os.path.islink(path):  # what it points to is a pin of its own
        return None
    try:
        fd = info.open_pin(path)
    except OSError:
        return None
    try:
        return info.identify(info.read_fdinfo(fd))
    finally:
        os.close(fd)


def find_directory() -> Path | None:
    """Where our sets are, or would be; None where the BPF file system is not mounted."""
    mount = find_mount(BPFFS.magic)
    return Path(mount, _OURS) if mount else None


def require_directory(what: str) -> Path:
    """Where our sets are pinned.  Raises PinError where the BPF file system is not mounted."""
    found = find_directory()
    if found is None:
        raise PinError(what, "the BPF file system is not mounted", _MOUNT)
    return found


def check_name(name: str) -> str:
    """A set's name.  Raises UsageError for one that cannot be a directory of bpffs."""
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"pinned set {name!r}",
            "a name is letters, digits, - and _, 64 at most",
            "for instance `counters`",
        )
    return name


def pin_set(
    name: str,
    programs: Mapping[str, int],
    maps: Mapping[str, int],
    links: Sequence[tuple[str, int]] = (),
) -> Path:
    """Pin descriptors as a new set; its directory.  They stay the caller's.

    ``links`` are (program's name, descriptor): the N-th is pinned as "PROG-N".  Raises UsageError,
    PinError (also where a set has that name), MissingPrivilege.
    """
    what = f"pin {check_name(name)}"
    place = require_directory(what)
    groups = {
        "programs": list(programs.items()),
        "maps": list(maps.items()),
        "links": [(f"{program}-{number}", fd) for number, (program, fd) in enumerate(links)],
    }
    final, unfinished = place / name, place / f"{name}~{os.getpid()}"
    try:
        place.mkdir(mode=0o700, exist_ok=True)
        if final.exists():
            raise _exists(what, final)
        unfinished.mkdir(mode=0o700)
        try:
            for group, members in groups.items():
                if members:
                    (unfinished / group).mkdir(mode=0o700)
                taken: set[str] = set()
                for member, fd in members:
                    path = unfinished / group / _pin_name(member, taken)
                    check(libbpf().bpf_obj_pin(fd, os.fsencode(path)))
            unfinished.rename(final)  # over an empty directory alone
        except BaseException:
            _remove_tree(unfinished)
            raise
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise _exists(what, final) from error
        raise _failed(what, error) from error
    for group, members in groups.items():
        for member, _fd in members:
            log.info("pinned %s %s in %s", group.removesuffix("s"), member, final)
    return final


def _pin_name(name: str, taken: set[str]) -> str:
    """A name that bpffs takes and that this directory does not have yet."""
    plain = re.sub(r"[^A-Za-z0-9_-]", "_", name) or "unnamed"
    found, number = plain, 1
    while found in taken:
        number += 1
        found = f"{plain}_{number}"
    taken.add(found)
    return found


def _exists(what: str, path: Path) -> PinError:
    return PinError(
        what,
        f"there is a pinned set of this name: {path}",
        f"see it with `hmebpf show {path.name}`; end it with `hmebpf unload {path.name}`, "
        "or take another name",
        errno=errno.EEXIST,
    )


def _failed(what: str, error: OSError) -> HmebpfError:
    cause = describe_errno(error.errno or errno.EIO)
    if error.errno in (errno.EPERM, errno.EACCES):
        return MissingPrivilege(what, cause, "run it as root", errno=error.errno)
    return PinError(what, cause, "see what is pinned with `hmebpf list`", errno=error.errno)


def list_sets() -> list[str]:
    """The names of our sets; none where the BPF file system is not mounted."""
    place = find_directory()
    if place is None or not place.is_dir():
        return []
    return sorted(path.name for path in place.iterdir() if _NAME.fullmatch(path.name))


def open_set(name: str) -> PinnedSet:
    """The descriptors of a set, for the caller to close.

    Raises ObjectNotFound, naming the sets that there are; PinError, MissingPrivilege.
    """
    what = f"open pinned set {name}"
    path = require_directory(what) / check_name(name)
    found = PinnedSet(name, path)
    groups = {"programs": found.programs, "maps": found.maps, "links": found.links}
    try:
        if not path.is_dir():
            raise _not_found(what)
        for group, members in groups.items():
            directory = path / group
            for pin in sorted(directory.iterdir()) if directory.is_dir() else ():
                members[pin.name] = info.open_pin(str(pin))
    except OSError as error:
        found.close()
        raise _failed(what, error) from error
    return found


def _not_found(what: str) -> ObjectNotFound:
    names = list_sets()
    remedy = "there are: " + ", ".join(names) if names else "`hmebpf list` shows what there is"
    return ObjectNotFound(what, "no set of that name is pinned", remedy)


def remove_set(name: str, verb: str = "unpin") -> list[str]:
    """Remove a set's pins, links first; the paths.  What nothing else holds is gone thereby.

    Raises ObjectNotFound, PinError, MissingPrivilege.
    """
    what = f"{verb} {name}"
    path = require_directory(what) / check_name(name)
    try:
        if not path.is_dir():
            raise _not_found(what)
        return _remove_tree(path)
    except OSError as error:
        raise _failed(what, error) from error


def remove_links(name: str) -> list[str]:
    """Remove the pins of a set's links alone; the paths.  Raises as :func:`remove_set`."""
    what = f"detach {name}"
    path = require_directory(what) / check_name(name)
    try:
        if not path.is_dir():
            raise _not_found(what)
        return _remove_tree(path / "links") if (path / "links").is_dir() else []
    except OSError as error:
        raise _failed(what, error) from error


def _remove_tree(path: Path) -> list[str]:
    """Remove a set's directory or a part of it; what was pinned there."""
    removed = []
    # Links first: a program is off before its maps go.
    for directory, _, names in os.walk(path, topdown=False):
        if directory.endswith("/links"):
            removed += [_unlink(directory, name) for name in sorted(names)]
    for directory, _, names in os.walk(path, topdown=False):
        removed += [_unlink(directory, name) for name in sorted(names)]
        os.rmdir(directory)
    return removed


def _unlink(directory: str, name: str) -> str:
    path = os.path.join(directory, name)
    os.unlink(path)
    log.info("unpinned %s", path)
    return path


def remove_unfinished() -> list[str]:
    """Clean up after processes that died while they pinned; a line for each thing removed."""
    place = find_directory()
    if place is None or not place.is_dir():
        return []
    told = []
    for path in sorted(place.iterdir()):
        match = _UNFINISHED.fullmatch(path.name)
        if match and not Path(f"/proc/{match['pid']}").exists():
            with contextlib.suppress(FileNotFoundError):
                _remove_tree(path)
                told.append(f"removed the half-made pinned set {match['name']}")
    return told
