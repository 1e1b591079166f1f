"""What `hmebpf list` finds, against bpftool and ip: of programs, maps and links loaded here alone.

Others load programs on this machine at the same time, so nothing is said of totals.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from hypermesh_ebpf.attach import attach
from hypermesh_ebpf.attach_type import EbpfAttachType
from hypermesh_ebpf.bpf import chain as chain_module
from hypermesh_ebpf.bpf import info, link_info
from hypermesh_ebpf.bpf.btf import Btf
from hypermesh_ebpf.bpf.chain import Member, load_chain
from hypermesh_ebpf.bpf.function_info import load_function_info
from hypermesh_ebpf.bpf.libbpf import ProgLoadOpts, check, libbpf
from hypermesh_ebpf.bpf.programs import create_map
from hypermesh_ebpf.bpf.spec import MapSpec, ProgramSpec
from hypermesh_ebpf.errors import HookUnsupported, Unsupported
from hypermesh_ebpf.host import chains, filesystems, holders
from hypermesh_ebpf.host.hooks import probe_hook, require_hook
from hypermesh_ebpf.host.mark import mark_process
from hypermesh_ebpf.host.objects import Objects, Program, read_objects
from tests.compiler import map_id
from tests.counting import TC_PASS, XDP_PASS, Counter, wait_until_freed
from tests.members import EXIT, insn, returning, set_r0
from tests.netns import Namespace, needs_namespaces, wait_until
from tests.programs import load_program, program_id

pytestmark = [pytest.mark.kernel, pytest.mark.vm_wide]
parse = EbpfAttachType.parse

needs_bpftool = pytest.mark.skipif(not shutil.which("bpftool"), reason="bpftool is not installed")


def bpftool(*words: str) -> Any:
    done = subprocess.run(["bpftool", "-j", *words], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.fixture
def counter() -> Iterator[Counter]:
    with Counter() as made:
        yield made


def find(objects: Objects, number: int) -> Program:
    found = objects.program(number)
    assert found is not None
    return found


@contextmanager
def attached(text: str, fd: int, number: int, *, pinnable: bool = False) -> Iterator[None]:
    """A program at an attach point; skips where this kernel has no such hook.

    In a thread with mounts of its own, as the worker has them.
    """
    point = parse(text)

    def run() -> Any:
        filesystems.enter_private_mounts()
        return attach(point, fd, number, lambda hold: None, pinnable=pinnable)

    try:
        with ThreadPoolExecutor(1) as pool:
            made = pool.submit(run).result()
    except (HookUnsupported, Unsupported) as error:
        pytest.skip(str(error))
    try:
        yield
    finally:
        for descriptor in made.descriptors:
            os.close(descriptor)


def require(text: str) -> str:
    point = parse(text)
    found = probe_hook(point.kind)
    if not found.available:
        pytest.skip(f"{point.kind}: {found.reason}")
    return require_hook(point)


def load_named(functions: list[tuple[int, str]], name: str, code: bytes) -> int:
    """An XDP program that carries BTF with the names of its functions."""
    btf, records = load_function_info(functions)
    try:
        options = ProgLoadOpts(sz=ctypes.sizeof(ProgLoadOpts), prog_btf_fd=btf)
        kept = ctypes.create_string_buffer(records, len(records))
        options.func_info, options.func_info_cnt = ctypes.addressof(kept), len(functions)
        options.func_info_rec_size = 8
        return check(
            libbpf().bpf_prog_load(
                6, name.encode()[:15], b"GPL", code, len(code) // 8, ctypes.byref(options)
            )
        )
    finally:
        os.close(btf)


def test_the_kernels_own_layouts() -> None:
    """Every member of our structures is where this kernel's BTF has it."""
    try:
        types = Btf.kernel()
    except Unsupported as error:
        pytest.skip(str(error))
    for name, ours in (("bpf_prog_info", info._ProgInfo), ("bpf_map_info", info._MapInfo)):
        number = types.find(name, (4,))
        assert number is not None
        theirs = {m.name: m.bit_offset // 8 for m in types.members(types.type(number))}
        members = [member[0] for member in ours._fields_]
        here = {member: getattr(ours, member).offset for member in members if member in theirs}
        assert here == {member: theirs[member] for member in here}
        assert len(here) >= 13, "and no name is misspelt"


def test_layouts_of_every_link_type() -> None:
    """The union of bpf_link_info, member by member, as far as this kernel has it."""
    try:
        types = Btf.kernel()
    except Unsupported as error:
        pytest.skip(str(error))
    number = types.find("bpf_link_info", (4,))
    assert number is not None
    *_head, union = types.members(types.type(number))
    assert union.bit_offset == 8 * link_info._LINK_HEAD
    seen = set()
    for variant in types.members(types.type(types.resolve(union.type))):
        ours = link_info._LINK_DETAILS.get(variant.name)
        assert ours is not None, f"this kernel has a link type of its own: {variant.name}"
        seen.add(variant.name)
        offsets: dict[str, int] = {}
        for name, at in _flat(types, variant.type):
            offsets.setdefault(name, at)
        # What we call "name" and "kind" has other names there, in other places' unions.
        aliases = {"name": ("tp_name", "target_name", "file_name"), "kind": ("type",)}
        aliases["name_len"] = ("tp_name_len", "target_name_len", "name_len")
        for member in (each[0] for each in ours._fields_ if each[0] != "_pad"):
            known = [offsets[each] for each in aliases.get(member, (member,)) if each in offsets]
            if known:  # an older kernel knows fewer
                assert getattr(ours, member).offset == known[0], f"{variant.name}.{member}"
    assert seen >= {"raw_tracepoint", "tracing", "cgroup", "xdp"}


def _flat(types: Btf, type_id: int, start: int = 0) -> Iterator[tuple[str, int]]:
    for member in types.members(types.type(types.resolve(type_id))):
        inner = types.type(types.resolve(member.type))
        at = start + member.bit_offset // 8
        if inner.kind in (4, 5):
            yield from _flat(types, member.type, at)
        else:
            yield member.name, at


@needs_bpftool
def test_a_program_is_what_bpftool_says() -> None:
    before = time.time()
    fd = load_program("hm_known")
    try:
        number = program_id(fd)
        theirs = bpftool("prog", "show", "id", str(number))
        program = find(read_objects(), number)
        found = program.as_dict()
        assert found["name"] == theirs["name"] == "hm_known"
        assert found["type"] == theirs["type"] == "xdp"
        assert found["tag"] == theirs["tag"]
        assert found["uid"] == theirs["uid"] == os.geteuid()
        assert found["gpl"] is theirs["gpl_compatible"] is True
        assert found["translated_bytes"] == theirs["bytes_xlated"] == 16
        assert found["jited_bytes"] == theirs.get("bytes_jited", 0)
        assert found["memlock_bytes"] == theirs["bytes_memlock"]
        assert before - 0.1 < found["loaded_at"] < time.time() + 0.1
        assert abs(found["loaded_at"] - theirs["loaded_at"]) < 2  # whole seconds
        assert found["processes"] == [{"pid": os.getpid(), "comm": _comm()}]
        assert not found["ours"]
    finally:
        os.close(fd)
    wait_until_freed(number)
    assert read_objects().program(number) is None


def _comm() -> str:
    return Path("/proc/self/comm").read_text().strip()


@needs_bpftool
def test_maps_and_the_programs_that_use_them(counter: Counter) -> None:
    _fd, number = counter.load(parse("xdp:lo"), returns=XDP_PASS)
    program = find(read_objects(), number)
    (used,) = program.info.map_ids
    assert [used] == bpftool("prog", "show", "id", str(number))["map_ids"]
    objects = read_objects()
    (found,) = [each for each in objects.maps or () if each.id == used]
    theirs = bpftool("map", "show", "id", str(used))
    assert (found.name, found.info.type) == (theirs["name"], theirs["type"])
    assert found.info.key_size == theirs["bytes_key"]
    assert found.info.value_size == theirs["bytes_value"]
    assert found.info.max_entries == theirs["max_entries"]
    assert found.info.memlock == theirs["bytes_memlock"]
    assert found.program_ids == (number,)
    assert [holder.pid for holder in found.processes] == [os.getpid()]


def test_whole_name_where_the_kernel_cuts_it() -> None:
    name = "count_every_packet_of_this_interface"
    code = bytes.fromhex("b7000000020000009500000000000000")
    fd = load_named([(0, name)], name, code)
    try:
        program = find(read_objects(), program_id(fd))
        assert program.info.name == name[:15]
        assert program.name == name
        assert program.as_dict()["name"] == name
    finally:
        os.close(fd)


def test_members_of_a_chain() -> None:
    """Read off the program itself: nobody had to write them down."""
    assert chains.NAME == chain_module.NAME
    members = [returning(2, name) for name in ("first", "second", "third")]
    chain = load_chain(members, "xdp")
    try:
        program = find(read_objects(), program_id(chain.head_fd))
        assert chain.way == "merged"
        assert program.members == ("first", "second", "third")
    finally:
        for fd in chain.descriptors:
            os.close(fd)


def test_members_with_functions_of_their_own() -> None:
    """What a member itself calls is no member."""
    code = insn(0x85, 0, 1, 0, 1) + EXIT + set_r0(2) + EXIT  # call pc+1; exit; r0 = 2; exit
    members = [Member(ProgramSpec(name, code, ()), []) for name in ("first", "second", "third")]
    chain = load_chain(members, "xdp")
    try:
        assert chain.way == "merged"
        program = find(read_objects(), program_id(chain.head_fd))
        assert program.info.functions == 6
        assert program.members == ("first", "second", "third")
    finally:
        for fd in chain.descriptors:
            os.close(fd)


def test_members_of_a_wrapped_chain() -> None:
    """Programs of licences that must not mix are joined by tail calls, through a program array."""
    members = [returning(2, "first"), returning(2, "second", "Proprietary"), returning(2, "third")]
    chain = load_chain(members, "xdp")
    try:
        assert chain.way == "wrapped"
        members_seen = find(read_objects(), program_id(chain.head_fd)).members
        assert members_seen is not None
        assert members_seen[1:] == ("second", "third")
    finally:
        for fd in chain.descriptors:
            os.close(fd)


def test_single_program_has_no_members() -> None:
    fd = load_program("hm_alone")
    try:
        assert find(read_objects(), program_id(fd)).members is None
    finally:
        os.close(fd)


def test_run_counts_come_with_statistics(counter: Counter) -> None:
    """The fixture has them switched on; the same program's runs as the kernel counts them."""
    fd, number = counter.load(parse("raw_tracepoint:sched_switch"))
    assert read_objects().statistics
    with attached("raw_tracepoint:sched_switch", fd, number):
        wait_until(lambda: counter.read() >= 7, "the program ran")
    program = find(read_objects(), number)
    assert program.run_count == counter.read() == counter.runs(fd)
    assert program.mean_ns is not None
    assert program.mean_ns > 0
    (spent,) = [program.run_time_ns]
    assert spent
    assert program.mean_ns == spent / program.run_count


POINTS = [
    ("tracepoint:sched:sched_process_exec", "tracepoint:sched:sched_process_exec"),
    ("tracepoint:syscalls:sys_enter_openat", "tracepoint:syscalls:sys_enter_openat"),
    ("raw_tracepoint:sched_process_exec", "raw_tracepoint:sched_process_exec"),
    ("kprobe:do_unlinkat", "kprobe:do_unlinkat"),
    ("kretprobe:do_unlinkat", "kretprobe:do_unlinkat"),
    ("fentry:do_unlinkat", "fentry:do_unlinkat"),
    ("fexit:do_unlinkat", "fexit:do_unlinkat"),
    ("lsm:file_open", "lsm:file_open"),
]


@pytest.mark.vm_too
@pytest.mark.parametrize("pinnable", [False, True], ids=["", "link"])
@pytest.mark.parametrize(("text", "shown"), POINTS, ids=[text for text, _ in POINTS])
def test_probe_is_shown_as_it_was_asked_for(
    counter: Counter, text: str, shown: str, pinnable: bool
) -> None:
    target = require(text)
    fd, number = counter.load(parse(text), target)
    with attached(text, fd, number, pinnable=pinnable):
        objects = read_objects()
        (found,) = find(objects, number).attachments
        if found.kind in ("fentry", "fexit", "lsm") and found.target == "?":
            pytest.skip("before Linux 5.13 the kernel does not tell a tracing link's target")
        if pinnable and found.target == "?":
            pytest.skip("before Linux 6.6 the kernel does not tell a perf event link's target")
        assert str(found) == shown
        assert parse(str(found)).kind == found.kind
        links = [each for each in objects.links or () if each.info.prog_id == number]
        assert [link.id for link in links] == ([found.link_id] if found.link_id else [])
        if pinnable:
            assert links
            assert links[0].attachment == found
            assert [holder.pid for holder in links[0].processes] == [os.getpid()]
    assert find(read_objects(), number).attachments == ()


@pytest.mark.parametrize("kind", ["uprobe", "uretprobe"])
def test_function_of_a_library(counter: Counter, kind: str) -> None:
    text = f"{kind}:c:a64l"
    require(text)
    fd, number = counter.load(parse(text))
    with attached(text, fd, number):
        (found,) = find(read_objects(), number).attachments
        assert found.kind == kind
        path, _, offset = found.target.rpartition(":")
        assert os.path.basename(path).startswith("libc.so")
        assert int(offset, 16) > 0
        assert parse(str(found)).target == found.target
        assert found.pids == (os.getpid(),)


def test_sampling_by_a_link(counter: Counter) -> None:
    text = "perf_event:cpu-clock,frequency=99"
    fd, number = counter.load(parse(text))
    with attached(text, fd, number, pinnable=True):
        found = find(read_objects(), number).attachments
        if not found or found[0].target == "?":
            pytest.skip("before Linux 6.6 the kernel does not tell what a perf event samples")
        assert {str(each) for each in found} == {"perf_event:cpu-clock"}


@needs_namespaces
@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("xdp:lo", "xdp:lo,mode=generic"),
        ("xdp:lo,link", "xdp:lo,mode=generic,link"),
        ("tc:lo,direction=egress,priority=7", "tc:lo,direction=egress,priority=7"),
        ("tc:lo,priority=9", "tc:lo,direction=ingress,priority=9"),
        ("tc:lo,link", "tc:lo,direction=ingress,link"),
    ],
)
def test_on_an_interface(counter: Counter, text: str, shown: str) -> None:
    """In a namespace of ours, seen from within; from outside as somebody else's interface."""
    require(text.partition(",")[0])
    point = parse(text)
    fd, number = counter.load(point, returns=XDP_PASS if point.kind == "xdp" else TC_PASS)
    with Namespace() as ns, ExitStack() as stack:
        with ns.entered():
            stack.enter_context(attached_here(point, fd, number))
            found = find(read_objects(), number).attachments
        assert [str(each) for each in found] == [shown]
        assert (found[0].iface, found[0].ifindex, found[0].netns) == ("lo", 1, None)
        assert parse(str(found[0])).target == "lo"
        if point.kind == "xdp":
            (link,) = json.loads(ns.run("ip", "-j", "-d", "link", "show", "lo").stdout)
            assert link["xdp"]["prog"]["id"] == found[0].program_id
        holder = ns.start("sleep", "600")
        wait_until(lambda: ns.inode in holders.read_holders().namespaces, "sleep is there")
        assert holder.poll() is None
        seen = [each for each in find(read_objects(), number).attachments if each.netns]
        assert [(each.netns, each.iface) for each in seen] == [(ns.inode, "lo")]
        assert f"netns={ns.inode}" in str(seen[0])


