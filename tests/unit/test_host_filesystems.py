"""File systems found by magic and opened without a mount; the host's mounts never change."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hypermesh_ebpf.errors import MissingPrivilege, Unsupported
from hypermesh_ebpf.host import filesystems
from hypermesh_ebpf.host.filesystems import (
    BPFFS,
    TRACEFS,
    Filesystem,
    find_mount,
    magic_of,
    open_detached,
    read_mounts,
)

root_only = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


def in_private_mounts(script: str, python: str) -> subprocess.CompletedProcess[str]:
    """Run a shell script, then Python, in a mount namespace of their own."""
    command = f"set -e\n{script}\nexec {sys.executable} -c '{python}'"
    return subprocess.run(["unshare", "-m", "sh", "-c", command], capture_output=True, text=True)


def test_magic_is_what_stat_says() -> None:
    for path in ("/", "/proc", "/sys", "/dev"):
        answer = subprocess.run(["stat", "-f", "-c", "%t", path], capture_output=True, text=True)
        assert magic_of(path) == int(answer.stdout, 16), path
    assert magic_of("/no/such/path") is None


def test_mounts_are_those_of_findmnt() -> None:
    answer = subprocess.run(
        ["findmnt", "--list", "--json", "-o", "TARGET,FSTYPE"], capture_output=True, text=True
    )
    expected = [(m["target"], m["fstype"]) for m in json.loads(answer.stdout)["filesystems"]]
    assert sorted((m.point, m.fstype) for m in read_mounts()) == sorted(expected)


@root_only
def test_mount_point_with_a_space_and_not_at_its_usual_place(tmp_path: Path) -> None:
    place = tmp_path / "trace äö\\fs"
    place.mkdir()
    answer = in_private_mounts(
        f"mount -t tracefs tracefs '{place}'",
        "from hypermesh_ebpf.host.filesystems import *; print(find_mount(TRACEFS.magic));"
        'print(read_tracefs("events/sched/sched_process_exec/id"))',
    )
    lines = answer.stdout.split("\n")
    assert lines[0] in (str(place), TRACEFS.places[0], TRACEFS.places[1]), answer.stderr
    assert int(lines[1]) > 0


@root_only
def test_a_path_alone_proves_nothing() -> None:
    """Something else mounted over tracefs' usual place is not tracefs."""
    answer = in_private_mounts(
        "umount -R /sys/kernel/tracing 2>/dev/null || true; umount -R /sys/kernel/debug "
        "2>/dev/null || true; mount -t tmpfs tmpfs /sys/kernel/tracing",
        "from hypermesh_ebpf.host.filesystems import *; print(find_mount(TRACEFS.magic));"
        'print(tracepoint_exists("sched:sched_process_exec"))',
    )
    assert answer.stdout.split() == ["None", "True"], answer.stderr


@root_only
def test_detached_tracefs_is_tracefs_and_leaves_no_mount() -> None:
    before = Path("/proc/self/mountinfo").read_text()
    directory = open_detached(TRACEFS)
    try:
        assert magic_of(f"/proc/self/fd/{directory}") == TRACEFS.magic
        assert "events" in os.listdir(directory)
        assert Path("/proc/self/mountinfo").read_text() == before
    finally:
        os.close(directory)


@root_only
def test_tracepoints() -> None:
    assert filesystems.tracepoint_exists("sched:sched_process_exec")
    for name in ("sched:no_such", "nosuch:thing", "sched", "", "sched:../sched_process_exec"):
        assert not filesystems.tracepoint_exists(name), name


@root_only
def test_unknown_file_system_is_said_to_be_unknown() -> None:
    with pytest.raises(Unsupported) as caught:
        open_detached(Filesystem("nosuchfs", 1, ("/mnt",), "CONFIG_NOSUCHFS"))
    assert "this kernel has no nosuchfs" in str(caught.value)
    assert "CONFIG_NOSUCHFS=y" in (caught.value.remedy or "")


def test_without_privileges_the_error_says_how_to_get_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(number: int, *arguments: object) -> int:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(filesystems, "_syscall", refuse)
    with pytest.raises(MissingPrivilege) as caught:
        open_detached(TRACEFS)
    assert "needs CAP_SYS_ADMIN" in str(caught.value)
    assert "sudo mount" in (caught.value.remedy or "")


