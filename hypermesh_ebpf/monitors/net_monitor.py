"""net-monitor: socket calls by process, with bytes, errors and latency; connects and accepts."""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Mapping, Sequence
from typing import Any

from hypermesh_ebpf.bpf.libbpf import possible_cpus
from hypermesh_ebpf.errors import UsageError, name_errno
from hypermesh_ebpf.host.users import find_uid, name_user
from hypermesh_ebpf.metrics import Row, Value
from hypermesh_ebpf.metrics.counted import Counted, Places
from hypermesh_ebpf.metrics.histogram import Bucket, log2_buckets, percentiles
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

# enum call, enum rows_by, enum count, struct choices and struct event of bpf_c/net_monitor.c
_CALLS = ("connect", "accept", "send", "recv", "close")
_MOVES_BYTES = ("send", "recv")
_LOST, _INFLIGHT_FULL, _ROWS_FULL, _ERRNOS_FULL, _BYTES_UNKNOWN = range(5)
_CHOICES = struct.Struct("=16sII3Bx")
_EVENT = struct.Struct("=QQQiIIHH16sHH108sHH108s")
_FIRST_SLOT_NS = 128
_NO_FAMILY = 0xFFFF
_COMM_LENGTH = 15  # TASK_COMM_LEN less its zero byte

# include/linux/socket.h; names as in ip-address(8) and `ss -f`
_FAMILIES = {
    0: "unspec",
    1: "unix",
    2: "inet",
    10: "inet6",
    16: "netlink",
    17: "packet",
    29: "can",
    30: "tipc",
    31: "bluetooth",
    38: "alg",
    40: "vsock",
    44: "xdp",
}
# include/linux/errno.h: seen by whoever looks inside the kernel, never by the program itself
_KERNEL_ERRNOS = {
    512: "ERESTARTSYS",
    513: "ERESTARTNOINTR",
    514: "ERESTARTNOHAND",
    516: "ERESTART_RESTARTBLOCK",
    524: "ENOTSUPP",
    529: "EIOCBQUEUED",
}

# Maps with an entry for each row, of 288 bytes for each CPU, may take this much memory.
_ROWS_MEMORY = 64 << 20
_ROW_SIZE = 288
_MOST_ROWS = 8192


class Errnos(dict[str, int]):
    """How often each error was returned, by name; as text: "EAGAIN 3, ECONNRESET 1"."""

    def __str__(self) -> str:
        return ", ".join(f"{name} {count}" for name, count in self.items())


def name_error(number: int) -> str:
    """ "ECONNREFUSED" for 111; the kernel's internal ones too; the number for an unknown one."""
    return _KERNEL_ERRNOS.get(number) or name_errno(number)


def name_family(number: int) -> str | None:
    """ "inet6" for 10; None where it is not known."""
    if number == _NO_FAMILY:
        return None
    return _FAMILIES.get(number, f"family {number}")


def name_address(family: str | None, raw: bytes) -> str | None:
    """An address of 4 or 16 bytes, or a unix socket's path; None where there is none.

    A name in the abstract namespace is written as /proc/net/unix does: "@" for each zero byte.
    """
    if not raw:
        return None
    if family == "unix":
        if raw[0]:
            return os.fsdecode(raw.split(b"\0", 1)[0])
        return os.fsdecode(raw.replace(b"\0", b"@"))
    return socket.inet_ntop(socket.AF_INET if len(raw) == 4 else socket.AF_INET6, raw)


def latency_buckets(slots: Sequence[int]) -> tuple[Bucket, ...]:
    """The slots of a counter as buckets in ns; the first holds all that took less than 256 ns."""
    buckets = log2_buckets(slots, first_low=_FIRST_SLOT_NS)
    if slots[0]:
        _low, high, count = buckets[0]
        return ((0, high, count), *buckets[1:])
    return buckets


