"""check-system's report as lines: findings by group, then the verdicts, which an eye meets first.

The same lines go to a terminal, coloured and wrapped to its width, and into a pipe, one line for
each finding.
"""

from __future__ import annotations

import json
import os
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, TextIO

from hypermesh_ebpf.output.draw import printable
from hypermesh_ebpf.output.grid import Line, cells

if TYPE_CHECKING:
    from hypermesh_ebpf.host.finding import Finding
    from hypermesh_ebpf.host.hooks import Availability
    from hypermesh_ebpf.host.report import MonitorVerdict, Report

_STYLES = {"ok": "good", "warn": "warn", "fail": "bad", "info": "dim"}
_SYMBOLS = {"ok": "✓", "warn": "!", "fail": "✗", "info": "·"}
_NAME = 17
_MOST_INTERFACES = 12
_INLINE = {"program types", "map types"}


class _Page:
    """Lines of one report.  ``width`` is None for a pipe: words for signs, and nothing wrapped."""

    def __init__(self, width: int | None, ascii: bool, verbose: int) -> None:
        self.lines: list[Line] = []
        self.verbose = verbose
        self._width = width
        self._ascii = ascii
        self._signs = (
            {status: f"{status:4}" for status in _STYLES}
            if width is None or ascii
            else dict(_SYMBOLS)
        )
        self._indent = 2 + len(self._signs["ok"]) + 1
        self._arrow = "-> " if width is None or ascii else "→ "
        self._said: set[str] = set()

    def heading(self, text: str) -> None:
        if self.lines:
            self.lines.append([])
        self.lines.append([(text, "title")])

    def row(self, status: str, name: str, text: str | None) -> None:
        """A sign, a name, and text that wraps under itself."""
        sign, style = self._signs[status], _STYLES[status]
        padded = printable(name, self._ascii).ljust(_NAME)
        start = self._indent + cells(padded) + 1
        words = self._wrap(text if text is not None else "unknown", start)
        text_style = {"fail": "bad", "warn": "warn"}.get(status, "" if text else "dim")
        self.lines.append([("  ", ""), (sign, style), (f" {padded} ", ""), (words[0], text_style)])
        self.lines += [[(" " * start, ""), (word, text_style)] for word in words[1:]]

    def note(self, text: str, style: str = "dim") -> None:
        """Something under a row: what it affects, or what was probed."""
        self._under(text, style, "")

    def _under(self, text: str, style: str, lead: str) -> None:
        start = self._indent + (2 if self._width is not None and self._width < 72 else _NAME + 1)
        words = self._wrap(text, start + len(lead))
        self.lines.append([(" " * start + lead, style), (words[0], style)])
        self.lines += [[(" " * (start + len(lead)), ""), (word, style)] for word in words[1:]]

    def remedy(self, text: str, again: bool = False) -> None:
        """What to type; something said before is not said once more unless ``again``."""
        if again or text not in self._said:
            self._said.add(text)
            self._under(text, "rate", self._arrow)

    def text(self, text: str, style: str) -> None:
        self.lines.append([])
        self.lines += [[(word, style)] for word in self._wrap(text, 0)]

    def _wrap(self, text: str, start: int) -> list[str]:
        safe = printable(text, self._ascii)
        if self._width is None:
            return [safe]
        room = max(self._width - start, 20)
        return textwrap.wrap(safe, room, break_on_hyphens=False) or [""]


def draw_report(report: Report, *, width: int | None, ascii: bool, verbose: int) -> list[Line]:
    """The report as lines of (text, style).  ``width`` None means a pipe."""
    page = _Page(width, ascii, verbose)
    shown = [finding for finding in report.findings if finding.group != "hooks"]
    for group, findings in groupby(shown, key=lambda finding: finding.group):
        page.heading(group.capitalize())
        if group in _INLINE:
            _draw_types(page, list(findings))
        elif group == "interfaces":
            _draw_interfaces(page, list(findings))
        else:
            _draw_findings(page, list(findings))
    _draw_attach_types(page, report)
    _draw_monitors(page, report.monitors)
    return page.lines


def _draw_findings(page: _Page, findings: Sequence[Finding]) -> None:
    for finding, following in zip(findings, [*findings[1:], None], strict=True):
        page.row(finding.status, finding.name, finding.found)
        # What several in a row share - probe, remedy - is said once, under the last of them.
        said = page.verbose and following is not None and following.affects == finding.affects
        if not said and (page.verbose or finding.status in ("warn", "fail")):
            page.note(f"affects: {finding.affects}")
        if page.verbose and (following is None or following.probed != finding.probed):
            page.note(f"probed: {finding.probed}")
        if finding.remedy and (following is None or following.remedy != finding.remedy):
            page.remedy(finding.remedy)


def _draw_types(page: _Page, findings: Sequence[Finding]) -> None:
    """Some thirty types on one line, and only those that lack by name."""
    if page.verbose:
        for finding in findings:
            use = f" (for {finding.affects})" if finding.status == "warn" else ""
            found = finding.found + use if finding.found else None
            page.row(finding.status, finding.name, found)
        page.note(f"probed: {findings[0].probed}")
        return
    there = [finding for finding in findings if finding.status == "ok"]
    unknown = [finding for finding in findings if finding.found is None]
    used = [finding for finding in findings if finding.status == "warn"]
    unused = [f for f in findings if f.status == "info" and f.found is not None]
    if len(unknown) == len(findings):
        page.row("info", "all", None)
        return
    page.row("ok", "available", f"{len(there)} of {len(findings)}")
    if used:
        words = ", ".join(f"{finding.name} ({finding.affects})" for finding in used)
        page.row("warn", "lacking", words)
    if unused:
        page.row("info", "lacking, unused", ", ".join(finding.name for finding in unused))
    if unknown:
        page.row("info", "unknown", ", ".join(finding.name for finding in unknown))


