"""``hmebpf load`` and ``hmebpf run``: users' programs on every hook, counted against known causes.

Each count is of events that the test makes itself, in a number that does not come by accident.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hypermesh_ebpf.attach_type import EbpfAttachType
from hypermesh_ebpf.host.hooks import probe_hook
from hypermesh_ebpf.host.symbols import find_function
from tests.netns import Namespace, needs_namespaces, wait_until
from tests.objects import example_path, object_path
from tests.owner import attached
from tests.packets import received_packets
from tests.running import COMMAND, ROOT, Running, run_cli, running

pytestmark = needs_namespaces

_LIBC = ctypes.CDLL(None, use_errno=True)
COUNT_PACKETS = """
BPF_HASH(packets, u16, u64);
int count(struct xdp_md *ctx) {
    u16 size = ctx->data_end - ctx->data;
    u64 zero = 0, *value = packets.lookup_or_try_init(&size, &zero);
    if (value)
        lock_xadd(value, 1);
    return XDP_PASS;
}
"""
EXECS = """
struct exec { u32 pid; u32 uid; char comm[16]; enum { SMALL, LARGE } size; };
BPF_RINGBUF_OUTPUT(execs, 64);
BPF_HISTOGRAM(lengths);
TRACEPOINT_PROBE(sched, sched_process_exec) {
    struct exec exec = {};
    exec.pid = bpf_get_current_pid_tgid() >> 32;
    exec.uid = bpf_get_current_uid_gid();
    exec.size = LARGE;
    bpf_get_current_comm(&exec.comm, sizeof(exec.comm));
    execs.ringbuf_output(&exec, sizeof(exec), 0);
    lengths.increment(bpf_log2l(exec.pid));
    return 0;
}
"""
LIBBPF_STYLE = """
#include "vmlinux.h"
#include <bpf/bpf_helpers.h>
const volatile __u32 step = 1;
__u64 counted;
SEC("raw_tp/sched_process_exec")
int count(void *ctx)
{
    __sync_fetch_and_add(&counted, step);
    return 0;
}
char LICENSE[] SEC("license") = "GPL";
"""


def needs(kind: str) -> None:
    """Skip where this kernel has no such hook."""
    found = probe_hook(kind)
    if not found.available:
        pytest.skip(f"{kind}: {found.reason}")


def value(sample: dict[str, Any], map_name: str, key: Any = 0) -> Any:
    """One entry's value."""
    (found,) = [r["value"] for r in sample["rows"] if r["map"] == map_name and r["key"] == key]
    return found


def last_value(monitor: Running, map_name: str, key: Any = 0) -> Any:
    monitor.finish()
    return value(monitor.last, map_name, key)


def ping(ns: Namespace, count: int) -> None:
    ns.run("ping", "-q", "-c", str(count), "-i", "0.002", "127.0.0.1")


def execute(times: int) -> None:
    for _ in range(times):
        subprocess.run(["/bin/true"], check=True)


@pytest.mark.vm_too
def test_xdp_object_counts_what_the_kernel_counts() -> None:
    """Keys and values decoded through BTF; /proc/net/dev is the second source."""
    with Namespace() as ns:
        argv = ("load", str(object_path("xdp")), "--attach", "xdp:lo,mode=generic")
        with running(*argv, namespace=ns) as monitor:
            before = received_packets(ns, "lo")
            ping(ns, 59)
            icmp = last_value(monitor, "protocols", 1)
            assert icmp["packets"] == received_packets(ns, "lo") - before == 118
            assert icmp["bytes"] == 118 * 98
        assert monitor.start["hooks"] == ["xdp:generic"]
        assert monitor.start["target"] == "lo"
        assert not attached(ns)


@pytest.mark.vm_too
def test_tc_object_in_both_directions() -> None:
    argv = ["load", str(object_path("tc"))]
    for direction in ("ingress", "egress"):  # the sections tell which program is meant
        argv += ["--attach", f"tc:lo,direction={direction}"]
    argv += ["--attach", "old_name=tc:lo,direction=egress,priority=9"]
    with Namespace() as ns:
        with running(*argv, namespace=ns) as monitor:
            ping(ns, 31)
            monitor.finish()
        assert [value(monitor.last, "directions", key) for key in (0, 1)] == [62, 62]
        assert "clsact" not in ns.run("tc", "qdisc", "show", "dev", "lo").stdout


