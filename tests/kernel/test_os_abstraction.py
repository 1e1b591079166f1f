"""The library's front door on this kernel: every value against a second source."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from hypermesh_ebpf import (
    AlreadyAttached,
    EbpfAbstraction,
    EbpfAttachType,
    EbpfHandle,
    EmptyProgram,
    ForeignObject,
    HookUnsupported,
    InterfaceNotFound,
    InvalidHandle,
    JumpOutOfRange,
    MalformedObject,
    MapError,
    MisalignedProgram,
    NotAttached,
    ProgramTooLong,
    UnknownOpcode,
    UsageError,
    VerifierError,
    create_os_abstraction,
)
from tests.netns import Namespace, needs_namespaces, wait_until
from tests.objects import example_path
from tests.owner import attached
from tests.packets import received_packets

pytestmark = needs_namespaces

EXIT = bytes([0x95, 0, 0, 0, 0, 0, 0, 0])
RETURN_0 = bytes([0xB7, 0, 0, 0, 0, 0, 0, 0]) + EXIT
RETURN_2 = bytes([0xB7, 0, 0, 0, 2, 0, 0, 0]) + EXIT
EXECVE = EbpfAttachType.tracepoint("syscalls", "sys_enter_execve")
COUNT_EXECS = """
BPF_HASH(execs, u32, u64);
TRACEPOINT_PROBE(syscalls, sys_enter_execve) {
    u32 uid = bpf_get_current_uid_gid();
    execs.increment(uid);
    return 0;
}
"""
COUNT_PACKETS = """
BPF_PERCPU_ARRAY(packets, u64, 1);
int count(struct xdp_md *ctx) {
    u32 zero = 0;
    u64 *value = packets.lookup(&zero);
    if (value)
        (*value)++;
    return XDP_PASS;
}
"""
DROP_EVERYTHING = COUNT_PACKETS.replace("XDP_PASS", "XDP_DROP").replace("packets", "dropped")


@pytest.fixture
def os_() -> Iterator[EbpfAbstraction]:
    with create_os_abstraction() as abstraction:
        yield abstraction


def ping(ns: Namespace, count: int) -> None:
    """That many echo requests and replies on lo."""
    ns.run("ping", "-q", "-c", str(count), "-i", "0.002", "127.0.0.1")


def execute(times: int) -> None:
    for _ in range(times):
        subprocess.run(["/bin/true"], check=True)


def test_platform_and_support(os_: EbpfAbstraction) -> None:
    assert os_.platform() == "linux"
    assert os_.is_ebpf_supported()


def test_the_documents_packet_counter(os_: EbpfAbstraction) -> None:
    """The bundled object counts what /proc/net/dev counts, under the document's names."""
    handle = os_.load_ebpf_program(example_path("xdp_packet_counter").read_bytes())
    with Namespace() as ns:
        with ns.entered():
            os_.attach_ebpf_monitor(handle, EbpfAttachType.xdp(iface="lo"))
        before = received_packets(ns, "lo")
        ping(ns, 53)
        values = os_.read_ebpf_metrics(handle).values
        assert values["packets_processed"] == received_packets(ns, "lo") - before == 106
        assert values["bytes_processed"] == 106 * 98
        metadata = os_.read_ebpf_metrics(handle).metadata
        assert metadata["attach_type"] == "xdp"
        assert metadata["hook"] == "xdp:generic"
        assert metadata["kernel_version"] == os.uname().release
        (program,) = os_.list_programs()
        assert metadata["program_id"] == program.id
        assert metadata["program_tag"] == program.tag
        os_.unload_ebpf_program(handle)
        assert not attached(ns)