def test_mounted_but_closed_to_us(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*arguments: object) -> int:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(filesystems, "find_mount", lambda magic: str(tmp_path))
    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(MissingPrivilege) as caught:
        filesystems.open_filesystem(TRACEFS)
    assert str(tmp_path) in str(caught.value)
    assert "mount -o remount" in (caught.value.remedy or "")


@root_only
def test_private_mounts_are_seen_by_nobody_else() -> None:
    code = (
        "from hypermesh_ebpf.host.filesystems import *; enter_private_mounts();"
        "import os; print(magic_of('/sys/kernel/tracing') or magic_of('/sys/kernel/debug/tracing'));"
        "print(os.path.exists('/sys/kernel/debug/kprobes') or not magic_of('/sys/kernel/debug'))"
    )
    before = Path("/proc/self/mountinfo").read_text()
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert answer.stdout.split()[0] == str(TRACEFS.magic), answer.stderr
    assert Path("/proc/self/mountinfo").read_text() == before


@root_only
def test_private_mounts_in_a_chroot_whose_root_is_no_mount(tmp_path: Path) -> None:
    """There "/" cannot be made a slave; the mounts below /sys can."""
    answer = subprocess.run(
        ["unshare", "-m", "--propagation", "shared", "sh", "-c",
         f"set -e; mkdir {tmp_path}/sys {tmp_path}/proc; mount --rbind /sys {tmp_path}/sys;"
         f"mount -t proc proc {tmp_path}/proc; exec {sys.executable} -c '"
         "import os, hypermesh_ebpf.host.filesystems as f;"
         f'from hypermesh_ebpf.host import architecture; os.chroot("{tmp_path}"); os.chdir("/");'
         'before = [m for m in open("/proc/1/mountinfo")] if os.path.exists("/proc/1/mountinfo") else [];'
         "f.enter_private_mounts();"
         'after = [m for m in open("/proc/1/mountinfo")] if before else [];'
         'print(f.magic_of("/sys/kernel/tracing") == f.TRACEFS.magic'
         ' or f.magic_of("/sys/kernel/debug/tracing") == f.TRACEFS.magic, before == after)'
         "'"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert answer.stdout.split() == ["True", "True"], answer.stderr


@root_only
def test_private_mounts_without_privilege_say_so(tmp_path: Path) -> None:
    code = (
        "from hypermesh_ebpf.host.filesystems import *; from hypermesh_ebpf.errors import *\n"
        "try: enter_private_mounts()\n"
        "except MissingPrivilege as e: print(e, e.remedy)\n"
        "else: print('done')"
    )
    if find_mount(TRACEFS.magic):
        pytest.skip("tracefs is mounted here, nothing needs to be done")
    answer = subprocess.run(
        ["setpriv", "--bounding-set=-sys_admin", "--inh-caps=-all", sys.executable, "-c", code],
        capture_output=True,
        text=True,
    )
    assert "needs CAP_SYS_ADMIN" in answer.stdout, answer.stderr
    assert "sudo mount -t tracefs" in answer.stdout


@root_only
def test_fix_mounts_what_is_missing_and_nothing_else() -> None:
    answer = in_private_mounts(
        "for m in /sys/fs/bpf /sys/kernel/tracing /sys/kernel/debug; do "
        "umount -R $m 2>/dev/null || true; done; cp /proc/self/mountinfo /dev/shm/hm-before",
        "from hypermesh_ebpf.host.filesystems import *; import os;"
        'before = open("/dev/shm/hm-before").read(); os.unlink("/dev/shm/hm-before");'
        "print(len(list_missing()), [mount(fs) for fs in list_missing()], len(list_missing()));"
        'new = open("/proc/self/mountinfo").read().replace(before, "");'
        'print(*sorted(line.split(" ")[4] for line in new.splitlines()))',
    )
    first, second = answer.stdout.splitlines()
    assert first == "3 [None, None, None] 0", answer.stderr
    assert second == "/sys/fs/bpf /sys/kernel/debug /sys/kernel/tracing"


def test_bpffs_is_found_where_stat_finds_it() -> None:
    answer = subprocess.run(
        ["findmnt", "-n", "-t", "bpf", "-o", "TARGET"], capture_output=True, text=True
    )
    assert find_mount(BPFFS.magic) in (answer.stdout.split() or [None])