def test_every_section_of_an_object_is_attached() -> None:
    """Tracepoint, raw tracepoint and perf event programs of one object, where it says and where
    we say."""
    path = str(object_path("tracing"))
    with running("load", path, "--attach", "on_sample=perf_event:cpu-clock,frequency=99") as it:
        for _ in range(1009):
            os.getpgid(0)
        execute(37)
        end = time.process_time() + 0.3
        while time.process_time() < end:
            pass
        counts = last_value(it, ".bss")
    assert 1009 <= counts["tracepoint_hits"] < 1100
    assert counts["raw_hits"] >= 37
    assert counts["samples"] >= 10
    assert sorted(it.start["hooks"]) == [
        "perf_event:cpu-clock",
        "raw_tracepoint:sched_process_exec",
        "tracepoint:syscalls:sys_enter_getpgid",
    ]


@pytest.mark.vm_too
def test_raw_tracepoint_with_types() -> None:
    """A tp_btf program follows its arguments' pointers without helpers."""
    with running("load", str(object_path("tp_btf"))) as monitor:
        execute(11)
        monitor.finish()
    assert value(monitor.last, ".bss")["execs"] >= 11
    assert monitor.start["hooks"] == ["raw_tracepoint:sched_process_exec"]


def test_uprobe_object() -> None:
    libc = next(
        line.split()[-1]
        for line in Path("/proc/self/maps").read_text().splitlines()
        if "libc.so" in line or "/libc-" in line
    )
    argv = ["load", str(object_path("uprobe"))]
    for program, kind in (("on_call", "uprobe"), ("on_return", "uretprobe")):
        argv += ["--attach", f"{program}={kind}:{libc}:labs,pid={os.getpid()}"]
    with running(*argv) as monitor:
        _LIBC.labs.restype = ctypes.c_long
        for _ in range(23):
            assert _LIBC.labs(ctypes.c_long(-4711)) == 4711
        counts = last_value(monitor, ".bss")
    assert (counts["calls"], counts["returns"]) == (23, 23)
    assert (counts["last_argument"], counts["last_result"]) == (-4711, 4711)


def test_cgroup_object(tmp_path: Path) -> None:
    needs("cgroup")
    from hypermesh_ebpf.host.filesystems import CGROUP2, find_mount

    root = find_mount(CGROUP2.magic)
    assert root is not None
    group = Path(root, f"hmebpf-test-{os.getpid()}")
    group.mkdir()
    argv = ["load", str(object_path("cgroup"))]
    for program, side in (
        ("count_ingress", "ingress"),
        ("count_egress", "egress"),
        ("count_sockets", "sock_create"),
    ):
        argv += ["--attach", f"{program}=cgroup:{group},attach={side}"]
    code = (
        "import os, socket\n"
        f"open('{group}/cgroup.procs', 'w').write(str(os.getpid()))\n"
        "for _ in range(7):\n"
        "    s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
        "    s.bind(('127.0.0.1', 0)); s.sendto(b'x', s.getsockname()); s.recv(9); s.close()\n"
    )
    try:
        with running(*argv) as monitor:
            subprocess.run(["python3", "-c", code], check=True)
            counts = last_value(monitor, ".bss")
        assert counts == {"ingress_packets": 7, "egress_packets": 7, "sockets": 7}
    finally:
        wait_until(lambda: not (group / "cgroup.procs").read_text(), "the group is empty")
        group.rmdir()


def needs_function(name: str) -> None:
    """Skip where the kernel's function is called otherwise (do_unlinkat on Linux 7.3)."""
    if find_function(name) is None:
        pytest.skip(f"this kernel has no function {name}")


def unlink_nothing(times: int) -> None:
    """do_unlinkat() runs and fails with ENOENT."""
    for _ in range(times):
        with pytest.raises(FileNotFoundError):
            os.unlink("/proc/hmebpf-no-such-file")


@pytest.mark.vm_too
def test_kprobe_object() -> None:
    """Entry, return with its value, and a system call's wrapper; arguments through CO-RE."""
    needs("kprobe")
    needs_function("do_unlinkat")
    with running("load", str(object_path("kprobe"))) as monitor:
        unlink_nothing(17)
        for _ in range(13):
            os.getpgid(os.getpid())
        counts = last_value(monitor, ".bss")
    assert counts["entries"] >= 17 and counts["returns"] >= 17
    assert counts["calls"] >= 13
    assert counts["last_name"].startswith("/") or counts["last_name"]


@pytest.mark.vm_too
def test_fentry_object() -> None:
    needs("fentry")
    needs_function("do_unlinkat")
    with running("load", str(object_path("fentry"))) as monitor:
        unlink_nothing(19)
        counts = last_value(monitor, ".bss")
    assert counts["entries"] >= 19
    assert counts["returns"] >= 19