class _Collector:
    """Decodes events, and reads the counters by call and by row."""

    def __init__(self, options: Options, targets: Mapping[str, Maps]) -> None:
        (self._maps,) = targets.values()
        self._by: str = options["by"]
        # The last reading of each row: most have not changed, and percentiles take their time.
        self._known: dict[Any, tuple[Any, dict[str, Value]]] = {}
        # bpf_ktime_get_ns counts as CLOCK_MONOTONIC does.
        self._epoch = time.time() - time.monotonic()

    def decode(self, record: bytes) -> dict[str, Any]:
        (
            end_ns,
            latency_ns,
            weight,
            ret,
            pid,
            uid,
            family_number,
            call,
            comm,
            port,
            length,
            address,
            local_port,
            local_length,
            local_address,
        ) = _EVENT.unpack(record)
        family = name_family(family_number)
        if family != "unix" and not local_port:
            local_length = 0  # it never got an address of its own
        return {
            "time": self._epoch + end_ns / 1e9,
            "pid": pid,
            "comm": _text(comm),
            "uid": uid,
            "user": name_user(uid),
            "call": _CALLS[call],
            "family": family,
            "address": name_address(family, address[:length]),
            "port": port if length and family != "unix" else None,
            "local_address": name_address(family, local_address[:local_length]),
            "local_port": local_port if local_length and family != "unix" else None,
            "ret": ret,
            "error": name_error(-ret) if ret < 0 else None,
            "latency_ns": latency_ns,
            **({"stands_for": weight} if weight > 1 else {}),
        }

    def collect(self) -> Reading:
        counts = [value for _key, value in self._maps["counts"].items()]
        calls = [
            (name, counter)
            for name, (_key, counter) in zip(_CALLS, self._maps["calls"].items(), strict=True)
            if counter.calls
        ]
        totals = {
            "calls": sum(counter.calls for _name, counter in calls),
            "bytes": sum(counter.bytes for _name, counter in calls),
            "errors": sum(counter.errors for _name, counter in calls),
            "bytes_unknown_calls": counts[_BYTES_UNKNOWN],
        }
        of_each = (counter.slots for _name, counter in calls)
        slots = [sum(column) for column in zip(*of_each, strict=True)]
        from hypermesh_ebpf.metrics.sample import Histogram  # the worker makes none

        histograms = [Histogram("latency", "ns", latency_buckets(slots))] if calls else []
        histograms += [
            Histogram(f"{name} latency", "ns", latency_buckets(counter.slots))
            for name, counter in calls
        ]
        full = counts[_INFLIGHT_FULL] + counts[_ROWS_FULL] + counts[_ERRNOS_FULL]
        return Reading(
            totals, self._rows(calls), tuple(histograms), map_full=full, events_lost=counts[_LOST]
        )

    def _rows(self, calls: list[tuple[str, Any]]) -> Sequence[Row]:
        failures = self._maps["failures"].items()
        if self._by == "call":
            errnos = _errnos(failures)
            return [
                _row({"call": name}, name, counter, errnos.get((0, bytes(16), _CALLS.index(name))))
                for name, counter in calls
            ]
        entries = self._maps["rows"].entries()
        moves = [_CALLS[call] in _MOVES_BYTES for call in entries.keys("call")]
        moved = zip(entries.values("bytes"), moves, strict=True)
        counters = {
            "calls": entries.values("calls"),
            "errors": entries.values("errors"),
            "bytes": [count if moves else None for count, moves in moved],
        }

        def write(places: Places) -> list[dict[str, Value]]:
            chosen, errnos = entries.select(places).items(), _errnos(failures)
            return [self._process_row(each, counter, errnos) for each, counter in chosen]

        return Counted(entries.identities, counters, write)

    def _process_row(
        self, process: Any, counter: Any, errnos: Mapping[Any, Errnos]
    ) -> dict[str, Value]:
        now = (counter, errnos.get((process.pid, process.comm, process.call)))
        before, row = self._known.get(process, (None, {}))
        if now != before:
            call = _CALLS[process.call]
            labels: dict[str, Value] = {"comm": _text(process.comm), "call": call}
            if self._by == "process":
                labels = {"pid": process.pid, **labels}
            row = _row(labels, call, *now)
            self._known[process] = (now, row)
        return dict(row)


