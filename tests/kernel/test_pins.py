"""Pinned sets: programs that outlive who loaded them, found again, read, detached and ended."""

from __future__ import annotations

import ctypes
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from hypermesh_ebpf.attach_type import EbpfAttachType
from hypermesh_ebpf.bpf import info
from hypermesh_ebpf.bpf.programs import create_map
from hypermesh_ebpf.bpf.spec import MapSpec
from hypermesh_ebpf.errors import UsageError
from hypermesh_ebpf.host.pins import check_name
from tests.bpffs import Bpffs
from tests.compiler import map_id
from tests.counting import Counter, link, wait_until_freed
from tests.netns import Namespace, needs_namespaces, needs_own_mounts, wait_until
from tests.objects import example_path
from tests.programs import load_program, program_id
from tests.running import run_cli

pytestmark = [pytest.mark.kernel, pytest.mark.vm_wide, needs_own_mounts, needs_namespaces]
parse = EbpfAttachType.parse
OURS = "/sys/fs/bpf/hmebpf"
_LIBBPF = ctypes.CDLL("libbpf.so.1", use_errno=True)


@pytest.fixture
def bpffs() -> Iterator[Bpffs]:
    with Bpffs() as made:
        yield made


@pytest.fixture
def counter() -> Iterator[Counter]:
    with Counter() as made:
        yield made


def exists(kind: str, number: int) -> bool:
    try:
        os.close(info.open_by_id(kind, number))
    except FileNotFoundError:
        return False
    return True


def files(bpffs: Bpffs) -> set[str]:
    said = bpffs.run("find", "/sys/fs/bpf/hmebpf", "-type", "f").stdout
    return {line.removeprefix(OURS + "/") for line in said.splitlines()}


def test_a_program_outlives_its_process_and_is_ended(bpffs: Bpffs, counter: Counter) -> None:
    fd, number = counter.load(parse("raw_tracepoint:sched_switch"), name="hm_outlives")
    link_fd = link(parse("raw_tracepoint:sched_switch"), fd, number)
    said = bpffs.hmebpf("pin", f"prog:{number}", "kept")
    assert (said.returncode, said.stderr) == (0, "")
    assert said.stdout == f"pinned 1 program, 1 map, 1 link at {OURS}/kept\n"
    assert files(bpffs) == {
        "kept/programs/hm_outlives",
        "kept/maps/hm_counter",
        "kept/links/hm_outlives-0",
    }
    link_number = int(info.read_fdinfo(link_fd)["link_id"])
    os.close(link_fd)
    before = counter.read()
    wait_until(lambda: counter.read() > before, "it goes on counting without its process's link")

    # A later command finds it, and reads it.
    document = json.loads(bpffs.hmebpf("list", "--ours", "-o", "json").stdout)
    (program,) = [each for each in document["programs"] if each["id"] == number]
    assert program["ours"] is True
    assert program["pins"] == [f"{OURS}/kept/programs/hm_outlives"]
    assert program["attachments"][0]["hook"] == "raw_tracepoint:sched_switch"
    low = counter.read()
    dumped = json.loads(bpffs.hmebpf("dump", "kept", "-o", "json").stdout)
    assert dumped["set"] == "kept"
    (counted,) = dumped["maps"]
    assert counted["name"] == "hm_counter"
    ((entry),) = counted["entries"]
    value = int.from_bytes(bytes.fromhex(entry["value"].removeprefix("0x")), "little")
    assert low <= value <= counter.read()
    shown = bpffs.hmebpf("show", "kept").stdout
    assert "hm_outlives" in shown
    assert "hm_counter" in shown

    done = bpffs.hmebpf("unload", "kept")
    detached = f"detached program {number} hm_outlives from raw_tracepoint:sched_switch\n"
    assert (done.returncode, done.stdout) == (0, f"{detached}unloaded kept\n")
    assert done.stderr.startswith(f"note: program {number} hm_outlives is held by ")
    assert files(bpffs) == set()
    wait_until(lambda: not exists("link", link_number), "the link is gone")
    after = counter.read()
    bpffs.run("true")
    assert counter.read() == after


