"""One program, map or link in full: a page of names and values, and a program's instructions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from hypermesh_ebpf.bpf.spec import MapSpec
from hypermesh_ebpf.host.instructions import Step
from hypermesh_ebpf.host.objects import Link, MapObject, Objects, Program
from hypermesh_ebpf.host.selection import Object
from hypermesh_ebpf.output.draw import format_elapsed, format_value, printable
from hypermesh_ebpf.output.grid import Line
from hypermesh_ebpf.output.objects import local_time, name_owner

_NAME = 14
Fact = tuple[str, str | None]


def draw_object(
    each: Object, objects: Objects, ascii: bool, spec: MapSpec | None = None
) -> list[Line]:
    """Names and values of an object, one to a line; what is unknown or empty is left out.

    ``spec`` is a map's, with the types of its keys and values.
    """
    if isinstance(each, Program):
        title, facts = f"program {each.id}", _program_facts(each, objects)
    elif isinstance(each, MapObject):
        title, facts = f"map {each.id}", _map_facts(each, objects, spec)
    else:
        title, facts = f"link {each.id}", _link_facts(each, objects)
    name = "" if isinstance(each, Link) else f"  {printable(each.name, ascii)}"
    lines: list[Line] = [[(title, "title"), (name, "title"), ("  ours" if each.ours else "", "")]]
    for label, value in facts:
        if value not in (None, ""):
            lines.append([(f"  {label:{_NAME}} ", "dim"), (printable(str(value), ascii), "")])
    return lines


def _program_facts(each: Program, objects: Objects) -> Iterator[Fact]:
    about = each.info
    yield "type", about.type
    yield "tag", about.tag
    yield (
        "loaded",
        (f"{local_time(about.loaded_at)} ({format_elapsed(objects.time - about.loaded_at)} ago)"),
    )
    yield "owner", name_owner(about.uid, each.processes)
    yield "licence", "GPL compatible" if about.gpl else "not GPL compatible"
    for attachment in each.attachments:
        link = f"  (link {attachment.link_id})" if attachment.link_id is not None else ""
        yield "attached to", f"{attachment}{link}"
    if not each.attachments:
        yield "attached to", "nothing that can be seen"
    if each.members:
        yield "runs", ", then ".join(each.members)
    yield "runs so far", _describe_runs(each, objects.statistics)
    if about.missed:
        yield "missed", f"{about.missed} runs that the kernel skipped"
    yield from _name_maps(about.map_ids, objects)
    for pin in each.pins:
        yield "pinned at", pin
    verified = about.verified_instructions
    size = f"{about.xlated_bytes // 8} instructions, {_bytes(about.jited_bytes)} of machine code"
    yield (
        "size",
        size if about.jited_bytes else f"{about.xlated_bytes // 8} instructions, not JITed",
    )
    yield "verified", f"{verified} instructions" if verified else None
    yield "memory", _bytes(about.memlock)
    yield "BTF", f"id {about.btf_id}" if about.btf_id else None


def _describe_runs(each: Program, statistics: bool) -> str:
    if each.run_count is None:
        return "not counted: statistics are off (`hmebpf top` counts while it runs)"
    mean = f", {format_value('ns', each.mean_ns)} each" if each.mean_ns is not None else ""
    when = "" if statistics else " while statistics were on"
    return f"{each.run_count:,}{mean}{when}"


def _name_maps(map_ids: Sequence[int], objects: Objects) -> Iterator[Fact]:
    names = {each.id: each for each in objects.maps or ()}
    for number in map_ids:
        found = names.get(number)
        yield "map", f"{number} {found.name} ({found.info.type})" if found else str(number)


def _map_facts(each: MapObject, objects: Objects, spec: MapSpec | None) -> Iterator[Fact]:
    about = each.info
    yield "type", about.type
    yield "key", _name_size(about.key_size, spec.key_desc if spec else None)
    yield "value", _name_size(about.value_size, spec.value_desc if spec else None)
    yield "entries", f"at most {about.max_entries:,}"
    yield "flags", f"{about.flags:#x}" if about.flags else None
    yield "frozen", "no program and no process can change it" if about.frozen else None
    yield "memory", _bytes(about.memlock)
    for number in each.program_ids:
        program = objects.program(number)
        yield "used by", f"program {number} {program.name if program else ''}".rstrip()
    yield "held by", name_owner(None, each.processes)
    for pin in each.pins:
        yield "pinned at", pin
    yield "BTF", f"id {about.btf_id}" if about.btf_id else "none: its types are not known"
    yield "contents", f"hmebpf dump {each.id}"


def _link_facts(each: Link, objects: Objects) -> Iterator[Fact]:
    yield "type", each.info.type
    yield "program", f"{each.info.prog_id} {each.program_name}".rstrip()
    yield "attached to", str(each.attachment) if each.attachment else None
    for name, value in each.info.details.items():
        shown = value if not isinstance(value, tuple) else " ".join(f"{each:#x}" for each in value)
        yield name.replace("_", " "), None if value is None else str(shown)
    yield "held by", name_owner(None, each.processes)
    for pin in each.pins:
        yield "pinned at", pin


def _name_size(size: int, description: Any) -> str:
    shown = f"{size} byte{'' if size == 1 else 's'}"
    if isinstance(description, Mapping) and description["kind"] != "opaque":
        return f"{shown}: {spell_type(description)}"
    return shown


def spell_type(description: Mapping[str, Any]) -> str:
    """A type as C declares it, in one line: ``struct flow { unsigned int saddr; char name[8]; }``.

    For descriptions of :mod:`hypermesh_ebpf.bpf.types`.
    """
    kind, name = description["kind"], description.get("name", "")
    if kind == "array":
        return f"{spell_type(description['element'])}[{description['count']}]"
    if kind in ("struct", "union"):
        members = " ".join(_spell_member(member) for member in description["members"])
        return " ".join(part for part in (kind, name, f"{{ {members} }}") if part)
    if kind == "enum":
        return f"enum {name}" if name else "enum"
    return str(name or kind)


def _spell_member(member: Mapping[str, Any]) -> str:
    type_, dimensions = member["type"], ""
    while type_["kind"] == "array":
        dimensions += f"[{type_['count']}]"
        type_ = type_["element"]
    bits = f":{member['bits']}" if member.get("bits") else ""
    return f"{spell_type(type_)} {member['name']}{dimensions}{bits};"


def _bytes(size: int | None) -> str | None:
    return None if size is None else format_value("bytes", size)


def draw_instructions(steps: Iterable[Step], ascii: bool) -> list[Line]:
    """A program's instructions below the functions and source lines that they belong to."""
    lines: list[Line] = []
    before: Any = None
    for step in steps:
        if step.function:
            lines += [[], [(f"{printable(step.function, ascii)}:", "title")]]
        if step.line and step.line != before and step.line.text:
            place = f"{step.line.file.rpartition('/')[2]}:{step.line.number}"
            source = printable(step.line.text.replace("\t", " "), ascii)
            lines.append([(f"; {source}", "good"), (f"  {place}", "dim")])
        before = step.line or before
        number, _, text = str(step.instruction).partition(": ")
        lines.append([(f"{number}: ", "dim"), (printable(text, ascii), "")])
    return lines
