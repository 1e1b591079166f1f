"""Which rung of a monitor's ladder runs here.  Sessions and check-system ask this one function."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hypermesh_ebpf.errors import MissingBtf, MissingPrivilege, Unsupported
from hypermesh_ebpf.host import kernel_btf
from hypermesh_ebpf.host.hooks import Availability, probe_hook

if TYPE_CHECKING:
    from hypermesh_ebpf.monitors.declaration import Monitor, Rung


@dataclass(frozen=True, slots=True)
class Choice:
    """The rung to take: its place on the ladder (from 0), and the better ones that cannot run."""

    index: int
    rung: Rung
    skipped: tuple[tuple[Rung, Availability], ...] = ()

    @property
    def reason(self) -> str | None:
        """Why no better rung was taken: each one's reason; None if this is the best."""
        return "; ".join(_without_repetition(self.skipped)) or None


def probe_rung(rung: Rung) -> Availability:
    """Whether every hook of the rung can be attached here, and BTF read where it needs it.

    The first hook that cannot decides, unless it is optional; the reason names it.
    """
    for hook in rung.hooks:
        found = probe_hook(hook.kind, hook.target)
        if not found.available and not hook.optional:
            # Name the target only where it is what lacks, not the kind as such.
            of_target = hook.target and probe_hook(hook.kind).available
            place = f"{hook.kind} {hook.target}: " if of_target else ""
            return Availability(
                False,
                f"{place}{found.reason}",
                found.remedy,
                found.privilege,
                found.probed,
                found.target,
            )
    if rung.needs_btf:
        try:
            kernel_btf.require_btf()
        except MissingBtf as error:
            return Availability(False, f"needs BTF: {error.cause}", error.remedy)
    return Availability(True)


def choose_rung(monitor: Monitor, start: int = 0) -> Choice:
    """The first rung from ``start`` on that this kernel and these privileges allow.

    Raises MissingPrivilege where privileges would make one run, else Unsupported; the cause
    gives each rung's reason.
    """
    skipped: list[tuple[Rung, Availability]] = []
    for index, rung in enumerate(monitor.rungs[start:], start):
        found = probe_rung(rung)
        if found.available:
            return Choice(index, rung, tuple(skipped))
        skipped.append((rung, found))
    what = f"run {monitor.name}"
    if not skipped:
        raise Unsupported(what, "no way to run it is left", "hmebpf check-system")
    reasons = "; ".join(_without_repetition(skipped))
    lacking = [found for _, found in skipped if found.privilege]
    if lacking:
        raise MissingPrivilege(what, reasons, lacking[0].remedy)
    raise Unsupported(what, reasons, skipped[-1][1].remedy)


def _without_repetition(skipped: Iterable[tuple[Rung, Availability]]) -> list[str]:
    """Each rung's reason; rungs that fail alike share one line."""
    by_reason: dict[str, list[str]] = {}
    for rung, found in skipped:
        by_reason.setdefault(found.reason or "", []).append(rung.name)
    return [f"{', '.join(names)}: {reason}" for reason, names in by_reason.items()]
