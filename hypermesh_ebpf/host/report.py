"""check-system's report: findings, then verdicts on attach types and monitors."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hypermesh_ebpf.bpf.libbpf import libbpf
from hypermesh_ebpf.errors import MissingDependency, MissingPrivilege, Unsupported
from hypermesh_ebpf.host import checks, dependencies, kernel, surveys
from hypermesh_ebpf.host.finding import Finding
from hypermesh_ebpf.host.hooks import Availability, probe_hook
from hypermesh_ebpf.host.ladder import choose_rung
from hypermesh_ebpf.metrics.sample import Degraded

if TYPE_CHECKING:
    from hypermesh_ebpf.monitors.declaration import Monitor

ATTACH_TYPES = (
    "xdp",
    "tc",
    "kprobe",
    "tracepoint",
    "raw_tracepoint",
    "fentry",
    "uprobe",
    "perf_event",
    "lsm",
    "cgroup",
)


@dataclass(frozen=True, slots=True)
class MonitorVerdict:
    """Whether a monitor runs here: on which rung, what that one loses, or why not at all.

    ``privilege`` is True when it would run with more privileges.
    """

    name: str
    runs: bool
    hook: str | None = None
    degraded: Degraded | None = None
    reason: str | None = None
    remedy: str | None = None
    privilege: bool = False

    def as_dict(self) -> dict[str, Any]:
        return {
            "runs": self.runs,
            "hook": self.hook,
            "degraded": self.degraded.as_dict() if self.degraded else None,
            "reason": self.reason,
            "remedy": self.remedy,
        }


@dataclass(frozen=True, slots=True)
class Report:
    """Everything that check-system found."""

    kernel: kernel.KernelRelease
    findings: tuple[Finding, ...]
    attach_types: dict[str, Availability]
    monitors: tuple[MonitorVerdict, ...]

    @property
    def all_run(self) -> bool:
        """True if every monitor runs, degraded or not."""
        return all(verdict.runs for verdict in self.monitors)

    def as_dict(self) -> dict[str, Any]:
        """The document that ``check-system -o json`` writes."""
        return {
            "kernel": {
                "release": self.kernel.release,
                "version": self.kernel.number,
                "machine": self.kernel.machine,
                "distribution": self.kernel.distribution,
                "build": self.kernel.build,
                "minimums": {
                    minimum.feature: {
                        "version": str(minimum),
                        "reached": self.kernel.reaches(minimum),
                    }
                    for minimum in kernel.MINIMUMS
                },
            },
            "findings": [finding.as_dict() for finding in self.findings],
            "attach_types": {
                kind: {
                    "available": found.available,
                    "reason": found.reason,
                    "remedy": found.remedy,
                    "privilege": found.privilege,
                    "probed": found.probed,
                }
                for kind, found in self.attach_types.items()
            },
            "monitors": {verdict.name: verdict.as_dict() for verdict in self.monitors},
        }


def verdict(monitor: Monitor) -> MonitorVerdict:
    """Whether ``monitor`` runs here, by the same choice that a session makes."""
    try:
        libbpf()
        dependencies.find_bcc()
        choice = choose_rung(monitor)
    except (Unsupported, MissingDependency) as error:
        return MonitorVerdict(
            monitor.name,
            False,
            reason=error.cause or error.what,
            remedy=error.remedy,
            privilege=isinstance(error, MissingPrivilege),
        )
    if not choice.index:
        return MonitorVerdict(monitor.name, True, choice.rung.name)
    lower = Degraded(choice.index + 1, choice.rung.name, choice.rung.lost, choice.reason)
    best = choice.skipped[0][1]
    return MonitorVerdict(monitor.name, True, choice.rung.name, lower, choice.reason, best.remedy)


def examine(monitors: Iterable[Monitor]) -> Report:
    """Probe this machine for everything that matters to ``monitors``.  Changes nothing."""
    monitors = tuple(monitors)
    attach_types = {kind: probe_hook(kind) for kind in ATTACH_TYPES}
    findings = [
        *checks.check_kernel(),
        *checks.check_filesystems(),
        *checks.check_privileges(),
        *checks.check_tools(),
        *surveys.check_types(),
        *surveys.check_interfaces(),
        *surveys.check_hooks(attach_types, monitors),
    ]
    return Report(
        kernel.read_kernel_release(),
        tuple(findings),
        attach_types,
        tuple(verdict(monitor) for monitor in monitors),
    )
