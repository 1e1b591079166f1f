"""A click command made from a monitor's declaration: its options and the common ones."""

from __future__ import annotations

import math
import sys
from typing import Any

import click

from hypermesh_ebpf.monitors.declaration import Monitor, Option


class _Seconds(click.FloatRange):
    """A time: more than nothing, less than infinity, and a number ("nan" passes for a float)."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        seconds = float(super().convert(value, param, ctx))
        if not math.isfinite(seconds):
            self.fail(f"{value} is no length of time.", param, ctx)
        return seconds


_POSITIVE = _Seconds(min=0, min_open=True)
_INTERVAL = _Seconds(min=0.05)  # nobody reads faster, and a reading costs a core no time
_COMMON = (
    click.Option(
        ["-i", "--interval"],
        type=_INTERVAL,
        default=1.0,
        show_default=True,
        metavar="SECONDS",
        help="Time between refreshes.",
    ),
    click.Option(
        ["-d", "--duration"], type=_POSITIVE, metavar="SECONDS", help="Stop after this time."
    ),
    click.Option(
        ["-n", "--count"], type=click.IntRange(min=1), metavar="N", help="Stop after N refreshes."
    ),
    click.Option(
        ["-o", "--output"],
        type=click.Choice(["table", "json", "csv"]),
        default="table",
        show_default=True,
        help="How to show it.",
    ),
    click.Option(
        ["--top"],
        type=click.IntRange(min=1),
        default=20,
        show_default=True,
        metavar="N",
        help="The most rows that a table shows.",
    ),
    click.Option(["--fail-on-loss"], is_flag=True, help="Exit with 4 if anything was lost."),
    click.Option(["--no-cache"], is_flag=True, help="Compile anew, and keep nothing."),
    click.Option(["-v", "--verbose"], count=True, help="Say more; -vv for tracebacks."),
)
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
        from hypermesh_ebpf.run import RunOptions, run_monitor

        options = {option.name: given[option.name] for option in monitor.options}
        for option in monitor.options:
            if option.multiple:  # what is given twice counts once
                options[option.name] = tuple(dict.fromkeys(options[option.name]))
        options["events"] = given.get("events", monitor.events == "always")
        common = RunOptions(
            interval=given["interval"],
            duration=given["duration"],
            count=given["count"],
            output=given["output"],
            top=given["top"],
            events=options["events"],
            fail_on_loss=given["fail_on_loss"],
            rung=given.get("rung"),
            use_cache=not given["no_cache"],
            verbose=given["verbose"],
        )
        run_monitor(monitor, options, common, sys.stdout)

    return click.Command(
        monitor.name, callback=run, params=[*own, *extra, *_COMMON], help=monitor.summary
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
