"""``hmebpf cleanup``: take off what runs left whose owner and guard died together."""

from __future__ import annotations

import click


@click.command()
def cleanup() -> None:
    """Remove attached programs whose owner is gone; every start of a monitor does the same."""
    from hypermesh_ebpf import ledger

    for line in ledger.sweep() or ["nothing to clean up"]:
        click.echo(line)