def _errnos(failures: Sequence[tuple[Any, int]]) -> dict[tuple[int, bytes, int], Errnos]:
    """The errors of each row, the most frequent first."""
    found: dict[tuple[int, bytes, int], Errnos] = {}
    for failure, times in sorted(failures, key=lambda item: -item[1]):
        place = found.setdefault((failure.pid, failure.comm, failure.call), Errnos())
        place[name_error(failure.number)] = times
    return found


def _row(
    labels: dict[str, Value], call: str, counter: Any, errnos: Errnos | None
) -> dict[str, Value]:
    """A row of the tables; latencies are of all its calls, the percentiles estimates."""
    p50, p99 = percentiles(latency_buckets(counter.slots), (50, 99))
    return {
        **labels,
        "calls": counter.calls,
        "errors": counter.errors,
        "bytes": counter.bytes if call in _MOVES_BYTES else None,
        # A counter may be read while a call is being added to it.
        "avg_ns": counter.ns // counter.calls if counter.calls else None,
        "p50_ns": None if p50 is None else round(p50),
        "p99_ns": None if p99 is None else round(p99),
        "errnos": errnos,
    }


def _text(raw: bytes) -> str:
    """A C string as the file system's text, whatever bytes it has."""
    return os.fsdecode(raw.split(b"\0", 1)[0])


_KEYS = {
    "process": ("pid", "comm", "call"),
    "comm": ("comm", "call"),
    "call": ("call",),
}


def _is_filtered(options: Options) -> bool:
    """Whether only some calls are wanted: the others' programs have nothing to look up."""
    return any(options[name] is not None for name in ("pid", "uid", "comm"))


def _settings(options: Options) -> bytes | None:
    """struct choices: whose calls are counted.  Raises UsageError for an impossible one."""
    if not _is_filtered(options):
        return None
    pid, comm = options["pid"], options["comm"]
    if pid is not None and not 0 <= pid < 1 << 32:
        raise UsageError(f"--pid {pid}", "no process has that number", "see `ps -e`")
    uid = None if options["uid"] is None else find_uid(options["uid"])
    return _CHOICES.pack(
        os.fsencode(comm or "")[:_COMM_LENGTH],
        pid or 0,
        uid or 0,
        pid is not None,
        uid is not None,
        comm is not None,
    )


def _defines(options: Options) -> dict[str, int]:
    """What the C file is compiled with: what it does for nobody is not in the program."""
    return {
        "ROWS": _row_limit(),
        "ROWS_BY": list(_KEYS).index(options["by"]),
        "EVENTS": int(options["events"]),
        **({"FILTERED": 1} if _is_filtered(options) else {}),
    }


