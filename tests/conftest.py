"""What every test run shares: markers by folder, skips without privileges, and a record of results.

``scripts/test`` runs pytest several times - on this machine, and inside virtual machines with other
kernels - and adds the results up.  Where HMEBPF_TEST_RESULTS names a file, a line is added to it
for the tests that are going to run, {"planned": [ids]}, and one for each that is over, {"id",
"outcome", "reason"}, outcome being passed, failed or skipped; what is over by that file is not run
again.  So a machine that dies is booted anew for
the tests that it did not get to.  A test that is skipped here may run there; one skipped everywhere
is found out.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).parent


def in_virtual_machine() -> bool:
    """True inside a machine that scripts/vm booted."""
    return "HMEBPF_VM_KERNEL" in os.environ


@pytest.hookimpl(tryfirst=True)  # before -m looks at the markers
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of tests/kernel and tests/vm, and skip them where they cannot run."""
    for item in items:
        folder = item.path.relative_to(TESTS).parts[0] if item.path.is_relative_to(TESTS) else ""
        if folder == "kernel":
            item.add_marker("kernel")
            if os.geteuid() != 0:
                item.add_marker(pytest.mark.skip(reason="needs root"))
        elif folder == "vm":
            item.add_marker("vm")
            if not in_virtual_machine():
                item.add_marker(pytest.mark.skip(reason="runs in scripts/vm's virtual machines"))


def read_results(file: Path) -> tuple[set[str], dict[str, dict[str, str]]]:
    """What was planned, by ids, and what is over, by id; a line that was cut off does not count."""
    planned: set[str] = set()
    over: dict[str, dict[str, str]] = {}
    for text in file.read_text(errors="replace").splitlines() if file.exists() else ():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        planned |= set(line.get("planned", ()))
        if "id" in line:
            over[line["id"]] = line
    return planned, over


class Results:
    """The outcome of every test of a run, with the reason of every skip, in a file."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._tests: dict[str, dict[str, str]] = {}
        self._before = set(read_results(file)[1])

    def pytest_collection_modifyitems(
        self, config: pytest.Config, items: list[pytest.Item]
    ) -> None:
        """Leave out what ran in a machine that died later."""
        config.hook.pytest_deselected(items=[i for i in items if i.nodeid in self._before])
        items[:] = [item for item in items if item.nodeid not in self._before]

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self._write({"planned": [item.nodeid for item in session.items]})

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        # A test has three reports - setup, call, teardown - and the worst one is its outcome.
        seen = self._tests.get(report.nodeid)
        if report.failed:
            self._note(report, "failed")
        elif report.skipped and (seen is None or seen["outcome"] == "passed"):
            self._note(report, "skipped")
        elif report.when == "call" and seen is None:
            self._note(report, "passed")

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        if nodeid in self._tests:
            self._write(self._tests[nodeid])

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        # A whole module can be skipped, or fail to be imported: it counts under the file's name.
        if not report.passed and report.nodeid not in self._before:
            self._note(report, report.outcome)
            self._write(self._tests[report.nodeid])

    def _note(self, report: pytest.TestReport | pytest.CollectReport, outcome: str) -> None:
        reason = ""
        if outcome == "skipped" and isinstance(report.longrepr, tuple):
            reason = report.longrepr[2].removeprefix("Skipped: ")
        elif outcome == "skipped":
            reason = f"expected to fail: {getattr(report, 'wasxfail', '')}"
        self._tests[report.nodeid] = {"id": report.nodeid, "outcome": outcome, "reason": reason}

    def _write(self, line: dict[str, Any]) -> None:
        with self._file.open("a") as file:
            # Behind a line that was cut off by the end of a machine, too.
            file.write("\n" + json.dumps(line) + "\n")


def pytest_configure(config: pytest.Config) -> None:
    if file := os.environ.get("HMEBPF_TEST_RESULTS"):
        config.pluginmanager.register(Results(Path(file)), "hmebpf-results")
