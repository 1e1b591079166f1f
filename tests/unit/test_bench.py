"""The bench's own logic: medians, ratios, budgets, turns, tables."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def bench_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))


def result(**given: Any) -> Any:
    """A comparison of 3 with 6 seconds."""
    defaults = {"what": "start", "unit": "s", "rounds": {"hmebpf": [9, 3, 1], "peer": [6, 6, 6]}}
    return import_module("benchmarks.measure").Result(**{**defaults, **given})


def test_ratio_is_of_medians() -> None:
    assert result(against="peer").ratio == 0.5
    assert result().ratio is None
    assert result(against="peer", rounds={"hmebpf": [1.0], "peer": [0.0]}).ratio is None


def test_ours_may_have_another_name() -> None:
    rounds = {"hmebpf, whole": [1.0], "hmebpf, columns": [2.0], "peer": [4.0]}
    assert result(rounds=rounds, against="peer", ours="hmebpf, columns").ratio == 0.5
    assert result(rounds=rounds, against="peer").ratio is None


@pytest.mark.parametrize(
    ("given", "met"),
    [
        ({}, None),
        ({"against": "peer"}, None),
        ({"against": "peer", "budget": 0.5}, True),
        ({"against": "peer", "budget": 0.49}, False),
        ({"against": "peer", "budget": 0.5, "more_is_better": True}, True),
        ({"against": "peer", "budget": 0.51, "more_is_better": True}, False),
        ({"limit": 3.0}, True),
        ({"limit": 2.9}, False),
        ({"against": "peer", "budget": 0.5, "limit": 2.9}, False),
        ({"budget": 0.5}, False),  # a ratio that could not be measured is not within its budget
    ],
)
def test_budgets(given: dict[str, Any], met: bool | None) -> None:
    assert result(**given).met is met


def test_contenders_take_turns_and_warm_up_does_not_count() -> None:
    calls: list[str] = []

    def contender(name: str) -> Any:
        def measure() -> float:
            calls.append(name)
            return float(len(calls))

        return measure

    take_turns = import_module("benchmarks.measure").take_turns
    figures = take_turns(2, {"a": contender("a"), "b": contender("b")}, warm_up=1)
    assert calls == ["a", "b"] * 3
    assert figures == {"a": [3.0, 5.0], "b": [4.0, 6.0]}


@pytest.mark.parametrize(
    ("figure", "unit", "text"),
    [
        (1.234, "s", "1.23 s"),
        (0.0456, "s", "45.6 ms"),
        (0.000789, "s", "789 us"),
        (3e-10, "s", "0.30 ns"),
        (0.0, "s", "0.00 ns"),
        (4_560_000, "/s", "4.56 M/s"),
        (17.84, "MiB", "17.8 MiB"),
        (3.0, "", "3.00"),
    ],
)
def test_figures_have_three_digits(figure: float, unit: str, text: str) -> None:
    assert import_module("benchmarks.table").format_figure(figure, unit) == text


def test_a_line_tells_contenders_ratio_and_verdict() -> None:
    draw = import_module("benchmarks.table").draw_table
    line = result(against="peer", budget=0.45, note="as measured")
    assert draw([line]).splitlines() == [
        "  start  hmebpf 3.00 s  peer 6.00 s  = 0.50 x peer  (<= 0.45 x: NOT MET)",
        "         as measured",
    ]
    more = result(against="peer", budget=0.5, more_is_better=True)
    assert draw([more]).endswith("(>= 0.50 x: met)")
    both = result(against="peer", budget=0.6, limit=2.0)
    assert draw([both]).endswith("(<= 0.60 x, <= 2.00 s: NOT MET)")


def growth() -> Any:
    columns = {"read": ("s", [0.001, 0.01, None]), "memory": ("MiB", [1.0, 10.0, 100.0])}
    kind = import_module("benchmarks.measure").Growth
    return kind("entries", "n", (10, 100, 1000), columns, "linear")


def test_growth_is_a_table_of_its_own() -> None:
    assert import_module("benchmarks.table").draw_table([growth()]).splitlines() == [
        "  entries",
        "        n     read    memory",
        "       10  1.00 ms  1.00 MiB",
        "      100  10.0 ms  10.0 MiB",
        "    1,000        -   100 MiB",
        "    linear",
    ]
    assert growth().met is None


def test_both_survive_json() -> None:
    as_dict = import_module("benchmarks.table").as_dict
    told = json.loads(json.dumps([as_dict(result(against="peer", budget=0.6)), as_dict(growth())]))
    assert told[0]["medians"] == {"hmebpf": 3, "peer": 6}
    assert (told[0]["ratio"], told[0]["met"]) == (0.5, True)
    assert told[1]["steps"] == [10, 100, 1000]
    assert told[1]["columns"]["read"] == {"unit": "s", "figures": [0.001, 0.01, None]}


def test_list_names_every_section() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import sys; from benchmarks.command import main; main(['--list'])"],
        env={"PYTHONPATH": f"{ROOT / 'scripts'}:{ROOT}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    named = [line.split()[0] for line in done.stdout.splitlines()]
    assert named == list(import_module("benchmarks").SECTIONS)


@pytest.mark.parametrize(
    "arguments", [["nosuch"], ["--rounds", "0", "start"], ["start", "--rounds", "x"]]
)
def test_wrong_arguments_are_told(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        import_module("benchmarks.command").main(arguments)
    assert ended.value.code == 2
    assert "scripts/bench: error:" in capsys.readouterr().err


def test_every_section_can_be_imported() -> None:
    for name in import_module("benchmarks").SECTIONS:
        module = import_module(f"benchmarks.{name}")
        assert module.TITLE and callable(module.run)
