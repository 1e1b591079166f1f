"""File systems opened without a mount, or mounted for one process: the host stays as it was."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hypermesh_ebpf.errors import Unsupported
from hypermesh_ebpf.host import filesystems
from hypermesh_ebpf.host.filesystems import TRACEFS, Filesystem, find_mount, magic_of, open_detached
from tests.compiler import ROOT
from tests.netns import needs_own_mounts

vm_too = pytest.mark.vm_too  # what may differ on another kernel; the rest is the same everywhere


def in_private_mounts(script: str, python: str) -> subprocess.CompletedProcess[str]:
    """Run a shell script, then Python, in a mount namespace of their own."""
    command = f"set -e\n{script}\nexec {sys.executable} -c '{python}'"
    return subprocess.run(["unshare", "-m", "sh", "-c", command], capture_output=True, text=True)


@needs_own_mounts
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


@needs_own_mounts
def test_a_path_alone_proves_nothing() -> None:
    """Something else mounted over tracefs' usual place is not tracefs."""
    answer = in_private_mounts(
        "umount -R /sys/kernel/tracing 2>/dev/null || true; umount -R /sys/kernel/debug "
        "2>/dev/null || true; mount -t tmpfs tmpfs /sys/kernel/tracing",
        "from hypermesh_ebpf.host.filesystems import *; print(find_mount(TRACEFS.magic));"
        'print(tracepoint_exists("sched:sched_process_exec"))',
    )
    assert answer.stdout.split() == ["None", "True"], answer.stderr


@vm_too
def test_detached_tracefs_is_tracefs_and_leaves_no_mount() -> None:
    before = Path("/proc/self/mountinfo").read_text()
    directory = open_detached(TRACEFS)
    try:
        assert magic_of(f"/proc/self/fd/{directory}") == TRACEFS.magic
        assert "events" in os.listdir(directory)
        assert Path("/proc/self/mountinfo").read_text() == before
    finally:
        os.close(directory)


@vm_too
def test_tracepoints() -> None:
    assert filesystems.tracepoint_exists("sched:sched_process_exec")
    for name in ("sched:no_such", "nosuch:thing", "sched", "", "sched:../sched_process_exec"):
        assert not filesystems.tracepoint_exists(name), name


def test_unknown_file_system_is_said_to_be_unknown() -> None:
    with pytest.raises(Unsupported) as caught:
        open_detached(Filesystem("nosuchfs", 1, ("/mnt",), "CONFIG_NOSUCHFS"))
    assert "this kernel has no nosuchfs" in str(caught.value)
    assert "CONFIG_NOSUCHFS=y" in (caught.value.remedy or "")


@vm_too
def test_private_mounts_are_seen_by_nobody_else() -> None:
    code = (
        "from hypermesh_ebpf.host.filesystems import *; enter_private_mounts();"
        "print(*(magic_of(place) for place in TRACEFS.places))"
    )
    before = Path("/proc/self/mountinfo").read_text()
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert str(TRACEFS.magic) in answer.stdout.split(), answer.stderr
    assert Path("/proc/self/mountinfo").read_text() == before


@vm_too
def test_private_mounts_are_entered_once() -> None:
    """Each hook of a monitor asks for them."""
    code = (
        "import os; from hypermesh_ebpf.host.filesystems import *\n"
        "look = lambda: (os.readlink('/proc/self/ns/mnt'), open('/proc/self/mountinfo').read())\n"
        "enter_private_mounts(); first = look(); enter_private_mounts(); print(first == look())"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert answer.stdout.split() == ["True"], answer.stderr


@vm_too
@needs_own_mounts
def test_private_mounts_in_a_chroot_whose_root_is_no_mount(tmp_path: Path) -> None:
    """There "/" cannot be made a slave; the mounts below /sys can."""
    code = f"""
import os
from hypermesh_ebpf.host.filesystems import *
outside = open("/proc/1/mountinfo")
before = outside.read()
os.chroot("{tmp_path}")
os.chdir("/")
enter_private_mounts()
outside.seek(0)
print(*(magic_of(place) for place in TRACEFS.places), before == outside.read())
"""
    script = (
        f"set -e; mkdir {tmp_path}/sys {tmp_path}/proc; mount --rbind /sys {tmp_path}/sys; "
        f"mount -t proc proc {tmp_path}/proc; exec {sys.executable} -c '{code}'"
    )
    answer = subprocess.run(
        ["unshare", "-m", "--propagation", "shared", "sh", "-c", script],
        capture_output=True,
        text=True,
    )
    assert str(TRACEFS.magic) in answer.stdout.split(), answer.stderr
    assert answer.stdout.split()[-1] == "True"


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


@needs_own_mounts
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


def test_compiling_leaves_the_mounts_alone() -> None:
    """A worker that compiled sees what the host mounts later: only a thread of its had others."""
    text = (
        "import os; from hypermesh_ebpf.libbcc import compile_module;"
        "before = os.readlink('/proc/thread-self/ns/mnt');"
        "flags = [b'-DLINUX_VERSION_CODE=0', b'-DPAGE_SIZE=4096'];"
        "assert compile_module(b'int f(void *ctx) { return 0; }', flags);"
        "assert os.readlink('/proc/thread-self/ns/mnt') == before; os._exit(0)"
    )
    env = {**os.environ, "BCC_KERNEL_SOURCE": str(ROOT / "hypermesh_ebpf/image")}
    done = subprocess.run(
        [sys.executable, "-c", text], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
