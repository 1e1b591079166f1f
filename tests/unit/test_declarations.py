"""Every monitor's declaration agrees with itself, with its C file and with the rest of the tool."""

from __future__ import annotations

import itertools
import re
import struct
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from hypermesh_ebpf import monitors
from hypermesh_ebpf.bpf.programs import PROGRAM_TYPES
from hypermesh_ebpf.cli.monitor import make_command
from hypermesh_ebpf.errors import UsageError
from hypermesh_ebpf.host.hooks import KINDS
from hypermesh_ebpf.image.source import bundled_directory
from hypermesh_ebpf.monitors.declaration import Monitor
from hypermesh_ebpf.opening import Opening, complete_options, open_monitor

COLUMN_KINDS = {"text", "count", "bytes", "rate", "byte_rate", "ns", "time", "percent"}
SNAKE_CASE = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")
# Filled in where an option has no default.
EXAMPLES: dict[str, Any] = {"iface": ("lo",)}


@pytest.fixture(params=monitors.names())
def monitor(request: pytest.FixtureRequest) -> Monitor:
    return monitors.load(request.param)


def every_choice(monitor: Monitor) -> Iterator[dict[str, Any]]:
    """Options for each combination of the choices that the monitor offers."""
    choosing = [option for option in monitor.options if option.choices]
    for chosen in itertools.product(*(option.choices for option in choosing)):
        given = dict(zip((option.name for option in choosing), chosen, strict=True))
        given.update({o.name: EXAMPLES[o.name] for o in monitor.options if o.name in EXAMPLES})
        yield complete_options(monitor, given)


def test_the_bundled_ones_are_there() -> None:
    assert {"exec-monitor", "net-monitor", "xdp"} <= set(monitors.names())
    with pytest.raises(KeyError):
        monitors.load("declaration")


def test_name_and_summary(monitor: Monitor) -> None:
    assert monitor.name in monitors.names()
    assert monitor.summary == monitors.summary(monitor.name)
    assert monitor.summary.endswith(".")
    assert len(monitor.summary) < 80


def test_c_file_is_there_and_says_what_it_is(monitor: Monitor) -> None:
    text = (bundled_directory() / monitor.source).read_text()
    assert text.startswith(f"/* {monitor.name}: "), "an opening comment: what, where, at what cost"
    opening = text[: text.index("*/")]
    assert re.search(r"[Aa]ttach|RUNG_|Costs|costs", opening)


def test_rungs(monitor: Monitor) -> None:
    names = [rung.name for rung in monitor.rungs]
    assert names
    assert len(set(names)) == len(names)
    for rung in monitor.rungs:
        assert rung.hooks
        assert any(not hook.optional for hook in rung.hooks)
        places = [(hook.kind, hook.target) for hook in rung.hooks]
        assert len(set(places)) == len(places), "a place that is hooked twice counts twice"
        for hook in rung.hooks:
            assert hook.kind in KINDS, "check-system knows it"
            assert hook.kind in PROGRAM_TYPES, "and it can be loaded"
            if hook.kind == "tracepoint":
                assert re.fullmatch(r"\w+:\w+", hook.target)
            if hook.kind == "xdp":
                assert hook.target == "", "the interface comes from the user"


def test_lower_rungs_say_what_is_lost(monitor: Monitor) -> None:
    best = monitor.rungs[0]
    assert best.lost == ()
    for rung in monitor.rungs[1:]:
        assert set(rung.fields) <= set(best.fields)
        if set(rung.fields) < set(best.fields):
            assert rung.lost


def decoded(monitor: Monitor) -> dict[str, Any]:
    """The fields of an event of zeros: records have the size of the module's largest struct."""
    module = sys.modules[f"hypermesh_ebpf.monitors.{monitor.name.replace('-', '_')}"]
    layouts = [value for value in vars(module).values() if isinstance(value, struct.Struct)]
    size = max(layout.size for layout in layouts)
    collector = monitor.collector(next(every_choice(monitor)), {"system": {}})
    event = collector.decode(bytes(size))
    assert event is not None
    return event


def test_events_have_the_fields_that_are_promised(monitor: Monitor) -> None:
    assert monitor.events in ("always", "option", "never")
    if monitor.events == "never":
        assert monitor.event_columns == ()
        assert all(rung.fields == () for rung in monitor.rungs)
        return
    fields = set(decoded(monitor))
    assert set(monitor.rungs[0].fields) == fields
    assert "time" in fields
    assert {column.field for column in monitor.event_columns} <= fields
    assert all(SNAKE_CASE.fullmatch(name) for name in fields)
    assert monitor.event_columns[0].field == "time"


def test_columns_keys_and_counters(monitor: Monitor) -> None:
    for options in every_choice(monitor):
        columns = monitor.columns(options)
        fields = [column.field for column in columns]
        assert len(set(fields)) == len(fields)
        assert all(SNAKE_CASE.fullmatch(name) for name in fields)
        assert all(column.kind in COLUMN_KINDS and column.heading for column in columns)
        assert sum(column.share for column in columns) <= 1
        key = monitor.key(options)
        assert key
        assert set(key) <= set(fields), "what tells rows apart is shown"
        assert not set(key) & set(monitor.counters)
        for name in fields:
            if name.endswith("_per_s"):
                assert name.removesuffix("_per_s") in monitor.counters
    assert monitor.headline in monitor.counters


