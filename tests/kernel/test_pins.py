"""Pinned sets: programs that outlive who loaded them, found again, read, detached and ended."""

from __future__ import annotations

import ctypes
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hypermesh_ebpf import ledger
from hypermesh_ebpf.attach import attach
from hypermesh_ebpf.attach_type import EbpfAttachType
from hypermesh_ebpf.bpf import info
from hypermesh_ebpf.bpf.libbpf import check
from hypermesh_ebpf.bpf.programs import create_map
from hypermesh_ebpf.bpf.spec import MapSpec
from hypermesh_ebpf.errors import HookUnsupported, UsageError
from hypermesh_ebpf.host import filesystems
from hypermesh_ebpf.host.pins import check_name
from tests.bpffs import Bpffs
from tests.compiler import map_id
from tests.counting import TC_PASS, XDP_PASS, Counter, wait_until_freed
from tests.netns import Namespace, needs_namespaces, needs_own_mounts, wait_until
from tests.objects import example_path
from tests.programs import load_program, program_id
from tests.running import COMMAND, ROOT, run_cli, running

pytestmark = [pytest.mark.kernel, pytest.mark.vm_too, needs_own_mounts, needs_namespaces]
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


def link(point: EbpfAttachType, fd: int, number: int) -> int:
    """A program attached by a link; its descriptor.  Skips where the kernel has no such links."""
    try:
        made = attach(point, fd, number, lambda hold: None, pinnable=True)
    except HookUnsupported as error:
        pytest.skip(str(error))
    (found,) = made.descriptors
    return found


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


def test_detach_a_set_leaves_its_maps_to_be_read(bpffs: Bpffs, counter: Counter) -> None:
    point = parse("xdp:lo,link")
    with Namespace() as ns:
        fd, number = counter.load(point, returns=XDP_PASS, name="hm_detached")
        with ns.entered():
            link_fd = link(point, fd, number)
        bpffs.hmebpf("pin", f"prog:{number}", "counts", net=ns.path)
        os.close(link_fd)
        ns.run("ping", "-c", "3", "-i", "0.05", "127.0.0.1")
        counted = counter.read()
        assert counted >= 6
        done = bpffs.hmebpf("detach", "counts", net=ns.path)
        expected = f"detached program {number} hm_detached from xdp:lo,mode=generic,link\n"
        assert (done.returncode, done.stdout) == (0, expected)
        assert "prog/xdp" not in ns.run("ip", "link", "show", "lo").stdout
        assert files(bpffs) == {"counts/programs/hm_detached", "counts/maps/hm_counter"}
        again = bpffs.hmebpf("detach", "counts", net=ns.path)
        assert again.returncode == 1
        assert "error: detach counts: no link of it is pinned" in again.stderr
        (entry,) = json.loads(bpffs.hmebpf("dump", "counts", "-o", "json").stdout)["maps"]
        assert int.from_bytes(bytes.fromhex(entry["entries"][0]["value"]), "little") == counted
        bpffs.hmebpf("unload", "counts")


def test_detach_by_link_id_is_for_ours_alone(counter: Counter) -> None:
    point = parse("xdp:lo,link")
    with Namespace() as ns:
        fd, number = counter.load(point, returns=XDP_PASS, name="hm_theirs")
        with ns.entered():
            link_fd = link(point, fd, number)
        what = f"link:{info.read_fdinfo(link_fd)['link_id']}"
        done = ns_cli(ns, "detach", what)
        assert done.returncode == 1
        error, hint = done.stderr.splitlines()
        assert error.startswith(
            f"error: detach {what.replace(':', ' ')}: program {number} hm_theirs is not ours: "
        )
        assert f"(process {os.getpid()})" in error
        assert "--force" in hint
        assert "prog/xdp" in ns.run("ip", "link", "show", "lo").stdout
        done = ns_cli(ns, "detach", what, "--force")
        assert done.returncode == 0, done.stderr
        assert "prog/xdp" not in ns.run("ip", "link", "show", "lo").stdout
        os.close(link_fd)


def ns_cli(ns: Namespace, *words: str) -> Any:
    return ns.run(*COMMAND, *words, check=False, cwd=ROOT)


@pytest.mark.parametrize(
    ("point", "shown"),
    [
        ("xdp:lo", "xdp:lo,mode=generic"),
        ("tc:lo,direction=egress,priority=7", "tc:lo,direction=egress,priority=7"),
    ],
)
def test_detach_what_netlink_attached(counter: Counter, point: str, shown: str) -> None:
    """By the attach point, as `hmebpf list` writes it; ours only, and with --force everybody's."""
    kind = parse(point).kind
    with Namespace() as ns:
        fd, number = counter.load(
            parse(point), returns=XDP_PASS if kind == "xdp" else TC_PASS, name="hm_netlink"
        )
        with ns.entered():
            made = attach(parse(point), fd, number, lambda hold: None)
            assert made.held
        assert ns_cli(ns, "detach", f"{kind}:nosuch").returncode == 1
        refused = ns_cli(ns, "detach", point)
        assert refused.returncode == 1
        assert f"program {number} hm_netlink is not ours" in refused.stderr
        done = ns_cli(ns, "detach", point, "--force")
        assert done.stdout == f"detached program {number} hm_netlink from {shown}\n"
        assert done.returncode == 0
        done = ns_cli(ns, "detach", point, "--force")
        assert done.returncode == 1
        assert "no program is attached there" in done.stderr
        listed = json.loads(ns_cli(ns, "list", "attachments", "-o", "json").stdout)
        assert not [a for a in listed["attachments"] if a["program_id"] == number]


