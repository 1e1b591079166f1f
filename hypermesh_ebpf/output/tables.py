"""The maps of a user's program as tables, one below the other, and how they share a screen."""

from __future__ import annotations

from collections.abc import Sequence

from hypermesh_ebpf.metrics.counted import busiest, column, pick
from hypermesh_ebpf.metrics.sample import Row, Table
from hypermesh_ebpf.monitors.declaration import TableLayout
from hypermesh_ebpf.output import draw
from hypermesh_ebpf.output.grid import Grid, Line

_FEW = 3
"""Rows that a table keeps for as long as another one has more."""
_AROUND = 2  # a table's title and heading


class Tables:
    """The tables of one run.  ``exact`` and ``ascii`` are a Frame's."""

    def __init__(self, layouts: Sequence[TableLayout], *, exact: bool, ascii: bool) -> None:
        self._exact, self._ascii = exact, ascii
        self._layouts = {layout.name: layout for layout in layouts}
        self._grids = {
            layout.name: Grid(layout.columns, layout.key, exact=exact, ascii=ascii)
            for layout in layouts
        }

    def least(self, tables: Sequence[Table]) -> int:
        """The lines below which tables are left out."""
        filled = [table for table in tables if table.rows]
        return len(self._without_rows(tables)) + sum(
            _AROUND + min(len(table.rows), _FEW) for table in filled
        )

    def lines(
        self, tables: Sequence[Table], width: int | None, room: int | None, top: int
    ) -> list[Line]:
        """All tables in ``room`` lines (None: any number), of each ``top`` rows at most.

        Where there is not room for all, the longest tables give rows away first, then the last
        tables shrink to a line each.
        """
        filled = [table for table in tables if table.rows]
        ending = self._without_rows(tables)
        wanted = [min(len(table.rows), top) for table in filled]
        gap = 1
        if room is not None:
            room -= len(ending)
            if sum(_cost(t, w) for t, w in zip(filled, wanted, strict=True)) + len(filled) > room:
                gap = 0
            wanted = _share(filled, wanted, room - gap * len(filled))
        lines: list[Line] = []
        for table, count in zip(filled, wanted, strict=True):
            lines += self._table(table, count, width)
            lines += [[]] * gap
        return [*lines, *ending]

    def _table(self, table: Table, count: int, width: int | None) -> list[Line]:
        title = self._title(table)
        if not count:
            return [title]
        layout, grid = self._layouts[table.name], self._grids[table.name]
        shares = None
        if layout.busy is None:
            rows: Sequence[Row] = table.rows[:count]
        else:
            places = busiest(table.rows, layout.busy, count)
            rows = pick(table.rows, places)
            if any(each.share for each in layout.columns):
                rates = [rate or 0 for rate in column(table.rows, layout.busy + "_per_s")]
                whole = sum(rates) or 1.0
                shares = [rates[place] / whole for place in places]
        flat = [layout.flatten(row) for row in rows]
        heading, lines = grid.lines(flat, width, shares)
        left = len(table.rows) - len(rows)
        if left:
            dots = "..." if self._ascii or self._exact else "\u2026"
            lines.append([(f"{dots} {left:,} more", "dim")])
        return [title, heading, *lines]

    def _title(self, table: Table) -> Line:
        layout = self._layouts[table.name]
        count = len(table.rows)
        words = f"{count:,} {'entry' if count == 1 else 'entries'}"
        if table.zeros:
            words += f", {table.zeros:,} more are zero"
        if table.left_out is None:
            words += ", more were not read"
        elif table.left_out:
            words += f", {table.left_out:,} more were not read"
        name = draw.printable(table.name, self._ascii)
        return [(name, "title"), (f"  {layout.kind}", "dim"), (f"  {words}", "dim")]

    def _without_rows(self, tables: Sequence[Table]) -> list[Line]:
        """A line that names the empty maps, and one for each that cannot be read."""
        empty = [table.name for table in tables if not table.rows and table.reason is None]
        lines: list[Line] = []
        if empty:
            names = draw.printable(", ".join(empty), self._ascii)
            lines.append([(f"nothing in {names} yet", "dim")])
        for table in tables:
            if table.reason is not None:
                name, reason = (
                    draw.printable(each, self._ascii) for each in (table.name, table.reason)
                )
                kind = self._layouts[table.name].kind
                lines.append([(name, "title"), (f"  {kind}  not shown: {reason}", "dim")])
        return lines


def _cost(table: Table, count: int) -> int:
    """Lines of a table of which ``count`` rows are shown."""
    return (_AROUND + count + (count < len(table.rows))) if count else 1


def _share(tables: Sequence[Table], wanted: Sequence[int], room: int) -> list[int]:
    """How many rows of each table are shown in ``room`` lines: as many as wanted, or fewer of the
    longest, or, of the last tables, none."""
    counts = list(wanted)

    def excess() -> int:
        return sum(_cost(table, count) for table, count in zip(tables, counts, strict=True)) - room

    while (over := excess()) > 0:
        longest = max(range(len(counts)), key=lambda index: counts[index], default=None)
        if longest is None or counts[longest] <= _FEW:
            break
        rest = sorted(counts)[-2] if len(counts) > 1 else 0
        counts[longest] -= max(1, min(over, counts[longest] - max(rest, _FEW)))
    for index in reversed(range(len(counts))):
        while counts[index] > (1 if index == 0 else 0) and excess() > 0:
            counts[index] -= 1
    return counts