@contextmanager
def attached_here(point: EbpfAttachType, fd: int, number: int) -> Iterator[None]:
    try:
        made = attach(point, fd, number, lambda hold: None)
    except HookUnsupported as error:
        pytest.skip(str(error))
    try:
        yield
    finally:
        for descriptor in made.descriptors:
            os.close(descriptor)


@contextmanager
def group() -> Iterator[str]:
    """A control group of the version 2 hierarchy; removed at the end."""
    root = filesystems.find_mount(filesystems.CGROUP2.magic)
    if root is None:
        pytest.skip("the cgroup2 hierarchy is not mounted")
    path = Path(root, f"hm-test-{os.getpid()}")
    path.mkdir()
    try:
        yield str(path)
    finally:
        path.rmdir()


@pytest.mark.parametrize("point", ["egress", "sock_create"])
def test_on_a_control_group(counter: Counter, point: str) -> None:
    with group() as path:
        text = f"cgroup:{path},attach={point}"
        fd, number = counter.load(parse(text), returns=1)
        with attached(text, fd, number):
            (found,) = find(read_objects(), number).attachments
            assert str(found) == text
            assert found.cgroup == "/" + os.path.basename(path)
            assert found.cgroup_id == os.stat(path).st_ino
            assert found.link_id is not None
            if shutil.which("bpftool"):
                (theirs,) = bpftool("cgroup", "show", path)
                assert (theirs["id"], theirs["attach_type"]) == (number, found.attach_type)


