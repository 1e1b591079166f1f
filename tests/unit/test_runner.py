"""scripts/test's sum over several pytest runs, and tests/conftest.py's record of one run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def runner() -> Any:
    """scripts/test as a module."""
    loader = SourceFileLoader("scripts_test", str(ROOT / "scripts/test"))
    spec = spec_from_loader("scripts_test", loader)
    assert spec is not None
    module = module_from_spec(spec)
    loader.exec_module(module)
    return module


def finished(name: str, failed: bool = False, **outcomes: str) -> Any:
    """A run that is over; ``outcomes`` by the last part of a test's id."""
    results = {
        f"tests/kernel/{test}": {"id": f"tests/kernel/{test}", "outcome": outcome, "reason": "why"}
        for test, outcome in outcomes.items()
    }
    return SimpleNamespace(name=name, where=name, failed=failed, results=results, left=[])


def test_sum_is_the_last_line(runner: Any, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [finished("host", a="passed", b="skipped"), finished("kernel 6.1", b="passed")]
    assert runner.report(runs) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "2 passed, 0 failed, 1 skipped"
    assert "   1 on host: why" in lines
    assert "       tests/kernel/b" in lines
    assert not [line for line in lines if "never run" in line]


@pytest.mark.parametrize(("ci", "code"), [("true", 1), ("", 0)])
def test_what_is_skipped_everywhere_fails_in_ci(
    runner: Any,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    ci: str,
    code: int,
) -> None:
    monkeypatch.setenv("CI", ci)
    runs = [finished("host", a="passed", b="skipped"), finished("kernel 6.1", b="skipped")]
    assert runner.report(runs) == code
    out = capsys.readouterr().out
    assert "never run: 1" in out
    assert out.splitlines()[-1] == "1 passed, 0 failed, 2 skipped"


def test_failures_of_any_kind_fail_the_whole(
    runner: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    good = finished("host", a="passed")
    assert runner.report([good, finished("kernel 6.1", a="failed")]) == 1
    assert runner.report([good, finished("mypy", failed=True)]) == 1
    assert "failed: mypy" in capsys.readouterr().out
    assert runner.report([finished("host")]) == 1, "no test at all is no success"


def test_module_skipped_as_a_whole_counts_as_run_where_its_tests_ran(runner: Any) -> None:
    def run(test: str, outcome: str) -> Any:
        result = {"id": test, "outcome": outcome, "reason": ""}
        return SimpleNamespace(results={test: result})

    runs = [run("tests/a.py", "skipped"), run("tests/a.py::test_x", "passed")]
    assert runner.find_never_run(runs) == []
    assert runner.find_never_run(runs[:1]) == ["tests/a.py"]


RESULT = '{"id": "%s", "outcome": "passed", "reason": ""}'


@pytest.mark.parametrize(
    ("command", "failed"),
    [
        ("echo '{}' >>$HMEBPF_TEST_RESULTS", False),
        ("echo '{}' >>$HMEBPF_TEST_RESULTS; exit 1", True),
        ("echo '{}' >>$HMEBPF_TEST_RESULTS; exit 5", False),
        ("echo killed before the end", True),
        ("echo '{}' >>$HMEBPF_TEST_RESULTS; echo '{{\"id\": ' >>$HMEBPF_TEST_RESULTS", False),
        (
            'echo \'{{"planned": ["t", "u"]}}\' >>$HMEBPF_TEST_RESULTS;'
            "echo '{}' >>$HMEBPF_TEST_RESULTS",
            True,
        ),
    ],
)
def test_run_without_results_has_failed(
    runner: Any, tmp_path: Path, command: str, failed: bool
) -> None:
    text = command.format(RESULT % "t")
    run = runner.Run("name", ["sh", "-c", text], where="host", results=tmp_path / "file")
    run.show()
    assert run.failed is failed
    assert runner.Run("no tests", ["true"]).name == "no tests"


def test_machine_that_dies_is_booted_again(
    runner: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its first boot brings one result and dies, the second the other one."""
    results = tmp_path / "tests"
    text = (
        f"if [ -s {results} ]; then echo '{RESULT % 'b'}' >>{results}; "
        f"else echo '{RESULT % 'a'}' >>{results}; echo a panic; exit 125; fi"
    )
    run = runner.Run("machine", ["sh", "-c", text], where="6.1", results=results)
    run.show()
    assert not run.failed
    assert run.results.keys() == {"a", "b"}
    out = capfd.readouterr().out
    assert "a panic\n   machine: booted again for what is left (1)\n" in out


def test_machine_that_always_dies_has_failed(
    runner: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "tests"
    text = f"echo '{RESULT % 'a'}' >>{results}; echo a panic; exit 125"
    run = runner.Run("machine", ["sh", "-c", text], where="6.1", results=results)
    run.show()
    assert run.failed
    assert capfd.readouterr().out.count("a panic") == 3


TESTS = """
import pytest

@pytest.fixture
def broken_before():
    raise ValueError

@pytest.fixture
def broken_after():
    yield
    raise ValueError

def test_passed(): pass
def test_failed(): raise ValueError
def test_skipped(): pytest.skip("not today")
def test_error_before(broken_before): pass
def test_error_after(broken_after): pass
@pytest.mark.xfail
def test_expected(): raise ValueError
"""
MODULE_SKIP = "import pytest; pytest.skip('all of it', allow_module_level=True)"


def record(folder: Path, *arguments: str, **environment: str) -> dict[str, tuple[str, str]]:
    """Outcome and reason by test, as a run with this project's conftest.py tells them."""
    results = folder / "results"
    subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--rootdir=.", *arguments],
        cwd=folder,
        env={**os.environ, "HMEBPF_TEST_RESULTS": str(results), **environment},
        capture_output=True,
        timeout=120,
    )
    lines = [json.loads(line) for line in results.read_text().splitlines() if line]
    tests = [line for line in lines if "id" in line]
    found = {test["id"]: (test["outcome"], test["reason"]) for test in tests}
    assert len(found) == len(tests), "each is told once"
    return found


@pytest.fixture
def project(tmp_path: Path) -> Path:
    shutil.copy(ROOT / "tests/conftest.py", tmp_path)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    kernel: k\n    vm: v\n")
    for folder in ("unit", "kernel", "vm"):
        (tmp_path / folder).mkdir()
    return tmp_path


def test_record_tells_every_outcome(project: Path) -> None:
    (project / "unit/test_it.py").write_text(TESTS)
    (project / "unit/test_module.py").write_text(MODULE_SKIP)
    (project / "unit/test_broken.py").write_text("import no_such_module")
    assert record(project, "--continue-on-collection-errors") == {
        "unit/test_broken.py": ("failed", ""),
        "unit/test_module.py": ("skipped", "all of it"),
        "unit/test_it.py::test_passed": ("passed", ""),
        "unit/test_it.py::test_failed": ("failed", ""),
        "unit/test_it.py::test_skipped": ("skipped", "not today"),
        "unit/test_it.py::test_error_before": ("failed", ""),
        "unit/test_it.py::test_error_after": ("failed", ""),
        "unit/test_it.py::test_expected": ("skipped", "expected to fail: "),
    }


def test_folders_decide_markers(project: Path) -> None:
    for folder in ("unit", "kernel", "vm"):
        (project / folder / f"test_{folder}.py").write_text("def test(): pass")
    chosen = record(project, "-m", "kernel or vm")
    (project / "results").unlink()
    assert chosen.keys() == {"kernel/test_kernel.py::test", "vm/test_vm.py::test"}
    assert chosen["vm/test_vm.py::test"][0] == "skipped"
    if os.geteuid() == 0:
        assert chosen["kernel/test_kernel.py::test"] == ("passed", "")
    else:
        assert chosen["kernel/test_kernel.py::test"] == ("skipped", "needs root")
    inside = record(project, "-m", "vm", HMEBPF_VM_KERNEL="6.1")
    assert inside == {"vm/test_vm.py::test": ("passed", "")}


def test_run_that_ends_early_has_failed(
    runner: Any, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever its status: a test, or what it calls, may end the process of the tests."""
    text = "import os\ndef test_a(): pass\ndef test_b(): os._exit(0)\ndef test_c(): 1 / 0"
    (project / "unit/test_it.py").write_text(text)
    assert record(project) == {"unit/test_it.py::test_a": ("passed", "")}
    run = runner.Run("early", ["true"], where="host", results=project / "results")
    run.show()
    assert run.code == 0
    assert run.failed
    assert runner.report([run]) == 1
    assert "unit/test_it.py::test_c" in capsys.readouterr().out


def test_what_was_over_before_a_machine_died_is_not_run_again(project: Path) -> None:
    file = project / "unit/test_it.py"
    file.write_text("import os\ndef test_a(): pass\ndef test_b(): os._exit(1)\ndef test_c(): pass")
    assert record(project) == {"unit/test_it.py::test_a": ("passed", "")}
    file.write_text("def test_a(): 1 / 0\ndef test_b(): pass\ndef test_c(): pass")
    names = ("test_a", "test_b", "test_c")
    assert record(project) == {f"unit/test_it.py::{name}": ("passed", "") for name in names}
