"""What every test run shares: markers by folder, skips without privileges, and a record of results.

``scripts/test`` runs pytest several times - on this machine, and inside virtual machines with other
kernels - and adds the results up.  Where HMEBPF_TEST_RESULTS is set, a run prints at its end one
line for it: that word, a space and a JSON list of {"id", "outcome", "reason"}, outcome being
passed, failed or skipped.  A test that is skipped here may run there; one skipped everywhere is
found out.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

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


class Results:
    """The outcome of every test of a run, with the reason of every skip."""

    def __init__(self) -> None:
        self.tests: dict[str, dict[str, str]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        # A test has three reports - setup, call, teardown - and the worst one is its outcome.
        seen = self.tests.get(report.nodeid)
        if report.failed:
            self._note(report, "failed")
        elif report.skipped and (seen is None or seen["outcome"] == "passed"):
            self._note(report, "skipped")
        elif report.when == "call" and seen is None:
            self._note(report, "passed")

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        # A whole module can be skipped, or fail to be imported: it counts under the file's name.
        if not report.passed:
            self._note(report, report.outcome)

    def _note(self, report: pytest.TestReport | pytest.CollectReport, outcome: str) -> None:
        reason = ""
        if outcome == "skipped" and isinstance(report.longrepr, tuple):
            reason = report.longrepr[2].removeprefix("Skipped: ")
        elif outcome == "skipped":
            reason = f"expected to fail: {getattr(report, 'wasxfail', '')}"
        self.tests[report.nodeid] = {"id": report.nodeid, "outcome": outcome, "reason": reason}

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        terminalreporter.ensure_newline()
        terminalreporter.write_line("HMEBPF_TEST_RESULTS " + json.dumps([*self.tests.values()]))


def pytest_configure(config: pytest.Config) -> None:
    if os.environ.get("HMEBPF_TEST_RESULTS"):
        config.pluginmanager.register(Results(), "hmebpf-results")
