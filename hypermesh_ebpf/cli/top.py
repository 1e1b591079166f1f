"""``hmebpf top``: CPU share of every BPF program, live."""

from __future__ import annotations

import sys
from typing import Any

import click

from hypermesh_ebpf.cli.options import COMMON, read_run_options

_TAKEN = ("interval", "duration", "count", "output", "top", "verbose")
_ALL = click.Option(["--all", "idle"], is_flag=True, help="Show programs that do not run, too.")


def _run(**given: Any) -> None:
    """Show which BPF programs of this host take how much CPU, all of them, not hmebpf's alone.

    The kernel's run statistics are switched on while this runs, and off afterwards.
    """
    from hypermesh_ebpf.run import run_programs
    from hypermesh_ebpf.top import TopSession

    run = read_run_options({"fail_on_loss": False, "no_cache": False, **given}, events=False)
    # All that a run needs of a session, without anything loaded.
    run_programs(lambda: TopSession(idle=given["idle"]), run, sys.stdout)


top = click.Command(
    "top",
    callback=_run,
    params=[_ALL, *(option for option in COMMON if option.name in _TAKEN)],
    help=_run.__doc__,
)
