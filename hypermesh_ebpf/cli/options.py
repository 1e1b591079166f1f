"""The options that everything has which shows samples, and what they mean for a run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from hypermesh_ebpf.run import RunOptions


class _Seconds(click.FloatRange):
    """A time: more than nothing, less than infinity, and a number ("nan" passes for a float)."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        seconds = float(super().convert(value, param, ctx))
        if not math.isfinite(seconds):
            self.fail(f"{value} is no length of time.", param, ctx)
        return seconds


class _Percent(click.FloatRange):
    """More than nothing; a sign behind it may be there."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        number: Any = value.removesuffix("%") if isinstance(value, str) else value
        percent = float(super().convert(number, param, ctx))
        if not math.isfinite(percent):
            self.fail(f"{value} is no percentage.", param, ctx)
        return percent


POSITIVE = _Seconds(min=0, min_open=True)
INTERVAL = _Seconds(min=0.05)  # nobody reads faster, and a reading costs a core no time
COMMON = (
    click.Option(
        ["-i", "--interval"],
        type=INTERVAL,
        default=1.0,
        show_default=True,
        metavar="SECONDS",
        help="Time between refreshes.",
    ),
    click.Option(
        ["-d", "--duration"], type=POSITIVE, metavar="SECONDS", help="Stop after this time."
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
    click.Option(
        ["--max-overhead"],
        type=_Percent(min=0, min_open=True),
        metavar="PERCENT",
        help="The most CPU time that the programs may take in the kernel, in percent of one CPU, "
        "all together. Above it events are sampled, and counts become estimates; where that is "
        "impossible or not enough it ends with 5. Needs root.",
    ),
    click.Option(["--no-cache"], is_flag=True, help="Compile anew, and keep nothing."),
    click.Option(["-v", "--verbose"], count=True, help="Say more; -vv for tracebacks."),
)
"""Interval, duration, count, output, top, fail-on-loss, max-overhead, no-cache, verbose."""


def read_run_options(given: Mapping[str, Any], *, events: bool) -> RunOptions:
    """The run that these options ask for; logging begins here, for -v and HMEBPF_LOG."""
    from hypermesh_ebpf import log
    from hypermesh_ebpf.run import RunOptions

    log.configure(given["verbose"])
    return RunOptions(
        interval=given["interval"],
        duration=given["duration"],
        count=given["count"],
        output=given["output"],
        top=given["top"],
        events=events,
        fail_on_loss=given["fail_on_loss"],
        rung=given.get("rung"),
        use_cache=not given["no_cache"],
        verbose=given["verbose"],
        max_overhead=given.get("max_overhead"),
    )
