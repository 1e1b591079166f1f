"""`hmebpf list` and `hmebpf show` as a user runs them."""

from __future__ import annotations

import csv
import ctypes
import fcntl
import io
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hypermesh_ebpf.attach import attach
from hypermesh_ebpf.attach_type import EbpfAttachType
from hypermesh_ebpf.bpf.libbpf import check, libbpf
from hypermesh_ebpf.bpf.programs import create_map
from hypermesh_ebpf.bpf.spec import MapSpec
from hypermesh_ebpf.host.objects import read_objects
from tests.compiler import map_id
from tests.counting import XDP_PASS, Counter
from tests.netns import Namespace, needs_namespaces
from tests.programs import load_program, program_id
from tests.running import COMMAND, ROOT, run_cli, running

pytestmark = [pytest.mark.kernel]
parse = EbpfAttachType.parse
NOBODY = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")


@pytest.fixture
def counter() -> Iterator[Counter]:
    with Counter() as made:
        yield made


@pytest.fixture
def loopback() -> Iterator[tuple[Namespace, int]]:
    """A namespace with a program on its lo, attached through netlink; the program's id."""
    with Counter() as counter, Namespace() as ns:
        fd, number = counter.load(parse("xdp:lo"), returns=XDP_PASS, name="hm_listed")
        with ns.entered():
            attach(parse("xdp:lo"), fd, number, lambda hold: None)
        yield ns, number


def cli(ns: Namespace, *words: str) -> subprocess.CompletedProcess[str]:
    done = ns.run(*COMMAND, *words, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done


def document(ns: Namespace, *words: str) -> Any:
    return json.loads(cli(ns, "list", *words, "-o", "json").stdout)


@needs_namespaces
def test_interface(loopback: tuple[Namespace, int]) -> None:
    """All that is on it, and nothing else."""
    ns, number = loopback
    found = document(ns, "--iface", "lo")
    assert [each["id"] for each in found["programs"]] == [number]
    (program,) = found["programs"]
    assert program["attachments"][0]["hook"] == "xdp:lo,mode=generic"
    assert [each["id"] for each in found["maps"]] == program["map_ids"]
    assert found["links"] == []
    assert [each["program_id"] for each in found["attachments"]] == [number]
    assert found["attachments"][0]["program_name"] == "hm_listed"
    assert {"time", "statistics"} <= set(found)

    table = cli(ns, "list", "--iface", "lo").stdout
    assert table.startswith("Programs (1)\n")
    (row,) = [line for line in table.splitlines() if " hm_listed " in line]
    assert row.split()[:4] == [str(number), "xdp", "hm_listed", "xdp:lo,mode=generic"]
    assert f"({os.getpid()})" in row


@needs_namespaces
def test_kinds_and_types(loopback: tuple[Namespace, int]) -> None:
    ns, number = loopback
    assert set(document(ns, "programs")) == {"time", "statistics", "programs"}
    assert set(document(ns, "links")) == {"time", "statistics", "links"}
    xdp = document(ns, "--type", "xdp")
    assert number in [each["id"] for each in xdp["programs"]]
    assert {each["type"] for each in xdp["programs"]} == {"xdp"}
    assert {each["kind"] for each in xdp["attachments"]} == {"xdp"}
    assert xdp["maps"] == []
    arrays = document(ns, "maps", "--type", "array")
    assert {each["type"] for each in arrays["maps"]} == {"array"}
    assert not [p for p in document(ns, "--type", "kprobe")["programs"] if p["id"] == number]


@needs_namespaces
def test_csv_has_one_kind(loopback: tuple[Namespace, int]) -> None:
    ns, number = loopback
    rows = list(csv.DictReader(io.StringIO(cli(ns, "list", "-o", "csv").stdout)))
    (row,) = [each for each in rows if each["id"] == str(number)]
    assert row["name"] == "hm_listed"
    assert row["attachments"] == "xdp:lo,mode=generic"
    assert row["ours"] == "false"
    assert row["processes"] == f"{os.getpid()}/" + Path("/proc/self/comm").read_text().strip()
    listed = cli(ns, "list", "attachments", "-o", "csv").stdout
    (row,) = [each for each in csv.DictReader(io.StringIO(listed)) if each["hook"].startswith("x")]
    assert (row["iface"], row["mode"], row["program_id"]) == ("lo", "generic", str(number))
    assert row["link_id"] == ""


def test_monitor_of_ours_is_marked() -> None:
    """A running monitor, which no pin and no ledger entry names, is found by its process."""
    with running("exec-monitor", "--rung", "tracepoint") as monitor:
        ids = set(monitor.start["prog_ids"])
        found = json.loads(run_cli("list", "--ours", "-o", "json").stdout)
        mine = {each["id"]: each for each in found["programs"]}
        assert ids <= set(mine)
        for number in ids:
            assert mine[number]["ours"] is True
            assert mine[number]["processes"][0]["pid"] == monitor.process.pid
        hooks = {a["hook"] for number in ids for a in mine[number]["attachments"]}
        assert "tracepoint:syscalls:sys_enter_execve" in hooks
        table = run_cli("list", "programs", "--ours").stdout
        assert re.search(rf"^\* +{min(ids)} ", table, re.M)
        assert table.endswith("\n* ours\n")
        monitor.finish()
    found = json.loads(run_cli("list", "--ours", "-o", "json").stdout)
    assert not ids & {each["id"] for each in found["programs"]}


def test_on_a_terminal_nothing_is_wider_than_it(counter: Counter) -> None:
    fds = [counter.load(parse("xdp:lo"), name=f"hm_wide_{number}")[0] for number in range(3)]
    assert fds
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 70, 0, 0))
    process = subprocess.Popen(
        [*COMMAND, "list", "--type", "xdp"], cwd=ROOT, stdin=slave, stdout=slave, stderr=slave
    )
    os.close(slave)
    said = b""
    while True:
        try:
            part = os.read(master, 65536)
        except OSError:
            break
        if not part:
            break
        said += part
    os.close(master)
    assert process.wait() == 0
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in said.decode().splitlines()]
    assert any("hm_wide_1" in line for line in lines)
    assert max(map(len, lines)) <= 70


