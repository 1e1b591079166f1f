"""Capabilities as the kernel counts them, and the errors that name those that lack."""

from __future__ import annotations

import errno
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hypermesh_ebpf.errors import MissingPrivilege, Unsupported
from hypermesh_ebpf.host import capabilities, security
from hypermesh_ebpf.host.security import perf_refusal, refusal

AMBIENT = frozenset({"CAP_BPF", "CAP_PERFMON", "CAP_NET_ADMIN"})


@pytest.fixture
def hold(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A process with the three ambient capabilities, in the initial user namespace, unlocked."""
    monkeypatch.setattr(capabilities, "effective", lambda: AMBIENT)
    monkeypatch.setattr(capabilities, "in_user_namespace", lambda: False)
    monkeypatch.setattr(capabilities, "seccomp_filtered", lambda: False)
    monkeypatch.setattr(security, "lockdown", lambda: "none")
    monkeypatch.setattr(security, "read_sysctl", lambda name: "2")
    return monkeypatch


def test_effective_is_what_capsh_decodes() -> None:
    if not shutil.which("capsh"):
        pytest.skip("no capsh here")
    status = Path("/proc/self/status").read_text()
    mask = next(line.split()[1] for line in status.splitlines() if line.startswith("CapEff"))
    decoded = subprocess.run(["capsh", f"--decode={mask}"], capture_output=True, text=True).stdout
    names = decoded.strip().partition("=")[2]
    assert capabilities.effective() == {name.upper() for name in names.split(",") if name}


def test_every_capability_of_the_uapi_header_by_its_bit() -> None:
    assert len(capabilities.NAMES) == 41
    for bit, name in (
        (0, "CHOWN"),
        (12, "NET_ADMIN"),
        (21, "SYS_ADMIN"),
        (24, "SYS_RESOURCE"),
        (38, "PERFMON"),
        (39, "BPF"),
    ):
        assert capabilities.NAMES[bit] == f"CAP_{name}"


def test_sys_admin_stands_for_bpf_but_not_for_net_admin(hold: pytest.MonkeyPatch) -> None:
    hold.setattr(capabilities, "effective", lambda: frozenset({"CAP_SYS_ADMIN"}))
    assert capabilities.has("CAP_BPF")
    assert capabilities.has("CAP_PERFMON")
    assert not capabilities.has("CAP_NET_ADMIN")
    assert capabilities.missing("CAP_NET_ADMIN", "CAP_BPF") == ("CAP_NET_ADMIN",)


def test_nothing_counts_in_a_user_namespace(hold: pytest.MonkeyPatch) -> None:
    hold.setattr(capabilities, "in_user_namespace", lambda: True)
    assert not capabilities.has("CAP_BPF")
    error = refusal("load", PermissionError(errno.EPERM, ""), ("CAP_BPF",))
    assert isinstance(error, MissingPrivilege)
    assert "user namespace" in str(error)


def test_real_user_namespace_is_noticed() -> None:
    code = (
        "from hypermesh_ebpf.host import capabilities as c;"
        "print(c.in_user_namespace(), 'CAP_BPF' in c.effective(), c.has('CAP_BPF'))"
    )
    command = ["unshare", "--user", "--map-root-user", sys.executable, "-c", code]
    answer = subprocess.run(command, capture_output=True, text=True)
    if answer.returncode and "unshare" in answer.stderr:
        pytest.skip(f"no user namespaces here: {answer.stderr.strip()}")
    assert answer.stdout.split() == ["True", "True", "False"], answer.stderr


def test_refusal_names_what_lacks_and_how_to_get_it(hold: pytest.MonkeyPatch) -> None:
    hold.setattr(capabilities, "effective", frozenset)
    error = refusal(
        "load an xdp program", PermissionError(errno.EPERM, ""), ("CAP_BPF", "CAP_NET_ADMIN")
    )
    assert isinstance(error, MissingPrivilege)
    assert str(error) == (
        "load an xdp program: Operation not permitted (EPERM): lacks CAP_BPF, CAP_NET_ADMIN"
    )
    assert "sudo hmebpf" in (error.remedy or "")
    assert "--ambient-caps=+bpf,+perfmon,+net_admin" in (error.remedy or "")


def test_sys_admin_is_not_offered_as_an_ambient_capability(hold: pytest.MonkeyPatch) -> None:
    error = perf_refusal("attach a uprobe", PermissionError(errno.EACCES, ""), ("CAP_SYS_ADMIN",))
    assert isinstance(error, MissingPrivilege)
    assert error.remedy == "run it as root: `sudo hmebpf ...`"


def test_refused_with_all_capabilities_is_the_kernels_own_no(hold: pytest.MonkeyPatch) -> None:
    error = refusal("load", PermissionError(errno.EPERM, ""), ("CAP_BPF",), "use another")
    assert type(error) is Unsupported
    assert "the kernel itself refuses it" in str(error)
    assert error.remedy == "use another"


def test_lockdown_is_named(hold: pytest.MonkeyPatch) -> None:
    hold.setattr(security, "lockdown", lambda: "confidentiality")
    error = refusal("attach", PermissionError(errno.EPERM, ""), ("CAP_BPF",))
    assert type(error) is Unsupported
    assert "locked down (confidentiality)" in str(error)
    assert "lockdown=integrity" in (error.remedy or "")


def test_seccomp_is_named(hold: pytest.MonkeyPatch) -> None:
    hold.setattr(capabilities, "seccomp_filtered", lambda: True)
    error = refusal("attach", PermissionError(errno.EPERM, ""), ("CAP_BPF",))
    assert isinstance(error, MissingPrivilege)
    assert "seccomp" in str(error)
    assert "--security-opt" in (error.remedy or "")


def test_perf_event_paranoid_is_named(hold: pytest.MonkeyPatch) -> None:
    hold.setattr(security, "read_sysctl", lambda name: "3")
    error = perf_refusal("attach", PermissionError(errno.EACCES, ""), ("CAP_BPF", "CAP_PERFMON"))
    assert isinstance(error, MissingPrivilege)
    assert "kernel.perf_event_paranoid is 3" in str(error)
    assert "sysctl kernel.perf_event_paranoid=2" in (error.remedy or "")


def test_other_errors_keep_the_kernels_words(hold: pytest.MonkeyPatch) -> None:
    error = refusal("load", OSError(errno.EINVAL, ""), ("CAP_BPF",), "boot another")
    assert type(error) is Unsupported
    assert str(error) == "load: Invalid argument (EINVAL)"
