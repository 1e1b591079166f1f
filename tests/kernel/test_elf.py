"""Objects of clang: loaded, run, their maps and variables read, and what is wrong with them."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from hypermesh_ebpf.attach_type import EbpfAttachType
from hypermesh_ebpf.bpf.btf import STRUCT, Btf
from hypermesh_ebpf.bpf.maps import TypedMap
from hypermesh_ebpf.bpf.perf_buffer import PerfBuffer
from hypermesh_ebpf.bpf.programs import load_program, read_program_info
from hypermesh_ebpf.bpf.ring import RingBuffer
from hypermesh_ebpf.bpf.spec import MapSpec, ProgramSpec
from hypermesh_ebpf.bpf.types import parse_type
from hypermesh_ebpf.errors import (
    HmebpfError,
    HookUnsupported,
    MalformedObject,
    MissingBtf,
    Unsupported,
    UsageError,
    VerifierError,
)
from hypermesh_ebpf.image.elf import load_object
from hypermesh_ebpf.image.image import LoadedSource
from tests.compiler import map_id, run_in_this_task, run_program
from tests.hostile import cases
from tests.netns import needs_own_mounts
from tests.objects import ROOT, example_path, object_path

_PATIENCE = 600.0
_PERF_EVENT_ARRAY, _RINGBUF = 4, 27


class Source:
    """A loaded object, by names."""

    def __init__(self, loaded: LoadedSource) -> None:
        self.loaded = loaded
        self.programs = {spec.name: fd for spec, fd in loaded.programs if fd is not None}
        self.specs: dict[str, ProgramSpec] = {spec.name: spec for spec, _fd in loaded.programs}
        self.maps = {spec.name: TypedMap(spec, fd) for spec, fd in loaded.maps}

    def map_spec(self, name: str) -> MapSpec:
        return self.maps[name].spec

    def variables(self, section: str = ".bss") -> dict[str, Any]:
        """The program's global variables as they are now."""
        ((_key, values),) = self.maps[section].entries()
        assert isinstance(values, dict)
        return values


@contextmanager
def load(
    path: Path,
    settings: Mapping[str, str] | None = None,
    attach: Mapping[str, str] | None = None,
    maps: Mapping[str, int] | None = None,
) -> Iterator[Source]:
    points = {name: EbpfAttachType.parse(text) for name, text in (attach or {}).items()}
    loaded = load_object(path.read_bytes(), path.name, settings or {}, points, maps)
    try:
        yield Source(loaded)
    finally:
        for fd in [fd for _spec, fd in (*loaded.maps, *loaded.programs) if fd is not None]:
            os.close(fd)


def refusal(path: Path, *arguments: Any) -> HmebpfError:
    """The error that loading ends with, and nothing left open behind it."""
    before = os.listdir("/proc/self/fd")
    with pytest.raises(HmebpfError) as caught, load(path, *arguments):
        pass
    assert caught.value.cause
    assert caught.value.remedy
    assert len(os.listdir("/proc/self/fd")) == len(before)
    return caught.value


# ---- what comes out ----------------------------------------------------------------------------


def test_xdp_example_counts() -> None:
    with load(example_path("xdp_packet_counter")) as source:
        fd = source.programs["count_packets"]
        assert run_program(fd, b"x" * 100, repeat=3) == 2  # XDP_PASS
        assert source.maps["counters"].numbers() == {
            "packets_processed": 3,
            "bytes_processed": 300,
        }
        assert source.loaded.license == "GPL"
        assert source.specs["count_packets"].kind == "xdp"
        assert read_program_info(fd).run_count in (0, 3)  # statistics may be on


def test_tracepoint_example_names_four_system_calls() -> None:
    with load(example_path("tracepoint_network")) as source:
        assert [spec.attach for spec in source.specs.values()] == [
            "tracepoint:syscalls:sys_enter_connect",
            "tracepoint:syscalls:sys_enter_accept",
            "tracepoint:syscalls:sys_exit_sendto",
            "tracepoint:syscalls:sys_exit_recvfrom",
        ]
        assert len(set(source.programs.values())) == 4
        assert set(source.maps["counters"].numbers()) >= {"connects", "bytes_sent", "failures"}


def test_types_of_keys_and_values() -> None:
    packet = bytes(12) + b"\x08\x00" + bytes([0x45]) + bytes(8) + bytes([17]) + bytes(10)
    with load(object_path("xdp")) as source:
        run_program(source.programs["count_protocols"], packet, repeat=2)
        assert source.maps["protocols"].entries() == [(17, {"packets": 2, "bytes": 128})]
        assert source.map_spec("protocols").value_desc["name"] == "traffic"


