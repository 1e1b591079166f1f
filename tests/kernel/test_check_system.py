"""check-system on this kernel, against independent evidence, as root and as others."""

from __future__ import annotations

import gzip
import json
import os
import pty
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.netns import Namespace, needs_namespaces, needs_own_mounts
from tests.programs import load_program, program_id

vm_too = pytest.mark.vm_too  # what may differ on another kernel; the rest is the same everywhere

CHECK = [sys.executable, "-m", "hypermesh_ebpf", "check-system"]
# Reading and searching only, so that the interpreter may live in a closed directory.
READ_ONLY = ["+dac_read_search"]
AMBIENT = ["+bpf", "+perfmon", "+net_admin", *READ_ONLY]


def run(
    *options: str, prefix: tuple[str, ...] = (), **env: str
) -> subprocess.CompletedProcess[str]:
    command = [*prefix, *CHECK, *options]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **env})


def unprivileged(capabilities: list[str]) -> tuple[str, ...]:
    """A command prefix for user nobody with these capabilities alone."""
    if not shutil.which("setpriv"):
        pytest.skip("no setpriv here")
    names = ",".join(capabilities)
    return (
        "setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", f"--inh-caps={names}",
        f"--ambient-caps={names}", f"--bounding-set=-all,{names}",
    )  # fmt: skip


def examine(prefix: tuple[str, ...] = (), **env: str) -> dict[str, Any]:
    answer = run("-o", "json", prefix=prefix, **env)
    document: dict[str, Any] = json.loads(answer.stdout)
    assert answer.stderr == ""
    runs = [monitor["runs"] for monitor in document["monitors"].values()]
    assert answer.returncode == (0 if all(runs) else 3)
    return document


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    """The report as root."""
    return examine()


def finding(report: dict[str, Any], name: str) -> dict[str, Any]:
    found: dict[str, Any] = next(f for f in report["findings"] if f["name"] == name)
    return found


def kernel_config() -> dict[str, str]:
    """The kernel's own configuration; skips where it is not at hand."""
    release = os.uname().release
    for path in ("/proc/config.gz", f"/boot/config-{release}", f"/lib/modules/{release}/config"):
        if os.path.exists(path):
            opened = gzip.open(path, "rt") if path.endswith(".gz") else open(path)  # noqa: SIM115
            with opened as file:
                return dict(re.findall(r"^(CONFIG_\w+)=(.*)$", file.read(), re.MULTILINE))
    pytest.skip("this kernel's configuration is not at hand")


@vm_too
def test_shape_is_as_promised(report: dict[str, Any]) -> None:
    assert list(report) == ["kernel", "findings", "attach_types", "monitors"]
    for each in report["findings"]:
        assert {"name", "status", "found", "affects", "remedy", "probed"} <= set(each)
        assert each["status"] in ("ok", "warn", "fail", "info")
        assert each["affects"]
        if each["status"] == "fail":
            assert each["remedy"], each["name"]
    assert set(report["attach_types"]) == {
        "xdp", "tc", "kprobe", "tracepoint", "raw_tracepoint", "fentry", "uprobe", "perf_event",
        "lsm", "cgroup",
    }  # fmt: skip
    for each in report["attach_types"].values():
        assert each["available"] or (each["reason"] and each["remedy"])
    assert {"xdp", "exec-monitor"} <= set(report["monitors"])
    for each in report["monitors"].values():
        assert set(each) == {"runs", "hook", "degraded", "reason", "remedy"}


@vm_too
def test_kernel_is_unames(report: dict[str, Any]) -> None:
    uname = subprocess.run(["uname", "-r"], capture_output=True, text=True, check=True).stdout
    assert report["kernel"]["release"] == uname.strip()
    assert report["kernel"]["build"] == Path("/proc/version").read_text().strip()


@vm_too
def test_capabilities_are_the_kernels(report: dict[str, Any]) -> None:
    status = Path("/proc/self/status").read_text()
    match = re.search(r"^CapEff:\s*([0-9a-f]+)", status, re.MULTILINE)
    assert match
    mask = int(match[1], 16)
    bits = {"CAP_BPF": 39, "CAP_PERFMON": 38, "CAP_NET_ADMIN": 12, "CAP_SYS_ADMIN": 21}
    for name, bit in {**bits, "CAP_SYS_RESOURCE": 24}.items():
        assert (finding(report, name)["status"] == "ok") == bool(mask >> bit & 1), name


