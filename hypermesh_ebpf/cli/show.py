"""``hmebpf show``: one program, map, link or pinned set in full."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from hypermesh_ebpf.bpf.spec import MapSpec


@click.command()
@click.argument("object_", metavar="ID|NAME|PIN")
@click.option("--instructions", is_flag=True, help="A program's instructions, too.")
@click.option(
    "-o",
    "--output",
    type=click.Choice(["table", "json"]),
    default="table",
    show_default=True,
    help="How to show it.",
)
@click.option("-v", "--verbose", count=True, help="Say more; -vv for tracebacks.")
def show(object_: str, instructions: bool, output: str, verbose: int) -> None:
    """Show everything about a program, map, link, or a set of programs that hmebpf pinned.

    It is named by id, by name or by the path of a pin; `prog:12`, `map:12` and `link:12` say
    which, where an id or a name is not enough.
    """
    from hypermesh_ebpf import log
    from hypermesh_ebpf.errors import UsageError
    from hypermesh_ebpf.host import pins
    from hypermesh_ebpf.host.objects import MapObject, Program, require_objects
    from hypermesh_ebpf.host.selection import find_object, select_set
    from hypermesh_ebpf.output.objects import as_json, show_objects, write_json, write_lines
    from hypermesh_ebpf.output.writer import OutputClosed, require_stream

    log.configure(verbose)
    stream = require_stream(sys.stdout)
    objects = require_objects()
    if object_ in pins.list_sets():
        with suppress(OutputClosed):
            kinds = ["programs", "maps", "links"]
            show_objects(select_set(objects, object_), kinds, output, stream)
        return
    found = find_object(objects, object_)
    steps = None
    if instructions:
        from hypermesh_ebpf.host.instructions import read_instructions

        if not isinstance(found, Program):
            raise UsageError(
                f"show the instructions of {object_!r}",
                "it is no program",
                "name a program: `hmebpf list programs` shows all",
            )
        steps = read_instructions(found.id, {each.id: each.name for each in objects.maps or ()})
    spec = _read_spec(found.id) if isinstance(found, MapObject) else None
    with suppress(OutputClosed):  # `| head` saw what it wanted
        if output == "json":
            document = as_json(found, objects)
            if spec is not None:
                document |= {"key_type": spec.key_desc, "value_type": spec.value_desc}
            if steps is not None:
                from hypermesh_ebpf.host.instructions import as_json as describe_steps

                document["instructions"] = [*describe_steps(steps)]
            write_json(document, stream)
            return
        from hypermesh_ebpf.output.details import draw_instructions, draw_object

        write_lines(
            lambda width, ascii: [
                *draw_object(found, objects, ascii, spec),
                *draw_instructions(steps or (), ascii),
            ],
            stream,
        )


def _read_spec(number: int) -> MapSpec | None:
    """A map's types; None for one that is gone by now."""
    from hypermesh_ebpf.bpf import info
    from hypermesh_ebpf.bpf.maps import read_map_spec

    try:
        fd = info.open_by_id("map", number)
    except FileNotFoundError:
        return None
    try:
        return read_map_spec(fd)
    finally:
        os.close(fd)
