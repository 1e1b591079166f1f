"""What can go wrong, as a user meets it: two lines that explain it, and nothing left behind."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path

import pytest

from hypermesh_ebpf.bpf.info import STATS_SYSCTL
from tests.compiler import copy_project
from tests.netns import Namespace, needs_namespaces, needs_own_mounts
from tests.owner import attached
from tests.running import COMMAND, ROOT, running

pytestmark = needs_namespaces

Done = subprocess.CompletedProcess[str]
NEEDED = "bpf,+perfmon,+net_admin"


@pytest.fixture
def ns() -> Iterator[Namespace]:
    """A namespace; at the end nothing may be attached to its lo."""
    with Namespace() as ns:
        yield ns
        assert not attached(ns)


def run(ns: Namespace, *arguments: str, cwd: Path = ROOT, **env: str) -> Done:
    """One call of the command line in the namespace."""
    return ns.run(
        *COMMAND, *arguments, check=False, cwd=cwd, timeout=300, env={**os.environ, **env}
    )


def explanation(done: Done, status: int = 1) -> tuple[str, str]:
    """The error and the hint, which end what is said on stderr."""
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    *_before, error, hint = done.stderr.splitlines()
    if not error.startswith("error: "):  # its cause has several lines, indented
        start = done.stderr.rindex("\nerror: ") + 1 if "\nerror: " in done.stderr else 0
        error = done.stderr[start:].rpartition("\nhint: ")[0]
        assert all(line.startswith("  ") for line in error.splitlines()[1:])
    assert error.startswith("error: ")
    assert hint.startswith("hint: ")
    assert done.stdout == ""
    return error, hint


# ---- C that is wrong ---------------------------------------------------------------------------


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the project, to be broken, and a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return copy_project(tmp_path)


def edit(project: Path, change: Callable[[str], str]) -> str:
    """Change bpf_c/xdp.c; its text then."""
    path = project / "bpf_c/xdp.c"
    path.write_text(change(path.read_text()))
    return path.read_text()


XDP = ("xdp", "--iface", "lo", "-d", "1")


def test_c_that_llvm_gives_up(ns: Namespace, project: Path) -> None:
    """LLVM ends the process then, the worker's; its words are the cause."""
    before = "counter->packets += weight;"
    large = "char big[600]; bpf_probe_read_kernel(big, sizeof(big), counter); "
    edit(
        project, lambda text: text.replace(before, large + "counter->packets += big[length & 511];")
    )
    error, _hint = explanation(run(ns, *XDP, cwd=project))
    assert error.startswith("error: load in the worker process: it ended with status 1 (error: xdp")
    assert "the BPF stack limit of 512 bytes is exceeded" in error


def test_c_that_does_not_compile(ns: Namespace, project: Path) -> None:
    text = edit(project, lambda text: text.replace("counter->packets +=", "counter->packages +="))
    number = text[: text.index("packages")].count("\n") + 1
    error, hint = explanation(run(ns, *XDP, cwd=project))
    first, *rest = error.splitlines()
    assert first.startswith(f"error: compile xdp.c: xdp.c:{number}:")
    assert "no member named 'packages'" in first
    assert "counter->packages +=" in rest[0], "the line itself"
    assert len(rest) == 2, "and the mark under it"
    assert "at the line given" in hint
    told = run(ns, *XDP, "-v", cwd=project)
    assert told.returncode == 1
    assert "Traceback" not in told.stderr
    assert "hmebpf: compiling xdp.c" in told.stderr
    assert "1 error generated." in told.stderr, "clang's last line"
    assert told.stderr.index("1 error generated.") < told.stderr.index("\nerror: compile xdp.c")
    traced = run(ns, *XDP, "-vv", cwd=project)
    assert "Traceback (most recent call last):" in traced.stderr
    assert traced.stderr.splitlines()[-1] == f"hint: {hint.removeprefix('hint: ')}"


def test_c_that_the_verifier_refuses(ns: Namespace, project: Path) -> None:
    """A packet is read without a look at where it ends."""
    edit(project, lambda text: text.replace("if (next > end) {", "if (eth->type == 1) {"))
    error, _hint = explanation(run(ns, *XDP, cwd=project))
    assert error.startswith("error: load program count_packet: refused by the kernel's verifier: ")
    assert "invalid access to packet" in error
    assert "lines of the verifier's log omitted; see them with -v)" in error
    told = run(ns, *XDP, "-v", cwd=project)
    assert told.returncode == 1
    assert "processed " in told.stderr and " insns" in told.stderr, "the verifier's last line"
    assert told.stderr.count("\n") > error.count("\n") + 5