@pytest.mark.vm_too
def test_fentry_object_on_another_function() -> None:
    needs("fentry")
    needs_function("do_rmdir")
    argv = ("load", str(object_path("fentry")), "--attach", "on_entry=fentry:do_rmdir")
    with running(*argv) as monitor:
        for _ in range(11):
            with pytest.raises(FileNotFoundError):
                os.rmdir("/proc/hmebpf-no-such-directory")
        assert last_value(monitor, ".bss")["entries"] >= 11


@pytest.mark.vm_too
def test_lsm_object() -> None:
    needs("lsm")
    with running("load", str(object_path("lsm"))) as monitor:
        execute(7)
        assert last_value(monitor, ".bss")["checks"] >= 7


@pytest.mark.vm_too
def test_c_for_bcc(tmp_path: Path) -> None:
    """Events typed, histogram drawn, the tracepoint taken from the name."""
    path = tmp_path / "execs.c"
    path.write_text(EXECS)
    with running("run", str(path)) as monitor:
        execute(41)
        monitor.finish()
    mine = [event for event in monitor.events if event["comm"] == "true"]
    assert len(mine) >= 41
    assert {event["map"] for event in mine} == {"execs"}
    assert {event["uid"] for event in mine} == {os.getuid()}
    counted = sum(count for _, _, count in monitor.last["histograms"][0]["buckets"])
    assert counted == len(monitor.events)


def test_c_for_bcc_on_an_interface(tmp_path: Path) -> None:
    path = tmp_path / "sizes.c"
    path.write_text(COUNT_PACKETS)
    with Namespace() as ns, running("run", str(path), "--attach", "xdp:lo", namespace=ns) as it:
        ping(ns, 29)
        assert last_value(it, "packets", 98) == 58


def test_c_for_libbpf(tmp_path: Path) -> None:
    """clang, our headers, a vmlinux.h from BTF; a constant set before loading."""
    object_path("xdp")  # skips where there is no clang
    path = tmp_path / "count.bpf.c"
    path.write_text(LIBBPF_STYLE)
    with running("run", str(path), "--set", "step=1000") as monitor:
        execute(31)
        counted = last_value(monitor, ".bss")["counted"]
    assert counted >= 31_000 and counted % 1000 == 0


def test_several_objects_on_one_interface() -> None:
    """One after another, in the order given, each with its own maps."""
    counter = str(example_path("xdp_packet_counter"))
    argv = ("load", counter, str(object_path("xdp")), counter, "--attach", "xdp:lo")
    with Namespace() as ns, running(*argv, namespace=ns) as monitor:
        ping(ns, 19)
        monitor.finish()
    name = Path(counter).name
    assert value(monitor.last, "protocols", 1)["packets"] == 38
    for number in (1, 2):
        counts = value(monitor.last, f"{name}#{number}:counters")
        assert counts == {"packets_processed": 38, "bytes_processed": 38 * 98}


def test_table_for_a_person() -> None:
    with Namespace() as ns:
        argv = ("load", str(example_path("xdp_packet_counter")), "--attach", "xdp:lo")
        process = ns.start(*COMMAND, *argv, "-n", "1", "-i", "0.3", cwd=ROOT)
        out, _said = process.communicate(timeout=300)
    assert process.returncode == 0
    assert "packets_processed" in out and "bytes_processed" in out
    assert "count reached" in out.splitlines()[-1]


def test_line_of_a_mistake_is_the_files(tmp_path: Path) -> None:
    """Though BCC puts a structure in front of each TRACEPOINT_PROBE."""
    path = tmp_path / "wrong.c"
    path.write_text(EXECS + "TRACEPOINT_PROBE(sched, sched_switch) {\n  return nothing;\n}\n")
    line = path.read_text().splitlines().index("  return nothing;") + 1
    result = run_cli("run", str(path))
    assert result.returncode == 1
    assert f"wrong.c:{line}:" in result.stderr


def test_setting_of_c_for_bcc_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "execs.c"
    path.write_text(EXECS)
    result = run_cli("run", str(path), "--set", "x=1")
    assert result.returncode == 2
    assert "--cflag -Dx=VALUE" in result.stderr


def test_csv_has_the_maps_of_a_program_without_events() -> None:
    with Namespace() as ns:
        argv = ("load", str(example_path("xdp_packet_counter")), "--attach", "xdp:lo")
        process = ns.start(*COMMAND, *argv, "-n", "2", "-i", "0.2", "-o", "csv", cwd=ROOT)
        out, _said = process.communicate(timeout=300)
    assert process.returncode == 0
    assert "packets_processed" in out.splitlines()[0]
    assert len(out.splitlines()) >= 3