@needs_namespaces
def test_without_root_the_network_is_seen(loopback: tuple[Namespace, int]) -> None:
    ns, number = loopback
    done = ns.run(*NOBODY, *COMMAND, "list", check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "xdp:lo,mode=generic" in done.stdout
    assert str(number) in done.stdout
    assert "needs CAP_SYS_ADMIN" in done.stderr
    assert "sudo hmebpf list" in done.stderr
    done = ns.run(*NOBODY, *COMMAND, "list", "-o", "json", check=False, cwd=ROOT)
    found = json.loads(done.stdout)
    assert found["programs"] is None, "unknown, and not none"
    assert found["maps"] is None
    assert [each["program_id"] for each in found["attachments"]] == [number]


@needs_namespaces
@pytest.mark.parametrize(
    "words",
    [["list", "programs"], ["list", "maps"], ["list", "--ours"], ["list"], ["show", "1"], ["top"]],
    ids=" ".join,
)
def test_without_root_and_nothing_to_be_seen(words: list[str]) -> None:
    """A namespace with nothing on its interfaces; three lines would say nothing."""
    with Namespace() as ns:
        done = ns.run(*NOBODY, *COMMAND, *words, check=False, cwd=ROOT)
    assert done.returncode == 3
    assert done.stdout == ""
    error, hint = done.stderr.splitlines()
    assert re.match(r"error: (list|count) the .*: Operation not permitted \(EPERM\)", error)
    assert "sudo hmebpf" in hint


@pytest.mark.parametrize(
    ("words", "said", "remedy"),
    [
        (["list", "--type", "xpd"], "no program, map, link or attachment", "did you mean xdp"),
        (["list", "--type", "7"], "no program, map, link or attachment", "for instance xdp"),
        (["list", "--iface", "no-such0"], "no such interface", "interfaces here: "),
        (["list", "nonsense"], "'nonsense' is not one of", "--help"),
        (["show", "prog:4294967295"], "there is no program, map or link of that", "hmebpf list"),
        (["show", "/no/such/pin"], "there is no program, map or link of that", "hmebpf list"),
        (["dump", "map:4294967295"], "there is no map of that id, name or pin", "hmebpf list"),
        (["pin", "prog:4294967295", "x"], "there is no program, map or link", "hmebpf list"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes(words: list[str], said: str, remedy: str) -> None:
    done = run_cli(*words)
    assert done.returncode in (1, 2)
    error, hint = done.stderr.splitlines()
    assert said in error
    assert remedy in hint


def test_show_by_id_name_and_prefix(counter: Counter) -> None:
    _fd, number = counter.load(parse("xdp:lo"), returns=XDP_PASS, name="hm_shown_alone")
    by_prefix = json.loads(run_cli("show", f"prog:{number}", "-o", "json").stdout)
    by_name = json.loads(run_cli("show", "hm_shown_alone", "-o", "json").stdout)
    assert by_prefix["id"] == by_name["id"] == number
    page = run_cli("show", "hm_shown_alone").stdout
    assert page.startswith(f"program {number}  hm_shown_alone\n")
    facts = dict(re.findall(r"^  (\w[\w ]*?)  +(.*)$", page, re.M))
    assert facts["type"] == "xdp"
    assert facts["tag"] == by_name["tag"]
    assert facts["attached to"] == "nothing that can be seen"
    assert facts["map"].split()[1:] == ["hm_counter", "(array)"]
    assert facts["size"].startswith("6 instructions")
    (used,) = by_name["map_ids"]
    page = run_cli("show", f"map:{used}").stdout
    assert page.startswith(f"map {used}  hm_counter\n")
    assert f"program {number} hm_shown_alone" in page
    assert f"hmebpf dump {used}" in page


def test_two_of_one_name(counter: Counter) -> None:
    numbers = [counter.load(parse("xdp:lo"), name="hm_same_name")[1] for _ in range(2)]
    done = run_cli("show", "hm_same_name")
    assert done.returncode == 2
    error, hint = done.stderr.splitlines()
    assert error == "error: find 'hm_same_name': there are 2 of that"
    assert hint == f"hint: say `prog:{numbers[0]}`, `prog:{numbers[1]}`"


def test_instructions_are_for_programs() -> None:
    fd = create_map(MapSpec("hm_shown", 2, 4, 8, 1, 0, None, None))
    try:
        done = run_cli("show", f"map:{map_id(fd)}", "--instructions")
    finally:
        os.close(fd)
    assert done.returncode == 2
    assert "it is no program" in done.stderr


def test_instructions_as_json() -> None:
    fd = load_program("hm_two_steps")
    try:
        done = run_cli("show", f"prog:{program_id(fd)}", "--instructions", "-o", "json")
    finally:
        os.close(fd)
    steps = json.loads(done.stdout)["instructions"]
    assert [(each["number"], each["text"]) for each in steps] == [(0, "r0 = 2"), (1, "exit")]
    assert steps[0]["bytes"] == "b700000002000000"


def test_dump_typed_and_not(counter: Counter) -> None:
    """A map without BTF is shown as bytes; its one entry is what the program counted."""
    spec = MapSpec("hm_dumped", 1, 4, 8, 10, 0, None, None)
    fd = create_map(spec)
    try:
        key, value = ctypes.c_uint32(7), ctypes.c_uint64(0x0102)
        check(libbpf().bpf_map_update_elem(fd, ctypes.byref(key), ctypes.byref(value), 0))
        number = map_id(fd)
        found = json.loads(run_cli("dump", f"map:{number}", "-o", "json").stdout)
        (map_,) = found["maps"]
        assert (map_["id"], map_["name"], map_["type"]) == (number, "hm_dumped", "hash")
        assert (map_["left_out"], map_["reason"], found["set"]) == (0, None, None)
        (entry,) = map_["entries"]
        assert "0201" in str(entry["value"]) or entry["value"] == 0x0102
        table = run_cli("dump", f"map:{number}").stdout
        assert table.startswith(f"hm_dumped  map {number}, hash\n")
        assert len(table.splitlines()) == 3
        lines = run_cli("dump", f"map:{number}", "-o", "csv").stdout.splitlines()
        assert len(lines) == 2
        assert lines[0] == "key,value"
    finally:
        os.close(fd)


def test_dump_what_has_no_entries() -> None:
    fd = create_map(MapSpec("hm_ring", 27, 0, 0, 4096, 0, None, None))
    try:
        done = run_cli("dump", f"map:{map_id(fd)}")
        assert done.returncode == 1
        assert "hm_ring: it holds events, not entries" in done.stderr
    finally:
        os.close(fd)
    fd = create_map(MapSpec("hm_empty", 1, 4, 8, 10, 0, None, None))
    try:
        assert run_cli("dump", f"map:{map_id(fd)}").stdout.splitlines()[1] == "empty"
    finally:
        os.close(fd)


def test_dump_of_a_large_map_can_be_limited() -> None:
    fd = create_map(MapSpec("hm_array", 2, 4, 8, 101, 0, None, None))
    try:
        number = map_id(fd)
        assert "all entries are zero" in run_cli("dump", f"map:{number}").stdout
        assert len(run_cli("dump", f"map:{number}", "--all").stdout.splitlines()) == 103
        limited = run_cli("dump", f"map:{number}", "--all", "--top", "7").stdout.splitlines()
        assert len(limited) == 10
        assert limited[-1] == "... 94 more"
        found = json.loads(run_cli("dump", f"map:{number}", "-o", "json").stdout)
        assert len(found["maps"][0]["entries"]) == 101, "JSON has all"
    finally:
        os.close(fd)


def test_list_runs_while_programs_come_and_go() -> None:
    """What is gone between two looks is left out, and is no error."""
    code = """
import os
from hypermesh_ebpf.bpf.libbpf import check, libbpf
from hypermesh_ebpf.bpf.programs import create_map
from hypermesh_ebpf.bpf.spec import MapSpec
from tests.programs import load_program
print("ready", flush=True)
while True:
    made = [load_program("hm_fleeting", 17), create_map(MapSpec("x", 18, 4, 4, 8, 0, None, None))]
    made.append(check(libbpf().bpf_raw_tracepoint_open(b"sched_process_exec", made[0])))
    for fd in made:
        os.close(fd)
"""
    churn = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        assert churn.stdout is not None
        churn.stdout.readline()
        for _ in range(60):
            read_objects()
        json.loads(run_cli("list", "-o", "json").stdout)
    finally:
        churn.kill()
        churn.wait()
        churn.stdout.close()  # type: ignore[union-attr]
