"""net-monitor's declaration: what becomes of bytes from the kernel, and of the user's options."""

from __future__ import annotations

import json
import socket
import struct
import time
from collections import namedtuple
from collections.abc import Sequence
from typing import Any

import pytest

from hypermesh_ebpf.errors import UsageError
from hypermesh_ebpf.image.source import bundled_directory
from hypermesh_ebpf.monitors.net_monitor import (
    MONITOR,
    Errnos,
    latency_buckets,
    name_address,
    name_error,
    name_family,
)
from hypermesh_ebpf.output.draw import format_text

OPTIONS = {"by": "process", "pid": None, "comm": None, "uid": None, "events": True}
Counter = namedtuple("Counter", "calls errors bytes ns slots")
Process = namedtuple("Process", "pid call comm")
Failure = namedtuple("Failure", "pid call number comm")
CONNECT, ACCEPT, SEND, RECV, CLOSE = range(5)


class FakeMap:
    """A map with these entries."""

    def __init__(self, entries: Sequence[tuple[Any, Any]]) -> None:
        self._entries = entries

    def items(self) -> Sequence[tuple[Any, Any]]:
        return self._entries

    def entries(self) -> FakeMap:
        return self

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def identities(self) -> list[Any]:
        return [key for key, _value in self._entries]

    def keys(self, member: str) -> list[Any]:
        return [getattr(key, member) for key, _value in self._entries]

    def values(self, member: str) -> list[Any]:
        return [getattr(value, member) for _key, value in self._entries]

    def select(self, places: Sequence[int]) -> FakeMap:
        return FakeMap([self._entries[place] for place in places])


def slots(**counts: int) -> tuple[int, ...]:
    """``slots(s3=5)``: five calls in slot 3, which is 1,024 to 2,047 ns."""
    return tuple(counts.get(f"s{number}", 0) for number in range(32))


def comm(name: str) -> bytes:
    return name.encode().ljust(16, b"\0")


def collector(by: str = "process", **maps: Sequence[tuple[Any, Any]]) -> Any:
    """The collector over these maps, those not given empty."""
    nothing = Counter(0, 0, 0, 0, slots())
    filled: dict[str, Any] = {
        "counts": list(enumerate([0] * 5)),
        "calls": list(enumerate([nothing] * 5)),
        "rows": (),
        "failures": (),
        **maps,
    }
    named: Any = {name: FakeMap(entries) for name, entries in filled.items()}
    return MONITOR.collector({**OPTIONS, "by": by}, {"system": named})


def record(**fields: Any) -> bytes:
    """struct event as the kernel would write it on a little-endian machine."""
    values = {
        "end_ns": time.monotonic_ns(),
        "latency_ns": 1234,
        "ret": 0,
        "pid": 42,
        "uid": 0,
        "family": 2,
        "call": CONNECT,
        "weight": 1,
        "comm": b"client",
        "port": 0,
        "address": b"",
        "local_port": 0,
        "local_address": b"",
        **fields,
    }
    head = struct.pack(
        "<QQQiIIHH16s",
        *(
            values[n]
            for n in ("end_ns", "latency_ns", "weight", "ret", "pid", "uid", "family", "call")
        ),
        values["comm"],
    )
    ends = b"".join(
        struct.pack("<HH", values[port], len(values[address])) + values[address].ljust(108, b"\xaa")
        for port, address in (("port", "address"), ("local_port", "local_address"))
    )
    return head + ends


@pytest.mark.parametrize(
    ("number", "name"),
    [
        (111, "ECONNREFUSED"),
        (11, "EAGAIN"),
        (95, "EOPNOTSUPP"),
        (512, "ERESTARTSYS"),
        (516, "ERESTART_RESTARTBLOCK"),
        (4000, "4000"),
    ],
)
def test_error_names(number: int, name: str) -> None:
    assert name_error(number) == name


@pytest.mark.parametrize(
    ("number", "name"),
    [
        (0, "unspec"),
        (1, "unix"),
        (2, "inet"),
        (10, "inet6"),
        (40, "vsock"),
        (999, "family 999"),
        (0xFFFF, None),
    ],
)
def test_family_names(number: int, name: str | None) -> None:
    assert name_family(number) == name


