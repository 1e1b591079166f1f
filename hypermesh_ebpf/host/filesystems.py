"""Kernel file systems (tracefs, debugfs, bpffs, ...), found or opened without mounting anything.

A file system is recognised by its magic (statfs(2), include/uapi/linux/magic.h), not by its path.
Where it is not mounted, fsopen(2) and fsmount(2) (Linux 5.2) give a mount that is attached
nowhere: no namespace has it, nobody sees it, and it is gone with its descriptor.  The mounts of
the host stay as they are, but for what its user asks for: :func:`mount` (``--fix``).
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

from hypermesh_ebpf.errors import MissingPrivilege, Unsupported, describe_errno
from hypermesh_ebpf.host import architecture


@dataclass(frozen=True, slots=True)
class Filesystem:
    """A kernel file system: its type's name, magic number, usual mount points, and use."""

    name: str
    magic: int
    places: tuple[str, ...]
    config: str


TRACEFS = Filesystem(
    "tracefs", 0x74726163, ("/sys/kernel/tracing", "/sys/kernel/debug/tracing"), "CONFIG_TRACING"
)
DEBUGFS = Filesystem("debugfs", 0x64626720, ("/sys/kernel/debug",), "CONFIG_DEBUG_FS")
BPFFS = Filesystem("bpf", 0xCAFE4A11, ("/sys/fs/bpf",), "CONFIG_BPF_SYSCALL")
SECURITYFS = Filesystem("securityfs", 0x73636673, ("/sys/kernel/security",), "CONFIG_SECURITYFS")
CGROUP2 = Filesystem(
    "cgroup2", 0x63677270, ("/sys/fs/cgroup", "/sys/fs/cgroup/unified"), "CONFIG_CGROUPS"
)
KNOWN = (TRACEFS, DEBUGFS, BPFFS, SECURITYFS, CGROUP2)

_CLONE_NEWNS = 0x20000
_MS_BIND, _MS_REC, _MS_SLAVE = 0x1000, 0x4000, 1 << 19
_MNT_DETACH = 2
_FSOPEN_CLOEXEC = _FSMOUNT_CLOEXEC = 1
_FSCONFIG_CMD_CREATE = 6


_mine = threading.local()  # mount namespaces belong to threads


@lru_cache(maxsize=1)
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _syscall(number: int, *arguments: object) -> int:
    result = int(_libc().syscall(ctypes.c_long(number), *arguments))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def magic_of(path: str) -> int | None:
    """The magic number of the file system at ``path`` (statfs(2) f_type), None if unreachable."""
    buffer = (ctypes.c_long * 64)()  # struct statfs is 120 bytes; f_type is its first word
    if _libc().statfs(os.fsencode(path), buffer):
        return None
    return int(buffer[0]) & 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class Mount:
    """One line of mountinfo: where, of which type, and whether its events travel (shared)."""

    point: str
    fstype: str
    shared: bool


def read_mounts() -> tuple[Mount, ...]:
    """The mounts that this thread sees (proc_pid_mountinfo(5)), in the kernel's order."""
    found = []
    with open("/proc/thread-self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            before, _, after = line.partition(" - ")
            fields = before.split(" ")
            point = re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), fields[4])
            shared = any(field.startswith("shared:") for field in fields[6:])
            found.append(Mount(point, after.split(" ", 1)[0], shared))
    return tuple(found)


def find_mount(magic: int) -> str | None:
    """Where the file system with this magic is mounted: its usual place first, None if nowhere.

    Paths come from mountinfo, so nothing is touched that might mount itself on access:
    looking into debugfs' "tracing" directory would add a mount to the host.
    """
    kind = next((fs for fs in KNOWN if fs.magic == magic), None)
    names = {kind.name} if kind else None
    points = [m.point for m in read_mounts() if names is None or m.fstype in names]
    if kind:
        points.sort(key=lambda p: kind.places.index(p) if p in kind.places else len(kind.places))
    return next((point for point in points if magic_of(point) == magic), None)


