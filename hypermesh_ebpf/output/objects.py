"""The host's programs, maps, links and attachments as tables, one JSON document, or CSV."""

from __future__ import annotations

import csv
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from io import StringIO
from typing import Any, TextIO

from hypermesh_ebpf.host.attachment import Attachment
from hypermesh_ebpf.host.holders import Holder
from hypermesh_ebpf.host.objects import Link, MapObject, Objects, Program
from hypermesh_ebpf.host.users import name_user
from hypermesh_ebpf.metrics.sample import Row
from hypermesh_ebpf.monitors.declaration import Column
from hypermesh_ebpf.output.draw import format_elapsed
from hypermesh_ebpf.output.grid import Grid, Line
from hypermesh_ebpf.output.json import format_time
from hypermesh_ebpf.output.writer import Writer

KINDS = ("programs", "maps", "links", "attachments")

# What comes last is left out first where the terminal is narrow.
_COLUMNS = {
    "programs": (
        Column("mark", ""),
        Column("id", "id"),
        Column("type", "type"),
        Column("name", "name"),
        Column("attached", "attached to"),
        Column("age", "age"),
        Column("runs", "runs", "count"),
        Column("mean_ns", "mean", "ns"),
        Column("owner", "owner"),
        Column("maps", "maps"),
        Column("memory", "memory", "bytes"),
        Column("pin", "pinned at"),
        Column("tag", "tag"),
    ),
    "maps": (
        Column("mark", ""),
        Column("id", "id"),
        Column("type", "type"),
        Column("name", "name"),
        Column("key", "key", "bytes"),
        Column("value", "value", "bytes"),
        Column("entries", "entries", "count"),
        Column("memory", "memory", "bytes"),
        Column("programs", "programs"),
        Column("owner", "owner"),
        Column("pin", "pinned at"),
    ),
    "links": (
        Column("mark", ""),
        Column("id", "id"),
        Column("type", "type"),
        Column("attached", "attached to"),
        Column("program", "program"),
        Column("owner", "owner"),
        Column("pin", "pinned at"),
    ),
    "attachments": (
        Column("mark", ""),
        Column("attached", "attached to"),
        Column("program", "program"),
        Column("link", "link"),
        Column("owner", "owner"),
    ),
}
_KEYS = ("mark", "id", "type", "name", "attached")


def show_objects(objects: Objects, kinds: Sequence[str], output: str, stream: TextIO) -> None:
    """Write the objects of those kinds as "table", "json" or "csv" (the first kind alone).

    Raises OutputError, OutputClosed.
    """
    if output == "json":
        write_json(as_document(objects, kinds), stream)
    elif output == "csv":
        Writer(stream).write(_as_csv(objects, kinds[0]).encode("utf-8", "surrogateescape"))
    else:
        write_lines(lambda width, ascii: draw_objects(objects, kinds, width, ascii), stream)


def write_json(document: Mapping[str, Any], stream: TextIO) -> None:
    """One JSON document; ASCII on a terminal, which obeys some other characters."""
    text = json.dumps(document, indent=2, ensure_ascii=stream.isatty(), default=list)
    Writer(stream).write(text.encode("utf-8", "surrogateescape") + b"\n")


def write_lines(draw: Callable[[int | None, bool], Iterable[Line]], stream: TextIO) -> None:
    """Lines of (text, style): coloured and as wide as a terminal is, or plain."""
    charset = (getattr(stream, "encoding", None) or "ascii").lower().replace("-", "")
    ascii = charset != "utf8"
    if stream.isatty():
        from hypermesh_ebpf.output.findings import paint

        width = os.get_terminal_size(stream.fileno()).columns or 80
        text = paint(draw(width, ascii), stream)
    else:
        lines = ("".join(part for part, _ in line).rstrip() for line in draw(None, ascii))
        text = "".join(line + "\n" for line in lines)
    Writer(stream).write(text.encode("utf-8", "surrogateescape"))


def as_document(objects: Objects, kinds: Sequence[str]) -> dict[str, Any]:
    """The JSON document: ``time``, ``statistics`` and a list for each kind (null: not to be
    seen)."""
    document: dict[str, Any] = {
        "time": format_time(objects.time),
        "statistics": objects.statistics,
    }
    for kind in kinds:
        items = getattr(objects, kind)
        document[kind] = None if items is None else [as_json(each, objects) for each in items]
    return document


def as_json(each: Program | MapObject | Link | Attachment, objects: Objects) -> dict[str, Any]:
    """One object as JSON writes it."""
    found = each.as_dict()
    if isinstance(each, Program):
        found["loaded_at"] = format_time(each.info.loaded_at)
    if isinstance(each, Attachment):
        program = objects.program(each.program_id)
        found["program_name"] = program.name if program else None
        found["ours"] = program.ours if program else None
    return found


_CSV_FIELDS: dict[str, tuple[str, ...]] = {
    "programs": (
        *("id", "type", "name", "tag", "ours", "loaded_at", "uid", "user", "run_count"),
        *("run_time_ns", "mean_ns", "missed", "map_ids", "memlock_bytes", "attachments"),
        *("processes", "pins"),
    ),
    "maps": (
        *("id", "type", "name", "ours", "key_bytes", "value_bytes", "max_entries", "flags"),
        *("memlock_bytes", "program_ids", "processes", "pins"),
    ),
    "links": (
        *("id", "type", "ours", "program_id", "program_name", "attachment", "processes", "pins"),
    ),
    "attachments": (
        *("hook", "kind", "target", "program_id", "program_name", "ours", "link_id", "iface"),
        *("ifindex", "mode", "direction", "priority", "position", "attach_type", "cgroup", "netns"),
    ),
}