def test_program_that_is_missing_from_the_c_file(ns: Namespace, project: Path) -> None:
    edit(project, lambda text: text.replace("int count_packet(", "int count_packets("))
    done = run(ns, *XDP, cwd=project)
    error, _hint = explanation(done)
    assert "has no program 'count_packet'" in error


# ---- a cache that cannot be used ---------------------------------------------------------------


def mounted(ns: Namespace, script: str, *arguments: str, **env: str) -> Done:
    """The command line behind a shell script, in a mount namespace that ends with it."""
    command = shlex.join([*COMMAND, *arguments])
    return ns.run(
        "unshare", "--mount", "--propagation", "private", "sh", "-ec", f"{script}\n{command}",
        check=False, cwd=ROOT, timeout=300, env={**os.environ, **env},
    )  # fmt: skip


SHORT = ("xdp", "--iface", "lo", "-n", "1", "-i", "0.05", "-o", "json")


def ran(done: Done) -> str:
    """What was said on stderr of a run that worked all the same."""
    assert done.returncode == 0, done.stderr
    types = [json.loads(line)["type"] for line in done.stdout.splitlines()]
    assert types == ["start", "sample", "end"]
    assert "Traceback" not in done.stderr
    return done.stderr


@needs_own_mounts
def test_full_disk_under_the_cache(ns: Namespace, tmp_path: Path) -> None:
    mount = f"mount -t tmpfs -o size=4k,mode=0700 none {tmp_path}"
    said = ran(mounted(ns, mount, *SHORT, XDG_CACHE_HOME=str(tmp_path)))
    assert f"hmebpf: image not cached: {tmp_path}/hmebpf: No space left on device" in said


@needs_own_mounts
def test_read_only_cache(ns: Namespace, tmp_path: Path) -> None:
    folder = tmp_path / "hmebpf"
    folder.mkdir(mode=0o700)
    mount = f"mount --bind {tmp_path} {tmp_path}; mount -o remount,bind,ro {tmp_path}"
    said = ran(mounted(ns, mount, *SHORT, XDG_CACHE_HOME=str(tmp_path)))
    assert f"hmebpf: image not cached: {folder}: Read-only file system" in said
    assert ran(run(ns, *SHORT, XDG_CACHE_HOME=str(tmp_path))).count("cache") == 0
    said = ran(mounted(ns, mount, *SHORT, XDG_CACHE_HOME=str(tmp_path)))
    assert "cache" not in said, "an image that is there can be read"
    clear = mounted(ns, mount, "cache", "clear", XDG_CACHE_HOME=str(tmp_path))
    error, _hint = explanation(clear)
    assert "Read-only file system" in error


def test_cache_that_others_may_write(ns: Namespace, tmp_path: Path) -> None:
    """It holds code for the kernel: better compiled each time than read from there."""
    folder = tmp_path / "hmebpf"
    folder.mkdir()
    folder.chmod(0o777)
    said = ran(run(ns, *SHORT, XDG_CACHE_HOME=str(tmp_path)))
    assert f"hmebpf: image cache not used: {folder}: others may write it" in said
    assert list(folder.iterdir()) == []


def test_damaged_cache(ns: Namespace, tmp_path: Path) -> None:
    ran(run(ns, *SHORT, XDG_CACHE_HOME=str(tmp_path)))
    (entry,) = (tmp_path / "hmebpf").iterdir()
    good = entry.read_bytes()
    entry.write_bytes(good[:-100] + b"?" * 100)
    ran(run(ns, *SHORT, XDG_CACHE_HOME=str(tmp_path)))
    assert entry.read_bytes() == good, "made anew"


# ---- interfaces, output, options ---------------------------------------------------------------


def test_unknown_interface(ns: Namespace) -> None:
    error, hint = explanation(run(ns, "xdp", "--iface", "l0", "-d", "1"))
    assert error == "error: find interface 'l0': no such interface in this network namespace"
    assert hint == "hint: interfaces here: lo"


def test_one_unknown_interface_among_others_leaves_the_others_alone(ns: Namespace) -> None:
    error, _hint = explanation(run(ns, "xdp", "--iface", "lo", "--iface", "eth7", "-d", "1"))
    assert "'eth7'" in error
    assert not attached(ns)


def test_interface_named_twice_is_watched_once(ns: Namespace) -> None:
    with running("xdp", "--iface", "lo", "--iface", "lo", namespace=ns) as monitor:
        ns.run("ping", "-q", "-i", "0.002", "-c", "7", "127.0.0.1")
        monitor.finish()
    assert monitor.start["target"] == "lo"
    assert [row["packets"] for row in monitor.last["rows"]] == [14]