def test_load_pin_read_detach_unload(bpffs: Bpffs) -> None:
    """The whole way of a user's object, each step a command of its own."""
    program = example_path("xdp_packet_counter")
    with Namespace() as ns:

        def cli(*words: str) -> subprocess.CompletedProcess[str]:
            return bpffs.hmebpf(*words, net=ns.path)

        done = cli("load", str(program), "--attach", "xdp:lo", "--pin", "--name", "counters")
        if done.returncode == 3:
            pytest.skip(done.stderr)  # XDP by a link: Linux 5.9
        assert done.returncode == 0, done.stderr
        ns.run("ping", "-c", "41", "-i", "0.002", "127.0.0.1")
        (found,) = json.loads(cli("dump", "counters", "-o", "json").stdout)["maps"]
        ((entry),) = found["entries"]
        assert entry["value"] == {"packets_processed": 82, "bytes_processed": 82 * 98}
        table = cli("dump", "counters").stdout.splitlines()
        assert table[1].split() == ["packets_processed", "bytes_processed"]
        assert table[2].split() == ["82", str(82 * 98)]

        listed = json.loads(cli("list", "--ours", "--iface", "lo", "-o", "json").stdout)
        (there,) = listed["programs"]
        assert there["name"] == "count_packets"
        assert there["attachments"][0]["hook"] == "xdp:lo,mode=generic,link"
        assert there["processes"] == [], "nobody holds it but the pins"
        shown = cli("show", f"prog:{there['id']}", "--instructions").stdout
        assert "totals->packets_processed++;" in shown, "the source, from BTF"
        assert re.search(r"map\[id:\d+ counters\]", shown)

        map_page = cli("show", "map:counters").stdout
        members = "unsigned long long packets_processed; unsigned long long bytes_processed;"
        assert f"16 bytes: struct totals {{ {members} }}" in map_page

        assert cli("detach", "counters").returncode == 0
        ns.run("ping", "-c", "3", "-i", "0.002", "127.0.0.1")
        (found,) = json.loads(cli("dump", "counters", "-o", "json").stdout)["maps"]
        assert found["entries"][0]["value"]["packets_processed"] == 82, "it does not run any more"
        assert cli("unload", "counters").stdout == "unloaded counters\n"
        wait_until_freed(there["id"])
        assert cli("dump", "counters").returncode == 1


def test_unpin_leaves_what_a_process_holds(bpffs: Bpffs) -> None:
    fd = load_program("hm_held")
    number = program_id(fd)
    assert bpffs.hmebpf("pin", f"prog:{number}", "mine").returncode == 0
    done = bpffs.hmebpf("unpin", "mine")
    assert done.returncode == 0
    assert done.stdout == "unpinned mine: 1 pin removed\n"
    pattern = rf"note: program {number} hm_held is held by .* \(process {os.getpid()}\)\n"
    assert re.fullmatch(pattern, done.stderr)
    assert exists("program", number)
    os.close(fd)
    wait_until_freed(number)


def test_pin_alone_keeps_a_program(bpffs: Bpffs) -> None:
    fd = load_program("hm_pinned")
    number = program_id(fd)
    bpffs.hmebpf("pin", f"prog:{number}", "alone")
    os.close(fd)
    assert exists("program", number)
    by_path = bpffs.hmebpf("show", f"{OURS}/alone/programs/hm_pinned", "-o", "json")
    assert json.loads(by_path.stdout)["id"] == number
    assert "owner          root\n" in bpffs.hmebpf("show", f"prog:{number}").stdout
    assert bpffs.hmebpf("unpin", "alone").stderr == ""
    wait_until_freed(number)


def test_names_with_dots_and_of_one_kind_twice(bpffs: Bpffs) -> None:
    """bpffs takes no dots: a map called .rodata gets another name, and no two get the same."""
    fd = create_map(MapSpec("hm.rodata", 2, 4, 8, 1, 0, None, None))
    try:
        done = bpffs.hmebpf("pin", f"map:{map_id(fd)}", "dots")
        assert done.returncode == 0, done.stderr
        assert files(bpffs) == {"dots/maps/hm_rodata"}
    finally:
        os.close(fd)


def test_a_name_that_is_taken(bpffs: Bpffs) -> None:
    fd = load_program("hm_twice")
    try:
        what = f"prog:{program_id(fd)}"
        assert bpffs.hmebpf("pin", what, "taken").returncode == 0
        done = bpffs.hmebpf("pin", what, "taken")
        assert done.returncode == 1
        error, hint = done.stderr.splitlines()
        assert error == f"error: pin taken: there is a pinned set of this name: {OURS}/taken"
        assert "hmebpf unload taken" in hint
        assert files(bpffs) == {"taken/programs/hm_twice"}
        names = bpffs.run("ls", OURS).stdout.split()
        assert names == ["taken"], "nothing half-made is left"
    finally:
        os.close(fd)


