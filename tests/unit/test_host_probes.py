"""Symbols, BTF and the surroundings, against what the kernel's own files say."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from hypermesh_ebpf.errors import MissingBtf, Unsupported
from hypermesh_ebpf.host import environment, hook_probes, kernel_btf, symbols, trials
from hypermesh_ebpf.host.hooks import KINDS, probe_hook
from hypermesh_ebpf.host.symbols import find_function, resolve_syscall_function


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    find_function.cache_clear()
    yield
    find_function.cache_clear()


def functions() -> set[str]:
    text = Path("/proc/kallsyms").read_text()
    return {f[2] for f in map(str.split, text.splitlines()) if f[1] in "tTwW"}


def test_syscall_function_is_in_kallsyms() -> None:
    for name in ("execve", "connect", "close"):
        found = resolve_syscall_function(name)
        assert found in functions()
        assert found.endswith(f"sys_{name}")
    prefix = {"x86_64": "__x64_sys_", "aarch64": "__arm64_sys_"}.get(os.uname().machine, "")
    assert resolve_syscall_function("execve").startswith(prefix)


def test_unknown_syscall_names_what_was_looked_for_and_the_tracepoint() -> None:
    with pytest.raises(Unsupported) as caught:
        resolve_syscall_function("nosuchcall")
    assert "sys_nosuchcall" in str(caught.value)
    assert "syscalls:sys_enter_nosuchcall" in (caught.value.remedy or "")


def test_only_whole_names_of_functions_match(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    table = tmp_path / "kallsyms"
    monkeypatch.setattr(symbols, "_KALLSYMS", str(table))
    lines = [
        "0000000000000000 T do_thing_more",
        "0000000000000000 d do_thing",
        "0000000000000000 t do_other.isra.0",
        "0000000000000000 t in_module\t[veth]",
        *(f"0000000000000000 T filler_{i}" for i in range(5000)),  # several chunks
        "0000000000000000 t do_last",
    ]
    table.write_text("\n".join(lines) + "\n")
    assert find_function("do_thing") is None
    assert find_function("do_other") is None
    assert symbols.find_variants("do_other") == ["do_other.isra.0"]
    assert find_function("in_module") == "in_module"
    assert find_function("do_last") == "do_last"
    assert find_function("nothing", "do_last", "in_module") == "do_last"
    assert find_function("nothing") is None


def test_btf_path_is_the_kernels_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HMEBPF_BTF", raising=False)
    assert kernel_btf.btf_path() == "/sys/kernel/btf/vmlinux"
    monkeypatch.setenv("HMEBPF_BTF", "/elsewhere")
    assert kernel_btf.btf_path() == "/elsewhere"


def test_btf_that_is_missing_or_is_something_else(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HMEBPF_BTF", str(tmp_path / "none"))
    with pytest.raises(MissingBtf) as caught:
        kernel_btf.require_btf()
    assert "ENOENT" in str(caught.value)
    assert "CONFIG_DEBUG_INFO_BTF=y" in (caught.value.remedy or "")
    (tmp_path / "none").write_bytes(b"\x7fELF")
    with pytest.raises(MissingBtf, match="is not a BTF file"):
        kernel_btf.require_btf()
    (tmp_path / "none").write_bytes(b"\x9f\xeb\x01")
    assert kernel_btf.require_btf() == str(tmp_path / "none")


def test_unknown_kind_is_answered_with_the_known_ones() -> None:
    found = probe_hook("kproobe")
    assert not found.available
    assert "kproobe" in (found.reason or "")
    assert all(kind in (found.remedy or "") for kind in KINDS)


def test_every_answer_of_no_has_reason_and_remedy() -> None:
    """Whatever this kernel and these privileges are."""
    for kind in KINDS:
        found = probe_hook(kind)
        if not found.available:
            assert found.reason, kind
            assert found.remedy, kind
        assert found.probed, kind


def test_kernel_without_kprobes_or_uprobes_is_told_by_its_event_sources(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(trials, "event_source", lambda name: None)
    monkeypatch.setattr(hook_probes, "_has_kprobe_events", lambda: False)
    probe_hook.cache_clear()
    try:
        for kind, config in (("kprobe", "KPROBE_EVENTS"), ("uretprobe", "UPROBE_EVENTS")):
            found = probe_hook(kind)
            assert not found.available
            assert not found.privilege
            assert f"CONFIG_{config} is off" in (found.reason or "")
    finally:
        probe_hook.cache_clear()


def test_files_of_an_image_do_not_make_a_container(monkeypatch: pytest.MonkeyPatch) -> None:
    """/.dockerenv is in many a machine image; namespaces tell."""
    monkeypatch.setattr(os.path, "exists", lambda path: path == "/.dockerenv")
    monkeypatch.setattr(environment, "_read", lambda path: "")
    monkeypatch.delenv("container", raising=False)
    monkeypatch.setattr(environment, "own_namespaces", lambda: ())
    assert environment.detect_environment().container is None
    monkeypatch.setattr(environment, "own_namespaces", lambda: ("pid", "uts"))
    assert environment.detect_environment().container == "Docker"


def test_machine_by_dmi_and_cpu_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"/sys/class/dmi/id/sys_vendor": "QEMU"}
    monkeypatch.setattr(environment, "_read", lambda path: files.get(path, ""))
    assert environment.detect_environment().machine == "QEMU"
    files = {"/proc/cpuinfo": "processor : 0\nflags\t\t: fpu vme hypervisor"}
    assert environment.detect_environment().machine == "an unnamed hypervisor"
    files = {"/proc/cpuinfo": "processor : 0\nflags\t\t: fpu vme"}
    assert environment.detect_environment().machine is None
