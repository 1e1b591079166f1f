"""A click command made from a monitor's declaration: its options and the common ones."""

from __future__ import annotations

import sys
from typing import Any

import click

from hypermesh_ebpf.cli.options import COMMON, read_run_options
from hypermesh_ebpf.monitors.declaration import Monitor, Option

_RUNG_HELP = "Attach in this way and no other; by default the first one that works here."
_EVENTS = click.Option(["--events"], is_flag=True, help="Show each event, too.")


def make_command(monitor: Monitor) -> click.Command:
    """The command of one monitor."""
    own = [_make_option(option) for option in monitor.options]
    extra = [_EVENTS] if monitor.events == "option" else []
    if len(monitor.rungs) > 1:
        names = [rung.name for rung in monitor.rungs]
        extra.append(click.Option(["--rung"], type=click.Choice(names), help=_RUNG_HELP))

    def run(**given: Any) -> None:
        from hypermesh_ebpf.run import run_monitor

        options = {option.name: given[option.name] for option in monitor.options}
        for option in monitor.options:
            if option.multiple:  # what is given twice counts once
                options[option.name] = tuple(dict.fromkeys(options[option.name]))
        options["events"] = given.get("events", monitor.events == "always")
        common = read_run_options(given, events=options["events"])
        run_monitor(monitor, options, common, sys.stdout)

    return click.Command(
        monitor.name, callback=run, params=[*own, *extra, *COMMON], help=monitor.summary
    )


def _make_option(option: Option) -> click.Option:
    flag = f"--{option.name.replace('_', '-')}"
    text = option.help[0].upper() + option.help[1:] + "."
    if option.kind is bool:
        return click.Option([flag, option.name], is_flag=True, help=text)
    kind: Any = click.Choice(option.choices) if option.choices else option.kind
    return click.Option(
        [flag, option.name],
        type=kind,
        default=option.default,
        show_default=option.default is not None,
        multiple=option.multiple,
        required=option.required,
        metavar=option.metavar,
        help=text,
    )