@pytest.mark.parametrize("by_link", [False, True])
def test_detach_from_a_control_group(counter: Counter, by_link: bool) -> None:
    root = filesystems.find_mount(filesystems.CGROUP2.magic)
    if root is None:
        pytest.skip("the cgroup2 hierarchy is not mounted")
    path = Path(root, f"hm-detach-{os.getpid()}")
    path.mkdir()
    text = f"cgroup:{path},attach=egress"
    fd, number = counter.load(parse(text), returns=1, name="hm_group")
    held = None
    try:
        if by_link:
            held = link(parse(text), fd, number)
        else:
            group = os.open(path, os.O_RDONLY)
            try:
                check(_LIBBPF.bpf_prog_attach(fd, group, 1, 0))  # BPF_CGROUP_INET_EGRESS
            finally:
                os.close(group)
        done = run_cli("detach", text, "--force")
        assert done.stdout == f"detached program {number} hm_group from {text}\n", done.stderr
        assert run_cli("detach", text, "--force").returncode == 1, "nothing is there any more"
    finally:
        if held is not None:
            os.close(held)
        path.rmdir()


def test_detach_tcx_without_a_link(counter: Counter) -> None:
    point = parse("tc:lo,direction=ingress")
    with Namespace() as ns:
        fd, number = counter.load(point, returns=TC_PASS, name="hm_tcx")
        with ns.entered():
            if _LIBBPF.bpf_prog_attach(fd, 1, 46, 0) < 0:  # BPF_TCX_INGRESS of interface 1
                pytest.skip("this kernel has no TCX (Linux 6.6)")
        done = ns_cli(ns, "detach", "tc:lo,direction=ingress", "--force")
        assert done.stdout == f"detached program {number} hm_tcx from tc:lo,direction=ingress\n", (
            done.stderr
        )
        assert ns_cli(ns, "detach", "tc:lo", "--force").returncode == 1


def test_detach_a_running_monitor() -> None:
    """It is ours, so nothing has to be forced; the monitor says what became of it."""
    with Namespace() as ns, running("xdp", "--iface", "lo", "-i", "0.1", namespace=ns) as monitor:
        (number,) = monitor.start["prog_ids"]
        done = ns_cli(ns, "detach", "xdp:lo")
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(f"detached program {number} count_packet from xdp:lo")
        while monitor.read() is not None:
            pass
        assert monitor.process.wait() == 1
        assert monitor.process.stderr is not None
        assert "was taken off or replaced" in monitor.process.stderr.read()
        assert [entry for entry in ledger.entries() if entry.netns == ns.inode] == []


def test_detach_a_perf_event() -> None:
    """It ends with the process that holds it, and the error says which that is."""
    with running("exec-monitor", "--rung", "tracepoint") as monitor:
        done = run_cli("detach", "tracepoint:syscalls:sys_enter_execve")
        assert done.returncode == 1
        assert "ends with its last descriptor, which is held by process" in done.stderr
        assert str(monitor.process.pid) in done.stderr
        monitor.finish()


def test_unload_tells_what_stays_attached(bpffs: Bpffs, counter: Counter) -> None:
    """What netlink attached is held by nothing that a pin's end would close."""
    point = parse("xdp:lo")
    with Namespace() as ns:
        fd, number = counter.load(point, returns=XDP_PASS, name="hm_stays")
        with ns.entered():
            attach(point, fd, number, lambda hold: None)
        pinned = bpffs.hmebpf("pin", f"prog:{number}", "stays", net=ns.path)
        assert "note: xdp:lo,mode=generic is no link: it does not depend on the pin" in (
            pinned.stderr
        )
        done = bpffs.hmebpf("unload", "stays", net=ns.path)
        assert done.returncode == 0
        assert "take it off with `hmebpf detach xdp:lo,mode=generic --force`" in done.stderr
        done = ns_cli(ns, "detach", "xdp:lo,mode=generic", "--force")
        assert done.returncode == 0, done.stderr


def test_detach_what_only_its_descriptor_ends(counter: Counter) -> None:
    point = parse("raw_tracepoint:sched_process_exec")
    fd, number = counter.load(point, name="hm_held")
    link_fd = link(point, fd, number)
    try:
        done = run_cli("detach", "raw_tracepoint:sched_process_exec", "--force")
        assert done.returncode == 1
        assert "a raw_tracepoint link ends with its last descriptor" in done.stderr
        assert "hint: end it: `kill " in done.stderr
    finally:
        os.close(link_fd)


def test_detach_usage() -> None:
    assert run_cli("detach", "nonsense:x").returncode == 2
    assert run_cli("detach", "xdp:").returncode == 2
    done = run_cli("detach", "xdp:no-such-interface")
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "error: detach xdp:no-such-interface: no program is attached there",
        "hint: `hmebpf list attachments` shows what is",
    ]


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