COMMON = {"interval", "duration", "count", "output", "top", "fail_on_loss", "no_cache", "verbose"}
COMMON |= {"max_overhead"}


def test_options(monitor: Monitor) -> None:
    names = [option.name for option in monitor.options]
    assert len(set(names)) == len(names)
    assert not {*names} & {*COMMON, "events", "rung", "help"}
    for option in monitor.options:
        assert SNAKE_CASE.fullmatch(option.name)
        assert option.help and not option.help.endswith("."), "the command line adds the full stop"
        assert option.default is None or isinstance(option.default, option.kind)
        if option.choices:
            assert option.default in option.choices
        if option.required:
            assert option.default is None
    command = make_command(monitor)
    flags = [flag for param in command.params for flag in param.opts]
    assert len(set(flags)) == len(flags)
    assert {param.name for param in command.params} >= {*names, *COMMON}


def test_defines_make_valid_macros(monitor: Monitor) -> None:
    for options in every_choice(monitor):
        for rung in monitor.rungs:
            both = {**monitor.defines(options), **rung.defines}
            assert all(re.fullmatch(r"[A-Z][A-Z0-9_]*", name) for name in both)
    macros = {macro for rung in monitor.rungs for macro in rung.defines}
    text = (bundled_directory() / monitor.source).read_text()
    assert all(macro in text for macro in macros)


def test_settings_fit_the_map(monitor: Monitor) -> None:
    """Whoever filters has settings, of one size, and a program that reads them; nobody else."""
    plain = list(every_choice(monitor))
    assert {monitor.settings(options) for options in plain} == {None}
    assert not any("FILTERED" in monitor.defines(options) for options in plain)
    text = (bundled_directory() / monitor.source).read_text()
    can_filter = "pid" in plain[0]
    assert can_filter == bool(re.search(r"#ifdef FILTERED\nBPF_ARRAY\(settings, ", text))
    if can_filter:
        filtered = [{**options, "pid": 0} for options in plain]
        assert len({len(monitor.settings(options) or b"") for options in filtered}) == 1
        assert all(monitor.settings(options) for options in filtered)
        assert all(monitor.defines(options)["FILTERED"] for options in filtered)


# ---- what a library call refuses ----------------------------------------------------------------


def test_unknown_monitor_option_and_rung() -> None:
    with pytest.raises(UsageError, match="monitor 'nothing': there is no such monitor") as caught:
        open_monitor("nothing")
    assert "xdp" in str(caught.value.remedy)
    with pytest.raises(UsageError, match="xdp: option 'bogus': there is no such") as caught:
        open_monitor("xdp", iface=("lo",), bogus=1)
    assert "hmebpf xdp --help" in str(caught.value.remedy)
    with pytest.raises(UsageError, match="rung 'cellar' of exec-monitor") as caught:
        open_monitor("exec-monitor", rung="cellar")
    assert "tracepoint" in str(caught.value.remedy)
    with pytest.raises(UsageError, match="rung 'cellar'"):
        Opening(monitors.load("xdp"), {"iface": ("lo",)}, True, "cellar")


def test_defaults_are_filled_in() -> None:
    monitor = monitors.load("exec-monitor")
    options = complete_options(monitor, {"comm": "sh"})
    expected = {option.name: option.default for option in monitor.options} | {"comm": "sh"}
    assert {name: options[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("name", "given", "cause"),
    [
        ("xdp", {}, "option 'iface': it is required"),
        ("xdp", {"iface": ()}, "option 'iface': it is required"),
        ("xdp", {"iface": (1,)}, "option 'iface': not of type str: (1,)"),
        ("xdp", {"iface": 7}, "option 'iface': not of type str: 7"),
        ("xdp", {"iface": "lo", "by": "color"}, "option 'by': 'color' is not one of protocol, "),
        ("exec-monitor", {"pid": "1"}, "option 'pid': not of type int: '1'"),
    ],
)
def test_values_that_an_option_cannot_have(name: str, given: dict[str, Any], cause: str) -> None:
    """Refused where the call is made, not by an accident in the worker."""
    with pytest.raises(UsageError) as caught:
        complete_options(monitors.load(name), given)
    assert str(caught.value).startswith(f"{name}: {cause}")
    assert caught.value.remedy


def test_one_interface_needs_no_tuple() -> None:
    assert complete_options(monitors.load("xdp"), {"iface": "lo"})["iface"] == ("lo",)
    both = complete_options(monitors.load("xdp"), {"iface": ["lo", "eth0"]})["iface"]
    assert both == ("lo", "eth0")
    twice = complete_options(monitors.load("xdp"), {"iface": ("lo", "lo")})["iface"]
    assert twice == ("lo",)