@pytest.mark.vm_too
@pytest.mark.parametrize(
    ("name", "attach"),
    [
        ("kprobe", ["kprobe:do_unlinkat", "kretprobe:do_unlinkat", "kprobe:syscall:getpgid"]),
        ("fentry", ["fentry:do_unlinkat", "fexit:do_unlinkat"]),
        ("lsm", ["lsm:bprm_check_security"]),
        ("tp_btf", ["raw_tracepoint:sched_process_exec"]),
        ("tc", ["tc:,direction=ingress", "tc:,direction=egress", None]),
        (
            "tracing",
            [
                "tracepoint:syscalls:sys_enter_getpgid",
                "raw_tracepoint:sched_process_exec",
                None,
            ],
        ),
        ("uprobe", [None, None]),
        (
            "cgroup",
            ["cgroup:,attach=ingress", "cgroup:,attach=egress", "cgroup:,attach=sock_create"],
        ),
    ],
)
def test_hooks_by_section_names(name: str, attach: list[str | None]) -> None:
    try:
        with load(object_path(name)) as source:
            assert [spec.attach for spec in source.specs.values()] == attach
            assert len(source.programs) == len(attach)
            kinds = [spec.kind for spec in source.specs.values()]
            assert all(kinds)
    except Unsupported as error:
        assert name in ("fentry", "lsm", "tp_btf"), error
        pytest.skip(str(error))


def test_every_other_section_name() -> None:
    with load(object_path("names")) as source:
        assert len(source.programs) == 15
        assert all(spec.kind for spec in source.specs.values())
        assert not source.loaded.notes


def test_programs_that_cannot_all_be_used() -> None:
    with load(object_path("mixed")) as source:
        assert set(source.programs) == {"good", "loaded_only"}
        assert source.specs["loaded_only"].kind is None
        notes = "\n".join(source.loaded.notes)
        for words in (
            'loaded_only is loaded; its section "socket"',
            'nameless is left out: its section is named "my_own_section"',
            'no_target is left out: its section "fentry" names no target',
            "on_request is left out: it is to be loaded on request only",
        ):
            assert words in notes


def test_attach_points_decide_what_the_section_leaves_open() -> None:
    points = {"nameless": "xdp:lo", "on_request": "tc:lo,direction=egress"}
    with load(object_path("mixed"), None, points) as source:
        assert source.specs["nameless"].kind == "xdp"
        assert run_program(source.programs["nameless"]) == 2
        assert source.specs["on_request"].attach == "tc:lo,direction=egress"


def test_maps_can_be_shared() -> None:
    with load(object_path("xdp")) as first:
        fd = first.loaded.maps[0][1]
        with load(object_path("xdp"), None, None, {"protocols": fd}) as second:
            assert map_id(second.loaded.maps[0][1]) == map_id(fd)
            run_program(second.programs["count_protocols"])
        assert first.maps["protocols"].entries()


def test_maps_of_maps() -> None:
    with load(object_path("inner")) as source:
        run_program(source.programs["count"], repeat=5)
        assert source.maps["left"].entries()[0] == (0, 5)


PIN = """
import ctypes, os, sys
from pathlib import Path
from hypermesh_ebpf.image.elf import load_object
from tests.compiler import map_id
assert ctypes.CDLL(None, use_errno=True).mount(b"bpf", b"/sys/fs/bpf", b"bpf", 0, None) == 0
data = Path(sys.argv[1]).read_bytes()
for _ in range(2):
    loaded = load_object(data, "pinned.o", {}, {})
    print(map_id(loaded.maps[0][1]), loaded.maps[0][0].pinned, *loaded.notes)
print(os.listdir("/sys/fs/bpf"))
"""


@needs_own_mounts
def test_maps_pinned_by_their_source_are_found_again() -> None:
    path = str(object_path("pinned"))
    command = ["unshare", "--mount", sys.executable, "-c", PIN, path]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=_PATIENCE, check=True
    )
    first, second, pins = done.stdout.splitlines()
    assert first.split()[0] == second.split()[0]  # the same map
    assert first.split()[1] == "/sys/fs/bpf/hmebpf_test_shared"
    assert "is pinned, and stays, at /sys/fs/bpf/hmebpf_test_shared" in first
    assert "is taken from /sys/fs/bpf/hmebpf_test_shared" in second
    assert "'hmebpf_test_shared'" in pins


# ---- calls, relocations, variables -------------------------------------------------------------