def _draw_interfaces(page: _Page, findings: Sequence[Finding]) -> None:
    """Those with a program on them first where there are too many to show."""
    shown = findings
    if not page.verbose and len(findings) > _MOST_INTERFACES:
        shown = sorted(findings, key=lambda finding: finding.status == "ok")[:_MOST_INTERFACES]
    _draw_findings(page, shown)
    if len(shown) < len(findings):
        page.note(f"and {len(findings) - len(shown)} more interfaces (-v shows all)")


def _draw_attach_types(page: _Page, report: Report) -> None:
    page.heading("Attach types")
    there = [kind for kind, found in report.attach_types.items() if found.available]
    if there:
        page.row("ok", "available", ", ".join(there))
    used = {finding.name: finding for finding in report.findings if finding.group == "hooks"}
    for alike in _alike(report.attach_types):
        kinds = [kind for kind, _ in alike]
        found = alike[0][1]
        status = "info"
        if any(used[kind].status == "warn" for kind in kinds):  # some monitor has a rung there
            status = "fail" if found.privilege else "warn"
        page.row(status, ", ".join(kinds) if len(kinds) < 3 else "not available", found.reason)
        if len(kinds) >= 3:
            page.note(", ".join(kinds), "")
        affects = sorted({name for kind in kinds for name in used[kind].affects.split(", ")})
        page.note(f"affects: {', '.join(affects)}")
        if found.remedy:
            page.remedy(found.remedy)
    if page.verbose:
        for kind, found in report.attach_types.items():
            page.note(f"probed {kind}: {found.probed}")


def _alike(attach_types: dict[str, Availability]) -> Iterator[list[tuple[str, Availability]]]:
    """The kinds that are not available, together where reason and remedy are the same."""
    by_reason: dict[tuple[str | None, str | None], list[tuple[str, Availability]]] = {}
    for kind, found in attach_types.items():
        if not found.available:
            by_reason.setdefault((found.reason, found.remedy), []).append((kind, found))
    yield from by_reason.values()


def _draw_monitors(page: _Page, monitors: Sequence[MonitorVerdict]) -> None:
    page.heading("Monitors")
    remedies: dict[str, None] = {}
    for verdict in monitors:
        lower = verdict.degraded
        if not verdict.runs:
            page.row("fail", verdict.name, f"cannot run: {verdict.reason}")
            if verdict.remedy:
                remedies[verdict.remedy] = None
        elif lower is None:
            page.row("ok", verdict.name, f"runs: {verdict.hook}")
        else:
            page.row("warn", verdict.name, f"runs degraded: {lower.hook} (rung {lower.rung})")
            page.note(f"lost: {', '.join(lower.lost) or 'nothing but speed'}", "warn")
            page.note(f"because {lower.reason}")
    for remedy in remedies:
        page.remedy(remedy, again=True)
    page.text(*_summarise(monitors))


def _summarise(monitors: Iterable[MonitorVerdict]) -> tuple[str, str]:
    verdicts = list(monitors)
    number = f"All {len(verdicts)} monitors run here"
    cannot = [verdict for verdict in verdicts if not verdict.runs]
    if cannot:
        where = "with these privileges" if all(v.privilege for v in cannot) else "here"
        if len(cannot) == len(verdicts):
            return f"No monitor runs {where}.", "bad"
        return f"{len(cannot)} of {len(verdicts)} monitors cannot run {where}.", "bad"
    lower = sum(verdict.degraded is not None for verdict in verdicts)
    if lower:
        return f"{number}, {lower} of them degraded.", "warn"
    return f"{number}.", "good"


def show_report(report: Report, output: str, stream: TextIO, verbose: int = 0) -> None:
    """Write the report as "json" or as "table".  Raises OutputError, OutputClosed."""
    from hypermesh_ebpf.output.writer import Writer

    writer = Writer(stream)
    if output == "json":
        document = json.dumps(report.as_dict(), indent=2, ensure_ascii=False)
        writer.write(document.encode("utf-8", "surrogateescape") + b"\n")
        return
    charset = (getattr(stream, "encoding", None) or "ascii").lower().replace("-", "")
    ascii = charset != "utf8"
    if stream.isatty():
        width = os.get_terminal_size(stream.fileno()).columns or 80
        text = paint(draw_report(report, width=width, ascii=ascii, verbose=verbose), stream)
    else:
        lines = draw_report(report, width=None, ascii=ascii, verbose=verbose)
        text = "".join("".join(part for part, _ in line).rstrip() + "\n" for line in lines)
    writer.write(text.encode("utf-8", "replace"))


def paint(lines: Iterable[Line], stream: TextIO) -> str:
    """The lines with the terminal's colours, as rich decides them (NO_COLOR, TERM)."""
    from rich.console import Console
    from rich.text import Text

    from hypermesh_ebpf.output.live import STYLES

    console = Console(file=stream, force_terminal=True)
    with console.capture() as capture:
        for line in lines:
            parts = [(text, STYLES.get(style, "")) for text, style in line]
            console.print(Text.assemble(*parts), soft_wrap=True, highlight=False)
    return capture.get()
