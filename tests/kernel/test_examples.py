"""The examples, run as their first lines say; what they print against what was done meanwhile."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from tests.netns import Namespace, needs_namespaces
from tests.objects import example_path
from tests.running import ROOT

pytestmark = needs_namespaces


def last_numbers(out: str) -> dict[str, int]:
    """``name number`` pairs of the last line."""
    return {name: int(n) for name, n in re.findall(r"(\w+) +(\d+)", out.splitlines()[-1])}


def start(ns: Namespace, name: str, *arguments: str) -> subprocess.Popen[str]:
    return ns.start(sys.executable, str(ROOT / "examples" / name), *arguments, cwd=ROOT)


def finish(process: subprocess.Popen[str], before: str) -> str:
    out, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    return before + out


def test_xdp_counter() -> None:
    example_path("xdp_packet_counter")
    with Namespace() as ns:
        process = start(ns, "xdp_counter.py", "lo", "3")
        assert process.stdout is not None
        first = process.stdout.readline()  # attached by now
        ns.run("ping", "-q", "-c", "23", "-i", "0.002", "127.0.0.1")
        numbers = last_numbers(finish(process, first))
    assert numbers == {"packets": 46, "bytes": 46 * 98}


def test_execve_monitor() -> None:
    """The eight bytes are refused with a hint, the sixteen count."""
    with Namespace() as ns:
        process = start(ns, "execve_monitor.py", "3")
        assert process.stdout is not None
        lines = [process.stdout.readline()]
        while "executions" not in lines[-1]:
            lines.append(process.stdout.readline())
        for _ in range(29):
            subprocess.run(["/bin/true"], check=True)
        out = finish(process, "".join(lines))
    assert "R0 !read_ok" in out
    assert "hint: set r0 before exit" in out
    assert int(out.split()[-2]) >= 29


def test_network_tracepoints() -> None:
    example_path("tracepoint_network")
    code = (
        "import socket\n"
        "s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.bind(('127.0.0.1', 0))\n"
        "for _ in range(101): s.sendto(b'four', s.getsockname()); s.recvfrom(9)\n"
    )
    with Namespace() as ns:
        process = start(ns, "network_tracepoints.py", "3")
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(5)]
        ns.run(sys.executable, "-c", code)
        numbers = last_numbers(finish(process, "".join(lines)))
    assert numbers["sends"] >= 101 and numbers["recvs"] >= 101
    assert numbers["bytes_sent"] >= 404


def test_first_lines_name_commands_that_exist() -> None:
    for path in sorted(Path(ROOT / "examples").glob("*.py")):
        text = path.read_text()
        assert f"examples/{path.name}" in text


def test_busiest_readers() -> None:
    """A process that reads 100,003 times is the busiest, and its reads are counted to the last."""
    with Namespace() as ns:
        process = start(ns, "busiest_readers.py", "4")
        assert process.stdout is not None
        first = process.stdout.readline()
        reader = (
            "import os\nzero = os.open('/dev/zero', 0)\nfor _ in range(100_003): os.read(zero, 7)"
        )
        with subprocess.Popen([sys.executable, "-c", reader]) as done:
            assert done.wait() == 0
        out = finish(process, first)
    (line,) = [line for line in out.splitlines() if line.split()[0] == str(done.pid)]
    _pid, _comm, calls, _reads, asked, _bytes = line.split()
    assert 100_003 <= int(calls) < 100_500, "and those by which the interpreter starts"
    assert last_numbers(out)["reads"] >= int(calls)
    assert int(asked) >= 7