@needs_bpftool
def test_links_are_what_bpftool_says(counter: Counter) -> None:
    fd, number = counter.load(parse("raw_tracepoint:sched_process_exec"))
    with attached("raw_tracepoint:sched_process_exec", fd, number):
        (found,) = [each for each in read_objects().links or () if each.info.prog_id == number]
        theirs = bpftool("link", "show", "id", str(found.id))
        assert theirs["type"] == found.info.type == "raw_tracepoint"
        assert theirs["prog_id"] == number
        assert theirs["tp_name"] == found.info.details["name"] == "sched_process_exec"


def test_link_to_an_interface_that_is_gone(counter: Counter) -> None:
    if not shutil.which("ip"):
        pytest.skip("needs iproute2")
    fd, number = counter.load(parse("xdp:lo"), returns=XDP_PASS)
    with Namespace() as ns, ExitStack() as stack:
        ns.run("ip", "link", "add", "gone0", "type", "veth", "peer", "name", "gone1")
        with ns.entered():
            stack.enter_context(attached_here(parse("xdp:gone0,link"), fd, number))
        ns.run("ip", "link", "delete", "gone0")
        (found,) = find(read_objects(), number).attachments
        assert (found.target, found.ifindex, found.iface) == ("nothing", None, None)


def test_marked_process_is_ours() -> None:
    """A program that uses the library says so by a descriptor: nothing else tells it apart."""
    fd = load_program("hm_marked")
    number = program_id(fd)
    try:
        assert not find(read_objects(), number).ours
        mark = mark_process()
        try:
            found = find(read_objects(), number)
            assert found.ours
            assert [holder.ours for holder in found.processes] == [True]
        finally:
            os.close(mark)
        assert not find(read_objects(), number).ours
    finally:
        os.close(fd)


