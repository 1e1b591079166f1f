"""Histograms as lines: bars where there is room, else one line each."""

from __future__ import annotations

from collections.abc import Sequence

from hypermesh_ebpf.metrics.histogram import percentiles
from hypermesh_ebpf.metrics.sample import Histogram
from hypermesh_ebpf.output import draw
from hypermesh_ebpf.output.grid import Line, line_cells

_BAR = 24
_GAP = 4


def bars(
    histograms: Sequence[Histogram], width: int | None, *, exact: bool, ascii: bool
) -> list[Line]:
    """A bar for each bucket, one histogram beside the other as far as ``width`` allows.

    Where it is None they stand one below the other.  ``exact`` gives counts in full.
    """
    blocks = [_block(each, exact, ascii) for each in histograms if each.buckets]
    sizes = [max(map(line_cells, block)) for block in blocks]
    lines: list[Line] = []
    while blocks:
        lines += [[]] if lines else []
        beside, used = 1, sizes[0]
        while beside < len(blocks) and width is not None and used + _GAP + sizes[beside] <= width:
            used += _GAP + sizes[beside]
            beside += 1
        for number in range(max(map(len, blocks[:beside]))):
            line: Line = []
            for block, size in zip(blocks[:beside], sizes[:beside], strict=True):
                part = block[number] if number < len(block) else []
                line += [*part, (" " * (size - line_cells(part) + _GAP), "")]
            lines.append(line)
        blocks, sizes = blocks[beside:], sizes[beside:]
    return lines


def brief(histograms: Sequence[Histogram], *, ascii: bool) -> list[Line]:
    """A line for each histogram: name, shape, estimated percentiles, range."""
    names = [_name(each, ascii) for each in histograms]
    name_width = max(map(len, names), default=0)
    most = max([len(each.buckets) for each in histograms], default=0)
    lines: list[Line] = []
    for each, name in zip(histograms, names, strict=True):
        shape = draw.sparkline([count for _, _, count in each.buckets], most, ascii)
        line: Line = [(name.ljust(name_width + 2), "head"), (shape.ljust(most), "bar")]
        if each.buckets:
            low, high = each.buckets[0][0], each.buckets[-1][1]
            line += _percentiles(each, ascii)
            line.append((f"  {draw.bucket_label(low, high, each.unit, ascii)}", "dim"))
        lines.append(line)
    return lines


def _block(histogram: Histogram, exact: bool, ascii: bool) -> list[Line]:
    """One histogram: its name, then a line for each bucket."""
    plain = ascii or exact
    buckets = histogram.buckets
    most = max(count for _, _, count in buckets) or 1
    labels = [draw.bucket_label(low, high, histogram.unit, plain) for low, high, _ in buckets]
    counts = [draw.format_value("count", count, exact=exact) for _, _, count in buckets]
    label_width, count_width = max(map(len, labels)), max(map(len, counts))
    name = _name(histogram, ascii)
    lines: list[Line] = [[(name, "head"), *_percentiles(histogram, plain)]]
    for label, text, (_, _, count) in zip(labels, counts, buckets, strict=True):
        numbers = f"{label.rjust(label_width)}  {text.rjust(count_width)}  "
        lines.append([(numbers, ""), (draw.bar(count / most, _BAR, plain), "bar")])
    return lines


def _name(histogram: Histogram, ascii: bool) -> str:
    return draw.printable(histogram.title or draw.words(histogram.name), ascii)


def _percentiles(histogram: Histogram, ascii: bool) -> Line:
    kind = {"bytes": "bytes", "ns": "ns"}.get(histogram.unit, "count")
    line: Line = []
    for percent, value in zip((50, 95, 99), percentiles(histogram.buckets), strict=True):
        if value is not None:
            shown = draw.format_value(kind, round(value), ascii=ascii)
            line.append((f"  p{percent} {shown}", "dim"))
    return line