def open_detached(fs: Filesystem) -> int:
    """A directory descriptor of ``fs`` from a mount that is attached nowhere.

    Raises MissingPrivilege without CAP_SYS_ADMIN, Unsupported where the kernel lacks ``fs`` or
    fsopen(2).
    """
    what = f"open {fs.name}, which is not mounted"
    mount_it = f"mount it: `sudo mount -t {fs.name} {fs.name} {fs.places[0]}`"
    mount_for_group = mount_it.replace(" -t ", " -o mode=750,gid=$(id -g) -t ")
    try:
        context = _syscall(architecture.FSOPEN, fs.name.encode(), _FSOPEN_CLOEXEC)
        try:
            _syscall(architecture.FSCONFIG, context, _FSCONFIG_CMD_CREATE, None, None, 0)
            mount = _syscall(architecture.FSMOUNT, context, _FSMOUNT_CLOEXEC, 0)
        finally:
            os.close(context)
        try:  # fsmount gives an O_PATH descriptor, which cannot list the directory
            return os.open(".", os.O_RDONLY | os.O_DIRECTORY, dir_fd=mount)
        finally:
            os.close(mount)
    except OSError as error:
        cause = describe_errno(error.errno or 0)
        if error.errno in (errno.EPERM, errno.EACCES):
            raise MissingPrivilege(
                what,
                f"{cause}: needs CAP_SYS_ADMIN",
                f"run it as root, or {mount_for_group}",
                errno=error.errno,
            ) from error
        if error.errno == errno.ENODEV:
            raise Unsupported(
                what,
                f"this kernel has no {fs.name}",
                f"boot a kernel with {fs.config}=y",
                errno=error.errno,
            ) from error
        raise Unsupported(what, cause, mount_it, errno=error.errno) from error