@pytest.mark.vm_wide
def test_subprograms() -> None:
    with load(object_path("subprograms")) as source:
        run_program(source.programs["sum_squares"])
        assert source.maps["sums"].entries() == [(0, 1 + 4 + 9)]


@pytest.mark.vm_wide
@pytest.mark.parametrize(("settings", "reached"), [({}, 2), ({"choice": "0"}, 1)])
def test_tail_calls(settings: dict[str, str], reached: int) -> None:
    with load(object_path("tailcalls"), settings) as source:
        assert source.loaded.tail_called == ("first", "second")
        run_program(source.programs["enter"])
        assert source.variables()["reached"] == reached


def test_tail_call_to_an_empty_place_goes_on() -> None:
    with load(object_path("tailcalls"), {"choice": "3"}) as source:
        run_program(source.programs["enter"])
        assert source.variables()["reached"] == 99


@pytest.mark.parametrize("name", ["xdp", "subprograms", "globals"])
def test_instructions_can_be_loaded_again(name: str) -> None:
    """As a chain does it: the specification and the maps' descriptors are all that is needed."""
    with load(object_path(name)) as source:
        (spec,) = source.specs.values()
        maps = [fd for _spec, fd in source.loaded.maps]
        fd = load_program(spec, "xdp", source.loaded.license, maps)
        try:
            before = {name: map_.entries() for name, map_ in source.maps.items() if map_.readable}
            assert run_program(fd) == 2
            after = {name: map_.entries() for name, map_ in source.maps.items() if map_.readable}
            assert before != after
        finally:
            os.close(fd)


@pytest.mark.vm_wide
def test_core_relocations() -> None:
    """Against what /proc and the kernel's BTF say."""
    with load(object_path("core")) as source:
        run_in_this_task(source.programs["look"])
        seen = source.variables()
    assert seen["tgid"] == seen["helpers_tgid"] > 0
    assert seen["parent_tgid"] > 0
    assert seen["comm"] == Path("/proc/self/comm").read_text().strip()
    assert seen["parent_comm"] == Path(f"/proc/{os.getppid()}/comm").read_text().strip()
    assert seen["in_execve"] is False
    assert seen["has_tgid"] is True
    assert seen["has_wrong"] is False
    assert seen["has_type"] is True
    assert seen["has_structure"] is False
    assert (seen["has_value"], seen["value"]) == (True, _RINGBUF)
    assert seen["member_size"] == 16
    kernel = Btf.kernel()
    found = kernel.find("task_struct", (STRUCT,))
    assert found is not None
    task = kernel.type(found)
    assert seen["type_size"] == task.size
    tgid = next(member for member in kernel.members(task) if member.name == "tgid")
    assert seen["member_offset"] == tgid.bit_offset // 8


SETTINGS = {
    "verbose": ("true", "verbose", True),
    "letter": ("q", "letter", ord("q")),
    "a_s8": ("-128", "a_s8", -128),
    "a_u8": ("255", "a_u8", 255),
    "a_s16": ("-2", "a_s16", -2),
    "a_u16": ("0xfffe", "a_u16", 0xFFFE),
    "a_s32": ("-3", "a_s32", -3),
    "a_u32": ("4000000000", "a_u32", 4_000_000_000),
    "a_s64": ("-4", "a_s64", -4),
    "a_u64": (str(2**64 - 5), "a_u64", 2**64 - 5),
    "name": ("eth0", "name", "eth0"),
    "mode": ("FAST", "mode", "FAST"),
    "numbers": ("9,8", "numbers", [9, 8, 3, 4]),
    "limits.low": ("70", "low", 70),
    "limits.ports[1]": ("443", "port", 443),
    "limits.inner.b": ("6", "inner_b", 6),
    "hidden": ("5", "hidden", 5),
    "in_data": ("100", "in_data", 100),
    "in_bss": ("200", "in_bss", 200),
}


@pytest.mark.vm_wide
def test_variables_of_every_type_are_set() -> None:
    settings = {name: text for name, (text, _field, _value) in SETTINGS.items()}
    with load(object_path("globals"), settings) as source:
        run_program(source.programs["show_settings"])
        ((_key, seen),) = source.maps["results"].entries()
        assert {field: seen[field] for _text, field, _value in SETTINGS.values()} == {
            field: value for _text, field, value in SETTINGS.values()
        }
        assert source.variables()["in_bss"] == 201  # the program's own from there on