def test_closed_standard_output(ns: Namespace) -> None:
    command = shlex.join([*COMMAND, *SHORT])
    done = ns.run("sh", "-c", f"exec {command} >&-", check=False, cwd=ROOT, timeout=300)
    error, _hint = explanation(done)
    assert error == "error: write the output: standard output is closed"


@pytest.mark.parametrize("closed", ["2>&-", "<&-", "<&- 2>&-"])
def test_other_closed_descriptors(ns: Namespace, closed: str, tmp_path: Path) -> None:
    """Sockets and files then get the numbers 0 and 2; and notes must not end up in the output."""
    command = shlex.join([*COMMAND, *SHORT, "-v"])
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    done = ns.run("sh", "-c", f"exec {command} {closed}", check=False, cwd=ROOT, env=env)
    assert done.returncode == 0
    assert [json.loads(line)["type"] for line in done.stdout.splitlines()] == [
        "start",
        "sample",
        "end",
    ]


@pytest.mark.parametrize("interval", ["3000000", "1e300"])
def test_interval_longer_than_poll_can_wait(ns: Namespace, interval: str) -> None:
    """Milliseconds in an int are 24 days."""
    arguments = ("xdp", "--iface", "lo", "-i", interval, "-o", "json")
    process = ns.start(*COMMAND, *arguments, cwd=ROOT)
    assert process.stdout is not None and process.stderr is not None
    assert json.loads(process.stdout.readline())["type"] == "start"
    process.send_signal(signal.SIGINT)
    types = [json.loads(line)["type"] for line in process.stdout]
    assert (process.wait(300), types) == (0, ["sample", "end"])
    assert "Traceback" not in process.stderr.read()


