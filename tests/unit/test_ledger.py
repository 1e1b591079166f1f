"""The ledger's directory and files; what it does to interfaces is in tests/kernel/test_sweep.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hypermesh_ebpf import ledger
from hypermesh_ebpf.attach.hold import Hold, TcFilter
from hypermesh_ebpf.errors import HmebpfError
from tests.netns import needs_own_mounts

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


def record(ifindex: int, iface: str, prog_id: int) -> Path:
    return ledger.record(Hold(ifindex, iface, prog_id, -1))


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A ledger of the test's own."""
    path = tmp_path / "hmebpf"
    monkeypatch.setattr(ledger, "_place", lambda: path)
    return path


def change(path: Path, **values: object) -> None:
    data = json.loads(path.read_text())
    path.write_text(json.dumps({**data, **values}))


def test_record_names_the_attachment_and_its_owner(place: Path) -> None:
    path = record(7, "veth0", 303)
    (entry,) = ledger.entries()
    assert path.parent == place
    assert (entry.kind, entry.ifindex, entry.iface, entry.prog_id) == ("xdp", 7, "veth0", 303)
    assert entry.owner_pid == os.getpid()
    assert entry.netns == os.stat("/proc/self/ns/net").st_ino
    assert entry.boot_id == Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    # ps counts from the other end: seconds since the process started
    age = int(subprocess.check_output(["ps", "-o", "etimes=", "-p", str(os.getpid())]))
    uptime = float(Path("/proc/uptime").read_text().split()[0])
    started = entry.owner_start / os.sysconf("SC_CLK_TCK")
    assert uptime - started == pytest.approx(age, abs=2)


def test_directory_is_for_its_owner_alone(place: Path) -> None:
    path = record(1, "lo", 1)
    assert place.stat().st_mode & 0o777 == 0o700
    assert list(place.iterdir()) == [path]


def test_one_program_in_two_network_namespaces_is_two_entries(place: Path) -> None:
    hold = Hold(1, "lo", 1, -1)
    ledger.record(hold).unlink()
    for netns in (4026531001, 4026531002):
        ledger.record(hold, netns)
    assert {entry.netns for entry in ledger.entries()} == {4026531001, 4026531002}


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777, 0o1777])
def test_directory_that_others_can_write_is_refused(place: Path, mode: int) -> None:
    place.mkdir()
    place.chmod(mode)
    for use in (lambda: record(1, "lo", 1), ledger.entries, ledger.sweep):
        with pytest.raises(HmebpfError) as caught:
            use()
        assert f"another user can write in it (owner {os.geteuid()}, mode {mode:04o})" in str(
            caught.value
        )
        assert f"rm -r {place}" in (caught.value.remedy or "")


@needs_root  # to give a directory away
def test_directory_of_another_user_is_refused(place: Path) -> None:
    place.mkdir(mode=0o700)
    os.chown(place, 65534, 65534)
    with pytest.raises(HmebpfError, match="owner 65534"):
        ledger.sweep()