def test_the_documents_network_tracepoints(os_: EbpfAbstraction) -> None:
    """One handle, four programs, each attached to its own system call."""
    handle = os_.load_ebpf_program(example_path("tracepoint_network"))
    for name in ("sys_enter_connect", "sys_enter_accept", "sys_exit_sendto", "sys_exit_recvfrom"):
        os_.attach_ebpf_monitor(handle, EbpfAttachType.tracepoint("syscalls", name))
    with pytest.raises(AlreadyAttached, match="sys_enter_connect"):
        os_.attach_ebpf_monitor(handle, EbpfAttachType.tracepoint("syscalls", "sys_enter_connect"))
    assert len({program.attached[0] for program in os_.list_programs()}) == 4
    before = sum(value or 0 for value in os_.read_ebpf_metrics(handle).values.values())
    code = (
        "import socket\n"
        "s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.bind(('127.0.0.1', 0))\n"
        "for _ in range(101): s.sendto(b'x', s.getsockname()); s.recvfrom(9)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    after = sum(value or 0 for value in os_.read_ebpf_metrics(handle).values.values())
    assert after - before >= 202


def test_raw_bytecode_counts_its_runs(os_: EbpfAbstraction) -> None:
    """The document's exec monitor: no maps, so the kernel's own run count is what it reports."""
    handle = os_.load_ebpf_program(RETURN_0)
    assert [program.id for program in os_.list_programs()] == [None]
    os_.attach_ebpf_monitor(handle, EXECVE)
    first = os_.read_ebpf_metrics(handle)
    execute(47)
    second = os_.read_ebpf_metrics(handle)
    assert first.metric_type == second.metric_type == "counter"
    assert second.values["probe_hits"] - first.values["probe_hits"] >= 47  # type: ignore[operator]
    assert second.timestamp_ms > first.timestamp_ms
    assert second.metadata["category"] == "syscalls"
    assert second.metadata["name"] == "sys_enter_execve"
    assert os_.last_ebpf_metrics(handle) == second
    assert os_.ebpf_metrics_history(handle) == [first, second]


def test_the_documents_eight_bytes_are_refused(os_: EbpfAbstraction) -> None:
    """A lone exit returns a register that nobody set; what to do is said."""
    handle = os_.load_ebpf_program(EXIT)
    with pytest.raises(VerifierError, match="R0 !read_ok") as caught:
        os_.attach_ebpf_monitor(handle, EXECVE)
    assert "r0" in (caught.value.remedy or "")
    assert os_.list_programs()[0].attached == ()


def test_c_source(os_: EbpfAbstraction) -> None:
    """A tracepoint program of BCC's own kind attaches where its name says."""
    handle = os_.load_ebpf_program(source=COUNT_EXECS, name="execs.c")
    os_.attach_ebpf_monitor(handle)
    execute(43)
    values = os_.read_ebpf_metrics(handle).values
    assert values["execs.0"] >= 43  # type: ignore[operator]
    assert os_.list_programs()[0].attached == (str(EXECVE),)


def test_c_file(os_: EbpfAbstraction, tmp_path: Path) -> None:
    path = tmp_path / "packets.c"
    path.write_text(COUNT_PACKETS)
    with Namespace() as ns:
        handle = os_.load_ebpf_program(path)
        with ns.entered():
            os_.attach_ebpf_monitor(handle, "xdp:lo")
        ping(ns, 23)
        assert os_.read_ebpf_metrics(handle).values == {"packets": 46}


def test_two_programs_on_one_interface(os_: EbpfAbstraction) -> None:
    """Unmodified, in order, each until one does not pass; added and taken off as packets flow."""
    with Namespace() as ns, ns.entered():
        first = os_.load_ebpf_program(source=COUNT_PACKETS, name="first.c")
        second = os_.load_ebpf_program(source=COUNT_PACKETS, name="second.c")
        os_.attach_ebpf_monitor(first, "xdp:lo")
        ping(ns, 11)
        os_.attach_ebpf_monitor(second, "xdp:lo")
        ping(ns, 13)
        assert os_.read_ebpf_metrics(first).values == {"packets": 48}
        assert os_.read_ebpf_metrics(second).values == {"packets": 26}
        drop = os_.load_ebpf_program(source=DROP_EVERYTHING, name="drop.c")
        os_.attach_ebpf_monitor(drop, "xdp:lo", position=1)
        sent = subprocess.run(["ping", "-q", "-c", "5", "-i", "0.002", "-W", "1", "127.0.0.1"])
        assert sent.returncode == 1
        assert os_.read_ebpf_metrics(first).values == {"packets": 53}
        assert os_.read_ebpf_metrics(second).values == {"packets": 26}
        os_.reorder_ebpf_monitors("xdp:lo", [second, first, drop])
        subprocess.run(["ping", "-q", "-c", "5", "-i", "0.002", "-W", "1", "127.0.0.1"])
        assert os_.read_ebpf_metrics(second).values == {"packets": 31}
        os_.detach_ebpf_monitor(drop)
        ping(ns, 7)
        assert os_.read_ebpf_metrics(first).values == {"packets": 72}
        os_.detach_ebpf_monitor(first)
        ping(ns, 3)
        assert os_.read_ebpf_metrics(second).values == {"packets": 51}
        (program,) = [each for each in os_.list_programs() if each.handle == second]
        assert attached(ns) == {program.id}
        os_.unload_ebpf_program(second)
        assert not attached(ns)


def test_one_place_by_two_names_is_one_place(os_: EbpfAbstraction) -> None:
    """Options do not make another interface of it."""
    with Namespace() as ns, ns.entered():
        one, two = (os_.load_ebpf_program(RETURN_2, name="my-prog.bin") for _ in range(2))
        os_.attach_ebpf_monitor(one, "xdp:lo")
        with pytest.raises(AlreadyAttached):
            os_.attach_ebpf_monitor(one, "xdp:lo,mode=generic")
        with pytest.raises(UsageError, match="joins them"):
            os_.attach_ebpf_monitor(two, "xdp:lo,mode=native")
        os_.attach_ebpf_monitor(two, "xdp:lo,mode=generic")
        os_.detach_ebpf_monitor(one)
        (program,) = [each for each in os_.list_programs() if each.attached]
        assert program.handle == two
        assert attached(ns) == {program.id}


def test_a_program_is_of_one_type_at_a_time(os_: EbpfAbstraction) -> None:
    with Namespace() as ns, ns.entered():
        handle, other = (os_.load_ebpf_program(RETURN_2) for _ in range(2))
        os_.attach_ebpf_monitor(other, "xdp:lo")
        os_.attach_ebpf_monitor(handle, EXECVE)
        with pytest.raises(AlreadyAttached, match="another type of program"):
            os_.attach_ebpf_monitor(handle, "xdp:lo")
        os_.detach_ebpf_monitor(handle)
        os_.attach_ebpf_monitor(handle, "xdp:lo")  # loaded anew
        os_.detach_ebpf_monitor(other)
        assert os_.read_ebpf_metrics(handle).values == {"probe_hits": 0}
        ping(ns, 4)
        assert os_.read_ebpf_metrics(handle).values == {"probe_hits": 8}


def test_runs_in_a_chain_are_unknown(os_: EbpfAbstraction) -> None:
    """The kernel counts the chain's, not the member's: unknown is None, never 0."""
    with Namespace() as ns, ns.entered():
        one, two = (os_.load_ebpf_program(RETURN_2) for _ in range(2))
        os_.attach_ebpf_monitor(one, "xdp:lo")
        os_.attach_ebpf_monitor(two, "xdp:lo")
        ping(ns, 3)
        assert os_.read_ebpf_metrics(one).values == {"probe_hits": None}


def test_a_chain_is_changed_from_another_network_namespace(os_: EbpfAbstraction) -> None:
    """A thread that is elsewhere by now takes off what it attached in a namespace."""
    with Namespace() as ns:
        with ns.entered():
            one, two = (os_.load_ebpf_program(RETURN_2) for _ in range(2))
            os_.attach_ebpf_monitor(one, "xdp:lo")
            os_.attach_ebpf_monitor(two, "xdp:lo")
        (before,) = attached(ns)
        os_.unload_ebpf_program(one)
        (program,) = os_.list_programs()
        assert attached(ns) == {program.id} != {before}
        os_.unload_ebpf_program(two)
        assert not attached(ns)


def test_one_program_in_two_network_namespaces(os_: EbpfAbstraction) -> None:
    """Two places, two guards, one set of maps."""
    handle = os_.load_ebpf_program(source=COUNT_PACKETS, name="both.c")
    with Namespace() as one, Namespace() as two:
        for ns in (one, two):
            with ns.entered():
                os_.attach_ebpf_monitor(handle, "xdp:lo")
        ping(one, 3)
        ping(two, 4)
        assert os_.read_ebpf_metrics(handle).values == {"packets": 14}
        assert attached(one) == attached(two) != set()
        os_.unload_ebpf_program(handle)
        assert not attached(one) and not attached(two)


def test_a_place_that_somebody_else_cleared(os_: EbpfAbstraction) -> None:
    """Members can be detached, unloaded and attached anew, though their chain was taken off."""
    with Namespace() as ns, ns.entered():
        one, two = (os_.load_ebpf_program(RETURN_2) for _ in range(2))
        os_.attach_ebpf_monitor(one, "xdp:lo")
        os_.attach_ebpf_monitor(two, "xdp:lo")
        ns.run("ip", "link", "set", "lo", "xdpgeneric", "off")
        os_.detach_ebpf_monitor(one)
        assert [program.attached for program in os_.list_programs()] == [(), ()]
        os_.attach_ebpf_monitor(two, "xdp:lo")
        ns.run("ip", "link", "set", "lo", "xdpgeneric", "off")
        os_.attach_ebpf_monitor(one, "xdp:lo")
        os_.unload_ebpf_program(one)
        os_.unload_ebpf_program(two)
        assert not attached(ns)


def test_all_programs_of_a_source_are_attached_or_none(os_: EbpfAbstraction) -> None:
    text = COUNT_EXECS + "int orphan(struct pt_regs *ctx) { return 0; }"
    handle = os_.load_ebpf_program(source=text)
    with pytest.raises(UsageError, match="does not say where"):
        os_.attach_ebpf_monitor(handle)
    broken = COUNT_EXECS + "RAW_TRACEPOINT_PROBE(no_such_tracepoint) { return 0; }"
    with pytest.raises(HookUnsupported, match="no_such_tracepoint"):
        os_.load_ebpf_program(source=broken)
    assert [program.attached for program in os_.list_programs()] == [(), ()]


def test_a_forked_child_leaves_its_parents_programs_alone(os_: EbpfAbstraction) -> None:
    with Namespace() as ns, ns.entered():
        handle = os_.load_ebpf_program(RETURN_2)
        os_.attach_ebpf_monitor(handle, "xdp:lo")
        child = os.fork()
        if child == 0:
            status = 1
            try:
                os_.detach_ebpf_monitor(handle)
            except UsageError:
                os_.close()
                status = 0
            finally:
                os._exit(status)
        assert os.waitpid(child, 0)[1] == 0
        assert attached(ns)


def test_closed_is_closed() -> None:
    os_ = create_os_abstraction()
    os_.close()
    with pytest.raises(UsageError, match="it is closed"):
        os_.load_ebpf_program(RETURN_2)
    os_.close()


def test_a_report_may_ask_back_while_another_thread_closes() -> None:
    """Neither waits for the other for ever."""
    asked = threading.Event()

    def report(kind: str, text: str) -> None:
        asked.set()
        os_.list_programs()

    os_ = create_os_abstraction(report=report)
    with Namespace() as ns, ns.entered():
        handle = os_.load_ebpf_program(RETURN_2)
        closing = threading.Thread(target=lambda: (asked.wait(60), os_.close()))
        closing.start()
        os_.attach_ebpf_monitor(handle, "xdp:lo")  # a note: generic, not native
        closing.join(60)
        assert not closing.is_alive()
        assert not attached(ns)


def test_members_are_named_exactly_to_reorder(os_: EbpfAbstraction) -> None:
    with Namespace() as ns, ns.entered():
        one, two = (os_.load_ebpf_program(RETURN_2) for _ in range(2))
        os_.attach_ebpf_monitor(one, "xdp:lo")
        with pytest.raises(UsageError, match="not the programs that run there"):
            os_.reorder_ebpf_monitors("xdp:lo", [one, two])


def test_handles(os_: EbpfAbstraction) -> None:
    handle = os_.load_ebpf_program(RETURN_0)
    with pytest.raises(NotAttached):
        os_.read_ebpf_metrics(handle)
    with pytest.raises(NotAttached):
        os_.detach_ebpf_monitor(handle)
    os_.attach_ebpf_monitor(handle, EXECVE)
    with pytest.raises(AlreadyAttached):
        os_.attach_ebpf_monitor(handle, EXECVE)
    os_.detach_ebpf_monitor(handle)
    os_.attach_ebpf_monitor(handle, EXECVE)
    os_.unload_ebpf_program(handle)
    os_.unload_ebpf_program(handle)  # idempotent
    for use in (os_.read_ebpf_metrics, os_.attach_ebpf_monitor, os_.last_ebpf_metrics):
        with pytest.raises(InvalidHandle) as caught:
            use(handle)
        assert caught.value.remedy
    with pytest.raises(InvalidHandle):
        os_.unload_ebpf_program(EbpfHandle(999_999))


def test_refused_before_the_kernel_is_asked(os_: EbpfAbstraction) -> None:
    broken = {
        b"": EmptyProgram,
        b"\x95" * 9: MisalignedProgram,
        RETURN_0[:8] * 1_000_001: ProgramTooLong,
        b"\xff" + RETURN_0[1:]: UnknownOpcode,
        bytes([5, 0, 9, 0, 0, 0, 0, 0]) + EXIT: JumpOutOfRange,
        b"\x7fELF" + bytes(20): MalformedObject,
        Path("/proc/self/exe").read_bytes(): ForeignObject,
    }
    for data, kind in broken.items():
        with pytest.raises(kind) as caught:
            os_.load_ebpf_program(data)
        assert caught.value.remedy
    assert os_.list_programs() == []


def test_hooks_that_are_not_there(os_: EbpfAbstraction) -> None:
    handle = os_.load_ebpf_program(RETURN_2)
    with pytest.raises(InterfaceNotFound, match="nowhere0"):
        os_.attach_ebpf_monitor(handle, "xdp:nowhere0")
    with pytest.raises(HookUnsupported, match="no tracepoint"):
        os_.attach_ebpf_monitor(handle, "tracepoint:sched:no_such_tracepoint")
    with pytest.raises(UsageError):
        os_.attach_ebpf_monitor(handle, "nonsense:lo")
    with pytest.raises(UsageError, match="does not say where"):
        os_.attach_ebpf_monitor(handle)


def test_bytes_take_the_type_of_each_place(os_: EbpfAbstraction) -> None:
    """Detached from one kind of hook, the same bytes may be attached to another."""
    with Namespace() as ns, ns.entered():
        handle = os_.load_ebpf_program(RETURN_2)
        os_.attach_ebpf_monitor(handle, "xdp:lo")
        assert attached(ns)
        os_.detach_ebpf_monitor(handle)
        assert not attached(ns)
        os_.attach_ebpf_monitor(handle, EXECVE)
        os_.read_ebpf_metrics(handle)
        execute(5)
        hits = os_.read_ebpf_metrics(handle).values["probe_hits"]
        assert hits is not None and hits >= 5


def test_what_a_wrong_call_says(os_: EbpfAbstraction) -> None:
    with pytest.raises(UsageError, match="either a program or C source"):
        os_.load_ebpf_program()
    with pytest.raises(UsageError, match="no/such/file"):
        os_.load_ebpf_program("no/such/file.o")
    with pytest.raises(UsageError, match="metric type"):
        os_.load_ebpf_program(RETURN_0, metric_type="meter")
    with pytest.raises(UsageError, match="no global variables"):
        os_.load_ebpf_program(RETURN_0, settings={"x": "1"})
    with pytest.raises(UsageError, match="no text"):
        os_.load_ebpf_program(RETURN_0, settings={"x": 1})  # type: ignore[dict-item]
    with pytest.raises(UsageError, match="one text"):
        os_.load_ebpf_program(source=COUNT_EXECS, flags="-DX")
    with pytest.raises(UsageError, match="null"):
        os_.load_ebpf_program("/no\0file")
    with pytest.raises(UsageError, match="no attach point"):
        os_.attach_ebpf_monitor(os_.load_ebpf_program(RETURN_0), 5)  # type: ignore[arg-type]
    with pytest.raises(InvalidHandle):
        os_.unload_ebpf_program([])  # type: ignore[arg-type]


def test_metric_types(os_: EbpfAbstraction) -> None:
    text = "BPF_HISTOGRAM(sizes);" + COUNT_EXECS.split(";", 1)[1].replace(
        "execs.increment(uid);", "sizes.increment(bpf_log2l(uid));"
    )
    handle = os_.load_ebpf_program(source=text)
    os_.attach_ebpf_monitor(handle)
    assert os_.read_ebpf_metrics(handle).metric_type == "histogram"
    gauge = os_.load_ebpf_program(RETURN_0, metric_type="gauge")
    os_.attach_ebpf_monitor(gauge, EXECVE)
    assert os_.read_ebpf_metrics(gauge).metric_type == "gauge"


def test_from_several_threads(os_: EbpfAbstraction) -> None:
    """Ten threads load, attach, read and unload at once."""
    failures: list[BaseException] = []

    def use() -> None:
        try:
            handle = os_.load_ebpf_program(RETURN_0)
            os_.attach_ebpf_monitor(handle, EXECVE)
            execute(3)
            hits = os_.read_ebpf_metrics(handle).values["probe_hits"]
            assert hits is not None and hits >= 3
            os_.unload_ebpf_program(handle)
        except BaseException as error:  # noqa: BLE001 - handed to the test below
            failures.append(error)

    threads = [threading.Thread(target=use) for _ in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert os_.list_programs() == []


def test_nothing_is_left_after_close() -> None:
    def own_descriptors() -> set[str]:
        links = Path("/proc/self/fd").iterdir()
        return {os.readlink(link) for link in links if link.exists()}

    with Namespace() as ns, ns.entered():
        before = {name for name in own_descriptors() if "bpf" in name or "perf" in name}
        with create_os_abstraction() as os_:
            os_.attach_ebpf_monitor(os_.load_ebpf_program(RETURN_2), "xdp:lo")
            os_.attach_ebpf_monitor(os_.load_ebpf_program(RETURN_0), EXECVE)
            assert attached(ns)
        assert not attached(ns)
        after = {name for name in own_descriptors() if "bpf" in name or "perf" in name}
        assert after == before


def test_killed_owner_leaves_nothing() -> None:
    """kill -9 of a program that uses the library."""
    code = (
        "import sys, time\n"
        "from hypermesh_ebpf import create_os_abstraction\n"
        "os_ = create_os_abstraction()\n"
        f"os_.attach_ebpf_monitor(os_.load_ebpf_program({RETURN_2!r}), 'xdp:lo')\n"
        "os_.attach_ebpf_monitor(os_.load_ebpf_program(bytes("
        f"{RETURN_2!r})), 'tc:lo,direction=egress')\n"
        "print('attached', flush=True); time.sleep(600)\n"
    )
    with Namespace() as ns:
        process = ns.start(sys.executable, "-c", code, cwd=Path(__file__).parents[2])
        assert process.stdout is not None
        assert process.stdout.readline() == "attached\n"
        assert attached(ns)
        process.kill()
        process.wait()
        wait_until(lambda: not attached(ns), "XDP is off", 30)
        wait_until(
            lambda: (
                not ns.run("tc", "qdisc", "show", "dev", "lo", "clsact").stdout.strip()
                or "clsact" not in ns.run("tc", "qdisc", "show", "dev", "lo").stdout
            ),
            "clsact is gone",
            30,
        )


TWO_MAPS = """
struct who { u32 uid; char comm[16]; };
BPF_TABLE("percpu_hash", struct who, u64, execs, 1024);
BPF_RINGBUF_OUTPUT(events, 1);
TRACEPOINT_PROBE(syscalls, sys_enter_execve) {
    struct who who = {.uid = bpf_get_current_uid_gid()};
    u64 none = 0;
    bpf_get_current_comm(&who.comm, sizeof(who.comm));
    u64 *count = execs.lookup_or_try_init(&who, &none);
    if (count)
        (*count)++;
    return 0;
}
"""


def test_columns_of_a_map(os_: EbpfAbstraction) -> None:
    """The execs of this very process, known by its children's name before the exec."""
    np = pytest.importorskip("numpy")
    handle = os_.load_ebpf_program(source=TWO_MAPS)
    os_.attach_ebpf_monitor(handle, EXECVE)
    script = "import ctypes, os\n" + "ctypes.CDLL(None).prctl(15, b'hm-columns')\n"
    script += "for _ in range(13):\n    os.waitpid(os.posix_spawn('/bin/true', ['true'], {}), 0)\n"
    subprocess.run([sys.executable, "-c", script], check=True)
    found = os_.read_ebpf_columns(handle, "execs")
    assert list(found.keys) == ["uid", "comm"]
    ours = (found.keys["comm"] == b"hm-columns") & (found.keys["uid"] == os.getuid())
    assert found.values["value"][ours].tolist() == [13]
    assert found.values["value"].dtype == np.dtype("u8")
    with pytest.raises(UsageError, match=r"read map 'nothing' of .*no map of that name") as caught:
        os_.read_ebpf_columns(handle, "nothing")
    assert "events, execs" in str(caught.value.remedy)
    with pytest.raises(MapError, match="read map events: it holds events, not entries"):
        os_.read_ebpf_columns(handle, "events")
    os_.unload_ebpf_program(handle)
    with pytest.raises(InvalidHandle):
        os_.read_ebpf_columns(handle, "execs")