@pytest.mark.parametrize("command", ["unpin", "unload", "detach", "dump"])
def test_no_such_set(bpffs: Bpffs, command: str) -> None:
    done = bpffs.hmebpf(command, "nothing")
    assert done.returncode == 1
    assert done.stdout == ""
    error, hint = done.stderr.splitlines()
    assert "nothing" in error
    assert "hmebpf list" in hint


def test_names_that_exist_are_suggested(bpffs: Bpffs) -> None:
    fd = load_program("hm_named")
    try:
        bpffs.hmebpf("pin", f"prog:{program_id(fd)}", "packets")
        done = bpffs.hmebpf("unpin", "packet")
        assert done.stderr.splitlines()[1] == "hint: there are: packets"
        done = bpffs.hmebpf("show", "packetz")
        assert "did you mean packets" in done.stderr
    finally:
        os.close(fd)


@pytest.mark.parametrize("command", ["pin", "unpin", "unload"])
def test_file_system_that_is_not_mounted(command: str) -> None:
    """Not here: a pin in a mount that nobody has would be gone with it."""
    if os.path.ismount("/sys/fs/bpf"):
        pytest.skip("the BPF file system is mounted here")
    fd = load_program("hm_unmounted")
    try:
        what = [f"prog:{program_id(fd)}"] if command == "pin" else []
        done = run_cli(command, *what, "kept")
    finally:
        os.close(fd)
    assert done.returncode == 1
    error, hint = done.stderr.splitlines()
    assert error.endswith("the BPF file system is not mounted")
    assert hint == "hint: mount the BPF file system: `sudo mount -t bpf bpf /sys/fs/bpf`"


@pytest.mark.parametrize("name", ["", "a/b", ".x", "..", "a.b", "x" * 65, "-x", "a b", "a~1"])
def test_names_that_cannot_be(name: str) -> None:
    with pytest.raises(UsageError) as caught:
        check_name(name)
    assert "a name is letters" in str(caught.value)


def test_name_is_looked_at_before_anything_else() -> None:
    done = run_cli("pin", "anything", "a/b")
    assert done.returncode == 2
    assert "error: pinned set 'a/b': a name is letters, digits, - and _, 64 at most" in done.stderr


def test_others_pins_are_shown_and_are_not_ours(bpffs: Bpffs) -> None:
    """A program that somebody pinned elsewhere: found by that path, and by no set."""
    fd = load_program("hm_foreign")
    number = program_id(fd)
    code = (
        "import os; from hypermesh_ebpf.bpf import info; from hypermesh_ebpf.bpf.libbpf import *;"
        f"check(libbpf().bpf_obj_pin(info.open_by_id('program', {number}), b'/sys/fs/bpf/theirs'))"
    )
    made = bpffs.run(sys.executable, "-c", code)
    assert made.returncode == 0, made.stderr
    os.close(fd)
    shown = json.loads(bpffs.hmebpf("show", "/sys/fs/bpf/theirs", "-o", "json").stdout)
    assert (shown["id"], shown["ours"], shown["pins"]) == (number, False, ["/sys/fs/bpf/theirs"])
    assert "owner          root\n" in bpffs.hmebpf("show", f"prog:{number}").stdout
    bpffs.run("rm", "/sys/fs/bpf/theirs")
    wait_until_freed(number)


def test_cleanup_removes_half_made_sets_of_dead_processes(bpffs: Bpffs) -> None:
    script = f"mkdir -p {OURS}/good/programs {OURS}/bad~4194304/maps {OURS}/busy~{os.getpid()}"
    assert bpffs.run("sh", "-c", script).returncode == 0
    done = bpffs.hmebpf("cleanup")
    assert (done.returncode, done.stderr) == (0, "")
    assert "removed the half-made pinned set bad\n" in done.stdout
    assert set(bpffs.run("ls", OURS).stdout.split()) == {"good", f"busy~{os.getpid()}"}


def test_cleanup_says_what_it_could_not(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    from hypermesh_ebpf import cli

    monkeypatch.setattr("hypermesh_ebpf.ledger.sweep", lambda: ["could not remove x: because"])
    monkeypatch.setattr("sys.argv", ["hmebpf", "cleanup"])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 1
    assert capsys.readouterr().out == "could not remove x: because\n"