def _row_limit() -> int:
    """How many rows the maps have room for: fewer where many CPUs each hold a copy."""
    return min(_MOST_ROWS, _ROWS_MEMORY // (_ROW_SIZE * possible_cpus()))


# System calls, each with the programs at its entry and at its return.
_CONNECTIONS = {"connect": "connect", "accept": "accept", "accept4": "accept"}
_TRANSFERS = {"sendto": "send", "sendmsg": "send", "recvfrom": "recvfrom", "recvmsg": "recvmsg"}
_MANY = {"sendmmsg": "sendmmsg", "recvmmsg": "recvmmsg"}
_CLOSE = {"close": "close"}


def _hooks(entry: tuple[str, str], result: tuple[str, str], closes: bool) -> tuple[Hook, ...]:
    """Both ends of every system call; ``entry`` and ``result`` are (kind, prefix of the target)."""
    hooks = []
    for calls, end in (
        (_CONNECTIONS, "end_connection"),
        ({**_TRANSFERS, **(_CLOSE if closes else {})}, "end_call"),
        (_MANY, "end_messages"),
    ):
        for call, begin in calls.items():
            hooks.append(Hook(entry[0], entry[1] + call, f"begin_{begin}"))
            hooks.append(Hook(result[0], result[1] + call, end))
    return tuple(hooks)


def _tracepoints(closes: bool) -> tuple[Hook, ...]:
    return _hooks(
        ("tracepoint", "syscalls:sys_enter_"), ("tracepoint", "syscalls:sys_exit_"), closes
    )


_RAW_TRACEPOINTS = (
    Hook("raw_tracepoint", "sys_enter", "begin_any"),
    Hook("raw_tracepoint", "sys_exit", "end_any"),
)
_NO_BTF_FIELDS = (
    "time",
    "pid",
    "comm",
    "uid",
    "user",
    "call",
    "family",
    "address",
    "port",
    "ret",
    "error",
    "latency_ns",
)
_FIELDS = (*_NO_BTF_FIELDS, "local_address", "local_port")
_LOST_WITHOUT_BTF = (
    "closes",
    "local addresses",
    "addresses of accepts that did not ask for them",
    "names of processes (of threads instead)",
)

_KEY_COLUMNS = {
    "pid": Column("pid", "pid"),
    "comm": Column("comm", "command"),
    "call": Column("call", "call"),
}

MONITOR = Monitor(
    name="net-monitor",
    summary="Socket calls by process: connect, accept, send, receive, close.",
    source="net_monitor.c",
    rungs=(
        Rung(
            "tracepoint",
            _tracepoints(closes=True),
            fields=_FIELDS,
            defines={"RUNG_TRACEPOINT": 1, "WITH_BTF": 1},
            needs_btf=True,
        ),
        Rung(
            "fentry",
            _hooks(("fentry", "syscall:"), ("fexit", "syscall:"), closes=True),
            fields=_FIELDS,
            defines={"RUNG_FENTRY": 1, "WITH_BTF": 1},
            needs_btf=True,
        ),
        Rung(
            "raw tracepoint",
            _RAW_TRACEPOINTS,
            fields=_FIELDS,
            lost=("low cost (it runs on every system call)",),
            defines={"RUNG_RAW_TRACEPOINT": 1, "WITH_BTF": 1},
            needs_btf=True,
        ),
        Rung(
            "tracepoint without BTF",
            _tracepoints(closes=False),
            fields=_NO_BTF_FIELDS,
            lost=_LOST_WITHOUT_BTF,
            defines={"RUNG_TRACEPOINT": 1},
        ),
        Rung(
            "raw tracepoint without BTF",
            _RAW_TRACEPOINTS,
            fields=_NO_BTF_FIELDS,
            lost=(*_LOST_WITHOUT_BTF, "low cost (it runs on every system call)"),
            defines={"RUNG_RAW_TRACEPOINT": 1},
        ),
    ),
    collector=_Collector,
    columns=lambda options: (
        *(_KEY_COLUMNS[name] for name in _KEYS[options["by"]]),
        Column("calls", "calls", "count"),
        Column("calls_per_s", "calls/s", "rate", share=True),
        Column("errors", "errors", "count"),
        Column("bytes", "bytes", "bytes"),
        Column("bytes_per_s", "bytes/s", "byte_rate"),
        Column("avg_ns", "avg", "ns"),
        Column("p50_ns", "p50", "ns"),
        Column("p99_ns", "p99", "ns"),
        Column("errnos", "errno"),
    ),
    key=lambda options: _KEYS[options["by"]],
    counters=("calls", "errors", "bytes"),
    headline="calls",
    options=(
        Option("by", "what a row stands for", default="process", choices=tuple(_KEYS)),
        Option("pid", "only of this process", kind=int, metavar="PID"),
        Option("comm", "only of processes called so", metavar="NAME"),
        Option("uid", "only of this user, by name or number", metavar="USER"),
    ),
    event_columns=(
        Column("time", "time", "time"),
        Column("pid", "pid"),
        Column("comm", "comm"),
        Column("call", "call"),
        Column("family", "family"),
        Column("address", "address"),
        Column("port", "port"),
        Column("local_address", "local"),
        Column("local_port", "port"),
        Column("error", "error"),
        Column("latency_ns", "took", "ns"),
    ),
    events="option",
    defines=_defines,
    settings=_settings,
)
