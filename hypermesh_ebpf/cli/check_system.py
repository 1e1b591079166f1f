"""``hmebpf check-system``: what this machine can do, and how to mend what it cannot."""

from __future__ import annotations

import sys
from contextlib import suppress

import click


@click.command("check-system")
@click.option(
    "-o",
    "--output",
    type=click.Choice(["table", "json"]),
    default="table",
    show_default=True,
    help="How to show it.",
)
@click.option(
    "--fix",
    is_flag=True,
    help="First mount bpffs, tracefs and debugfs where they are missing.",
)
@click.option("-v", "--verbose", count=True, help="Say what was probed, too; -vv for tracebacks.")
def check_system(output: str, fix: bool, verbose: int) -> None:
    """Probe this machine: what runs, what runs degraded, what cannot, and why.

    Changes nothing, unless --fix asks for it. Exits with 3 if a monitor cannot run at all.
    """
    from hypermesh_ebpf import monitors
    from hypermesh_ebpf.host.report import examine
    from hypermesh_ebpf.output.findings import show_report
    from hypermesh_ebpf.output.writer import OutputClosed, require_stream

    stream = require_stream(sys.stdout)

    mended = _mount_missing() if fix else True
    report = examine(monitors.load(name) for name in monitors.names())
    with suppress(OutputClosed):  # `| head` saw what it wanted
        show_report(report, output, stream, verbose)
    if not report.all_run:
        sys.exit(3)
    if not mended:
        sys.exit(1)


def _mount_missing() -> bool:
    """Mount what is missing and say so on stderr; True if all that was tried worked."""
    from hypermesh_ebpf.errors import MissingPrivilege, describe_errno
    from hypermesh_ebpf.host import capabilities, filesystems

    missing = filesystems.list_missing()
    if missing and not capabilities.has("CAP_SYS_ADMIN"):
        raise MissingPrivilege(
            f"mount {', '.join(fs.name for fs in missing)}",
            "lacks CAP_SYS_ADMIN",
            "sudo hmebpf check-system --fix",
        )
    mended = True
    for fs in missing:
        place = fs.places[0]
        error = filesystems.mount(fs)
        if error is None:
            click.echo(f"fixed: mounted {fs.name} at {place}", err=True)
        else:
            mended = False
            cause = describe_errno(error.errno or 0)
            click.echo(f"not fixed: mount {fs.name} at {place}: {cause}", err=True)
    if not missing:
        click.echo("nothing to fix: bpffs, tracefs and debugfs are mounted", err=True)
    return mended