def _as_csv(objects: Objects, kind: str) -> str:
    text = StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_CSV_FIELDS[kind])
    for each in getattr(objects, kind) or ():
        row = as_json(each, objects)
        writer.writerow([_cell(row[name]) for name in _CSV_FIELDS[kind]])
    return text.getvalue()


def _cell(value: Any) -> Any:
    """None empty, true and false as in JSON, several values with spaces between."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Mapping):
        return value["hook"] if "hook" in value else f"{value['pid']}/{value['comm']}"
    if isinstance(value, (list, tuple)):
        return " ".join(str(_cell(each)) for each in value)
    return value


def draw_objects(
    objects: Objects, kinds: Sequence[str], width: int | None, ascii: bool
) -> list[Line]:
    """A table for each kind; ``width`` None is a pipe: numbers in full, nothing left out."""
    lines: list[Line] = []
    for kind in kinds:
        items = getattr(objects, kind)
        if items is None:
            continue
        if lines:
            lines.append([])
        if len(kinds) > 1:
            lines.append([(f"{kind.capitalize()} ({len(items)})", "title")])
        rows = [_ROWS[kind](each, objects) for each in items]
        if rows:
            lines += draw_rows(_shown(kind, rows), rows, width, ascii)
        elif len(kinds) == 1:
            lines.append([(f"no {kind}", "dim")])
    if any(line and line[0][0].startswith("*") for line in lines):
        lines += [[], [("* ours", "dim")]]
    return lines


def _shown(kind: str, rows: Sequence[Row]) -> list[Column]:
    """The columns that have something to say; those that name an object, always."""
    return [
        column
        for column in _COLUMNS[kind]
        if column.field in _KEYS or any(row[column.field] not in (None, "") for row in rows)
    ]


def draw_rows(
    columns: Sequence[Column], rows: Sequence[Row], width: int | None, ascii: bool
) -> list[Line]:
    """A heading and a line for each row."""
    grid = Grid(columns, _KEYS, exact=width is None, ascii=ascii)
    heading, lines = grid.lines(rows, width)
    return [heading, *lines]


def _program_row(each: Program, objects: Objects) -> Row:
    about = each.info
    name = f"{each.name} ({' > '.join(each.members)})" if each.members else each.name
    return {
        "mark": "*" if each.ours else "",
        "id": each.id,
        "type": about.type,
        "name": name,
        "attached": " ".join(map(str, each.attachments)),
        "age": format_elapsed(objects.time - about.loaded_at),
        "runs": each.run_count,
        "mean_ns": each.mean_ns,
        "owner": name_owner(about.uid, each.processes),
        "maps": " ".join(map(str, about.map_ids)),
        "memory": about.memlock,
        "pin": _name_pins(each.pins),
        "tag": about.tag,
    }


def _map_row(each: MapObject, objects: Objects) -> Row:
    about = each.info
    return {
        "mark": "*" if each.ours else "",
        "id": each.id,
        "type": about.type,
        "name": each.name,
        "key": about.key_size,
        "value": about.value_size,
        "entries": about.max_entries,
        "memory": about.memlock,
        "programs": " ".join(map(str, each.program_ids)),
        "owner": name_owner(None, each.processes),
        "pin": _name_pins(each.pins),
    }


def _link_row(each: Link, objects: Objects) -> Row:
    return {
        "mark": "*" if each.ours else "",
        "id": each.id,
        "type": each.info.type,
        "attached": str(each.attachment) if each.attachment else None,
        "program": f"{each.info.prog_id} {each.program_name}".rstrip(),
        "owner": name_owner(None, each.processes),
        "pin": _name_pins(each.pins),
    }


def _attachment_row(each: Attachment, objects: Objects) -> Row:
    program = objects.program(each.program_id)
    return {
        "mark": "*" if program and program.ours else "",
        "attached": str(each),
        "program": f"{each.program_id} {program.name if program else ''}".rstrip(),
        "link": each.link_id,
        "owner": name_owner(program.info.uid, program.processes) if program else None,
    }


_ROWS: dict[str, Callable[[Any, Objects], Row]] = {
    "programs": _program_row,
    "maps": _map_row,
    "links": _link_row,
    "attachments": _attachment_row,
}


def name_owner(uid: int | None, processes: Sequence[Holder]) -> str | None:
    """Who loaded it and who holds it: ``root: python(4711)``."""
    user = None if uid is None else name_user(uid) or str(uid)
    held = " ".join(f"{holder.comm}({holder.pid})" for holder in processes)
    return ": ".join(part for part in (user, held) if part) or None


def _name_pins(paths: Sequence[str]) -> str | None:
    if len(paths) > 1:
        return f"{paths[0]} +{len(paths) - 1}"
    return paths[0] if paths else None


def local_time(seconds: float) -> str:
    """A moment for people: local time to the second."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
