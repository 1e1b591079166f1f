"""The command line before anything reaches the kernel: help, usage errors, exit statuses."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import Any

import pytest

from hypermesh_ebpf import __version__, cli, errors, monitors
from hypermesh_ebpf.errors import CompileError, HmebpfError, LossSeen, Unsupported
from tests.running import COMMAND, ROOT, run_cli

HEAVY = {"bcc", "rich", "pyroute2", "numpy"}
COMMANDS = [
    *monitors.names(),
    "load",
    "run",
    "list",
    "show",
    "dump",
    "top",
    "pin",
    "unpin",
    "detach",
    "unload",
    "headers",
    "check-system",
    "cleanup",
    "cache",
    "cache show",
    "cache clear",
]


def imported_by(*arguments: str) -> set[str]:
    """The modules that a call of the command line imports."""
    argv = [sys.executable, "-X", "importtime", *COMMAND[1:], *arguments]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0
    return {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if "|" in line}


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["cache", "show"], []])
def test_nothing_heavy_is_imported(arguments: list[str]) -> None:
    modules = imported_by(*arguments)
    assert "click" in modules
    assert not {name.partition(".")[0] for name in modules} & HEAVY
    assert "ctypes" not in modules or arguments == ["cache", "show"]
    declarations = {f"hypermesh_ebpf.monitors.{n.replace('-', '_')}" for n in monitors.names()}
    assert not modules & declarations, "nor any declaration"


@pytest.mark.parametrize("name", monitors.names())
def test_help_of_a_monitor_imports_nothing_heavy_either(name: str) -> None:
    modules = imported_by(name, "--help")
    assert not {module.partition(".")[0] for module in modules} & HEAVY
    others = {
        f"hypermesh_ebpf.monitors.{n.replace('-', '_')}" for n in monitors.names() if n != name
    }
    assert not modules & others


def test_help_lists_every_command() -> None:
    done = run_cli("--help")
    assert done.returncode == 0
    for name in ["check-system", "cache", *monitors.names()]:
        assert re.search(rf"^  {name}  +\S", done.stdout, re.M)
    assert run_cli().stdout == done.stdout, "so does no argument at all"
    assert run_cli("-h").stdout == done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str) -> None:
    done = run_cli(*command.split(), "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"Usage: hmebpf {command} ")


@pytest.mark.parametrize("name", monitors.names())
def test_help_of_a_monitor_explains_every_option(name: str) -> None:
    shown = " ".join(run_cli(name, "--help").stdout.split())
    for option in monitors.load(name).options:
        assert f" --{option.name.replace('_', '-')} " in shown
        assert f"{option.help[1:]}." in shown
        assert "|".join(option.choices) in shown
    for flag in ("interval", "duration", "count", "output", "fail-on-loss", "no-cache", "verbose"):
        assert f"--{flag} " in shown
    assert "--max-overhead PERCENT The most CPU time that the programs may take" in shown
    assert "in percent of one CPU" in shown


def test_version() -> None:
    assert run_cli("--version").stdout == f"hmebpf, version {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nonsense"], "No such command 'nonsense'"),
        (["--bogus"], "No such option"),
        (["xdp"], "Missing option '--iface'"),
        (["xdp", "--iface"], "requires an argument"),
        (["xdp", "--iface", "lo", "--bogus"], "No such option"),
        (["xdp", "--iface", "lo", "extra"], "unexpected extra argument"),
        (["xdp", "--iface", "lo", "--by", "color"], "'color' is not one of 'protocol'"),
        (["xdp", "--iface", "lo", "-o", "xml"], "'xml' is not one of 'table', 'json', 'csv'"),
        (["xdp", "--iface", "lo", "-i", "0"], "not in the range"),
        (["xdp", "--iface", "lo", "-i", "-1"], "not in the range"),
        (["xdp", "--iface", "lo", "-i", "soon"], "not a valid"),
        (["xdp", "--iface", "lo", "-i", "nan"], "nan is no length of time"),
        (["xdp", "--iface", "lo", "-d", "inf"], "inf is no length of time"),
        (["xdp", "--iface", "lo", "-n", "0"], "not in the range"),
        (["xdp", "--iface", "lo", "-n", "1.5"], "not a valid integer"),
        (["xdp", "--iface", "lo", "--top", "0"], "not in the range"),
        (["xdp", "--iface", "lo", "--max-overhead", "0"], "not in the range"),
        (["xdp", "--iface", "lo", "--max-overhead", "-1%"], "not in the range"),
        (["xdp", "--iface", "lo", "--max-overhead", "little"], "not a valid"),
        (["xdp", "--iface", "lo", "--max-overhead", "nan"], "nan is no percentage"),
        (["top", "--max-overhead", "1"], "No such option"),
        (["exec-monitor", "--pid", "one"], "not a valid integer"),
        (["exec-monitor", "--rung", "cellar"], "'cellar' is not one of 'kprobe'"),
        (["cache"], "Missing command"),
        (["cache", "bogus"], "No such command 'bogus'"),
        (["check-system", "-o", "csv"], "'csv' is not one of"),
    ],
    ids=str,
)
def test_usage_errors(arguments: list[str], said: str) -> None:
    """Two lines and exit status 2, whoever found the mistake."""
    done = run_cli(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    error, hint = done.stderr.splitlines()
    assert error.startswith("error: hmebpf")
    assert said in error
    assert re.fullmatch(r"hint: see `hmebpf.* --help`", hint)


def test_what_is_pinned_cannot_be_limited() -> None:
    done = run_cli("load", "x.o", "--pin", "--max-overhead", "0.5")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == [
        "error: --pin with --max-overhead 0.5: what is pinned stays when the command has ended, "
        "and nobody watches over it",
        "hint: leave one of the two out; `hmebpf top` shows what pinned programs cost",
    ]


@pytest.mark.parametrize("arguments", [["--help"], ["cache", "show"], ["xdp", "--help"]])
def test_output_that_cannot_be_written(arguments: list[str]) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*COMMAND, *arguments],
            cwd=ROOT,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=300,
        )
    assert done.returncode == 1
    error, hint = done.stderr.splitlines()
    assert error == "error: write the output: No space left on device (ENOSPC)"
    assert hint.startswith("hint: ")


@pytest.mark.parametrize("arguments", ["--help", "cache show"])
def test_reader_that_is_gone(arguments: str) -> None:
    shell = f"exec 2>&1; {sys.executable} -m hypermesh_ebpf {arguments} | true"
    done = subprocess.run(["bash", "-c", shell], cwd=ROOT, capture_output=True, timeout=300)
    assert done.stdout == b"", "no traceback, no complaint"


def raised(
    error: Exception, *arguments: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> tuple[int, str]:
    """Exit status and stderr when a command fails with that error."""

    def fail(*args: object, **options: object) -> None:
        raise error

    monkeypatch.setattr("hypermesh_ebpf.run.run_monitor", fail)
    monkeypatch.setattr(sys, "argv", ["hmebpf", "xdp", "--iface", "lo", *arguments])
    status = cli.main()
    return status, capsys.readouterr().err


@pytest.mark.parametrize("name", errors.all_errors())
def test_every_error_becomes_two_lines_and_its_exit_status(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    error = errors.all_errors()[name]("do it", "it broke", "mend it", details="a long story")
    status, said = raised(error, monkeypatch=monkeypatch, capsys=capsys)
    assert status == error.exit_code
    assert said == "error: do it: it broke\nhint: mend it\n"


def test_details_come_with_v_and_a_traceback_with_vv(
    monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    error = CompileError("compile xdp.c", "xdp.c:3: error", "mend it", details="all that was said")
    plain = "error: compile xdp.c: xdp.c:3: error\nhint: mend it\n"
    _, said = raised(error, monkeypatch=monkeypatch, capsys=capsys)
    assert said == plain
    for flags in (["-v"], ["--verbose"]):
        _, said = raised(error, *flags, monkeypatch=monkeypatch, capsys=capsys)
        assert said == f"all that was said\n{plain}"
    for flags in (["-vv"], ["-v", "-v"], ["--verbose", "-v"]):
        _, said = raised(error, *flags, monkeypatch=monkeypatch, capsys=capsys)
        assert said.startswith("all that was said\nTraceback (most recent call last):\n")
        assert said.endswith(plain)


def test_error_without_remedy_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    _, said = raised(Unsupported("do it"), monkeypatch=monkeypatch, capsys=capsys)
    assert said == "error: do it\n"


def test_status_of_loss_and_of_success(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    status, _ = raised(LossSeen("watch", "lost 3"), monkeypatch=monkeypatch, capsys=capsys)
    assert status == 4
    monkeypatch.setattr("hypermesh_ebpf.run.run_monitor", lambda *args: None)
    assert cli.main() == 0


def test_nothing_of_ours_is_mistaken_for_a_usage_error(
    monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """An error that is none of ours is a bug: its traceback is wanted."""
    with pytest.raises(ZeroDivisionError):
        raised(ZeroDivisionError(), monkeypatch=monkeypatch, capsys=capsys)
    assert issubclass(errors.UsageError, HmebpfError)


def test_words_behind_a_double_dash_are_no_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cli._verbosity(["hmebpf", "xdp", "-v", "--", "-vv"]) == 1
    assert cli._verbosity(["hmebpf", "xdp", "--iface", "veth0"]) == 0
    assert cli._verbosity(["hmebpf", "-vvv"]) == 3
