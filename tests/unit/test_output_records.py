"""Records written by a template are, byte for byte, what the same events give one by one."""

from __future__ import annotations

import csv
import io
import json
import random
import struct
from typing import Any

import pytest

from hypermesh_ebpf.bpf import map_types
from hypermesh_ebpf.bpf.record_shape import make_shape
from hypermesh_ebpf.bpf.spec import MapSpec
from hypermesh_ebpf.bpf.types import parse_type
from hypermesh_ebpf.metrics.event_log import EventLog, Records
from hypermesh_ebpf.metrics.sample import Start
from hypermesh_ebpf.output.sink import open_sink
from hypermesh_ebpf.program_view import make_view
from tests.unit.test_output_program import Kernel, structure

CHAR = {"kind": "int", "name": "char", "size": 1, "signed": True}
NAMES = {"type": "type_", "time": "time_"}


def integer(size: int, *, signed: bool = False) -> dict[str, Any]:
    return {"kind": "int", "name": f"int{size}", "size": size, "signed": signed}


def array(element: Any, count: int) -> dict[str, Any]:
    return {"kind": "array", "element": element, "count": count}


def floating(size: int) -> dict[str, Any]:
    return {"kind": "float", "name": "float", "size": size}


BOOL = {"kind": "bool", "name": "_Bool", "size": 1}
COLOR = {"kind": "enum", "name": "color", "size": 1, "signed": False, "values": {"RED": 1, "B%": 2}}
POINTER = {"kind": "pointer", "size": 8}
INNER = structure(x=integer(2), y=integer(4, signed=True))
EITHER = {
    "kind": "union",
    "name": "either",
    "size": 8,
    "members": [
        {"name": "number", "type": integer(8), "offset": 0},
        {"name": "text", "type": array(CHAR, 8), "offset": 0},
    ],
}
BITS = {
    "kind": "struct",
    "name": "bits",
    "size": 4,
    "members": [
        {"name": "low", "type": integer(4), "offset": 0, "bits": 5},
        {"name": "high", "type": integer(4, signed=True), "offset": 5, "bits": 9},
    ],
}
TWICE = {
    "kind": "struct",
    "name": "twice",
    "size": 8,
    "members": [
        {"name": "same", "type": integer(4), "offset": 0},
        {"name": "same", "type": integer(4), "offset": 32},
    ],
}

TYPES = {
    "numbers": structure(a=integer(8), b=integer(4, signed=True), c=integer(1), d=integer(2)),
    "text": structure(pid=integer(4), comm=array(CHAR, 16), path=array(CHAR, 5)),
    "only text": structure(comm=array(CHAR, 16)),
    "open end": structure(pid=integer(4), words=array(integer(4), 0)),
    "open text": structure(pid=integer(4), text=array(CHAR, 0)),
    "open structures": structure(pid=integer(4), more=array(INNER, 0)),
    "open pointers": structure(pid=integer(4), more=array(POINTER, 0)),
    "floats": structure(part=floating(8), half=floating(4), tiny=floating(2)),
    "everything": structure(
        flag=BOOL, color=COLOR, at=POINTER, big=integer(16, signed=True), inner=INNER, n=integer(4)
    ),
    "arrays": structure(v4=array(integer(1), 4), comm=array(CHAR, 8), parts=array(floating(8), 2)),
    "arrays of structures": structure(n=integer(4), parts=array({**INNER}, 1)),
    "nested": structure(outer=structure(inner=INNER, color=COLOR), last=integer(8)),
    "union inside": structure(n=integer(8), either=EITHER),
    "union": EITHER,
    "bit fields": BITS,
    "a name twice": TWICE,
    "reserved names": structure(type=integer(4), time=integer(8), map=integer(4)),
    "odd names": structure(**{'"%s"\\': integer(4), "ünï %%": integer(4)}),
    "a number": integer(4),
    "a text": array(CHAR, 8),
    "an enum": COLOR,
    "an array": array(integer(2), 3),
    "not known": {"kind": "opaque", "size": 8},
    "unknown size": {"kind": "opaque", "size": 0},
    "nothing": {"kind": "struct", "name": "nothing", "size": 0, "members": []},
    "padding": {"kind": "struct", "name": "padding", "size": 8, "members": []},
}
NASTY = [
    b'"quo\\te\n\t\x7f%s%%d',
    b"\x00\xff\xfe\x80\x81",
    "grün € \U0001f600 ".encode(),
    "\u202e\u2028".encode() + b"\x1b[31m",
    b"\xed\xa0\x80",
    struct.pack("=ddd", float("nan"), float("inf"), -0.0),
    struct.pack("=dfe", float("-inf"), float("nan"), float("inf")),
    b"\xff" * 64,
    bytes(64),
]


