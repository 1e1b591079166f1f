"""exec-monitor: every execve and execveat, by whom, with which arguments and result."""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Mapping
from typing import Any

from hypermesh_ebpf.errors import UsageError, name_errno
from hypermesh_ebpf.host.cgroups import CgroupPaths, find_container
from hypermesh_ebpf.host.users import find_uid, name_user
from hypermesh_ebpf.metrics.counted import Counted, Places
from hypermesh_ebpf.monitors.declaration import (
    Column,
    Hook,
    Maps,
    Monitor,
    Option,
    Options,
    Reading,
    Rung,
)

# struct exec up to its arguments, struct choices, and places in the map counts
# (bpf_c/exec_monitor.c)
_RECORD = struct.Struct("=6Q3IiI4B16s16s256s")
_CHOICES = struct.Struct("=II4B16s")
_SUCCEEDED, _FAILED, _LOST, _INFLIGHT_FULL = range(4)
_CALLS = ("execve", "execveat")
_ARGS_CUT, _FILENAME_CUT, _UNREADABLE, _ARGS_FROM_STACK = 1, 2, 4, 8
_MOST_ROWS = 10_000
_COUNTERS = ("execs", "failed")
_COMM_LENGTH = 15  # TASK_COMM_LEN less its zero byte

_SCHED_FIELDS = (
    "time",
    "pid",
    "ppid",
    "parent",
    "uid",
    "user",
    "comm",
    "filename",
    "args",
    "args_truncated",
    "ret",
    "error",
    "cgroup",
    "container",
)
_FIELDS = (*_SCHED_FIELDS, "call", "duration_ns")
_NO_BTF_FIELDS = tuple(name for name in _FIELDS if name not in ("ppid", "parent"))


def _text(raw: bytes) -> str:
    """A C string as the file system's text, whatever bytes it has."""
    return os.fsdecode(raw[: raw.index(0)] if 0 in raw else raw)


class _Collector:
    """Decodes records, and counts them by what the user asked for."""

    def __init__(self, options: Options, targets: Mapping[str, Maps]) -> None:
        (self._maps,) = targets.values()
        self._by: str = options["by"]
        self._rows: dict[tuple[Any, ...], dict[str, Any]] = {}
        self._cgroups = CgroupPaths()
        self._epoch = 0.0
        self._set_clock()

    def _set_clock(self) -> None:
        """Where CLOCK_MONOTONIC, by which bpf_ktime_get_ns counts, began; suspending moves it."""
        self._epoch = time.time() - time.monotonic()

    def decode(self, record: bytes) -> dict[str, Any]:
        fields = self._fields(record)
        row = self._rows.get(key := tuple(fields[name] for name in _KEYS[self._by]))
        if row is None and len(self._rows) >= _MOST_ROWS:
            row = self._rows.get(key := (None,) * len(key))  # all the others
        if row is None:
            row = self._rows[key] = dict(zip(_KEYS[self._by], key, strict=True), execs=0, failed=0)
        weight = fields.get("stands_for", 1)
        row["execs"] += weight
        row["failed"] += weight if fields["ret"] else 0
        return fields

    def _fields(self, record: bytes) -> dict[str, Any]:
        (
            start_ns,
            duration_ns,
            cgroup_id,
            _filename_at,
            argv_at,
            weight,
            pid,
            ppid,
            uid,
            ret,
            args_length,
            call,
            flags,
            _pointer_size,
            has_parent,
            comm,
            parent,
            filename,
        ) = _RECORD.unpack_from(record)
        raw = record[_RECORD.size : _RECORD.size + args_length]
        args = os.fsdecode(raw.removesuffix(b"\0")).split("\0") if raw else []
        unread = flags & _UNREADABLE and not flags & _ARGS_FROM_STACK and argv_at
        known = call < len(_CALLS)  # the sched rung sees neither the call nor its beginning
        cgroup = self._cgroups.find(cgroup_id)
        return {
            "time": self._epoch + start_ns / 1e9,
            "pid": pid,
            "ppid": ppid if has_parent else None,
            "parent": _text(parent) if has_parent else None,
            "uid": uid,
            "user": name_user(uid),
            "comm": _text(comm),
            "call": _CALLS[call] if known else None,
            "filename": _text(filename),
            "args": args,
            "args_truncated": bool(flags & (_ARGS_CUT | _FILENAME_CUT) or unread),
            "ret": ret,
            "error": name_errno(-ret) if ret else None,
            "duration_ns": duration_ns if known else None,
            "cgroup": cgroup,
            "container": find_container(cgroup),
            **({"stands_for": weight} if weight > 1 else {}),
        }

    def collect(self) -> Reading:
        self._set_clock()
        counts = [value for _key, value in self._maps["counts"].items()]
        totals = {
            "execs": counts[_SUCCEEDED] + counts[_FAILED],
            "failed": counts[_FAILED],
        }
        return Reading(
            totals, self._count(), map_full=counts[_INFLIGHT_FULL], events_lost=counts[_LOST]
        )

    def _count(self) -> Counted:
        """The rows as they are now, of which the next event changes one."""
        keys = list(self._rows)
        counters = {name: [row[name] for row in self._rows.values()] for name in _COUNTERS}
        names = (*_KEYS[self._by], *counters)

        def write(places: Places) -> list[dict[str, Any]]:
            counts = [[column[place] for column in counters.values()] for place in places]
            return [
                dict(zip(names, (*keys[place], *numbers), strict=True))
                for place, numbers in zip(places, counts, strict=True)
            ]

        return Counted(keys, counters, write)


def _is_filtered(options: Options) -> bool:
    """Whether only some execs are wanted: the others' programs have nothing to look up."""
    return options["failed"] or any(options[name] is not None for name in ("pid", "uid", "comm"))