@vm_too
@pytest.mark.parametrize("kind", ["program", "map"])
def test_types_are_those_of_bpftool(report: dict[str, Any], kind: str) -> None:
    if not shutil.which("bpftool"):
        pytest.skip("no bpftool here")
    command = ["bpftool", "-j", "feature", "probe", "kernel"]
    answer = subprocess.run(command, capture_output=True, text=True)
    if answer.returncode:
        pytest.skip(f"bpftool: {answer.stderr.strip()}")
    suffix = "_prog_type" if kind == "program" else "_map_type"
    expected = {
        name.removeprefix("have_").removesuffix(suffix): available
        for name, available in json.loads(answer.stdout)[f"{kind}_types"].items()
    }
    found = {
        each["name"]: each["found"] == "available"
        for each in report["findings"]
        if each["group"] == f"{kind} types" and each["found"] is not None
    }
    common = set(expected) & set(found)
    assert len(common) >= 25
    assert {name: found[name] for name in common} == {name: expected[name] for name in common}


@vm_too
def test_attach_types_agree_with_the_kernels_configuration(report: dict[str, Any]) -> None:
    config = kernel_config()
    found = {kind: each["available"] for kind, each in report["attach_types"].items()}
    for kind, option in (
        ("kprobe", "CONFIG_KPROBE_EVENTS"),
        ("uprobe", "CONFIG_UPROBE_EVENTS"),
        ("tracepoint", "CONFIG_EVENT_TRACING"),
        ("cgroup", "CONFIG_CGROUP_BPF"),
    ):
        assert found[kind] == (config.get(option) == "y"), kind
    assert found["xdp"]
    assert found["raw_tracepoint"]


@vm_too
def test_attach_types_agree_with_bpftools_program_types(report: dict[str, Any]) -> None:
    """Attaching needs the type; fentry and LSM need a kernel that lets them be loaded."""
    types = {f["name"]: f["found"] for f in report["findings"] if f["group"] == "program types"}
    for kind, program in (("fentry", "tracing"), ("lsm", "lsm"), ("tc", "sched_cls")):
        if report["attach_types"][kind]["available"]:
            assert types[program] == "available", kind


@vm_too
def test_every_choice_is_what_a_run_does(report: dict[str, Any]) -> None:
    verdict = report["monitors"]["exec-monitor"]
    command = [sys.executable, "-m", "hypermesh_ebpf", "exec-monitor", "-d", "0.1", "-o", "json"]
    answer = subprocess.run(command, capture_output=True, text=True)
    if not verdict["runs"]:
        assert answer.returncode != 0
        return
    assert answer.returncode == 0, answer.stderr
    start = json.loads(answer.stdout.splitlines()[0])
    assert (start["degraded"] or {}).get("rung") == (verdict["degraded"] or {}).get("rung")
    assert (start["degraded"] or {}).get("lost") == (verdict["degraded"] or {}).get("lost")


def test_file_systems_are_found_by_magic_and_mounts_stay(report: dict[str, Any]) -> None:
    before = Path("/proc/self/mountinfo").read_text()
    again = examine()
    assert Path("/proc/self/mountinfo").read_text() == before
    for name, kind in (("tracefs", "tracefs"), ("debugfs", "debugfs"), ("bpffs", "bpf")):
        mounted = f" - {kind} " in before
        assert ("mounted at /" in finding(again, name)["found"]) == mounted, name
        if name != "bpffs" or mounted:  # pins need a mount that stays; all else needs none
            assert finding(again, name)["status"] == "ok", name