def test_link_in_place_of_the_directory_is_refused(place: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    place.symlink_to(elsewhere)
    with pytest.raises(HmebpfError, match="it is not a directory"):
        record(1, "lo", 1)


def test_directory_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(ledger, "_place", lambda: tmp_path / "file" / "hmebpf")
    with pytest.raises(HmebpfError) as caught:
        record(1, "lo", 1)
    assert "Not a directory (ENOTDIR)" in str(caught.value)
    assert caught.value.remedy == f"make {tmp_path / 'file'} a writable directory"


@needs_root  # to mount
@needs_own_mounts
def test_full_disk_is_told_and_leaves_no_half_entry(tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
from hypermesh_ebpf import ledger
from hypermesh_ebpf.attach.hold import Hold
from hypermesh_ebpf.errors import HmebpfError
base = Path(sys.argv[1])
ledger._place = lambda: base / "hmebpf"
ledger.directory()
with open(base / "fill", "wb", buffering=0) as fill:
    try:
        while True:
            fill.write(bytes(4096))
    except OSError:
        pass
try:
    ledger.record(Hold(1, "lo", 1, -1))
except HmebpfError as error:
    print(error, "|", error.remedy, list((base / "hmebpf").iterdir()))
"""
    shell = 'mount -t tmpfs -o size=64k none "$2" && exec "$0" -c "$1" "$2"'
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", shell, sys.executable, code, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "No space left on device (ENOSPC)" in done.stdout, done.stderr
    assert f"df {tmp_path}/hmebpf" in done.stdout
    assert done.stdout.endswith("[]\n")


def test_nothing_to_sweep_makes_no_directory(place: Path) -> None:
    assert ledger.sweep() == []
    assert ledger.entries() == []
    assert not place.exists()


def test_living_owner_is_left_alone(place: Path) -> None:
    path = record(1, "lo", 1)
    assert ledger.sweep() == []
    assert path.exists()


@needs_root  # to ask for a program by its id
def test_another_process_of_the_same_number_is_not_the_owner(place: Path) -> None:
    path = record(1, "lo", 0x7FFFFFF0)  # a program that is long gone
    change(path, owner_start=12345)
    assert ledger.sweep() == []
    assert not path.exists()


def test_entry_of_an_earlier_boot_is_forgotten(place: Path) -> None:
    path = record(1, "lo", 1)
    change(path, boot_id="00000000-0000-0000-0000-000000000000")
    assert ledger.sweep() == []
    assert not path.exists()


@pytest.mark.parametrize("changed", [{"pidns": 1}, {"kind": "of a later version"}])
def test_what_cannot_be_judged_is_left_alone(place: Path, changed: dict[str, object]) -> None:
    path = record(1, "lo", 0x7FFFFFF0)
    change(path, owner_start=12345, **changed)
    assert ledger.sweep() == []
    assert path.exists()


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"\xff\xfe", b"{}", b'{"kind": "xdp"}', b"1e999", b"[" * 50],
)
def test_corrupt_entry_is_reported_and_removed(place: Path, content: bytes) -> None:
    good = record(1, "lo", 1)
    bad = place / "bad.json"
    bad.write_bytes(content)
    (line,) = ledger.sweep()
    assert line.startswith(f"removed the corrupt ledger entry {bad}: ")
    assert not bad.exists()
    assert good.exists()


@pytest.mark.parametrize(
    "changed",
    [
        {"ifindex": -1},
        {"ifindex": 0},
        {"ifindex": 1 << 31},
        {"ifindex": True},
        {"ifindex": "1"},
        {"prog_id": 0},
        {"prog_id": 1 << 32},
        {"owner_pid": None},
        {"iface": 3},
    ],
)
def test_nonsense_in_an_entry_is_corrupt(place: Path, changed: dict[str, object]) -> None:
    path = record(1, "lo", 1)
    change(path, **changed)
    (line,) = ledger.sweep()
    assert line.startswith(f"removed the corrupt ledger entry {path}: ")


def test_additions_of_later_versions_are_no_corruption(place: Path) -> None:
    path = record(1, "lo", 1)
    change(path, weather="fine")
    assert ledger.sweep() == []
    assert path.exists()


def test_half_written_entries_are_removed_when_old(place: Path) -> None:
    record(1, "lo", 1)
    old, new = place / "xdp-2-2.tmp", place / "xdp-3-3.tmp"
    old.write_text("{")
    new.write_text("{")
    os.utime(old, (time.time() - 3600, time.time() - 3600))
    assert ledger.sweep() == []
    assert not old.exists()
    assert new.exists()


def test_liveness_is_of_one_process_not_of_a_number() -> None:
    child = subprocess.Popen(["sleep", "1000"])
    try:
        start = ledger._start_time(child.pid)
        assert start is not None
        assert ledger.is_alive(child.pid, start)
        assert not ledger.is_alive(child.pid, start + 1)
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert not ledger.is_alive(child.pid, start)  # a zombie holds nothing
    finally:
        child.kill()
        child.wait()
    assert not ledger.is_alive(child.pid, start)


def test_name_of_the_owner_may_contain_anything() -> None:
    code = "import time; open('/proc/self/comm', 'w').write(') Z 1 (('); print(); time.sleep(1000)"
    child = subprocess.Popen([sys.executable, "-uc", code], stdout=subprocess.PIPE)
    try:
        assert child.stdout
        child.stdout.readline()
        start = ledger._start_time(child.pid)
        own = ledger._start_time(os.getpid())
        assert start is not None
        assert own is not None
        assert own <= start
    finally:
        child.kill()
        child.communicate()


def test_places(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert ledger._place() == Path("/run/hmebpf")
    monkeypatch.setattr(os, "geteuid", lambda: 4242)
    assert ledger._place() == tmp_path / "hmebpf"
    monkeypatch.setenv("XDG_RUNTIME_DIR", "relative")
    assert ledger._place() == Path("/tmp/hmebpf-4242")


def test_filter_is_written_down_with_its_place(place: Path) -> None:
    where = TcFilter(0xFFFFFFF3, 9, 303, True)
    path = ledger.record(Hold(7, "veth0", 303, -1, where))
    ledger.record(Hold(7, "veth0", 303, -1, TcFilter(0xFFFFFFF2, 9, 303, False)))
    entry = ledger.read(path)
    assert (entry.kind, entry.prog_id, entry.filter) == ("tc", 303, where)
    assert len(ledger.entries()) == 2
    assert ledger.is_clsact_ours(7)
    assert not ledger.is_clsact_ours(8)
    path.unlink()
    assert not ledger.is_clsact_ours(7)


def test_entry_of_an_earlier_version_is_read(place: Path) -> None:
    """It knew XDP only, and nothing of filters."""
    path = record(1, "lo", 1)
    data = json.loads(path.read_text())
    for name in ("parent", "priority", "handle", "clsact_ours"):
        del data[name]
    path.write_text(json.dumps(data))
    assert ledger.read(path).filter is None
