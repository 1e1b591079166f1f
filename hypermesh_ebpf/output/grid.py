"""Rows under headings: what fits is aligned, what does not fit is left out by rule.

rich's Table does this too and costs 25 ms for 40 rows of 8 columns, 2.5 % of a core at one refresh
a second; this costs about one.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Collection, Sequence
from functools import lru_cache

from hypermesh_ebpf.metrics.sample import Row
from hypermesh_ebpf.monitors.declaration import Column
from hypermesh_ebpf.output.draw import NUMERIC, UNKNOWN, bar, format_value

Line = list[tuple[str, str]]
"""One line of the screen: (text, name of a style) from left to right."""

_GAP = 2
_TEXT_FLOOR = 12
_FLOWING = {"time": 12, "text": 7}
_FLOWING_CAP = 32
_FLOWING_FLOOR = 24
_BAR_WIDTHS = (20, 12, 6)
_PERCENT_WIDTH = 7  # " 100.0%"


def cells(text: str) -> int:
    """How many columns of a terminal ``text`` takes: wide characters two, combining ones none."""
    if text.isascii() or max(text) < "\u0300":
        return len(text)
    return _wide_cells(text)


@lru_cache(maxsize=1024)
def _wide_cells(text: str) -> int:
    """The same by looking at each character; the bars of one frame are those of the next."""
    return sum(
        2
        if unicodedata.east_asian_width(each) in "WF"
        else 0
        if unicodedata.category(each) in ("Mn", "Me")
        else 1
        for each in text
    )


def crop(text: str, width: int, ascii: bool = False) -> str:
    """``text`` cut to ``width`` columns; the cut is marked."""
    if cells(text) <= width:
        return text
    mark = "~" if ascii else "…"
    room, kept = width - 1, []
    for each in text:
        room -= cells(each)
        if room < 0:
            break
        kept.append(each)
    return "".join(kept) + mark if width > 0 else ""


def line_cells(line: Line) -> int:
    """How many columns of a terminal ``line`` takes."""
    return sum([cells(text) for text, _ in line])


def crop_line(line: Line, width: int, ascii: bool = False) -> Line:
    """``line`` cut to ``width`` columns."""
    room, kept = width, []
    for text, style in line:
        size = cells(text)
        if size > room:
            if room:
                kept.append((crop(text, room, ascii), style))
            break
        kept.append((text, style))
        room -= size
    return kept


class Grid:
    """The columns of one table during one run.

    A column never becomes narrower while the width stays, so that nothing jumps.  ``keys`` are the
    fields that name a row: they are the last to go.  ``exact`` gives plain numbers.  ``flowing`` is
    for lines that come one by one: columns begin with room for what is still to come, no column
    becomes wide for the sake of one long text, which then pushes the rest of its line aside, and a
    text that comes last (arguments) is kept like a key and has more room than others.
    """

    def __init__(
        self,
        columns: Sequence[Column],
        keys: Collection[str] = (),
        *,
        exact: bool,
        ascii: bool,
        flowing: bool = False,
    ) -> None:
        self.columns = tuple(columns)
        self._keys = [column.field in keys for column in self.columns]
        self._exact = exact
        self._ascii = ascii
        self._flowing = flowing
        self._texts = [column.kind == "text" for column in self.columns]
        # A text column is set like a number if its first value is one: a pid, a port.
        self._right = [
            None if column.kind == "text" else column.kind in NUMERIC for column in self.columns
        ]
        self._floors = [_TEXT_FLOOR] * len(self.columns)
        if flowing and self._texts[-1]:
            self._keys[-1] = True
            self._floors[-1] = _FLOWING_FLOOR
        self._headings = [cells(column.heading) for column in self.columns]
        self._first_widths = list(self._headings)
        if flowing:
            for index, column in enumerate(self.columns):
                least = _FLOWING.get(column.kind, 6)
                self._first_widths[index] = max(self._headings[index], least)
        self._widths = list(self._first_widths)
        self._width: int | None = None
        self._fitted: tuple[list[int], list[int], int | None] | None = None
        self._fitted_with_share = False

    def lines(
        self, rows: Sequence[Row], width: int | None, shares: Sequence[float] | None = None
    ) -> tuple[Line, list[Line]]:
        """The heading and a line for each of ``rows``, none wider than ``width`` (None: any).

        ``shares`` are fractions of the whole, one for each row, drawn as a bar or as a percentage.
        """
        table = []
        for column in self.columns:
            kind, name = column.kind, column.field
            table.append(
                [
                    format_value(kind, row.get(name), exact=self._exact, ascii=self._ascii)
                    for row in rows
                ]
            )
        self._measure(rows, table, width)
        if self._fitted is None or self._fitted_with_share != (shares is not None):
            self._fitted_with_share = shares is not None
            self._fitted = self._fit(width, self._fitted_with_share)
        shown, widths, bar_width = self._fitted
        heading: Line = [
            (
                (" " * _GAP).join(
                    [
                        self._cell(self.columns[index].heading, index, widths[index])
                        for index in shown
                    ]
                ),
                "head",
            )
        ]
        lines = [
            self._line([(table[index][number], index, widths[index]) for index in shown])
            for number in range(len(rows))
        ]
        if shares is not None and bar_width is not None:
            heading.append((" " * _GAP + "share".rjust(0 if bar_width else _PERCENT_WIDTH), "head"))
            for line, share in zip(lines, shares, strict=True):
                line += self._share(share, bar_width)
        return heading, lines

    def _measure(
        self, rows: Sequence[Row], table: Sequence[Sequence[str]], width: int | None
    ) -> None:
        """Make columns as wide as what is in them; begin anew when the terminal was resized."""
        if width != self._width:
            self._width, self._widths, self._fitted = width, list(self._first_widths), None
        last = len(self.columns) - 1
        for index, texts in enumerate(table):
            if self._right[index] is None:
                name = self.columns[index].field
                for row in rows:
                    if row.get(name) is not None:
                        self._right[index] = type(row.get(name)) is int
                        break
            widest = max(map(cells, texts), default=0)
            if width is not None:
                widest = min(widest, width)
            if self._flowing and self._texts[index]:
                if index < last:
                    widest = min(widest, _FLOWING_CAP)
                elif width is None:
                    continue  # nothing comes after it that it could push aside
            if widest > self._widths[index]:
                self._widths[index] = widest
                self._fitted = None

    def _fit(self, width: int | None, share: bool) -> tuple[list[int], list[int], int | None]:
        """Which columns are shown, how wide all are, and how wide the share's bar is if any.

        Too much for ``width``: the bar shrinks, texts shrink, the bar goes, then columns from the
        right, those that name the row last.
        """
        widths = list(self._widths)
        shown = list(range(len(widths)))
        if width is None:
            return shown, widths, 0 if share else None

        def excess(bar_width: int | None) -> int:
            size = sum(widths[index] + _GAP for index in shown) - _GAP
            if bar_width is not None:
                size += _GAP + bar_width + _PERCENT_WIDTH
            return size - width

        for bar_width in _BAR_WIDTHS if share else ():
            if excess(bar_width) <= 0:
                return shown, widths, bar_width
        while True:
            for narrow in (_BAR_WIDTHS[-1], 0, None) if share else (None,):
                widths = list(self._widths)
                self._shrink(widths, shown, excess(narrow), self._floors)
                if excess(narrow) <= 0:
                    return shown, widths, narrow
            others = [index for index in shown if not self._keys[index]]
            if not others or len(shown) == 1:
                break
            shown.remove(others[-1])
        self._shrink(widths, shown, excess(None), [4] * len(widths))
        while excess(None) > 0 and len(shown) > 1:
            shown.pop()
        widths[shown[0]] = min(widths[shown[0]], width)
        return shown, widths, None

    def _shrink(
        self, widths: list[int], shown: Sequence[int], excess: int, floors: Sequence[int]
    ) -> None:
        """Take ``excess`` from the widest texts, none below its floor or its heading."""
        texts = [index for index in shown if self._texts[index]]
        while excess > 0:
            able = [i for i in texts if widths[i] > max(floors[i], self._headings[i])]
            if not able:
                return
            widths[max(able, key=widths.__getitem__)] -= 1
            excess -= 1

    def _cell(self, text: str, index: int, width: int) -> str:
        size = len(text) if text.isascii() else cells(text)
        if size > width:
            return text if self._exact else crop(text, width, self._ascii)
        padding = " " * (width - size)
        return padding + text if self._right[index] else text + padding

    def _line(self, parts: Sequence[tuple[str, int, int]]) -> Line:
        """One row: rates in their colour, unknown and nothing dim, the rest plain."""
        line: Line = []
        run, run_style, gap = "", "", ""
        for text, index, width in parts:
            kind = self.columns[index].kind
            style = ""
            if kind != "text":
                if text in _NOTHING:
                    style = "dim"
                elif kind in ("rate", "byte_rate"):
                    style = "rate"
            if style != run_style:
                line.append((run, run_style))
                run, run_style = "", style
            run += gap + self._cell(text, index, width)
            gap = " " * _GAP
        line.append((run, run_style))
        return line

    def _share(self, share: float, bar_width: int) -> Line:
        percent = f"{share * 100:.1f}%".rjust(_PERCENT_WIDTH)
        if not bar_width:
            return [(" " * _GAP + percent, "dim")]
        return [(" " * _GAP + bar(share, bar_width, self._ascii), "bar"), (percent, "dim")]


_NOTHING = frozenset((UNKNOWN, "0", "0/s", "0 B", "0 B/s", "0 ns", "0.0", "0ns", "0.0%"))
