"""The entries of maps, typed: tables, histograms, one JSON document, or CSV."""

from __future__ import annotations

import csv
import time
from collections.abc import Sequence
from dataclasses import dataclass
from io import StringIO
from typing import Any, TextIO

from hypermesh_ebpf.bpf import map_types
from hypermesh_ebpf.bpf.maps import TypedMap
from hypermesh_ebpf.bpf.names import MAP_TYPES, name_type
from hypermesh_ebpf.bpf.types import flatten
from hypermesh_ebpf.metrics.sample import Row
from hypermesh_ebpf.output import histograms
from hypermesh_ebpf.output.draw import format_text, printable
from hypermesh_ebpf.output.grid import Grid, Line
from hypermesh_ebpf.output.json import format_time
from hypermesh_ebpf.output.objects import write_json, write_lines
from hypermesh_ebpf.output.writer import Writer
from hypermesh_ebpf.program_histograms import find_slots
from hypermesh_ebpf.program_tables import make_layout


@dataclass(frozen=True, slots=True)
class Dump:
    """A map's entries at one moment; ``left_out`` is None where nobody knows how many."""

    id: int
    typed: TypedMap
    entries: Sequence[tuple[Any, Any]]
    left_out: int | None

    @classmethod
    def read(cls, number: int, typed: TypedMap, limit: int | None) -> Dump:
        """Read a map.  Raises MapError."""
        entries = typed.entries(limit)
        return cls(number, typed, entries, typed.left_out)

    @property
    def type(self) -> str:
        """The kernel's name of the map's type."""
        return name_type(MAP_TYPES, self.typed.spec.type)


def show_dumps(
    dumps: Sequence[Dump], set_name: str | None, output: str, stream: TextIO, *, all_: bool
) -> None:
    """Write maps as "table", "json" or "csv" (of the first alone).

    ``all_`` shows an array's entries that are zero, too.  Raises OutputError, OutputClosed.
    """
    if output == "json":
        document = {
            "time": format_time(time.time()),
            "set": set_name,
            "maps": [_as_json(dump) for dump in dumps],
        }
        write_json(document, stream)
    elif output == "csv":
        Writer(stream).write(_as_csv(dumps[0]).encode("utf-8", "surrogateescape"))
    else:
        write_lines(lambda width, ascii: draw_dumps(dumps, width, ascii, all_=all_), stream)


def _as_json(dump: Dump) -> dict[str, Any]:
    return {
        "id": dump.id,
        "name": dump.typed.spec.name,
        "type": dump.type,
        "entries": [{"key": key, "value": value} for key, value in dump.entries],
        "left_out": dump.left_out,
        "reason": dump.typed.reason,
    }


def _as_csv(dump: Dump) -> str:
    layout = make_layout(dump.typed, (), False)
    text = StringIO()
    writer = csv.writer(text, lineterminator="\n")
    fields = [column.field for column in layout.columns]
    writer.writerow(fields)
    for key, value in dump.entries:
        row = layout.flatten({"key": key, "value": value})
        writer.writerow([_cell(row.get(field)) for field in fields])
    return text.getvalue()


def _cell(value: Any) -> Any:
    if isinstance(value, bool):
        return "true" if value else "false"
    return value if isinstance(value, (int, float)) else format_text(value)


def draw_dumps(dumps: Sequence[Dump], width: int | None, ascii: bool, *, all_: bool) -> list[Line]:
    """A title and a table, or a histogram, for each map."""
    lines: list[Line] = []
    for dump in dumps:
        if lines:
            lines.append([])
        name = printable(dump.typed.spec.name, ascii)
        about = f"  map {dump.id}, {dump.type.replace('_', ' ')}"
        lines.append([(name, "title"), (about, "dim")])
        lines += _draw_entries(dump, width, ascii, all_)
    return lines


def _draw_entries(dump: Dump, width: int | None, ascii: bool, all_: bool) -> list[Line]:
    typed, exact = dump.typed, width is None
    if not typed.readable:
        return [[(f"not shown: {typed.reason}", "dim")]]
    entries, zeros = list(dump.entries), 0
    if typed.spec.type in map_types.FULL and not typed.single and not all_:
        entries = [(key, value) for key, value in entries if _is_set(value)]
        zeros = len(dump.entries) - len(entries)
    rows: list[Row] = [{"key": key, "value": value} for key, value in entries]
    slots = find_slots(typed)
    lines: list[Line] = []
    if slots is not None and rows and not all_:
        drawn = list(slots.draw(typed.spec.name, rows))
        lines += histograms.bars(drawn, width, exact=exact, ascii=ascii)
    if slots is None or slots.beside or all_:
        layout = make_layout(typed, (), slots is not None and not all_ and slots.beside)
        if rows:
            flat = [layout.flatten(row) for row in rows]
            grid = Grid(layout.columns, layout.key, exact=exact, ascii=ascii)
            heading, body = grid.lines(flat, width)
            lines += [heading, *body]
    if not rows:
        lines.append([("empty" if not zeros else "all entries are zero", "dim")])
    elif zeros:
        lines.append([(f"{zeros:,} entries that are zero left out (--all shows them)", "dim")])
    if dump.left_out != 0:
        more = "more" if dump.left_out is None else f"{dump.left_out:,} more"
        lines.append([(f"... {more}", "dim")])
    return lines


def _is_set(value: Any) -> bool:
    """Whether anything in a value is not zero."""
    leaves = flatten("", value, arrays=True).values()
    return any(leaf.strip("0x") if isinstance(leaf, str) else leaf for leaf in leaves)