def test_user_that_does_not_exist() -> None:
    done = subprocess.run(
        [*COMMAND, "exec-monitor", "--uid", "hm-nobody", "-d", "1"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    error, hint = explanation(done, 2)
    assert error == "error: --uid hm-nobody: no such user"
    assert "getent passwd" in hint


# ---- no privileges -----------------------------------------------------------------------------


def as_nobody(capabilities: str = "") -> list[str]:
    """setpriv's arguments: uid 65534 with these capabilities and no others."""
    sets = f"-all{',+' + capabilities if capabilities else ''}"
    return [
        *("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", f"--inh-caps={sets}"),
        *(f"--ambient-caps={sets}", f"--bounding-set={sets}", "--no-new-privs"),
    ]


@lru_cache(maxsize=1)
def open_interpreter() -> str | None:
    """A Python that other users may run with this project and its packages: not one in /root."""
    for python in (sys.executable, "/usr/bin/python3"):
        # Through a shell: it is without capabilities already when it looks for the interpreter.
        shell = ["sh", "-c", 'exec "$0" -c "import click, hypermesh_ebpf.cli, pyroute2"', python]
        argv = [*as_nobody(), *shell]
        done = subprocess.run(argv, cwd="/", env=_environment(), capture_output=True, timeout=300)
        if done.returncode == 0:
            return python
    return None


def _environment() -> dict[str, str]:
    path = f"{ROOT}:{sysconfig.get_path('purelib')}"
    return {**os.environ, "PYTHONPATH": path, "HOME": "/nonexistent", "XDG_CACHE_HOME": ""}


def run_as_nobody(ns: Namespace, *arguments: str, capabilities: str = "", **env: str) -> Done:
    python = open_interpreter()
    if python is None:
        pytest.skip("this checkout or its packages cannot be read by other users")
    return ns.run(
        *as_nobody(capabilities), python, "-m", "hypermesh_ebpf", *arguments,
        check=False, cwd=ROOT, timeout=300, env={**_environment(), **env},
    )  # fmt: skip


needs_setpriv = pytest.mark.skipif(not shutil.which("setpriv"), reason="needs setpriv")


@needs_setpriv
@pytest.mark.parametrize(
    "arguments", [XDP, ("exec-monitor", "-d", "1"), ("net-monitor", "-d", "1")]
)
def test_no_privileges(ns: Namespace, arguments: tuple[str, ...]) -> None:
    error, hint = explanation(run_as_nobody(ns, *arguments), 3)
    assert error.startswith(f"error: run {arguments[0]}: ")
    assert "Operation not permitted (EPERM)" in error
    assert "CAP_BPF" in error
    assert "sudo hmebpf" in hint


@needs_setpriv
@pytest.mark.skipif(
    Path(STATS_SYSCTL).exists() and Path(STATS_SYSCTL).read_text().strip() == "1",
    reason="statistics are on for everybody here",
)
def test_limit_to_overhead_needs_more_than_three_capabilities(ns: Namespace) -> None:
    """Which would do for the monitor itself; nothing is attached."""
    arguments = ("--max-overhead", "0.5", "-o", "json")
    done = run_as_nobody(ns, *SHORT, *arguments, capabilities=NEEDED)
    assert done.returncode == 3
    assert done.stdout == "", "not even a start"
    assert done.stderr.splitlines() == [
        "error: limit the overhead to 0.5 %: Operation not permitted (EPERM): needs CAP_SYS_ADMIN",
        "hint: run it as root, or without --max-overhead; or let statistics be on for good: "
        "`sudo sysctl kernel.bpf_stats_enabled=1`",
    ]


@needs_setpriv
def test_xdp_with_three_capabilities(ns: Namespace) -> None:
    """No root: the promise of ambient capabilities."""
    done = run_as_nobody(ns, *SHORT, capabilities=NEEDED)
    said = ran(done)
    start = json.loads(done.stdout.splitlines()[0])
    assert start["hooks"] == ["xdp:generic"]
    assert start["degraded"] is None
    assert "image not cached: /nonexistent/.cache/hmebpf: " in said, "and it goes on"


@needs_setpriv
def test_exec_monitor_without_root_takes_a_rung_that_it_may(ns: Namespace) -> None:
    if (
        list(Path("/sys/kernel/tracing").glob("events"))
        and os.stat("/sys/kernel/tracing").st_mode & 5
    ):
        pytest.skip("tracefs is open to everybody here")
    arguments = ("exec-monitor", "-n", "1", "-i", "0.05")
    done = run_as_nobody(ns, *arguments, "-o", "json", capabilities=NEEDED)
    if done.returncode == 3:
        assert "perf_event_paranoid" in done.stderr
        pytest.skip("kernel.perf_event_paranoid forbids it")
    start = json.loads(done.stdout.splitlines()[0])
    if start["degraded"] is None or start["degraded"]["hook"] == "fentry":
        pytest.skip("a better rung works here without root")
    assert start["hooks"] == ["raw_tracepoint:sched_process_exec"]
    assert start["degraded"]["hook"] == "sched"
    assert "failed execs" in start["degraded"]["lost"]
    assert "tracepoint without BTF: Operation not permitted" in start["degraded"]["reason"]
    table = run_as_nobody(ns, *arguments, capabilities=NEEDED)
    assert "degraded to rung 5, sched: without failed execs" in table.stdout


# ---- no type information -----------------------------------------------------------------------


def test_exec_monitor_without_btf_goes_down_and_says_so(ns: Namespace) -> None:
    arguments = ("exec-monitor", "-n", "1", "-i", "0.05")
    done = run(ns, *arguments, "-o", "json", HMEBPF_BTF="/nonexistent")
    assert done.returncode == 0, done.stderr
    start = json.loads(done.stdout.splitlines()[0])
    assert start["degraded"]["hook"] == "tracepoint without BTF"
    assert "parent" in start["degraded"]["lost"]
    assert (
        "needs BTF: /nonexistent: No such file or directory (ENOENT)" in start["degraded"]["reason"]
    )
    table = run(ns, *arguments, HMEBPF_BTF="/nonexistent")
    assert "degraded to rung 4, tracepoint without BTF: without " in table.stdout


def test_asking_for_a_rung_that_needs_btf_is_an_error(ns: Namespace) -> None:
    done = run(ns, "exec-monitor", "--rung", "sched", "-d", "1", HMEBPF_BTF="/nonexistent")
    error, hint = explanation(done, 3)
    assert "needs BTF: /nonexistent: No such file or directory" in error
    assert "CONFIG_DEBUG_INFO_BTF" in hint or "HMEBPF_BTF" in hint


def test_file_that_is_no_btf(ns: Namespace, tmp_path: Path) -> None:
    (tmp_path / "btf").write_text("not type information")
    done = run(ns, "exec-monitor", "--rung", "sched", "-d", "1", HMEBPF_BTF=str(tmp_path / "btf"))
    error, _hint = explanation(done, 3)
    assert f"{tmp_path}/btf is not a BTF file" in error


def test_xdp_needs_no_btf(ns: Namespace) -> None:
    said = ran(run(ns, *SHORT, HMEBPF_BTF="/nonexistent"))
    assert "BTF" not in said
