"""The host's objects as values: chosen, found, written; nothing here asks a kernel."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest

from hypermesh_ebpf.attach_type import EbpfAttachType
from hypermesh_ebpf.bpf.info import MapInfo, ProgramInfo, identify
from hypermesh_ebpf.bpf.link_info import LinkInfo
from hypermesh_ebpf.bpf.names import ATTACH_TYPES, LINK_TYPES, MAP_TYPES, PROGRAM_TYPES, name_type
from hypermesh_ebpf.errors import InterfaceNotFound, ObjectNotFound, UsageError
from hypermesh_ebpf.host import netlink, pins
from hypermesh_ebpf.host.attachment import Attachment, describe_link, name_place
from hypermesh_ebpf.host.holders import Holder
from hypermesh_ebpf.host.objects import Link, MapObject, Objects, Program
from hypermesh_ebpf.host.selection import Selection, find_object, spell
from hypermesh_ebpf.output.details import draw_object, spell_type
from hypermesh_ebpf.output.objects import as_document, draw_objects, show_objects
from tests.running import COMMAND, ROOT, run_cli

NEW_COMMANDS = ("list", "show", "dump", "top", "pin", "unpin", "detach", "unload", "cleanup")
HOLDER = Holder(4711, "cilium", False)
NOW = 1_800_000_000.0


def program(number: int, name: str, **changes: Any) -> Program:
    about = ProgramInfo(
        id=number,
        type=changes.pop("type", "xdp"),
        name=name[:15],
        tag="0123456789abcdef",
        loaded_at=NOW - 90,
        uid=0,
        gpl=True,
        map_ids=changes.pop("map_ids", ()),
        xlated_bytes=160,
        jited_bytes=90,
        verified_instructions=None,
        run_count=0,
        run_time_ns=0,
        missed=None,
        btf_id=0,
        functions=0,
        lines=0,
        attach_btf=(0, 0),
        ifindex=0,
        memlock=4096,
    )
    values: dict[str, Any] = {
        "ours": False,
        "run_count": None,
        "run_time_ns": None,
        "members": None,
        "attachments": (),
        "processes": (HOLDER,),
        "pins": (),
    }
    return Program(number, name, info=about, **{**values, **changes})


def map_(number: int, name: str, **changes: Any) -> MapObject:
    about = MapInfo(number, "hash", name, 4, 8, 100, 0, 0, 0, 4096, False)
    values: dict[str, Any] = {"ours": False, "program_ids": (), "processes": (), "pins": ()}
    return MapObject(number, name, info=about, **{**values, **changes})


def objects(**changes: Any) -> Objects:
    on_eth = Attachment("xdp", "eth0", 12, iface="eth0", ifindex=2, mode="native")
    on_lo = Attachment("tc", "lo", 13, link_id=3, iface="lo", ifindex=1, direction="ingress")
    found = Objects(
        NOW,
        False,
        (
            program(12, "filter", attachments=(on_eth,), map_ids=(7,)),
            program(13, "count_everything_here", attachments=(on_lo,), ours=True, type="sched_cls"),
        ),
        (map_(7, "flows", program_ids=(12,)), map_(12, "counts", ours=True, program_ids=(13,))),
        (Link(3, True, LinkInfo(3, "tcx", 13), "count_everything_here", on_lo, (), ()),),
        (on_lo, on_eth),
    )
    return replace(found, **changes)


@pytest.mark.parametrize(
    ("attachment", "text"),
    [
        (Attachment("xdp", "eth0", 1, mode="native"), "xdp:eth0,mode=native"),
        (Attachment("xdp", "eth0", 1, 5, mode="generic"), "xdp:eth0,mode=generic,link"),
        (
            Attachment("tc", "lo", 1, direction="egress", priority=10, parent=0xFFFFFFF3),
            "tc:lo,direction=egress,priority=10",
        ),
        (
            Attachment("cgroup", "/sys/fs/cgroup/x", 1, attach_type="cgroup_inet4_post_bind"),
            "cgroup:/sys/fs/cgroup/x,attach=post_bind4",
        ),
        (Attachment("kprobe", "do_unlinkat+4", 1), "kprobe:do_unlinkat+4"),
        (Attachment("tracepoint", "sched:sched_switch", 1), "tracepoint:sched:sched_switch"),
        (Attachment("uprobe", "/bin/bash:0x4a10", 1), "uprobe:/bin/bash:0x4a10"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_attachment_is_written_as_the_command_line_takes_it(
    attachment: Attachment, text: str
) -> None:
    assert str(attachment) == text
    point = EbpfAttachType.parse(text)
    assert (point.kind, point.target) == (attachment.kind, attachment.target)
    assert attachment.as_dict()["hook"] == text


@pytest.mark.parametrize(
    ("kind", "name", "offset", "place"),
    [
        ("kprobe", "do_unlinkat", 0, "do_unlinkat"),
        ("kprobe", "do_unlinkat", 4, "do_unlinkat+4"),
        ("uretprobe", "/bin/bash", 0x4A10, "/bin/bash:0x4a10"),
        ("kprobe", None, 0, "?"),
    ],
)
def test_places_of_probes(kind: str, name: str | None, offset: int, place: str) -> None:
    assert name_place(kind, name, offset) == place


@pytest.mark.parametrize(
    ("type_", "details", "shown"),
    [
        ("raw_tracepoint", {"name": "sched_switch"}, "raw_tracepoint:sched_switch"),
        (
            "tracing",
            {"attach_type": "trace_fentry", "target_obj_id": 1, "target_btf_id": 2},
            "fentry:do_unlinkat",
        ),
        (
            "tracing",
            {"attach_type": "lsm_mac", "target_obj_id": 1, "target_btf_id": 3},
            "lsm:file_open",
        ),
        (
            "tracing",
            {"attach_type": "trace_raw_tp", "target_obj_id": 1, "target_btf_id": 4},
            "raw_tracepoint:sched_switch",
        ),
        ("iter", {"name": "task"}, "iter:task"),
        ("netns", {"netns_ino": 4026531840, "attach_type": "sk_lookup"}, "netns:4026531840"),
        ("struct_ops", {"map_id": 9}, "struct_ops:map:9"),
        (
            "netfilter",
            {"pf": 2, "hooknum": 0, "priority": -5, "flags": 0},
            "netfilter:ipv4:prerouting,priority=-5",
        ),
        ("kprobe_multi", {"count": 12, "flags": 0, "missed": 0}, "kprobe_multi:12 functions"),
        ("uprobe_multi", {"path": "/bin/sh", "count": 2}, "uprobe_multi:/bin/sh:2 places"),
        ("xdp", {"ifindex": 0}, "xdp:nothing,link"),
        (
            "tcx",
            {"ifindex": 9, "attach_type": "tcx_egress"},
            "tc:ifindex 9,direction=egress,link",
        ),
        ("sockmap", {"map_id": 4, "attach_type": "sk_msg_verdict"}, "sockmap:map:4"),
        ("type 99", {}, "type 99:?"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_a_link_says(type_: str, details: dict[str, Any], shown: str) -> None:
    """Every link type that no kernel here has, too."""
    types = {2: "do_unlinkat", 3: "bpf_lsm_file_open", 4: "btf_trace_sched_switch"}
    found = describe_link(LinkInfo(5, type_, 12, details), lambda _, n: types.get(n), {}, {})
    assert str(found) == shown
    assert (found.program_id, found.link_id) == (12, 5)


def test_target_of_the_program_counts_more_than_the_links() -> None:
    """The same id is a BTF object's or a program's in the link; the program tells (Linux 6.0)."""
    details = {"attach_type": "trace_fentry", "target_obj_id": 77, "target_btf_id": 2}
    link = LinkInfo(5, "tracing", 12, details)
    seen = []

    def resolve(object_id: int, type_id: int) -> str:
        seen.append((object_id, type_id))
        return "account"

    assert describe_link(link, resolve, {12: (3, 9)}, {12: "tracing"}).target == "account"
    assert describe_link(link, resolve, {12: (3, 9)}, {12: "ext"}).kind == "freplace"
    assert seen == [(3, 9), (3, 9)]


@pytest.mark.parametrize(
    ("fdinfo", "found"),
    [
        ({"prog_id": "12", "link_id": "3"}, ("link", 3)),
        ({"prog_id": "12"}, ("program", 12)),
        ({"map_id": "7"}, ("map", 7)),
        ({"pos": "0"}, None),
    ],
)
def test_whose_descriptor_it_is(fdinfo: dict[str, str], found: tuple[str, int] | None) -> None:
    assert identify(fdinfo) == found


def test_names_of_types() -> None:
    assert (PROGRAM_TYPES[6], PROGRAM_TYPES[29], PROGRAM_TYPES[32]) == ("xdp", "lsm", "netfilter")
    assert (MAP_TYPES[1], MAP_TYPES[27], MAP_TYPES[33]) == ("hash", "ringbuf", "arena")
    assert (LINK_TYPES[6], LINK_TYPES[14]) == ("xdp", "sockmap")
    assert ATTACH_TYPES.index("tcx_egress") == 47
    assert ATTACH_TYPES.index("trace_uprobe_session") == 57
    assert name_type(PROGRAM_TYPES, 99) == "type 99"


@pytest.mark.parametrize(
    ("selection", "programs", "maps", "links"),
    [
        (Selection(), [12, 13], [7, 12], [3]),
        (Selection(iface="lo"), [13], [12], [3]),
        (Selection(iface="eth0"), [12], [7], []),
        (Selection(ours=True), [13], [12], [3]),
        (Selection(type="xdp"), [12], [], []),
        (Selection(type="tc"), [13], [], [3]),
        (Selection(type="hash"), [], [7, 12], []),
        (Selection(type="tcx"), [13], [], [3]),
        (Selection(iface="lo", type="xdp"), [], [], []),
    ],
    ids=repr,
)
def test_selection(
    selection: Selection, programs: list[int], maps: list[int], links: list[int]
) -> None:
    found = selection.apply(objects())
    assert [each.id for each in found.programs or ()] == programs
    assert [each.id for each in found.maps or ()] == maps
    assert [each.id for each in found.links or ()] == links


def test_selection_of_what_cannot_be_seen() -> None:
    hidden = objects(programs=None, maps=None, links=None)
    found = Selection(iface="eth0").apply(hidden)
    assert (found.programs, found.maps, found.links) == (None, None, None)
    assert [each.program_id for each in found.attachments] == [12]
    assert Selection(type="xdp").apply(hidden).programs is None


def test_an_interface_of_another_namespace_is_another_one() -> None:
    there = Attachment("xdp", "eth0", 12, iface="eth0", ifindex=2, netns=4026539999)
    assert Selection(iface="eth0").apply(objects(attachments=(there,))).programs == ()


def test_mistakes_in_a_selection() -> None:
    with pytest.raises(UsageError) as unknown:
        Selection(type="kprob").check()
    assert "did you mean kprobe" in (unknown.value.remedy or "")
    with pytest.raises(InterfaceNotFound) as missing:
        Selection(iface="no-such0").check()
    assert "interfaces here: " in (missing.value.remedy or "")


@pytest.mark.parametrize(
    ("text", "kinds", "found"),
    [
        ("13", (), "prog:13"),
        ("7", (), "map:7"),
        ("prog:12", (), "prog:12"),
        ("program:12", (), "prog:12"),
        ("map:12", (), "map:12"),
        ("12", ("map",), "map:12"),
        ("link:3", (), "link:3"),
        ("flows", (), "map:7"),
        ("count_everything_here", (), "prog:13"),
        ("count_everythin", (), "prog:13"),
        ("/sys/fs/bpf/x", (), "prog:14"),
    ],
)
def test_find(text: str, kinds: tuple[str, ...], found: str) -> None:
    here = objects()
    pinned = program(14, "pinned", pins=("/sys/fs/bpf/x", "/sys/fs/bpf/y"))
    here = replace(here, programs=(*(here.programs or ()), pinned))
    assert spell(find_object(here, text, kinds)) == found


def test_find_several_or_none() -> None:
    with pytest.raises(UsageError) as several:
        find_object(objects(), "12")
    assert several.value.remedy == "say `prog:12`, `map:12`"
    with pytest.raises(ObjectNotFound) as none:
        find_object(objects(), "flaws")
    assert none.value.remedy == "did you mean flows? `hmebpf list` shows all"
    for text in ("99", "prog:7", "", "nothing", "link:99", "/sys/fs/bpf/none", "prog:", "12x"):
        with pytest.raises(ObjectNotFound):
            find_object(objects(), text)


def test_tables() -> None:
    text = "\n".join("".join(part for part, _ in line) for line in drawn())
    head, first, second = text.splitlines()[1:4]
    assert head.split()[:4] == ["id", "type", "name", "attached"]
    assert first.split()[:4] == ["12", "xdp", "filter", "xdp:eth0,mode=native"]
    assert second.startswith("*  13  sched_cls")
    assert "1:30" in first, "the age"
    assert "cilium(4711)" in first
    assert "mean" not in head, "columns that have nothing to say are left out"
    assert text.endswith("* ours")


def drawn(width: int | None = None) -> list[Any]:
    return draw_objects(objects(), ["programs", "maps", "links"], width, False)


@pytest.mark.parametrize("width", [40, 60, 80, 120, 200])
def test_tables_fit(width: int) -> None:
    for line in drawn(width):
        assert sum(len(part) for part, _ in line) <= width


def test_members_of_a_chain_are_in_its_name() -> None:
    chain = program(20, "hmebpf_chain", members=("first", "second"))
    lines = draw_objects(objects(programs=(chain,)), ["programs"], None, False)
    text = "\n".join("".join(part for part, _ in line) for line in lines)
    assert "hmebpf_chain (first > second)" in text


def test_runs_are_unknown_and_not_none_without_statistics() -> None:
    document = as_document(objects(), ["programs"])
    assert {each["run_count"] for each in document["programs"]} == {None}
    assert {each["mean_ns"] for each in document["programs"]} == {None}
    counted = program(20, "counted", run_count=4, run_time_ns=1000)
    (row,) = as_document(objects(programs=(counted,)), ["programs"])["programs"]
    assert (row["run_count"], row["run_time_ns"], row["mean_ns"]) == (4, 1000, 250.0)


def test_document_is_stable() -> None:
    """The names that scripts depend on."""
    document = as_document(objects(), ["programs", "maps", "links", "attachments"])
    assert json.loads(json.dumps(document, default=list))
    assert list(document) == ["time", "statistics", "programs", "maps", "links", "attachments"]
    assert list(document["programs"][0]) == [
        *("id", "type", "name", "tag", "ours", "loaded_at", "uid", "user", "gpl", "run_count"),
        *("run_time_ns", "mean_ns", "missed", "map_ids", "members", "attachments", "processes"),
        *("pins", "translated_bytes", "jited_bytes", "verified_instructions", "memlock_bytes"),
        "btf_id",
    ]
    assert list(document["maps"][0]) == [
        *("id", "type", "name", "ours", "key_bytes", "value_bytes", "max_entries", "flags"),
        *("frozen", "memlock_bytes", "program_ids", "processes", "pins", "btf_id"),
    ]
    assert list(document["links"][0]) == [
        *("id", "type", "ours", "program_id", "program_name", "attachment", "details"),
        *("processes", "pins"),
    ]
    assert document["programs"][0]["loaded_at"] == "2027-01-15T07:58:30.000000Z"
    assert document["attachments"][0]["program_name"] == "count_everything_here"
    assert document["attachments"][0]["ours"] is True


def test_csv_is_one_line_each() -> None:
    stream = io.StringIO()
    show_objects(objects(), ["programs"], "csv", stream)
    first, _second = csv.DictReader(io.StringIO(stream.getvalue()))
    assert first["attachments"] == "xdp:eth0,mode=native"
    assert first["processes"] == "4711/cilium"
    assert (first["run_count"], first["ours"], first["map_ids"]) == ("", "false", "7")


def test_types_are_spelled_as_c_does() -> None:
    u32 = {"kind": "int", "name": "unsigned int", "size": 4, "signed": False}
    char = {"kind": "int", "name": "char", "size": 1, "signed": True}
    flow = {
        "kind": "struct",
        "name": "flow",
        "size": 24,
        "members": [
            {"name": "saddr", "type": u32, "offset": 0},
            {"name": "flag", "type": u32, "offset": 32, "bits": 3},
            {
                "name": "names",
                "type": {
                    "kind": "array",
                    "count": 2,
                    "element": {"kind": "array", "count": 8, "element": char},
                },
                "offset": 64,
            },
        ],
    }
    assert spell_type(flow) == (
        "struct flow { unsigned int saddr; unsigned int flag:3; char names[2][8]; }"
    )
    assert spell_type({"kind": "array", "count": 3, "element": u32}) == "unsigned int[3]"
    assert spell_type({"kind": "enum", "name": "color", "size": 4}) == "enum color"
    assert spell_type({"kind": "pointer", "size": 8}) == "pointer"
    assert spell_type({"kind": "union", "size": 4, "name": "", "members": []}) == "union {  }"


def test_names_cannot_command_a_terminal() -> None:
    evil = program(20, "a\x1b[2Jb", processes=(Holder(1, "x\x1b]0;y\x07", False),))
    for lines in (
        draw_objects(objects(programs=(evil,)), ["programs"], None, False),
        draw_object(evil, objects(), False),
    ):
        text = "".join(part for line in lines for part, _ in line)
        assert "\x1b" not in text
        assert "\\x1b[2Jb" in text


def test_dots_are_not_for_bpffs() -> None:
    taken: set[str] = set()
    names = [pins._pin_name(name, taken) for name in (".rodata", "x.rodata", "_rodata", "", "ä/b")]
    assert names == ["_rodata", "x_rodata", "_rodata_2", "unnamed", "__b"]


def test_attributes_of_an_interface_with_a_hole() -> None:
    """A length of nothing in an attribute must not turn into an endless loop."""
    assert netlink.parse_attributes(b"\0\0\1\0") == {}


@pytest.mark.parametrize("command", NEW_COMMANDS)
def test_every_command_has_help_and_imports_nothing_heavy(command: str) -> None:
    argv = [sys.executable, "-X", "importtime", *COMMAND[1:], command, "--help"]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0
    assert done.stdout.startswith(f"Usage: hmebpf {command} ")
    modules = {
        line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()
    }
    assert not modules & {"bcc", "rich", "pyroute2", "numpy", "ctypes"}


def test_commands_are_listed() -> None:
    said = run_cli("--help").stdout
    for command in NEW_COMMANDS:
        assert f"\n  {command} " in said
