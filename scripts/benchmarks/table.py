"""Results as a table for people, and as values for JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.measure import Growth, Result

_PREFIXES = ((1e9, "G"), (1e6, "M"), (1e3, "k"))
_SECONDS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "us"), (1e-9, "ns"))


def format_figure(figure: float, unit: str) -> str:
    """A figure with its unit, three digits of it: "12.3 ms", "4.56 M/s", "17.8 MiB"."""
    if unit == "s":
        scale, name = next(((s, n) for s, n in _SECONDS if abs(figure) >= s), _SECONDS[-1])
        return f"{_digits(figure / scale)} {name}"
    if unit.endswith("/s"):
        scale, prefix = next(((s, p) for s, p in _PREFIXES if figure >= s), (1.0, ""))
        return f"{_digits(figure / scale)} {prefix}{unit}"
    return f"{_digits(figure)} {unit}".rstrip()


def _digits(figure: float) -> str:
    size = abs(figure)
    return f"{figure:.0f}" if size >= 100 else f"{figure:.1f}" if size >= 10 else f"{figure:.2f}"


def draw_table(results: Sequence[Result | Growth]) -> str:
    """One line for each result: every contender's median, the ratio, the budget."""
    lines = []
    width = max((len(each.what) for each in results if isinstance(each, Result)), default=0)
    for each in results:
        if isinstance(each, Growth):
            lines += _draw_growth(each)
            continue
        contenders = "  ".join(
            f"{name} {format_figure(each.median(name), each.unit)}" for name in each.rounds
        )
        lines.append(f"  {each.what:{width}}  {contenders}{_verdict(each)}")
        if each.note:
            lines.append(f"  {'':{width}}  {each.note}")
    return "\n".join(lines)


def _draw_growth(growth: Growth) -> list[str]:
    """Title, head, a line for each step, the note."""
    rows = [[growth.counted, *growth.columns]]
    for at, step in enumerate(growth.steps):
        figures = [(values[at], unit) for unit, values in growth.columns.values()]
        rows.append(
            [f"{step:,}", *("-" if v is None else format_figure(v, unit) for v, unit in figures)]
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    table = ["  ".join(f"{cell:>{w}}" for cell, w in zip(row, widths, strict=True)) for row in rows]
    return [f"  {growth.what}", *(f"    {line}" for line in table), f"    {growth.note}"]


def _verdict(result: Result) -> str:
    """The ratio, and what it or our figure may be at most (at least)."""
    sign = ">=" if result.more_is_better else "<="
    bounds = []
    if result.budget is not None:
        bounds.append(f"{sign} {_digits(result.budget)} x")
    if result.limit is not None:
        bounds.append(f"{sign} {format_figure(result.limit, result.unit)}")
    text = f"  = {_digits(result.ratio)} x {result.against}" if result.ratio is not None else ""
    if bounds:
        text += f"  ({', '.join(bounds)}: {'met' if result.met else 'NOT MET'})"
    return text


def as_dict(result: Result | Growth) -> dict[str, Any]:
    """A result for JSON: medians, all rounds, ratio and budgets; units as told."""
    if isinstance(result, Growth):
        return {
            "what": result.what,
            "counted": result.counted,
            "steps": list(result.steps),
            "columns": {
                name: {"unit": unit, "figures": list(figures)}
                for name, (unit, figures) in result.columns.items()
            },
            "note": result.note,
        }
    return {
        "what": result.what,
        "unit": result.unit,
        "medians": {name: result.median(name) for name in result.rounds},
        "rounds": {name: list(rounds) for name, rounds in result.rounds.items()},
        "ours": result.ours,
        "against": result.against,
        "ratio": result.ratio,
        "budget": result.budget,
        "limit": result.limit,
        "more_is_better": result.more_is_better,
        "met": result.met,
        "note": result.note or None,
    }