@needs_own_mounts
def test_fix_mounts_for_good_and_says_so() -> None:
    """In a mount namespace of its own, so that the host stays as it is."""
    script = (
        "for m in /sys/fs/bpf /sys/kernel/tracing /sys/kernel/debug; do "
        'umount -R $m 2>/dev/null; done; "$@" --fix -o json && exec "$@" --fix -o json'
    )
    before = Path("/proc/self/mountinfo").read_text()
    answer = subprocess.run(
        ["unshare", "-m", "sh", "-c", script, "sh", *CHECK], capture_output=True, text=True
    )
    assert answer.stderr.splitlines() == [
        "fixed: mounted bpf at /sys/fs/bpf",
        "fixed: mounted tracefs at /sys/kernel/tracing",
        "fixed: mounted debugfs at /sys/kernel/debug",
        "nothing to fix: bpffs, tracefs and debugfs are mounted",
    ]
    document, _ = json.JSONDecoder().raw_decode(answer.stdout)
    assert finding(document, "tracefs")["found"] == "mounted at /sys/kernel/tracing"
    assert finding(document, "bpffs")["found"] == "mounted at /sys/fs/bpf"
    assert Path("/proc/self/mountinfo").read_text() == before


@needs_own_mounts
def test_fix_that_fails_says_why_and_exits_with_1() -> None:
    script = (
        "for m in /sys/fs/bpf /sys/kernel/tracing /sys/kernel/debug; do "
        'umount -R $m 2>/dev/null; done; mount -t tmpfs tmpfs /sys/fs; exec "$@" --fix'
    )
    answer = subprocess.run(
        ["unshare", "-m", "sh", "-c", script, "sh", *CHECK], capture_output=True, text=True
    )
    assert "not fixed: mount bpf at /sys/fs/bpf: No such file or directory" in answer.stderr
    assert "fixed: mounted tracefs at /sys/kernel/tracing" in answer.stderr
    assert answer.returncode == 1


@vm_too
def test_without_any_privilege() -> None:
    document = examine(unprivileged(READ_ONLY))
    for name in ("CAP_BPF", "CAP_PERFMON", "CAP_NET_ADMIN", "CAP_SYS_ADMIN"):
        assert finding(document, name)["found"] == "lacking"
        assert "sudo" in finding(document, name)["remedy"]
    assert finding(document, "bpf(2)")["status"] == "fail"
    for kind in ("xdp", "tc", "raw_tracepoint", "perf_event"):
        each = document["attach_types"][kind]
        assert not each["available"], kind
        assert each["privilege"], kind
        assert "lacks CAP_BPF" in each["reason"]
        assert "sudo" in each["remedy"]
    for name, verdict in document["monitors"].items():
        assert not verdict["runs"], name
        assert "sudo" in verdict["remedy"], name
    types = [f for f in document["findings"] if f["group"] == "program types"]
    assert all(f["found"] is None for f in types)  # unknown, not "not available"


@vm_too
def test_with_the_three_ambient_capabilities() -> None:
    if int(Path("/proc/sys/kernel/cap_last_cap").read_text()) < 39:
        pytest.skip("before Linux 5.8 there is no CAP_BPF")
    document = examine(unprivileged(AMBIENT))
    for kind in ("xdp", "raw_tracepoint", "cgroup"):
        assert document["attach_types"][kind]["available"], document["attach_types"][kind]
    assert document["monitors"]["xdp"]["runs"]
    paranoid = int(Path("/proc/sys/kernel/perf_event_paranoid").read_text())
    perf = document["attach_types"]["perf_event"]
    assert perf["available"] == (paranoid <= 2)
    if paranoid > 2:
        assert f"perf_event_paranoid is {paranoid}" in perf["reason"]
        assert perf["privilege"]
    if " tracefs " not in Path("/proc/self/mountinfo").read_text() and paranoid <= 2:
        tracepoint = document["attach_types"]["tracepoint"]
        assert not tracepoint["available"]
        assert tracepoint["privilege"]
        assert "sudo mount" in tracepoint["remedy"]


def test_fix_without_privilege_is_an_error_with_a_hint() -> None:
    if " bpf bpf " in Path("/proc/self/mountinfo").read_text():
        pytest.skip("bpffs is mounted here")
    answer = run("--fix", prefix=unprivileged(READ_ONLY))
    assert answer.returncode == 3
    assert re.search(r"^error: mount .*: lacks CAP_SYS_ADMIN$", answer.stderr, re.MULTILINE)
    assert "hint: sudo hmebpf check-system --fix" in answer.stderr
    assert answer.stdout == ""