def test_variables_keep_their_defaults() -> None:
    with load(object_path("globals")) as source:
        run_program(source.programs["show_settings"])
        ((_key, seen),) = source.maps["results"].entries()
    assert (seen["verbose"], seen["letter"], seen["name"]) == (False, ord("x"), "none")
    assert (seen["numbers"], seen["low"], seen["in_data"]) == ([1, 2, 3, 4], 7, 17)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"limits": "1"}, "struct limits, which has no text"),
        ({"pointer": "1"}, "cannot be set (pointer)"),
        ({"a_u8": "256"}, "0 to 255"),
        ({"verbos": "1"}, "no global variable of that name, but a_s16"),
        ({"results": "1"}, "no global variable"),
    ],
)
def test_settings_that_make_no_sense(setting: dict[str, str], words: str) -> None:
    error = refusal(object_path("globals"), setting)
    assert isinstance(error, UsageError)
    assert words in str(error)


def test_settings_for_an_object_without_variables() -> None:
    error = refusal(object_path("xdp"), {"x": "1"})
    assert "no global variables" in str(error)


def expected_event() -> dict[str, Any]:
    return {
        "number": 7,
        "verdict": "DENIED",
        "comm": Path("/proc/self/comm").read_text().strip(),
        "from": {"port": 80, "address": [127, 0, 0, 0]},
        "to": [{"port": 0, "address": [0] * 4}, {"port": 443, "address": [0] * 4}],
        "whole": 0x20001,
        "halves": [1, 2],
        "low": 5,
        "high": 1000,
        "last": True,
    }


@pytest.mark.vm_wide
def test_events_have_their_type() -> None:
    with load(object_path("events")) as source:
        buffers: dict[str, RingBuffer | PerfBuffer] = {}
        for spec, fd in source.loaded.maps:
            if spec.type == _RINGBUF:
                assert (spec.key_size, spec.value_size) == (0, 0)
                buffers[spec.name] = RingBuffer(fd, spec.max_entries)
            elif spec.type == _PERF_EVENT_ARRAY:
                buffers[spec.name] = PerfBuffer(fd)
        try:
            run_in_this_task(source.programs["send"])
            for name, buffer in buffers.items():
                (record,) = buffer.read()
                type_ = parse_type(source.map_spec(name).value_desc)
                assert type_.decode(record[: type_.size]) == expected_event(), name
        finally:
            for buffer in buffers.values():
                buffer.close()
        assert set(buffers) == {"declared", "events", "perf_events", "plain"}
        assert source.variables()["lost"] == 0


# ---- what is wrong with an object --------------------------------------------------------------


def test_refused_by_the_verifier() -> None:
    error = refusal(object_path("refused"))
    assert isinstance(error, VerifierError)
    assert error.what == "load program unchecked of refused.o: refused by the kernel's verifier"
    assert "R0 invalid mem access 'map_value_or_null'" in str(error)
    assert "*count += 1" in (error.details or "")


@pytest.mark.vm_wide
def test_a_member_that_this_kernel_lacks() -> None:
    error = refusal(object_path("unresolved"))
    assert isinstance(error, VerifierError)
    assert "task_struct___other.no_such_member" in str(error)
    assert "bpf_core_field_exists" in (error.remedy or "")