def open_filesystem(fs: Filesystem) -> int:
    """A directory descriptor of ``fs``, from its mount or a detached one, for the caller to close.

    Raises MissingPrivilege, Unsupported.
    """
    point = find_mount(fs.magic)
    if point is None:
        return open_detached(fs)
    try:
        return os.open(point, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except PermissionError as error:
        raise _closed_to_us(fs, point, error) from error


def _closed_to_us(fs: Filesystem, path: str, error: OSError) -> MissingPrivilege:
    return MissingPrivilege(
        f"read {fs.name}",
        f"{path}: {describe_errno(error.errno or 0)}; the kernel opens it to root alone",
        f"run it as root, or let your group read it: "
        f"`sudo mount -o remount,mode=750,gid=$(id -g) {path}`",
        errno=error.errno,
    )


@lru_cache(maxsize=1)
def open_tracefs() -> int:
    """A directory descriptor of tracefs, the same one for the life of the process: do not close it.

    Raises MissingPrivilege or Unsupported.
    """
    try:
        return open_filesystem(TRACEFS)
    except Unsupported:
        # Before fsopen(2), or where it is refused, debugfs may still offer tracefs inside.  To
        # look mounts it there for everybody (fs/tracefs' automount), so this comes last.
        debug = find_mount(DEBUGFS.magic)
        if debug and find_mount(TRACEFS.magic) is None:
            try:
                return os.open(f"{debug}/tracing", os.O_RDONLY | os.O_DIRECTORY)
            except OSError:
                pass  # the first error says it better
        raise


def read_at(directory: int, path: str) -> str:
    """The text of the file ``path`` below a directory descriptor.  Raises OSError."""
    fd = os.open(path, os.O_RDONLY, dir_fd=directory)
    with os.fdopen(fd, encoding="utf-8", errors="replace") as file:
        return file.read()


def read_tracefs(path: str) -> str:
    """The text of a tracefs file, such as "events/sched/sched_process_exec/id".

    Raises FileNotFoundError where the kernel has no such file, MissingPrivilege, Unsupported.
    """
    try:
        return read_at(open_tracefs(), path)
    except PermissionError as error:
        raise _closed_to_us(TRACEFS, TRACEFS.places[0], error) from error


def tracepoint_id(tracepoint: str) -> int | None:
    """The number of "category:name" for perf_event_open(2), None where the kernel has it not.

    A tracepoint has an ``id`` file exactly if perf events can use it (event_create_dir() in
    kernel/trace/trace_events.c).  Raises MissingPrivilege, Unsupported.
    """
    category, _, name = tracepoint.partition(":")
    if not category or not name or "/" in tracepoint:
        return None
    try:
        return int(read_tracefs(f"events/{category}/{name}/id"))
    except (FileNotFoundError, NotADirectoryError):
        return None


def tracepoint_exists(tracepoint: str) -> bool:
    """True if the kernel has "category:name".  Raises MissingPrivilege, Unsupported."""
    return tracepoint_id(tracepoint) is not None


def enter_private_mounts() -> None:
    """For the worker process only: give this process tracefs and debugfs at their usual paths.

    libbcc opens real paths.  Where it would find tracefs mounted, nothing is done.  Otherwise the
    process leaves for a mount namespace of its own, made a slave (a private one would keep
    volumes busy that the host unmounts), and mounts there; nobody else sees it.  A mounted debugfs
    whose "tracing" was never looked at counts as not mounted: libbcc's look would mount it for all.

    Once for each thread: what it left for stays.

    Raises MissingPrivilege without CAP_SYS_ADMIN, Unsupported where the kernel lacks tracefs.
    """
    if getattr(_mine, "are_private", False):
        return
    tracing, debug_tracing = TRACEFS.places
    traced = {m.point for m in read_mounts() if m.fstype == TRACEFS.name}
    debug_mounted = magic_of(DEBUGFS.places[0]) == DEBUGFS.magic
    if debug_tracing in traced or (tracing in traced and not debug_mounted):
        return
    what = "mount tracefs for the worker process"
    try:
        _leave_for_private_mounts()
        for fs in (TRACEFS, DEBUGFS):
            if magic_of(fs.places[0]) != fs.magic:
                try:
                    _mount(fs.name, fs.places[0], fs.name, 0)
                except OSError as error:
                    if fs is TRACEFS or error.errno != errno.ENODEV:  # debugfs may be absent
                        raise
        _mine.are_private = True
    except OSError as error:
        cause = describe_errno(error.errno or 0)
        mount_it = f"mount it: `sudo mount -t tracefs tracefs {tracing}`"
        if error.errno in (errno.EPERM, errno.EACCES):
            raise MissingPrivilege(
                what,
                f"{cause}: needs CAP_SYS_ADMIN",
                f"run it as root, or {mount_it}",
                errno=error.errno,
            ) from error
        raise Unsupported(what, cause, mount_it, errno=error.errno) from error


@contextmanager
def stand_in(file: str, place: str) -> Iterator[None]:
    """For a thread that ends with this: meanwhile ``place`` is ``file``, for this thread alone.

    It has mounts of its own from then on, and would not see what the host mounts later.  Raises
    OSError, EPERM without CAP_SYS_ADMIN.
    """
    _leave_for_private_mounts()
    _mount(file, place, None, _MS_BIND)
    try:
        yield
    finally:
        if _libc().umount2(os.fsencode(place), _MNT_DETACH):
            _raise_errno()


def _leave_for_private_mounts() -> None:
    """A mount namespace of this process's own, of which the host sees nothing.  Raises OSError."""
    if _libc().unshare(_CLONE_NEWNS):
        _raise_errno()
    _become_slave()


def _become_slave() -> None:
    """No mount of ours travels to the host.  Inside a chroot "/" is no mount point: take those
    that are."""
    try:
        _mount(None, "/", None, _MS_REC | _MS_SLAVE)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        for mount in read_mounts():
            if mount.shared:
                _mount(None, mount.point, None, _MS_SLAVE)


def _mount(source: str | None, target: str, fstype: str | None, flags: int) -> None:
    arguments = [None if text is None else os.fsencode(text) for text in (source, target, fstype)]
    if _libc().mount(*arguments, ctypes.c_ulong(flags), None):
        _raise_errno()


def _raise_errno() -> None:
    code = ctypes.get_errno()
    raise OSError(code, os.strerror(code))


def list_missing() -> list[Filesystem]:
    """Those of bpffs, tracefs and debugfs that are mounted nowhere."""
    return [fs for fs in (BPFFS, TRACEFS, DEBUGFS) if find_mount(fs.magic) is None]


def mount(fs: Filesystem) -> OSError | None:
    """Mount ``fs`` at its usual place, for good and for everybody: ``check-system --fix``.

    Gives the kernel's error back, None if it worked.
    """
    try:
        _mount(fs.name, fs.places[0], fs.name, 0)
    except OSError as error:
        return error
    return None
