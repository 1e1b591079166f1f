"""``hmebpf list``: the programs, maps, links and attachments of this host."""

from __future__ import annotations

import sys
from contextlib import suppress

import click


@click.command("list")
@click.argument(
    "kind", required=False, type=click.Choice(["programs", "maps", "links", "attachments"])
)
@click.option("--iface", metavar="IF", help="Only what is on this network interface.")
@click.option("--type", "type_", metavar="TYPE", help="Only this type: xdp, hash, kprobe, ...")
@click.option("--ours", is_flag=True, help="Only what hmebpf loaded.")
@click.option(
    "-o",
    "--output",
    type=click.Choice(["table", "json", "csv"]),
    default="table",
    show_default=True,
    help="How to show it; csv has one kind, programs unless another is named.",
)
@click.option("-v", "--verbose", count=True, help="Say more; -vv for tracebacks.")
def list(  # the command's name: nothing here wants Python's own
    kind: str | None, iface: str | None, type_: str | None, ours: bool, output: str, verbose: int
) -> None:
    """Show the BPF programs, maps and links of this host, and what programs are attached to.

    All but the attachments to network interfaces can be seen by root alone.
    """
    from hypermesh_ebpf import log
    from hypermesh_ebpf.host.objects import read_objects
    from hypermesh_ebpf.host.selection import Selection
    from hypermesh_ebpf.output.objects import show_objects
    from hypermesh_ebpf.output.writer import OutputClosed, require_stream

    log.configure(verbose)
    stream = require_stream(sys.stdout)
    selection = Selection(iface, type_, ours)
    selection.check()
    objects = read_objects()
    refusal = objects.refusal
    kinds = [kind] if kind else ["programs", "maps", "links"]
    if refusal is not None:
        if kind not in (None, "attachments") or ours or not objects.attachments:
            refusal.what = f"list the {kind or 'programs'} of this host"
            raise refusal
        if kind is None:
            kinds = ["attachments"] if output != "json" else [*kinds, "attachments"]
            click.echo(f"hmebpf: {refusal}; {refusal.remedy}", err=True)
    elif kind is None and output == "json":
        kinds.append("attachments")
    with suppress(OutputClosed):  # `| head` saw what it wanted
        show_objects(selection.apply(objects), kinds, output, stream)
