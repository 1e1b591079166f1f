"""The report as an operator sees it, and as a script reads it."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import pytest

from hypermesh_ebpf.host.finding import Finding
from hypermesh_ebpf.host.hooks import Availability
from hypermesh_ebpf.host.kernel import parse_kernel_release
from hypermesh_ebpf.host.report import ATTACH_TYPES, MonitorVerdict, Report
from hypermesh_ebpf.metrics.sample import Degraded
from hypermesh_ebpf.output.findings import draw_report, show_report
from hypermesh_ebpf.output.grid import cells

SUDO = "run it as root: `sudo hmebpf ...`"
LOWER = Degraded(3, "tracepoint", ("parent", "failed execs"), "kprobe: this kernel has no kprobes")
REPORT = Report(
    parse_kernel_release("6.1.0-21-amd64", "#1 SMP Debian 6.1.90-1", "x86_64"),
    (
        Finding("kernel", "JIT", "warn", "off", "speed", "sysctl", "sudo sysctl x=1"),
        Finding("kernel", "lockdown", "info", None, "kprobes", "securityfs"),
        Finding("privileges", "CAP_BPF", "warn", "lacking", "all", "status", SUDO),
        Finding("privileges", "CAP_PERFMON", "warn", "lacking", "tracing", "status", SUDO),
        Finding("program types", "xdp", "ok", "available", "XDP", "libbpf"),
        Finding("program types", "lsm", "warn", "not available", "LSM hooks", "libbpf"),
        Finding("program types", "ext", "info", "not available", "your own", "libbpf"),
        *(
            Finding("interfaces", f"veth{i}", "ok", "XDP native, generic", "xdp", "netlink")
            for i in range(40)
        ),
        Finding("interfaces", "eth\x1b[31m0", "info", "XDP generic", "xdp", "netlink"),
        *(Finding("hooks", kind, "ok", "available", "exec-monitor", "") for kind in ATTACH_TYPES),
    ),
    {
        kind: Availability(False, "lacks CAP_BPF and a good many more words than fit", SUDO, True)
        if kind in ("fentry", "lsm", "cgroup")
        else Availability(True, probed="program loaded")
        for kind in ATTACH_TYPES
    },
    (
        MonitorVerdict("exec-monitor", True, "tracepoint", LOWER),
        MonitorVerdict("net-monitor", False, reason="no tracepoints", remedy="boot another"),
        MonitorVerdict("xdp", True, "xdp"),
    ),
)


def draw(report: Report = REPORT, width: int | None = None, verbose: int = 0) -> list[str]:
    lines = draw_report(report, width=width, ascii=False, verbose=verbose)
    return ["".join(text for text, _ in line) for line in lines]


@pytest.mark.parametrize("verbose", [0, 1])
@pytest.mark.parametrize("width", [60, 80, 120])
def test_fits_the_terminal(width: int, verbose: int) -> None:
    too_wide = [line for line in draw(width=width, verbose=verbose) if cells(line) > width]
    assert too_wide == []


def test_a_pipe_gets_one_line_for_each_finding_and_words_for_signs() -> None:
    lines = draw()
    assert "  warn JIT               off" in lines
    assert "  info lockdown          unknown" in lines
    assert all(line.isascii() for line in lines)


def test_what_failed_is_followed_by_what_it_affects_and_what_to_type() -> None:
    lines = [line.strip() for line in draw()]
    at = lines.index("warn JIT               off")
    assert lines[at + 1 : at + 3] == ["affects: speed", "-> sudo sysctl x=1"]


def test_a_shared_remedy_is_said_once_above_and_once_at_the_end() -> None:
    report = replace(REPORT, monitors=(MonitorVerdict("xdp", False, reason="no", remedy=SUDO),))
    places = [i for i, line in enumerate(draw(report)) if SUDO in line]
    assert len(places) == 2
    lines = draw(report)
    assert lines[places[0] - 2] == "  warn CAP_PERFMON       lacking"
    assert "Monitors" in lines[: places[1]]


def test_types_are_one_line_unless_asked() -> None:
    lines = [line.strip() for line in draw()]
    assert "ok   available         1 of 3" in lines
    assert "warn lacking           lsm (LSM hooks)" in lines
    assert "info lacking, unused   ext" in lines
    assert "ok   xdp               available" in [line.strip() for line in draw(verbose=1)]


def test_many_interfaces_are_cut_but_not_the_one_that_matters() -> None:
    lines = "\n".join(draw())
    assert "and 29 more interfaces (-v shows all)" in lines
    assert "eth\\x1b[31m0" in lines  # first, and harmless to the terminal
    assert "more interfaces" not in "\n".join(draw(verbose=1))


def test_attach_types_that_fail_alike_are_together() -> None:
    text = "\n".join(draw())
    assert "fentry, lsm, cgroup" in text
    assert text.count("lacks CAP_BPF and a good many") == 1


def test_verdicts_come_last() -> None:
    lines = [line.strip() for line in draw()]
    verdicts = lines[lines.index("Monitors") :]
    assert verdicts[1:4] == [
        "warn exec-monitor      runs degraded: tracepoint (rung 3)",
        "lost: parent, failed execs",
        "because kprobe: this kernel has no kprobes",
    ]
    assert "fail net-monitor       cannot run: no tracepoints" in verdicts
    assert "-> boot another" in verdicts
    assert "ok   xdp               runs: xdp" in verdicts
    assert verdicts[-1] == "1 of 3 monitors cannot run here."


def test_summary_for_every_outcome() -> None:
    runs, lower, cannot = REPORT.monitors[2], REPORT.monitors[0], REPORT.monitors[1]
    for monitors, words in (
        ((runs, runs), "All 2 monitors run here."),
        ((runs, lower), "All 2 monitors run here, 1 of them degraded."),
        ((cannot, cannot), "No monitor runs here."),
        ((replace(cannot, privilege=True),), "No monitor runs with these privileges."),
    ):
        report = replace(REPORT, monitors=monitors)
        assert draw(report)[-1] == words
        assert report.all_run == ("All" in words)


def test_json_has_the_promised_shape() -> None:
    stream = io.StringIO()
    show_report(REPORT, "json", stream)
    document = json.loads(stream.getvalue())
    assert list(document) == ["kernel", "findings", "attach_types", "monitors"]
    assert document["kernel"]["version"] == "6.1.90"
    assert document["kernel"]["minimums"]["XDP"] == {"version": "4.8", "reached": True}
    assert document["findings"][0] == {
        "group": "kernel",
        "name": "JIT",
        "status": "warn",
        "found": "off",
        "affects": "speed",
        "remedy": "sudo sysctl x=1",
        "probed": "sysctl",
    }
    assert document["findings"][1]["found"] is None
    assert list(document["attach_types"]) == [
        "xdp", "tc", "kprobe", "tracepoint", "raw_tracepoint", "fentry", "uprobe", "perf_event",
        "lsm", "cgroup",
    ]  # fmt: skip
    assert document["attach_types"]["xdp"]["available"] is True
    assert document["monitors"]["net-monitor"] == {
        "runs": False,
        "hook": None,
        "degraded": None,
        "reason": "no tracepoints",
        "remedy": "boot another",
    }
    assert document["monitors"]["exec-monitor"]["degraded"] == {
        "rung": 3,
        "hook": "tracepoint",
        "lost": ["parent", "failed execs"],
        "reason": "kprobe: this kernel has no kprobes",
    }