def records_of(name: str) -> list[bytes]:
    """Records of a type with every value that may go wrong, and random ones."""
    source = random.Random(name)
    size = parse_type(TYPES[name]).size
    raw = [(each + source.randbytes(64))[: size or 9] for each in NASTY]
    raw += [source.randbytes(size or 3) for _ in range(60)]
    return raw + [each for each in raw for _ in range(2)]


def write(
    kind: str,
    name: str,
    events: Any,
    monkeypatch: Any,
    *,
    terminal: bool = False,
    limited: bool = False,
) -> str:
    """What a sink makes of events of a ring buffer with records of that type."""
    Kernel(monkeypatch)
    described = MapSpec("events", map_types.RINGBUF, 0, 0, 4096, 0, None, TYPES[name])
    monitor, _collector = make_view([(described, 100)], "prog.c")
    out = io.StringIO()
    if terminal:
        monkeypatch.setattr(out, "isatty", lambda: True)
    sink = open_sink(
        kind, monitor, {}, interval=1, top=20, stream=out, show_events=True, limited=limited
    )
    sink.start(Start(0.0, "prog.c", "lo", (), None, ()))
    for each in events:
        sink.events(each)
    return out.getvalue()


def take_apart(name: str, records: list[bytes]) -> Records:
    type_ = parse_type(TYPES[name])
    shape = make_shape(type_, {"map": 'ev"%s'}, NAMES)
    size, unpack = shape.layout.size, shape.layout.unpack_from
    rows = [unpack(raw) if len(raw) >= size else raw for raw in records]
    return Records(1_700_000_000.25, "prog.c", shape, rows)


@pytest.mark.parametrize("name", list(TYPES))
@pytest.mark.parametrize("kind", ["json", "csv", "terminal"])
def test_a_batch_is_written_as_its_events_are(kind: str, name: str, monkeypatch: Any) -> None:
    records = take_apart(name, records_of(name))
    terminal, kind = kind == "terminal", kind.replace("terminal", "json")
    singly = [[event] for event in records.events()]
    wanted = write(kind, name, singly, monkeypatch, terminal=terminal)
    assert write(kind, name, [EventLog([records])], monkeypatch, terminal=terminal) == wanted
    assert len(wanted.splitlines()) > len(records.rows)


@pytest.mark.parametrize("name", list(TYPES))
def test_each_stands_for_itself_where_overhead_is_limited(name: str, monkeypatch: Any) -> None:
    records = take_apart(name, records_of(name))
    plain = write("csv", name, [EventLog([records])], monkeypatch)
    limited = write("csv", name, [EventLog([records])], monkeypatch, limited=True)
    (head, *rows), (wanted_head, *wanted) = (
        list(csv.reader(io.StringIO(text))) for text in (limited, plain)
    )
    assert head == [*wanted_head, "stands_for"]
    assert rows == [[*row, "1"] for row in wanted]


@pytest.mark.parametrize("name", list(TYPES))
def test_json_is_that_of_the_json_module(name: str, monkeypatch: Any) -> None:
    """Of the values that the type's own decoding gives; what is not finite is null."""
    raws, type_ = records_of(name), parse_type(TYPES[name])
    lines = write("json", name, [EventLog([take_apart(name, raws)])], monkeypatch).splitlines()[1:]
    for raw, line in zip(raws, lines, strict=True):
        value = type_.decode(raw)
        fields = value if isinstance(value, dict) else {"value": value}
        wanted = {
            "type": "event",
            "time": "2023-11-14T22:13:20.250000Z",
            "monitor": "prog.c",
            "map": 'ev"%s',
            **{NAMES.get(field, field): each for field, each in fields.items()},
        }
        text = json.dumps(wanted, ensure_ascii=False, separators=(",", ":"))
        for word in ("NaN", "-Infinity", "Infinity"):
            text = text.replace(f":{word}", ":null").replace(f"[{word}", "[null")
            text = text.replace(f",{word}", ",null")
        assert line == text


@pytest.mark.parametrize("kind", ["json", "csv"])
def test_records_that_are_too_short_stay_in_their_place(kind: str, monkeypatch: Any) -> None:
    raws = records_of("text")
    raws[3:3] = [b"short", b""]
    records = take_apart("text", raws)
    singly = [[event] for event in records.events()]
    batch = write(kind, "text", [EventLog([records, records])], monkeypatch)
    assert batch == write(kind, "text", singly + singly, monkeypatch)
    assert ('"data":"73686f7274"' if kind == "json" else 'ev""%s') in batch


def test_a_log_is_a_sequence_of_events() -> None:
    records = take_apart("numbers", records_of("numbers"))
    log = EventLog([records, take_apart("numbers", []), records])
    events = list(records.events())
    assert list(log) == events * 2
    assert len(log) == 2 * len(records.rows)
    assert log[0] == events[0]
    assert log[-3:] == events[-3:]
    assert not EventLog([])
