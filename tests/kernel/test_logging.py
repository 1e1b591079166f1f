"""Debug logging: what -v, -vv, HMEBPF_LOG and a program's own logging get to hear."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.netns import Namespace, needs_namespaces
from tests.running import COMMAND, ROOT, run_cli

pytestmark = needs_namespaces

LIBRARY_USER = """
import logging
logging.basicConfig(level=logging.{level}, format="%(name)s %(levelname)s %(message)s")
from hypermesh_ebpf import create_os_abstraction
with create_os_abstraction() as os_:
    handle = os_.load_ebpf_program(bytes.fromhex("b7000000020000009500000000000000"))
    os_.attach_ebpf_monitor(handle, "xdp:lo")
"""


def monitor(ns: Namespace, *flags: str, **environment: str) -> str:
    """What a short run of the xdp monitor writes to stderr."""
    command = (*COMMAND, "xdp", "--iface", "lo", "-n", "1", "-i", "0.1", *flags)
    process = ns.start(*command, cwd=ROOT, env={**os.environ, **environment})
    _out, said = process.communicate(timeout=300)
    assert process.returncode == 0
    return said


def test_verbose_tells_what_is_attached_and_detached() -> None:
    with Namespace() as ns:
        quiet, verbose = monitor(ns), monitor(ns, "-v")
    assert "INFO" not in quiet
    assert "to xdp:generic" in verbose and "detached from xdp:generic" in verbose
    assert "DEBUG" not in verbose


@pytest.mark.parametrize("how", ["flag", "environment"])
def test_debug_tells_every_command_with_size_and_time(how: str) -> None:
    """The worker's too: maps and programs are made there."""
    with Namespace() as ns:
        said = monitor(ns, "-vv") if how == "flag" else monitor(ns, HMEBPF_LOG="debug")
    lines = [line for line in said.splitlines() if " DEBUG " in line]
    for command in ("bpf_map_create", "bpf_prog_load", "bpf_map_lookup_batch"):
        told = [line for line in lines if f"{command}(" in line]
        assert told and all(line.endswith(" us") for line in told), command
    assert any("bpf_prog_load(" in line and "bytes>" in line for line in lines)


def test_environment_alone_can_ask_for_less() -> None:
    with Namespace() as ns:
        said = monitor(ns, HMEBPF_LOG="info")
    assert "INFO" in said and "DEBUG" not in said


def test_level_that_does_not_exist() -> None:
    result = run_cli("xdp", "--iface", "lo", extra_env={"HMEBPF_LOG": "loud"})
    assert result.returncode == 2
    assert "error: HMEBPF_LOG=loud: there is no such level" in result.stderr
    assert "hint: use debug, info, warning, error" in result.stderr


@pytest.mark.parametrize("level", ["DEBUG", "INFO", "WARNING"])
def test_a_program_that_logs_hears_us(level: str) -> None:
    """Through its own handlers, under the name hypermesh_ebpf, and only what it asked for."""
    with Namespace() as ns:
        process = ns.start(sys.executable, "-c", LIBRARY_USER.format(level=level), cwd=Path(ROOT))
        _out, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert ("hypermesh_ebpf INFO attached" in said) == (level != "WARNING")
    assert ("hypermesh_ebpf DEBUG bpf_prog_load" in said) == (level == "DEBUG")


def test_nobody_listens_nothing_is_imported() -> None:
    code = (
        "import sys, hypermesh_ebpf.session, hypermesh_ebpf.worker; print('logging' in sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert result.stdout == "False\n"