@pytest.mark.parametrize(
    ("family", "raw", "address"),
    [
        ("inet", b"\x7f\0\0\x01", "127.0.0.1"),
        ("inet6", socket.inet_pton(socket.AF_INET6, "fe80::1"), "fe80::1"),
        ("inet6", socket.inet_pton(socket.AF_INET6, "::ffff:10.0.0.1"), "::ffff:10.0.0.1"),
        ("unix", b"/run/x.sock\0", "/run/x.sock"),
        ("unix", b"/run/x.sock\0garbage", "/run/x.sock"),
        ("unix", b"/run/no-zero", "/run/no-zero"),
        ("unix", b"\0abstract", "@abstract"),
        ("unix", b"\0two\0parts", "@two@parts"),
        ("unix", b"/run/\xff", "/run/\udcff"),
        ("unix", b"", None),
        (None, b"", None),
    ],
)
def test_addresses(family: str | None, raw: bytes, address: str | None) -> None:
    assert name_address(family, raw) == address


def test_first_bucket_begins_at_nothing() -> None:
    assert latency_buckets(slots(s0=2, s1=3)) == ((0, 255, 2), (256, 511, 3))
    assert latency_buckets(slots(s3=1)) == ((1024, 2047, 1),)
    assert latency_buckets(slots()) == ()


def test_event_of_a_refused_connect() -> None:
    event = collector().decode(record(ret=-111, port=443, address=b"\x0a\0\0\x01"))
    assert abs(event.pop("time") - time.time()) < 60
    assert event == {
        "pid": 42,
        "comm": "client",
        "uid": 0,
        "user": "root",
        "call": "connect",
        "family": "inet",
        "address": "10.0.0.1",
        "port": 443,
        "local_address": None,
        "local_port": None,
        "ret": -111,
        "error": "ECONNREFUSED",
        "latency_ns": 1234,
    }


def test_event_of_a_unix_accept_has_no_ports() -> None:
    path = b"/run/docker.sock\0"
    event = collector().decode(record(call=ACCEPT, family=1, ret=7, local_address=path))
    assert (event["call"], event["family"], event["ret"]) == ("accept", "unix", 7)
    assert (event["address"], event["port"]) == (None, None)
    assert (event["local_address"], event["local_port"]) == ("/run/docker.sock", None)


def test_an_unbound_socket_has_no_local_address() -> None:
    event = collector().decode(record(local_address=bytes(4), local_port=0))
    assert (event["local_address"], event["local_port"]) == (None, None)
    event = collector().decode(record(local_address=bytes(4), local_port=80))
    assert (event["local_address"], event["local_port"]) == ("0.0.0.0", 80)


def test_every_rung_gives_the_fields_of_its_events() -> None:
    event = collector().decode(record())
    for rung in MONITOR.rungs:
        assert set(rung.fields) <= set(event)
    assert set(MONITOR.rungs[0].fields) == set(event)


def test_rows_by_process() -> None:
    reading = collector(
        rows=[
            (Process(7, SEND, comm("web")), Counter(4, 1, 300, 8000, slots(s3=4))),
            (Process(7, CONNECT, comm("web")), Counter(1, 0, 0, 500, slots(s1=1))),
        ],
        failures=[
            (Failure(7, SEND, 32, comm("web")), 1),
            (Failure(7, SEND, 11, comm("web")), 3),
        ],
    ).collect()
    first, second = reading.rows
    assert first == {
        "pid": 7,
        "comm": "web",
        "call": "send",
        "calls": 4,
        "errors": 1,
        "bytes": 300,
        "avg_ns": 2000,
        "p50_ns": pytest.approx(1536, abs=1),
        "p99_ns": pytest.approx(2037, abs=1),
        "errnos": {"EAGAIN": 3, "EPIPE": 1},
    }
    assert list(first["errnos"]) == ["EAGAIN", "EPIPE"]  # the most frequent first
    assert second["bytes"] is None, "a connect moves none, which is not the same as 0"
    assert second["errnos"] is None


