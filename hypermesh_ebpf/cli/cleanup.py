"""``hmebpf cleanup``: take off what runs left whose owner and guard died together."""

from __future__ import annotations

import sys

import click

_LEFT = ("could not ", "left ")


@click.command()
@click.option("-v", "--verbose", count=True, help="Say more; -vv for tracebacks.")
def cleanup(verbose: int) -> None:
    """Remove attached programs whose owner is gone; every start of a monitor does the same.

    Removes half-made pins of dead processes, too. Pinned sets stay: `hmebpf unload` ends them.
    Exits with 1 if something could not be removed.
    """
    from hypermesh_ebpf import ledger, log
    from hypermesh_ebpf.host import pins

    log.configure(verbose)
    lines = ledger.sweep() + pins.remove_unfinished()
    for line in lines or ["nothing to clean up"]:
        click.echo(line)
    if any(line.startswith(_LEFT) for line in lines):
        sys.exit(1)