def _settings(options: Options) -> bytes | None:
    """struct choices: what the program is to report.  Raises UsageError for an unknown user."""
    if not _is_filtered(options):
        return None
    pid, comm = options["pid"], options["comm"]
    if pid is not None and not 0 <= pid < 1 << 32:
        raise UsageError(f"--pid {pid}", "no process has that number", "see `ps -e`")
    uid = None if options["uid"] is None else find_uid(options["uid"])
    return _CHOICES.pack(
        pid or 0,
        uid or 0,
        pid is not None,
        uid is not None,
        comm is not None,
        options["failed"],
        os.fsencode(comm or "")[:_COMM_LENGTH],
    )


_KEYS = {
    "comm": ("comm",),
    "uid": ("uid", "user"),
    "parent": ("ppid", "parent"),
    "filename": ("filename",),
}
_KEY_COLUMNS = {
    "comm": (Column("comm", "command"),),
    "uid": (Column("uid", "uid"), Column("user", "user")),
    "parent": (Column("ppid", "ppid"), Column("parent", "parent")),
    "filename": (Column("filename", "file"),),
}


# How a call ends, on every rung but the last: a success by this, whoever made the call; a failure
# by its return, and so does a success that the kernel did not run this program for.
_SUCCESS = Hook("raw_tracepoint", "sched_process_exec", "leave_done")
_RETURNS = (
    Hook("tracepoint", "syscalls:sys_exit_execve", "leave_call"),
    Hook("tracepoint", "syscalls:sys_exit_execveat", "leave_call"),
)


def _entries(kind: str) -> tuple[Hook, ...]:
    """Both system calls at their functions' entry, those of 32-bit programs where there are any."""
    return (
        Hook(kind, "syscall:execve", "enter_execve"),
        Hook(kind, "syscall:execveat", "enter_execveat"),
        Hook(kind, "compat_syscall:execve", "enter_compat_execve", optional=True),
        Hook(kind, "compat_syscall:execveat", "enter_compat_execveat", optional=True),
    )


_KPROBES = (
    *_entries("kprobe"),
    _SUCCESS,
    *_RETURNS,
    Hook("kretprobe", "compat_syscall:execve", "leave_compat_call", optional=True),
    Hook("kretprobe", "compat_syscall:execveat", "leave_compat_call", optional=True),
)
_TRAMPOLINES = (
    *_entries("fentry"),
    _SUCCESS,
    Hook("fexit", "syscall:execve", "leave_call"),
    Hook("fexit", "syscall:execveat", "leave_call"),
    Hook("fexit", "compat_syscall:execve", "leave_call", optional=True),
    Hook("fexit", "compat_syscall:execveat", "leave_call", optional=True),
)
_TRACEPOINTS = (
    Hook("tracepoint", "syscalls:sys_enter_execve", "enter_call"),
    Hook("tracepoint", "syscalls:sys_enter_execveat", "enter_call"),
    _SUCCESS,
    *_RETURNS,
)
_LOST_32_BIT = "execs by 32-bit programs"

MONITOR = Monitor(
    name="exec-monitor",
    summary="Every process execution: who, what, with which arguments and result.",
    source="exec_monitor.c",
    rungs=(
        Rung(
            "kprobe",
            _KPROBES,
            fields=_FIELDS,
            defines={"RUNG_KPROBE": 1, "WITH_BTF": 1},
            needs_btf=True,
        ),
        Rung(
            "fentry",
            _TRAMPOLINES,
            fields=_FIELDS,
            defines={"RUNG_FENTRY": 1, "WITH_BTF": 1},
            needs_btf=True,
        ),
        Rung(
            "tracepoint",
            _TRACEPOINTS,
            fields=_FIELDS,
            lost=(_LOST_32_BIT,),
            defines={"RUNG_TRACEPOINT": 1, "WITH_BTF": 1},
            needs_btf=True,
        ),
        Rung(
            "tracepoint without BTF",
            _TRACEPOINTS,
            fields=_NO_BTF_FIELDS,
            lost=(_LOST_32_BIT, "parent", "arguments that are not in memory yet"),
            defines={"RUNG_TRACEPOINT": 1},
        ),
        Rung(
            "sched",
            (Hook("raw_tracepoint", "sched_process_exec", "exec_done"),),
            fields=_SCHED_FIELDS,
            lost=("failed execs", "duration", "which call", "a script's own arguments"),
            defines={"RUNG_SCHED": 1, "WITH_BTF": 1},
            needs_btf=True,
        ),
    ),
    collector=_Collector,
    columns=lambda options: (
        *_KEY_COLUMNS[options["by"]],
        Column("execs", "execs", "count", share=True),
        Column("execs_per_s", "execs/s", "rate"),
        Column("failed", "failed", "count"),
    ),
    key=lambda options: _KEYS[options["by"]],
    counters=_COUNTERS,
    headline="execs",
    options=(
        Option("by", "what a row of the counts stands for", default="comm", choices=tuple(_KEYS)),
        Option("uid", "only of this user, by name or number", metavar="USER"),
        Option(
            "comm",
            "only where the process is called so (after a successful exec: the new name)",
            metavar="NAME",
        ),
        Option("pid", "only by this process", kind=int, metavar="PID"),
        Option("failed", "only those that failed", kind=bool, default=False),
    ),
    event_columns=(
        Column("time", "time", "time"),
        Column("user", "user"),
        Column("pid", "pid"),
        Column("ppid", "ppid"),
        Column("comm", "comm"),
        Column("error", "error"),
        Column("duration_ns", "took", "ns"),
        Column("container", "container"),
        Column("filename", "file"),
        Column("args", "args"),
    ),
    events="always",
    defines=lambda options: {"FILTERED": 1} if _is_filtered(options) else {},
    settings=_settings,
)