def test_kernel_without_btf(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HMEBPF_BTF", str(tmp_path / "none"))
    error = refusal(object_path("core"))
    assert isinstance(error, MissingBtf)
    assert "HMEBPF_BTF" in (error.remedy or "")


def test_plain_object_needs_no_btf(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HMEBPF_BTF", str(tmp_path / "none"))
    with load(example_path("xdp_packet_counter")) as source:
        assert source.programs


def test_unknown_names() -> None:
    error = refusal(object_path("xdp"), None, {"count": "xdp:lo"})
    assert "no program of that name, but count_protocols" in str(error)
    error = refusal(object_path("xdp"), None, None, {"counts": 0})
    assert "no map of that name" in str(error)


def test_program_of_another_kind() -> None:
    error = refusal(object_path("xdp"), None, {"count_protocols": "tracepoint:sched:sched_switch"})
    assert isinstance(error, UsageError)
    assert 'it is a xdp program, by its section "xdp"' in str(error)


@pytest.mark.vm_too
@pytest.mark.parametrize("name", ["fentry", "lsm"])
def test_target_that_does_not_exist(name: str) -> None:
    program, kind = {"fentry": ("on_entry", "fentry"), "lsm": ("on_check", "lsm")}[name]
    error = refusal(object_path(name), None, {program: f"{kind}:no_such_function_here"})
    assert isinstance(error, HookUnsupported)


@pytest.mark.vm_wide
def test_target_in_the_section_name_that_does_not_exist(tmp_path: Path) -> None:
    path = tmp_path / "stray.o"
    path.write_bytes(object_path("fentry").read_bytes().replace(b"do_unlinkat", b"no_unlinkat"))
    error = refusal(path)
    assert isinstance(error, HookUnsupported)
    assert "no_unlinkat" in str(error) or "refuses it" in str(error)


def test_nothing_to_load(tmp_path: Path) -> None:
    """An object all of whose programs are left out, made of one by renaming its section."""
    data = object_path("subprograms").read_bytes()
    path = tmp_path / "renamed.o"
    path.write_bytes(data.replace(b".relxdp\0", b".relxpd\0"))  # one string for both names
    error = refusal(path)
    assert isinstance(error, UsageError)
    assert '"xpd", which says nothing about where it runs' in str(error)


def test_object_without_types(tmp_path: Path) -> None:
    """The .BTF section renamed away: maps can then not be understood."""
    path = tmp_path / "untyped.o"
    path.write_bytes(object_path("xdp").read_bytes().replace(b".BTF\0", b".XTF\0"))
    error = refusal(path)
    assert isinstance(error, MalformedObject)
    assert "BTF is required" in str(error)
    assert "-g" in (error.remedy or "")


def test_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "half.o"
    data = object_path("xdp").read_bytes()
    path.write_bytes(data[: len(data) // 2])
    assert isinstance(refusal(path), MalformedObject)


UNPRIVILEGED = """
import os, sys
from pathlib import Path
from hypermesh_ebpf.image.elf import load_object
from hypermesh_ebpf.host import hooks, symbols
from hypermesh_ebpf.errors import HmebpfError
data = Path(sys.argv[1]).read_bytes()
os.setresuid(65534, 65534, 65534)
try:
    load_object(data, "xdp.o", {}, {})
except HmebpfError as error:
    print(type(error).__name__, error.remedy)
"""


def test_without_privileges() -> None:
    path = str(example_path("xdp_packet_counter"))
    done = subprocess.run(
        [sys.executable, "-c", UNPRIVILEGED, path],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=_PATIENCE,
        check=True,
    )
    assert done.stdout.startswith("MissingPrivilege ")
    assert "root" in done.stdout


# ---- hostile objects ---------------------------------------------------------------------------

SEED, COUNT = 20, 400


def test_damaged_objects_end_in_an_error_or_load(tmp_path: Path) -> None:
    """libbpf may crash on some; no Python exception, and nothing runs on."""
    for path in object_path("xdp").parent.glob("*.o"):
        if path.stem != "pinned":
            shutil.copy(path, tmp_path)
    ends: dict[int, str] = {}
    first = 0
    while first < COUNT:
        command = [sys.executable, "-m", "tests.hostile", str(tmp_path)]
        done = subprocess.run(
            [*command, str(SEED), str(first), str(COUNT - first)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=_PATIENCE,
        )
        for line in done.stdout.splitlines():
            number, _, word = line.partition(" ")
            ends[int(number)] = word or "crash"
        assert done.returncode <= 0, done.stderr  # 1 would be a Python exception
        first = max(ends, default=-1) + 1
    assert sorted(ends) == list(range(COUNT))
    words = set(ends.values())
    assert {"loaded", "MalformedObject", "VerifierError"} <= words
    assert sum(word == "crash" for word in ends.values()) < COUNT // 20


ENDLESS = """
import sys
from pathlib import Path
from hypermesh_ebpf.image import elf
class Settings(dict):
    def items(self):
        while True: pass
elf.SECONDS = 1
elf.load_object(Path(sys.argv[1]).read_bytes(), "x.o", Settings(x="1"), {})
"""


def test_loading_cannot_go_on_for_ever() -> None:
    done = subprocess.run(
        [sys.executable, "-c", ENDLESS, str(object_path("globals"))],
        cwd=ROOT,
        capture_output=True,
        timeout=_PATIENCE,
    )
    assert done.returncode == -signal.SIGXCPU


def test_limits_are_as_before_afterwards() -> None:
    kinds = (resource.RLIMIT_CPU, resource.RLIMIT_AS)
    before = [resource.getrlimit(kind) for kind in kinds]
    with load(object_path("xdp")):
        assert [resource.getrlimit(kind) for kind in kinds] == before
    refusal(object_path("refused"))
    assert [resource.getrlimit(kind) for kind in kinds] == before


def test_damage_is_the_same_for_the_same_seed(tmp_path: Path) -> None:
    shutil.copy(object_path("xdp"), tmp_path)
    all_of_them = cases(tmp_path, SEED, 0, 20)
    assert cases(tmp_path, SEED, 10, 10) == all_of_them[10:]
    assert len({data for _number, data in all_of_them}) > 10
