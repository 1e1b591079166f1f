"""One map of a user's program as a table: its columns, its rates, and what of it is a histogram."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

from hypermesh_ebpf.bpf import map_types
from hypermesh_ebpf.bpf.entries import TypedEntries
from hypermesh_ebpf.bpf.maps import TypedMap, cut_trace
from hypermesh_ebpf.bpf.names import MAP_TYPES, name_type
from hypermesh_ebpf.bpf.spec import PERF_COUNTERS
from hypermesh_ebpf.bpf.types import Type, flatten
from hypermesh_ebpf.errors import MapError
from hypermesh_ebpf.metrics.counted import Counted, Places
from hypermesh_ebpf.metrics.rates import Rates
from hypermesh_ebpf.metrics.sample import Histogram, Row, Table
from hypermesh_ebpf.monitors.declaration import Column, TableLayout
from hypermesh_ebpf.program_histograms import find_slots

MOST_ENTRIES = 100_000
"""Entries of one map that are read at each refresh."""


_COUNTERS_REASON = "it holds performance counters, which only the program can read"
# Names of members whose numbers are not counted: no rate is made of them.
_NO_COUNTER = re.compile(
    r"(^|_)(ts|time|timestamp|start|started|begin|end|last|first|now|since|pid|tgid|tid|ppid|uid|gid"
    r"|id|key|index|idx|addr|address|saddr|daddr|ip|ip4|port|sport|dport|lport|rport|ifindex|ptr"
    r"|cookie|inode|ino|dev|major|minor|cpu|node|flag|flags|state|type|family|proto|protocol|mode"
    r"|level|prio|priority|min|max|avg|mean|ret|rc|err|errno|fd|depth|version|mark|ttl|limit)"
    r"\d*($|_)"
)


class ShownMap:
    """One map on its way into tables: its layout, its rates, its histograms."""

    def __init__(self, typed: TypedMap) -> None:
        self._typed = typed
        spec = typed.spec
        self._rates = Rates()
        self._slots = find_slots(typed)
        self.has_more = self._slots is not None and self._slots.beside
        self._counters = _counters(typed) if self._slots is None else ()
        self.layout = make_layout(typed, self._counters, self.has_more)
        self._full = spec.type in map_types.FULL and spec.max_entries > 1
        self._zero_is_set = _is_set(_example(typed.value))  # an enum has names for it
        self._symbols: Callable[[Any], Any] | None = None
        if spec.type == map_types.STACK_TRACE:
            from hypermesh_ebpf.host.kallsyms import name_frames

            self._symbols = name_frames

    def begin(self) -> None:
        """Take what a map holds already - one that was pinned - as the start of the rates."""
        if self._counters:
            self.read(0.0)

    def read(self, elapsed: float) -> Table:
        """The entries now; those of an array that are zero only if there is but one."""
        typed, name = self._typed, self._typed.spec.name
        if not typed.readable:
            counters = typed.spec.value_desc == PERF_COUNTERS
            return Table(name, reason=_COUNTERS_REASON if counters else typed.reason)
        try:
            entries = typed.read(MOST_ENTRIES)
        except MapError as error:
            return Table(name, reason=error.cause)
        left_out, zeros = typed.left_out, 0
        if self._full:
            kept = self._places_of_set(entries)
            zeros, entries = len(entries) - len(kept), entries.select(kept)
        rows: Sequence[Row] = self._count(entries, elapsed)
        if self._slots is not None:  # drawn as histograms, all of them
            rows = list(rows)
        return Table(name, rows, left_out, zeros)

    def _places_of_set(self, entries: TypedEntries) -> list[int]:
        """Which entries of an array have something in them."""
        # Most of an array is often nothing, which need not be decoded.
        places = range(len(entries)) if self._zero_is_set else entries.places_of_set()
        values = [value for _key, value in entries.select(places).items()]
        return [place for place, value in zip(places, values, strict=True) if _is_set(value)]

    def _count(self, entries: TypedEntries, elapsed: float) -> Counted:
        """The entries as rows, with rates if there is something that is counted."""
        name, symbols = self._typed.spec.name, self._symbols

        def write(places: Places) -> list[dict[str, Any]]:
            pairs = entries.select(places).items()
            if symbols is not None:
                pairs = ((key, symbols(cut_trace(frames))) for key, frames in pairs)
            return [{"map": name, "key": key, "value": value} for key, value in pairs]

        columns = {counter: entries.values(counter) for counter in self._counters}
        rows = Counted(entries.identities, columns, write, add_rates=self._add_rates)
        if not self._counters:
            return rows
        _totals, rated = self._rates.apply({}, rows, (), self._counters, elapsed)
        return cast(Counted, rated)

    def _add_rates(self, row: dict[str, Any], rates: dict[str, Any]) -> None:
        """Give a row its ``value_per_s``: a number, or one for each member that counts."""
        if self._counters == ("",):
            row["value_per_s"] = rates["_per_s"]
        else:
            row["value_per_s"] = {name: rates[name + "_per_s"] for name in self._counters}

    def histograms(self, rows: Sequence[Row]) -> Iterator[Histogram]:
        """What is to be drawn as histograms."""
        if self._slots is not None:
            yield from self._slots.draw(self._typed.spec.name, rows)


def _is_set(value: Any) -> bool:
    """Whether anything in a value is not zero."""
    if isinstance(value, dict):
        return any(map(_is_set, value.values()))
    if isinstance(value, list):
        return any(map(_is_set, value))
    if isinstance(value, str):
        return bool(value.strip("0")) and value != "0x0"
    return bool(value)


def make_layout(typed: TypedMap, counters: tuple[str, ...], slots: bool) -> TableLayout:
    spec = typed.spec
    keys = [] if typed.single else list(flatten("key", _example(typed.key)))
    if spec.type == map_types.STACK_TRACE:
        values = ["value"]
    else:
        values = list(flatten("value", _example(typed.value)))
        if slots:  # drawn as a histogram
            values.remove("value.slots")
    rated = {f"value.{name}" if name else "value": name for name in counters}
    headings = _headings([*keys, *values])
    columns = [Column(field, headings[field]) for field in keys]
    for field in values:
        kind = column_kind(field) if field in rated else "text"
        columns.append(Column(field, headings[field], kind))
        if field in rated:
            rate = "byte_rate" if kind == "bytes" else "rate"
            share = rated[field] == counters[0]
            columns.append(Column(field + "_per_s", headings[field] + "/s", rate, share))
    busy = counters[0] if counters and not typed.single else None
    kind = name_type(MAP_TYPES, spec.type).replace("_", " ")
    return TableLayout(spec.name, kind, tuple(columns), tuple(keys), _flatten_row, busy)


def _example(type_: Type) -> Any:
    return type_.decode(bytes(type_.size))


def _headings(fields: Sequence[str]) -> dict[str, str]:
    """Short names: without "key." and "value.", where no two fields are then called the same."""
    short = {field: field.partition(".")[2] or field for field in fields}
    names = list(short.values())
    return {field: name if names.count(name) == 1 else field for field, name in short.items()}


def _flatten_row(row: Any) -> Row:
    """A row's fields under the columns' names: "key.pid", "value.packets", "..._per_s"."""
    flat = {**flatten("key", row["key"]), **flatten("value", row["value"])}
    rates = row.get("value_per_s")
    if isinstance(rates, dict):
        flat |= {f"value.{name}_per_s": rate for name, rate in rates.items()}
    elif "value_per_s" in row:
        flat["value_per_s"] = rates
    return flat


def column_kind(field: str) -> str:
    """How a counted number is drawn, by the unit in its name."""
    name = field.rpartition(".")[2].lower()
    if name.endswith(("_ns", "nsec", "nsecs")) or name == "ns":
        return "ns"
    if re.search(r"(^|_)bytes($|_)", name):
        return "bytes"
    return "count" if field.startswith("value") else "text"


def _counters(typed: TypedMap) -> tuple[str, ...]:
    """The members of the values that are counted, as far as types and names tell: integers of 4
    or 8 bytes without a sign, of which the name does not say that they are something else.

    ("",) where the value itself is one, and the map's name does not.
    """
    if typed.refers_to or not typed.readable or typed.spec.type == map_types.STACK_TRACE:
        return ()
    description = typed.value.description
    if _is_counter(description, typed.spec.name):
        return ("",)
    if description["kind"] != "struct":
        return ()
    return tuple(
        member["name"]
        for member in description["members"]
        if not member.get("bits") and _is_counter(member["type"], member["name"])
    )


def _is_counter(description: Mapping[str, Any], name: str) -> bool:
    return (
        description["kind"] == "int"
        and not description["signed"]
        and description["size"] in (4, 8)
        and not _NO_COUNTER.search(name.lower())
        and column_kind(name) != "ns"
    )
