"""`hmebpf detach`: links, pinned sets and attach points; ours, and with --force everybody's."""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hypermesh_ebpf import ledger
from hypermesh_ebpf.attach import attach
from hypermesh_ebpf.attach_type import EbpfAttachType
from hypermesh_ebpf.bpf import info
from hypermesh_ebpf.bpf.libbpf import check
from hypermesh_ebpf.host import filesystems
from tests.bpffs import Bpffs
from tests.counting import TC_PASS, XDP_PASS, Counter, link
from tests.netns import Namespace, needs_namespaces, needs_own_mounts
from tests.running import COMMAND, ROOT, run_cli, running

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


def files(bpffs: Bpffs) -> set[str]:
    said = bpffs.run("find", "/sys/fs/bpf/hmebpf", "-type", "f").stdout
    return {line.removeprefix(OURS + "/") for line in said.splitlines()}


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