def test_the_same_map_in_two_programs(counter: Counter) -> None:
    numbers = [counter.load(parse("xdp:lo"), returns=XDP_PASS)[1] for _ in range(2)]
    objects = read_objects()
    (used,) = find(objects, numbers[0]).info.map_ids
    (found,) = [each for each in objects.maps or () if each.id == used]
    assert set(found.program_ids) == set(numbers)


def test_frozen_map_and_flags() -> None:
    fd = create_map(MapSpec("hm_flags", 1, 4, 8, 10, 1, None, None))  # BPF_F_NO_PREALLOC
    try:
        (found,) = [each for each in read_objects().maps or () if each.id == map_id(fd)]
        assert found.info.flags == 1
        assert not found.info.frozen
        assert found.as_dict()["max_entries"] == 10
    finally:
        os.close(fd)


def test_five_hundred_programs_are_few() -> None:
    """No assertion on time: the number of system calls for each is what counts."""
    fds = [load_program(f"hm_many_{number}") for number in range(500)]
    try:
        objects = read_objects()
        here = {program_id(fd): f"hm_many_{number}" for number, fd in enumerate(fds)}
        found = {each.id: each.name for each in objects.programs or () if each.id in here}
        assert found == here
    finally:
        for fd in fds:
            os.close(fd)