def test_an_error_that_is_read_late_is_not_forgotten() -> None:
    rows = [(Process(7, SEND, comm("web")), Counter(1, 1, 0, 500, slots(s1=1)))]
    failures: list[tuple[Any, int]] = []
    monitor = collector(rows=rows, failures=failures)
    (row,) = monitor.collect().rows
    assert row["errnos"] is None  # the kernel counts it a moment later
    failures.append((Failure(7, SEND, 32, comm("web")), 1))
    (row,) = monitor.collect().rows
    assert row["errnos"] == {"EPIPE": 1}


def test_totals_and_histograms_come_from_the_calls_even_when_rows_are_full() -> None:
    nothing = Counter(0, 0, 0, 0, slots())
    calls = [nothing] * 5
    calls[SEND] = Counter(3, 1, 50, 900, slots(s0=3))
    calls[CLOSE] = Counter(2, 0, 0, 700, slots(s1=2))
    reading = collector(
        calls=list(enumerate(calls)), counts=list(enumerate([1, 2, 4, 8, 16]))
    ).collect()
    totals = {"calls": 5, "bytes": 50, "errors": 1, "bytes_unknown_calls": 16}
    assert reading.totals == totals
    assert (reading.events_lost, reading.map_full) == (1, 2 + 4 + 8)
    assert [(h.name, h.unit, h.buckets) for h in reading.histograms] == [
        ("latency", "ns", ((0, 255, 3), (256, 511, 2))),
        ("send latency", "ns", ((0, 255, 3),)),
        ("close latency", "ns", ((256, 511, 2),)),
    ]


def test_rows_by_call() -> None:
    nothing = Counter(0, 0, 0, 0, slots())
    calls = [Counter(2, 1, 0, 4000, slots(s4=2)), *[nothing] * 4]
    failures = [(Failure(0, CONNECT, 111, bytes(16)), 1)]
    (row,) = collector("call", calls=list(enumerate(calls)), failures=failures).collect().rows
    assert row["call"] == "connect" and row["errnos"] == {"ECONNREFUSED": 1}
    assert "pid" not in row and "comm" not in row


def test_nothing_counted_yet() -> None:
    reading = collector().collect()
    assert (reading.totals["calls"], reading.rows, reading.histograms) == (0, [], ())


def test_errnos_as_json_and_as_text() -> None:
    errnos = Errnos({"EAGAIN": 3, "EPIPE": 1})
    assert json.loads(json.dumps(errnos)) == {"EAGAIN": 3, "EPIPE": 1}
    assert format_text(errnos) == "EAGAIN 3, EPIPE 1"


def choices(**given: Any) -> tuple[Any, ...]:
    """The settings' fields: comm, pid, uid, by_pid, by_uid, by_comm."""
    raw = MONITOR.settings({**OPTIONS, **given})
    assert raw is not None and len(raw) == 28
    return struct.unpack("<16sII3Bx", raw)


def test_settings() -> None:
    assert MONITOR.settings(OPTIONS) is None
    assert choices(pid=0)[3] == 1, "pid 0 is a filter as well"
    assert choices(uid="root", pid=42)[1:5] == (42, 0, 1, 1)
    assert choices(comm="a-name-longer-than-15")[0] == b"a-name-longer-t\0"
    rows = [MONITOR.defines({**OPTIONS, "by": by})["ROWS_BY"] for by in ("process", "comm", "call")]
    assert rows == [0, 1, 2]
    assert [MONITOR.defines({**OPTIONS, "events": e})["EVENTS"] for e in (False, True)] == [0, 1]


def test_unknown_user() -> None:
    with pytest.raises(UsageError, match="--uid no-such-user: no such user"):
        choices(uid="no-such-user")


@pytest.mark.parametrize("pid", [-1, 1 << 32])
def test_impossible_pid(pid: int) -> None:
    with pytest.raises(UsageError, match=f"--pid {pid}: no process has that number"):
        choices(pid=pid)


def test_every_program_is_in_the_source() -> None:
    source = (bundled_directory() / MONITOR.source).read_text()
    for rung in MONITOR.rungs:
        for hook in rung.hooks:
            assert f"int {hook.program}(" in source
