"""The ledger: what we attached that outlives its owner, written down before it is attached.

An XDP program or TC filter attached through netlink stays when its owner dies.  The guard takes it
off; where the guard was killed too, the next start finds the entry here and settles it.  One small
JSON file for each attachment, in ``/run/hmebpf`` (root) or ``$XDG_RUNTIME_DIR/hmebpf`` (anybody
else), gone after a reboot.  Whoever could write there could have us detach things, so the directory
belongs to us alone (0700) or is refused.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hypermesh_ebpf.attach.hold import Hold, TcFilter
from hypermesh_ebpf.errors import DetachError, HmebpfError, describe_errno
from hypermesh_ebpf.host.kernel import boot_id

_LEFTOVER_SECONDS = 60.0  # a half-written entry older than this has no writer any more


@dataclass(frozen=True, slots=True)
class Entry:
    """One attachment; the last four for filters of traffic control (:class:`TcFilter`).

    ``owner_start`` is the owner's start time in clock ticks since boot (field 22 of
    /proc/PID/stat, proc(5)): with ``owner_pid`` it names a process for good.  ``netns`` and
    ``pidns`` are the inodes of its network and process namespaces.
    """

    kind: str
    ifindex: int
    iface: str
    prog_id: int
    owner_pid: int
    owner_start: int
    netns: int
    pidns: int
    boot_id: str
    parent: int = 0
    priority: int = 0
    handle: int = 0
    clsact_ours: bool = False

    @property
    def filter(self) -> TcFilter | None:
        """Where the filter is; None for XDP."""
        if self.kind != "tc":
            return None
        return TcFilter(self.parent, self.priority, self.handle, self.clsact_ours)


def directory() -> Path:
    """The ledger's directory, made if it is missing.

    Raises HmebpfError where it cannot be made or somebody else could write in it.
    """
    path = _place()
    what = f"use the ledger {path}"
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = path.lstat()
    except OSError as error:
        raise HmebpfError(
            what,
            describe_errno(error.errno or errno.EIO),
            f"make {path.parent} a writable directory",
            errno=error.errno,
        ) from error
    if not stat.S_ISDIR(status.st_mode):
        raise HmebpfError(what, "it is not a directory", f"remove it: `rm {path}`")
    if status.st_uid != os.geteuid() or status.st_mode & 0o022:
        mode = stat.S_IMODE(status.st_mode)
        raise HmebpfError(
            what,
            f"another user can write in it (owner {status.st_uid}, mode {mode:04o})",
            f"look at what is in it, then `rm -r {path}`",
        )
    return path


def record(hold: Hold, netns: int | None = None) -> Path:
    """Write down that this process is about to attach a program; the entry's path.

    ``netns`` is the inode of the interface's network namespace, if that is not this thread's.  The
    guard deletes the entry when the program is off.  Raises HmebpfError.
    """
    netns = netns or _namespace("net")
    entry = Entry(
        kind=hold.kind,
        ifindex=hold.ifindex,
        iface=hold.iface,
        prog_id=hold.prog_id,
        owner_pid=os.getpid(),
        owner_start=_start_time(os.getpid()) or 0,
        netns=netns,
        pidns=_namespace("pid"),
        boot_id=boot_id(),
        **(asdict(hold.filter) if hold.filter else {}),
    )
    side = f"-{entry.parent & 0xF:x}-{entry.priority}" if hold.filter else ""
    path = directory() / f"{entry.kind}-{entry.ifindex}-{entry.prog_id}{side}-{netns}.json"
    unfinished = path.with_suffix(".tmp")
    try:
        unfinished.write_text(json.dumps(asdict(entry)) + "\n")
        unfinished.rename(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            unfinished.unlink()
        raise HmebpfError(
            f"write the ledger entry {path}",
            describe_errno(error.errno or errno.EIO),
            f"make room in {path.parent}: `df {path.parent}`",
            errno=error.errno,
        ) from error
    return path


def read(path: Path) -> Entry:
    """One entry.  Raises ValueError when it is none, FileNotFoundError when it is gone."""
    data = json.loads(path.read_bytes())
    if not isinstance(data, dict):
        raise ValueError(f"not an object: {data!r}")
    values: dict[str, Any] = {}
    known = Entry.__annotations__
    for name, kind in known.items():  # later versions may write more than these
        if name not in data and name in TcFilter.__annotations__:
            continue  # an earlier version, which knew XDP only
        value = values[name] = data.get(name)
        if type(value).__name__ != kind:
            raise ValueError(f"{name} is {value!r}")
    entry = Entry(**values)
    if not (0 < entry.ifindex < 1 << 31 and 0 < entry.prog_id < 1 << 32):
        raise ValueError(f"ifindex {entry.ifindex}, program {entry.prog_id}")
    return entry


def entries() -> list[Entry]:
    """All readable entries.  Raises HmebpfError for an unsafe directory."""
    found = []
    for path in sorted(_files()):
        with contextlib.suppress(ValueError, FileNotFoundError):
            found.append(read(path))
    return found


def is_clsact_ours(ifindex: int) -> bool:
    """Whether hmebpf made the clsact of an interface and still has a filter there.

    Who comes later then shares it: whoever goes last takes it off.
    """
    return any(
        entry.clsact_ours and (entry.ifindex, entry.netns, entry.boot_id) == here
        for here in [(ifindex, _namespace("net"), boot_id())]
        for entry in entries()
    )


def sweep() -> list[str]:
    """Settle what dead owners left: called before anything is attached, and by cleanup.

    Removes exactly the programs written down, through a guard of its own.  What a living owner or a
    process of another network or process namespace attached is left alone.  Gives a line for
    everything that was done or could not be done.  Raises HmebpfError for an unsafe directory.
    """
    told: list[str] = []
    for path in sorted(_files()):
        try:
            entry = read(path)
        except FileNotFoundError:  # its guard was just at it
            continue
        except ValueError as error:
            path.unlink(missing_ok=True)
            told.append(f"removed the corrupt ledger entry {path}: {error}")
            continue
        told += _settle(path, entry)
    return told


def _settle(path: Path, entry: Entry) -> list[str]:
    """Deal with one entry; what to tell the user."""
    if entry.boot_id != boot_id():
        path.unlink(missing_ok=True)
        return []
    if entry.kind not in ("xdp", "tc") or entry.pidns != _namespace("pid"):
        return []
    if is_alive(entry.owner_pid, entry.owner_start):
        return []
    program = (
        f"{entry.kind} program {entry.prog_id} on {entry.iface} (owner {entry.owner_pid} is dead)"
    )
    try:
        prog_fd = _program_fd(entry.prog_id)
    except PermissionError as error:
        # Without it the program cannot be told from one that took its place meanwhile.
        words = describe_errno(error.errno or errno.EPERM)
        return [f"left {program}: {words}, CAP_SYS_ADMIN is missing; run `sudo hmebpf cleanup`"]
    if prog_fd is None:  # the kernel has no such program any more: nothing carries it
        path.unlink(missing_ok=True)
        return []
    try:
        if entry.netns != _namespace("net"):
            return []
        return _remove(path, entry, prog_fd, program)
    finally:
        os.close(prog_fd)


def _remove(path: Path, entry: Entry, prog_fd: int, program: str) -> list[str]:
    from hypermesh_ebpf.guard import Guard

    try:
        with Guard.start() as guard:
            hold = Hold(entry.ifindex, entry.iface, entry.prog_id, prog_fd, entry.filter)
            guard.hold(hold, str(path))
            (outcome,) = guard.release()
    except DetachError as error:
        return [f"could not remove {program}: {error.cause}; {error.remedy}"]
    if outcome.what == "removed":
        return [f"removed {program}"]
    if outcome.what == "moved":
        return [f"removed {program}, from another network namespace"]
    return []


def is_alive(pid: int, start: int) -> bool:
    """Whether that very process still runs, not another one of the same number."""
    return _start_time(pid) == start


def _start_time(pid: int) -> int | None:
    """Field 22 of /proc/PID/stat; None for a process that is gone or a zombie."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = status.rpartition(")")[2].split()  # from field 3 on: the name may contain anything
    # A main thread that ended is a zombie too, while other threads (field 20) go on.
    return None if fields[0] in "ZX" and int(fields[17]) <= 1 else int(fields[19])


def _namespace(kind: str) -> int:
    return os.stat(f"/proc/thread-self/ns/{kind}").st_ino


def _program_fd(prog_id: int) -> int | None:
    """A descriptor of a program by its id; None when there is no such program."""
    from hypermesh_ebpf.bpf.libbpf import check, libbpf

    try:
        return check(libbpf().bpf_prog_get_fd_by_id(prog_id))
    except FileNotFoundError:
        return None


def _place() -> Path:
    if os.geteuid() == 0:
        return Path("/run/hmebpf")
    for base in (os.environ.get("XDG_RUNTIME_DIR"), f"/run/user/{os.geteuid()}"):
        if base and os.path.isabs(base) and os.access(base, os.W_OK):
            return Path(base, "hmebpf")
    return Path(f"/tmp/hmebpf-{os.geteuid()}")  # safe as it is checked, and gone after a reboot


def _files() -> list[Path]:
    """The entries' files; half-written ones that a killed process left are removed."""
    if not _place().exists():
        return []
    found = []
    for path in directory().iterdir():
        if path.suffix == ".json":
            found.append(path)
        elif path.suffix == ".tmp":
            with contextlib.suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > _LEFTOVER_SECONDS:
                    path.unlink()
    return found