def test_kernel_without_btf_is_simulated_by_an_empty_path(tmp_path: Path) -> None:
    document = examine(HMEBPF_BTF=str(tmp_path / "none"))
    btf = finding(document, "BTF")
    assert btf["status"] == "fail"
    assert str(tmp_path / "none") in btf["found"]
    assert "CONFIG_DEBUG_INFO_BTF" in btf["remedy"]
    for kind in ("fentry", "lsm"):
        assert not document["attach_types"][kind]["available"]
    assert document["monitors"]["exec-monitor"]["runs"]


@vm_too
@needs_namespaces
def test_xdp_modes_of_every_interface_and_what_is_attached() -> None:
    """A veth pair has native XDP, lo has not; a program on an interface is shown by its id."""
    with Namespace() as ns:
        ns.run("ip", "link", "add", "hm-a", "type", "veth", "peer", "name", "hm-b")
        fd = load_program()
        try:
            wanted = program_id(fd)
            enter = ("nsenter", f"--net=/proc/{os.getpid()}/fd/{ns.fd}")
            attach = [
                *enter, sys.executable, "-c",
                "import sys; from pyroute2 import IPRoute; ip = IPRoute();"
                "i = ip.link_lookup(ifname='hm-a')[0];"
                "ip.link('set', index=i, xdp={'attrs': [('IFLA_XDP_FD', int(sys.argv[1])),"
                "('IFLA_XDP_FLAGS', 2)]})",
                str(fd),
            ]  # fmt: skip
            os.set_inheritable(fd, True)
            subprocess.run(attach, check=True, pass_fds=[fd, ns.fd])
            answer = subprocess.run(
                [*enter, *CHECK, "-o", "json"], capture_output=True, text=True, pass_fds=[ns.fd]
            )
        finally:
            os.close(fd)
        document = json.loads(answer.stdout)
    found = {f["name"]: f for f in document["findings"] if f["group"] == "interfaces"}
    assert set(found) == {"lo", "hm-a", "hm-b"}
    assert f"program {wanted} attached (generic)" in found["hm-a"]["found"]
    assert str(wanted) in found["hm-a"]["remedy"]
    assert "attached" not in found["hm-b"]["found"]
    native = "XDP native, generic" in found["hm-b"]["found"]
    unknown = "native unknown (its driver has it since 4.19)" in found["hm-b"]["found"]
    assert native or unknown
    assert "native, generic" not in found["lo"]["found"]


def test_on_a_terminal_it_fits_and_in_a_pipe_it_is_plain() -> None:
    plain = run()
    assert "\x1b" not in plain.stdout
    assert "Monitors" in plain.stdout
    master, slave = pty.openpty()
    with os.fdopen(master, "rb", buffering=0) as terminal:
        subprocess.run(["stty", "cols", "60", "rows", "24"], stdin=slave, check=True)
        environment = {**os.environ, "TERM": "xterm-256color", "PYTHONUTF8": "1"}
        environment.pop("NO_COLOR", None)
        started = subprocess.Popen(CHECK, stdout=slave, stdin=slave, env=environment)
        os.close(slave)
        text = b""
        while True:
            try:
                chunk = terminal.read(65536)
            except OSError:  # EIO: the other side is closed
                break
            if not chunk:
                break
            text += chunk
        assert started.wait() in (0, 3)
    shown = text.decode()
    assert "\x1b[" in shown
    lines = re.sub(r"\x1b\[[0-9;]*m", "", shown).replace("\r", "").splitlines()
    assert max(map(len, lines)) <= 60
    assert lines[-1].endswith(".")
    assert "monitor" in lines[-1]


def test_output_that_cannot_be_written() -> None:
    with open("/dev/full", "w") as full:
        answer = subprocess.run(CHECK, stdout=full, stderr=subprocess.PIPE, text=True)
    assert answer.returncode == 1
    assert "error: write the output: No space left on device" in answer.stderr
    piped = subprocess.run(
        ["sh", "-c", '"$@" | head -n 1', "sh", *CHECK], capture_output=True, text=True
    )
    assert piped.stdout == "Kernel\n"
    assert piped.stderr == ""
