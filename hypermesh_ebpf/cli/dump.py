"""``hmebpf dump``: the entries of a map, or of all maps of a pinned set."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from dataclasses import replace

import click


@click.command()
@click.argument("map_", metavar="MAP|SETNAME")
@click.option(
    "-o",
    "--output",
    type=click.Choice(["table", "json", "csv"]),
    default="table",
    show_default=True,
    help="How to show it.",
)
@click.option(
    "--top", type=click.IntRange(min=1), metavar="N", help="Read at most N entries of each map."
)
@click.option(
    "--all", "all_", is_flag=True, help="Show an array's zeros, and histograms as numbers."
)
@click.option("-v", "--verbose", count=True, help="Say more; -vv for tracebacks.")
def dump(map_: str, output: str, top: int | None, all_: bool, verbose: int) -> None:
    """Show what is in a map, its keys and values by their types where the kernel knows them.

    MAP is an id, a name or the path of a pin; a set that hmebpf pinned shows all its maps. Values
    of per-CPU maps are added up.
    """
    from hypermesh_ebpf import log
    from hypermesh_ebpf.bpf import info
    from hypermesh_ebpf.bpf.maps import TypedMap, read_map_spec
    from hypermesh_ebpf.errors import MapError, ObjectNotFound, UsageError, describe_errno
    from hypermesh_ebpf.host import pins
    from hypermesh_ebpf.host.objects import require_objects
    from hypermesh_ebpf.host.selection import find_object, select_set
    from hypermesh_ebpf.output.dump import Dump, show_dumps
    from hypermesh_ebpf.output.writer import OutputClosed, require_stream

    log.configure(verbose)
    stream = require_stream(sys.stdout)
    objects = require_objects("maps")
    set_name = map_ if map_ in pins.list_sets() else None
    if set_name is not None:
        numbers = [each.id for each in select_set(objects, set_name).maps or ()]
    else:
        numbers = [find_object(objects, map_, ("map",)).id]
    if output == "csv" and len(numbers) != 1:
        raise UsageError(
            f"dump {map_} as csv",
            f"it has {len(numbers)} maps, and csv has the columns of one",
            f"name one: {', '.join(f'`map:{number}`' for number in numbers)}, or take -o json",
        )
    names = {each.id: each.name for each in objects.maps or ()}
    dumps = []
    for number in numbers:
        try:
            fd = info.open_by_id("map", number)
        except FileNotFoundError as error:
            cause = describe_errno(error.errno or 0)
            remedy = "`hmebpf list maps` shows what there is"
            raise ObjectNotFound(f"dump map {number}", cause, remedy) from error
        try:
            typed = TypedMap(replace(read_map_spec(fd), name=names[number]), fd)
            if typed.reason and set_name is None:
                raise MapError(
                    f"dump map {number} {typed.spec.name}",
                    typed.reason,
                    f"`hmebpf show map:{number}` tells what it is",
                )
            dumps.append(Dump.read(number, typed, top))
        finally:
            os.close(fd)
    with suppress(OutputClosed):  # `| head` saw what it wanted
        show_dumps(dumps, set_name, output, stream, all_=all_)
