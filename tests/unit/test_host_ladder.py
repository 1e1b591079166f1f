"""The choice of a rung: first that can, all reasons when none can."""

from __future__ import annotations

from pathlib import Path

import pytest

from hypermesh_ebpf.errors import MissingPrivilege, Unsupported
from hypermesh_ebpf.host import ladder
from hypermesh_ebpf.host.hooks import Availability
from hypermesh_ebpf.host.ladder import choose_rung
from hypermesh_ebpf.monitors.declaration import Hook, Monitor, Rung

YES = Availability(True)
NO = Availability(False, "this kernel has none", "boot another")
NOT_ALLOWED = Availability(False, "lacks CAP_BPF", "sudo", privilege=True)


def make_monitor(*rungs: Rung) -> Monitor:
    return Monitor(
        "demo",
        "",
        "demo.c",
        rungs,
        collector=lambda options, maps: pytest.fail("not asked for"),
        columns=lambda options: (),
        key=lambda options: (),
    )


def rung(name: str, *hooks: tuple[str, str], needs_btf: bool = False) -> Rung:
    return Rung(name, tuple(Hook(kind, target, "f") for kind, target in hooks), needs_btf=needs_btf)


@pytest.fixture
def available(monkeypatch: pytest.MonkeyPatch) -> dict[str, Availability]:
    """What probes answer, by kind or "kind:target"; True for all else."""
    answers: dict[str, Availability] = {}

    def probe(kind: str, target: str = "") -> Availability:
        return answers.get(f"{kind}:{target}", answers.get(kind, YES))

    monkeypatch.setattr(ladder, "probe_hook", probe)
    return answers


LADDER = make_monitor(
    rung("kprobe", ("kprobe", "syscall:execve")),
    rung("fentry", ("fentry", "syscall:execve")),
    rung("tracepoint", ("tracepoint", "a:b"), ("tracepoint", "a:c")),
)


def test_takes_the_best_rung(available: dict[str, Availability]) -> None:
    choice = choose_rung(LADDER)
    assert (choice.index, choice.rung.name, choice.skipped, choice.reason) == (
        0,
        "kprobe",
        (),
        None,
    )


def test_goes_down_and_remembers_why(available: dict[str, Availability]) -> None:
    available.update(kprobe=NO, fentry=NOT_ALLOWED)
    choice = choose_rung(LADDER)
    assert (choice.index, choice.rung.name) == (2, "tracepoint")
    assert [(r.name, a.privilege) for r, a in choice.skipped] == [
        ("kprobe", False),
        ("fentry", True),
    ]
    assert choice.reason == "kprobe: this kernel has none; fentry: lacks CAP_BPF"


def test_one_missing_hook_rules_a_rung_out(available: dict[str, Availability]) -> None:
    available.update({"kprobe": NO, "fentry": NO, "tracepoint:a:c": NO})
    with pytest.raises(Unsupported) as caught:
        choose_rung(LADDER)
    assert "tracepoint a:c: this kernel has none" in str(caught.value)
    assert caught.value.exit_code == 3


def test_start_skips_what_was_tried(available: dict[str, Availability]) -> None:
    choice = choose_rung(LADDER, start=1)
    assert (choice.index, choice.rung.name) == (1, "fentry")
    with pytest.raises(Unsupported, match="no way to run it is left"):
        choose_rung(LADDER, start=3)


def test_says_if_privileges_would_help(available: dict[str, Availability]) -> None:
    available.update(kprobe=NO, fentry=NOT_ALLOWED, tracepoint=NOT_ALLOWED)
    with pytest.raises(MissingPrivilege) as caught:
        choose_rung(LADDER)
    assert caught.value.remedy == "sudo"
    assert "kprobe: this kernel has none" in str(caught.value)
    assert "fentry, tracepoint: lacks CAP_BPF" in str(caught.value)


def test_optional_hook_does_not_count(available: dict[str, Availability]) -> None:
    available["tracepoint:x:y"] = NO
    hooks = (Hook("tracepoint", "a:b", "f"), Hook("tracepoint", "x:y", "f", optional=True))
    assert choose_rung(make_monitor(Rung("tracepoint", hooks))).index == 0


def test_rung_that_needs_btf_without_btf(
    available: dict[str, Availability], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HMEBPF_BTF", str(tmp_path / "none"))
    monitor = make_monitor(
        rung("rich", ("tracepoint", "a:b"), needs_btf=True), rung("poor", ("tracepoint", "a:b"))
    )
    choice = choose_rung(monitor)
    assert choice.rung.name == "poor"
    assert choice.reason is not None
    assert "needs BTF" in choice.reason
    assert "ENOENT" in choice.reason