def test_program_without_maps_shows_its_runs(tmp_path: Path) -> None:
    """Raw bytecode, named by its file's name as the hint says."""
    path = tmp_path / "pass.bin"
    path.write_bytes(bytes.fromhex("b7000000020000009500000000000000"))
    argv = ("load", str(path), "--attach", "pass.bin=xdp:lo")
    with Namespace() as ns, running(*argv, namespace=ns) as monitor:
        ping(ns, 17)
        monitor.finish()
    assert monitor.last["totals"]["probe_hits"] == 34


def stop(process: subprocess.Popen[str], number: int) -> None:
    process.send_signal(number)
    process.communicate(timeout=300)


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left(end: signal.Signals) -> None:
    """Of a chain of two on XDP and a filter on TC, however the command ends."""
    counter, tc = str(example_path("xdp_packet_counter")), str(object_path("tc"))
    argv = ["load", counter, counter, tc, "--attach", "xdp:lo"]
    for program in ("count_ingress", "count_egress", "old_name"):
        argv += ["--attach", f"{program}=tc:lo,direction=egress"]
    with Namespace() as ns:
        with running(*argv, namespace=ns) as monitor:
            assert attached(ns)
            assert "clsact" in ns.run("tc", "qdisc", "show", "dev", "lo").stdout
            stop(monitor.process, end)
        wait_until(lambda: not attached(ns), "XDP is off", 30)
        gone: Callable[[], bool] = lambda: (  # noqa: E731
            "clsact" not in ns.run("tc", "qdisc", "show", "dev", "lo").stdout
        )
        wait_until(gone, "clsact is gone", 30)


BROKEN = {
    "no-such-file.o": "error: read no-such-file.o: No such file or directory",
    "short.o": "it was cut short",
    "text.txt": "no whole number of instructions",
}


def test_errors_name_the_file(tmp_path: Path) -> None:
    (tmp_path / "short.o").write_bytes(object_path("xdp").read_bytes()[:700])
    (tmp_path / "text.txt").write_text("This is no program.")
    for name, words in BROKEN.items():
        result = run_cli("load", name if name.startswith("no-") else str(tmp_path / name))
        assert result.returncode == (2 if name.startswith("no-") else 1)
        assert words in result.stderr
        assert name in result.stderr
        assert "\nhint: " in result.stderr
        assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        ([], 2, "its source does not say where"),
        (["--attach", "tc:lo"], 2, "it has no tc program"),
        (["--attach", "nobody=xdp:lo"], 2, "has no program of that name, but count_packets"),
        (["--attach", "xdp:nowhere0"], 1, "no such interface"),
        (["--attach", "xdp:lo", "--set", "volume=11"], 2, "volume"),
        (["--attach", "xdp:lo", "--set", "volume"], 2, "it gives no value"),
        (["--attach", "xdp:lo,colour=red"], 2, "there is no option 'colour'"),
        (["--attach", "nowhere"], 2, "there is no attach type 'nowhere'"),
        (["--attach", "xdp:lo", "--attach", "xdp:lo"], 1, "it is attached there already"),
    ],
)
def test_what_a_wrong_command_line_says(arguments: list[str], status: int, words: str) -> None:
    result = run_cli("load", str(example_path("xdp_packet_counter")), *arguments)
    assert words in result.stderr
    assert result.returncode == status
    assert "\nhint: " in result.stderr


def test_verifiers_refusal_reaches_the_user() -> None:
    result = run_cli("load", str(object_path("refused")))
    assert result.returncode == 1
    assert "refused by the kernel's verifier" in result.stderr
    assert "\nhint: " in result.stderr


def test_bytes_need_an_attach_point(tmp_path: Path) -> None:
    path = tmp_path / "program.bin"
    path.write_bytes(bytes.fromhex("b7000000020000009500000000000000"))
    result = run_cli("load", str(path))
    assert "its source does not say where" in result.stderr
    with Namespace() as ns, running("load", str(path), "--attach", "xdp:lo", namespace=ns) as it:
        assert attached(ns) == set(it.start["prog_ids"])
        it.finish()


def test_hook_that_this_kernel_lacks_is_told_before_anything_is_loaded() -> None:
    if probe_hook("kprobe").available:
        pytest.skip("this kernel has kprobes")
    result = run_cli("load", str(object_path("kprobe")))
    assert result.returncode == 3
    assert "kprobe" in result.stderr and "kprobe needs Linux 4." in result.stderr


def test_every_kind_has_an_example_that_parses() -> None:
    from hypermesh_ebpf.attach_type import KINDS

    for kind in KINDS:
        assert EbpfAttachType.parse(EbpfAttachType.example(kind)).kind == kind
