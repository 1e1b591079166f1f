"""What a table shows, as lines: title, totals, rows, histograms, loss.

The same lines go to a terminal, cut to its size, and into a pipe, whole and with plain numbers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from hypermesh_ebpf.metrics.counted import busiest, column, pick
from hypermesh_ebpf.metrics.sample import End, Loss, Row, Sample, Start
from hypermesh_ebpf.monitors.declaration import Monitor, Options
from hypermesh_ebpf.output import draw, histograms
from hypermesh_ebpf.output.grid import Grid, Line, cells, crop_line, line_cells
from hypermesh_ebpf.output.tables import Tables

HISTORY = 60
"""Intervals that the sparkline shows."""

_MIN_ROWS = 5

_REASONS = {
    "duration": "duration reached",
    "count": "count reached",
    "interrupt": "interrupted",
    "terminated": "terminated",
    "output": "output closed",
    "overhead": "stopped by --max-overhead",
    "error": "failed",
}


class Frame:
    """The table of one run: fed with a Start and Samples, asked for lines.

    ``top`` is the most rows shown.  ``exact`` is for pipes: numbers in full, no sparkline, no bars
    but those of histograms, nothing cut.  ``ascii`` keeps to characters that every terminal has.
    """

    def __init__(
        self,
        monitor: Monitor,
        options: Options,
        *,
        interval: float,
        top: int,
        exact: bool,
        ascii: bool,
    ) -> None:
        self.top = top
        self._interval = interval
        self._exact = exact
        self._ascii = ascii
        columns = monitor.columns(options)
        self._grid = Grid(columns, monitor.key(options), exact=exact, ascii=ascii)
        self._tables = Tables(monitor.tables, exact=exact, ascii=ascii) if monitor.tables else None
        self._share = next((column.field for column in columns if column.share), None)
        self._kinds = {column.field: column.kind for column in columns}
        self._counters = monitor.counters
        self._headline = monitor.headline or (monitor.counters[0] if monitor.counters else "")
        self._history: deque[float | None] = deque(maxlen=HISTORY)
        self._start: Start | None = None
        self._sample: Sample | None = None

    def start(self, start: Start) -> None:
        self._start = start

    def sample(self, sample: Sample) -> None:
        self._sample = sample
        rate = sample.totals.get(self._headline + "_per_s")
        self._history.append(rate if isinstance(rate, (int, float)) else None)

    def lines(self, width: int | None, height: int | None) -> list[Line]:
        """All that is known, in at most ``height`` lines of at most ``width`` columns."""
        head, sample = self.title(width), self._sample
        most = max(2, height // 4) if height is not None else len(head)
        if len(head) > most:  # a long notice gives way to what is counted
            text, style = head[most - 1][0]
            head[most - 1 :] = [[(text.rstrip() + " ...", style)]]
        if sample is None:
            return self._cut([*head, [("waiting for the first reading", "dim")]], width, height)
        loss = self._cut([*self.overhead(sample), self.loss(sample.loss)], width, None)
        if height is not None:
            height -= len(loss) - 1
        if self._tables is not None:
            room = None if height is None else height - len(head) - 1
            middle = self._maps(self._tables, sample, width, room)
            return [*self._cut([*head, *middle], width, height and height - 1), *loss]
        if height is None:
            bars = histograms.bars(sample.histograms, width, exact=self._exact, ascii=self._ascii)
            space: list[Line] = [[]] if bars else []
            rows = self._rows(sample, width, self.top)
            middle = [*self._totals(sample, width), *rows, *space, *bars, *space]
            return [*self._cut([*head, *middle], width, None), *loss]
        middle = self._fit(sample, width, height - len(head) - 1)
        return [*self._cut([*head, *middle], width, height - 1), *loss]

    def _maps(
        self, tables: Tables, sample: Sample, width: int | None, room: int | None
    ) -> list[Line]:
        """The maps of a user's program: tables, then histograms, as bars if there is room."""
        bars = histograms.bars(sample.histograms, width, exact=self._exact, ascii=self._ascii)
        if room is None:
            above = tables.lines(sample.tables, width, None, self.top)
            gap: list[Line] = [[]] if above and above[-1] and bars else []
            return [[], *above, *gap, *bars, *([[]] if bars else [])]
        least = tables.least(sample.tables)
        if len(bars) > room - least - 1:
            bars = histograms.brief(sample.histograms, ascii=self._ascii)
            most = max(room - least, 2)
            if len(bars) > most:
                bars[most - 1 :] = [[(f"... {len(bars) - most + 1:,} more histograms", "dim")]]
        room -= len(bars)
        blank: list[Line] = [[]] if room > least + 1 else []
        above = tables.lines(sample.tables, width, room - 2 * len(blank), self.top)
        return [*blank, *above, *bars, *blank] if bars else [*blank, *above]

    def _fit(self, sample: Sample, width: int | None, room: int) -> list[Line]:
        """What stands between title and loss, in ``room`` lines or so.

        Where there is not room for all, blank lines go first, then histograms shrink to a line
        each, then rows are left out (and counted), then histograms, sparkline and totals.
        """
        all_rows = 2 + min(self.top, len(sample.rows))  # the heading, and how many more there are
        few_rows = min(all_rows, 2 + _MIN_ROWS)
        top: list[Line] = []
        for part in (self._totals(sample, width), self._sparkline(width)):
            if room - len(top) - len(part) >= few_rows:
                top += part
        room -= len(top)
        brief = histograms.brief(sample.histograms, ascii=self._ascii)
        gaps = 2 + bool(brief)
        blank: list[Line] = [[]]
        if room < all_rows + len(brief) + gaps:
            blank, gaps = [], 0
        bars = histograms.bars(sample.histograms, width, exact=self._exact, ascii=self._ascii)
        shapes: list[Line] = []
        if room >= all_rows + len(bars) + gaps:
            shapes = bars
        elif room >= few_rows + len(brief) + gaps:
            shapes = brief
        limit = max(room - len(shapes) - gaps - 2, 0)
        rows = self._rows(sample, width, min(self.top, limit))
        below = [*blank, *shapes] if shapes else []
        return [*top, *blank, *rows, *below, *blank]

    def summary(self, end: End) -> str:
        """The run in one line: how long, how much, what was lost, why it ended."""
        target = end.target if isinstance(end.target, str) else ", ".join(end.target)
        parts = [draw.printable(f"{end.monitor} on {target}", self._ascii)]
        sample = self._sample
        if sample is not None:
            parts.append(draw.format_elapsed(sample.elapsed_s))
            for name in self._counters:
                value = sample.totals.get(name)
                if value is not None:
                    shown = draw.format_value(self._kind(name), value, ascii=self._ascii)
                    parts.append(f"{shown} {name}" if self._kind(name) == "count" else shown)
        lost = [
            f"{count:,} {name.replace('_', ' ')}"
            for name, count in end.loss.as_dict().items()
            if count
        ]
        parts.append("LOSS: " + ", ".join(lost) if lost else "no loss")
        if end.overhead is not None and end.overhead.estimated:
            parts.append("counts are estimates")
        parts.append(_REASONS.get(end.reason, end.reason))
        return ", ".join(parts)

    def _cut(self, lines: list[Line], width: int | None, height: int | None) -> list[Line]:
        if width is not None:
            lines = [crop_line(line, width, self._ascii) for line in lines]
        return lines if height is None else lines[:height]

    def _kind(self, name: str) -> str:
        """How a total is drawn: as its column, else by the unit in its name."""
        kind = self._kinds.get(name)
        if kind:
            return kind
        if name.endswith("_per_s"):
            return "byte_rate" if "bytes" in name else "rate"
        if name == "bytes" or name.endswith("_bytes") or name.startswith("bytes_"):
            return "bytes"
        return "ns" if name.endswith("_ns") else "count"

    def title(self, width: int | None = None) -> list[Line]:
        start, sample = self._start, self._sample
        if start is None:
            return []
        target = start.target if isinstance(start.target, str) else " ".join(start.target)
        line: Line = [(start.monitor, "title"), ("  " + draw.printable(target, self._ascii), "")]
        hooks = "  " + draw.printable(" ".join(start.hooks), self._ascii)
        if self._exact:
            moment = datetime.fromtimestamp(sample.time if sample else start.time)
            elapsed = f"  {moment.isoformat(' ', 'milliseconds')}"
            elapsed += f"  {sample.elapsed_s:.1f} s" if sample else ""
        else:
            elapsed = draw.format_elapsed(sample.elapsed_s) if sample else ""
        if width is not None:
            room = width - sum(cells(text) for text, _ in line) - len(elapsed) - 2
            hooks = hooks if cells(hooks) <= room else _hooks_in_short(start.hooks, room)
            elapsed = " " * max(room + 2 - cells(hooks), 2) + elapsed
        lines = [[*line, (hooks, "dim"), (elapsed, "dim" if self._exact else "")]]
        if start.degraded is not None:
            degraded = start.degraded
            words = f"degraded to rung {degraded.rung}, {degraded.hook}"
            if degraded.lost:
                words += ": without " + ", ".join(degraded.lost)
            if degraded.reason:
                words += f" ({degraded.reason})"
            words = draw.printable(words, self._ascii)
            if width is not None:
                import textwrap

                parts = textwrap.wrap(words, width, subsequent_indent="  ")
                lines += [[(part, "warn")] for part in parts]
            else:
                lines.append([(words, "warn")])
        return lines

    def _totals(self, sample: Sample, width: int | None) -> list[Line]:
        """Counters with their rates, then whatever else was counted and is not nothing."""
        totals, exact, ascii = sample.totals, self._exact, self._ascii
        parts: list[Line] = []
        for name in self._counters:
            if name not in totals:
                continue
            kind = self._kind(name)
            value = draw.format_value(kind, totals[name], exact=exact, ascii=ascii)
            rate_kind = "byte_rate" if kind == "bytes" else "rate"
            part: Line = [(f"{draw.words(name)} ", "dim"), (value, "title")]
            if name + "_per_s" in totals:
                rate = totals[name + "_per_s"]
                shown = draw.format_value(rate_kind, rate, exact=exact, ascii=ascii)
                shown += "/s" if exact and rate is not None else ""
                part.append((f" ({shown})" if exact else f"  {shown}", "rate"))
            parts.append(part)
        for name, amount in totals.items():
            if name in self._counters or name.endswith("_per_s") or not amount:
                continue
            value = draw.format_value(self._kind(name), amount, exact=exact, ascii=ascii)
            parts.append([(f"{draw.words(name)} ", "dim"), (value, "")])
        line: Line = []
        for part in parts:
            gap: Line = [("    ", "")] if line else []
            if width is not None and line and line_cells(line + gap + part) > width:
                break
            line += gap + part
        return [line] if line else []

    def _sparkline(self, width: int | None) -> list[Line]:
        if len(self._history) < 2:
            return []
        known = [rate for rate in self._history if rate is not None]
        if not known:
            return []
        kind = "byte_rate" if self._kind(self._headline) == "bytes" else "rate"
        span = draw.format_elapsed(len(self._history) * self._interval)
        most = f"  max {draw.format_value(kind, max(known), ascii=self._ascii)} in {span}"
        room = (
            HISTORY if width is None else min(HISTORY, width - len(most) - len(self._headline) - 1)
        )
        name = f"{draw.words(self._headline)} " if room >= 10 else ""
        room = room if name or width is None else width - len(most)
        spark = draw.sparkline(list(self._history), room, self._ascii)
        return [[(name, "dim"), (spark, "bar"), (most, "dim")]]

    def _rows(self, sample: Sample, width: int | None, limit: int) -> list[Line]:
        """The busiest rows: by the first counter's rate, then by its count."""
        rows = sample.rows
        if not rows:
            return [[("nothing counted yet", "dim")]]
        rows = self._busiest(rows, limit)
        shares = None
        if self._share is not None:
            whole = self._whole(sample, self._share)
            shares = [_number(row.get(self._share)) / whole for row in rows]
        heading, lines = self._grid.lines(rows, width, shares)
        left = len(sample.rows) - len(rows)
        more: list[Line] = []
        if left:
            dots = "..." if self._ascii or self._exact else "…"
            more = [[(f"{dots} {left:,} more", "dim")]]
        return [heading, *lines, *more]

    def _busiest(self, rows: Sequence[Row], limit: int) -> Sequence[Row]:
        if not self._counters:
            return rows[:limit]
        return pick(rows, busiest(rows, self._counters[0], limit))

    def _whole(self, sample: Sample, field: str) -> float:
        """What the shares are shares of: the total if it is known and can be, else the sum."""
        total = _number(sample.totals.get(field))
        return total or sum(map(_number, column(sample.rows, field))) or 1.0

    def overhead(self, sample: Sample) -> list[Line]:
        """A line on what the programs cost and on what was passed over, where that is limited."""
        overhead = sample.overhead
        if overhead is None:
            return []
        took = draw.UNKNOWN if overhead.percent is None else f"{overhead.percent:g}"
        line: Line = [(f"overhead  {took} % of a CPU, limit {overhead.limit:g} %", "dim")]
        if overhead.sampled < 1:
            words = f"  1 event in {1 / overhead.sampled:.0f} taken, counts are estimates"
            line = [("SAMPLED", "warn"), (words, "warn"), ("  ", ""), *line]
        elif overhead.estimated:
            line.append(("  counts are estimates: events were sampled before", "warn"))
        return [line]

    def loss(self, loss: Loss) -> Line:
        counts = "  ".join(
            f"{draw.words(name)} {draw.UNKNOWN if count is None else format(count, ',')}"
            for name, count in loss.as_dict().items()
        )
        if self._exact:
            counts = counts.replace(",", "")
        if loss.any():
            return [("LOSS", "bad"), ("  " + counts, "bad")]
        return [("no loss", "good"), ("  " + counts, "dim")]


def _number(value: Any) -> float:
    return value if isinstance(value, (int, float)) else 0.0


def _hooks_in_short(hooks: Sequence[str], room: int) -> str:
    """Many hooks in little room: their kinds and how many they are, or nothing."""
    kinds = list(dict.fromkeys(hook.partition(":")[0] for hook in hooks))
    short = f"  {len(hooks)} hooks ({', '.join(kinds)})" if len(hooks) > 1 else ""
    return short if len(short) <= room else ""
