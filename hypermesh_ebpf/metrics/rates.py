"""Counters to rates: what changed since the last reading, per second."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import itemgetter
from typing import Any

from hypermesh_ebpf.metrics.counted import Counted, Identities, Places
from hypermesh_ebpf.metrics.sample import Row, Value

SHORT_S = 0.05
"""Below this an interval says nothing about a rate; see :meth:`Rates.apply`."""

Rated = dict[str, Value]
"""A row with its rates."""


class Rates:
    """Keeps the previous readings of one run and adds a ``<counter>_per_s`` to each counter."""

    def __init__(self) -> None:
        self._totals: Rated = {}
        self._rows: _Readings = {}
        self._base_totals: Rated = {}
        self._base_rows: _Readings = {}
        self._span = 0.0

    def apply(
        self,
        totals: Row,
        rows: Sequence[Row],
        key: Sequence[str],
        counters: Sequence[str],
        elapsed: float,
    ) -> tuple[Rated, Sequence[Row]]:
        """Copies of ``totals`` and ``rows`` with rates, per second, rounded to 3 decimals.

        ``key`` names the fields that tell rows apart, ``counters`` the cumulative fields that get a
        rate, ``elapsed`` the seconds since the last call (the first time: since attach, when all
        counters were 0).  A row that was not there before counts from 0, and so does a counter that
        went back, because its map entry was deleted and made anew; a rate is never negative.  A
        counter that is unknown (None, or missing in a row) has the rate None.  Counters that the
        totals do not have get no rate there.

        The last reading of a run often follows the one before within milliseconds.  An interval
        shorter than :data:`SHORT_S` is therefore taken together with the one before it.

        Rows that are :class:`~hypermesh_ebpf.metrics.counted.Counted` stay so: their own identities
        tell them apart, and rates are made where they are looked at.
        """
        if elapsed >= SHORT_S or not self._span:
            self._base_totals, self._base_rows, self._span = self._totals, self._rows, 0.0
        self._span += max(elapsed, 0.0)
        names = [(counter, counter + "_per_s") for counter in counters]

        new_totals = dict(totals)
        here = [pair for pair in names if pair[0] in totals]
        _add_rates(new_totals, self._base_totals, here, self._span)
        self._totals = new_totals

        if isinstance(rows, Counted):
            return new_totals, self._apply_counted(rows, counters)
        before: dict[Any, Rated] = self._base_rows if isinstance(self._base_rows, dict) else {}
        nothing = Rated()
        key_of = itemgetter(*key) if key else (lambda row: ())
        new_rows, current = [], {}
        for row in rows:
            new_row = dict(row)
            row_key = key_of(row)
            _add_rates(new_row, before.get(row_key, nothing), names, self._span)
            current[row_key] = new_row
            new_rows.append(new_row)
        self._rows = current
        return new_totals, new_rows

    def _apply_counted(self, rows: Counted, counters: Sequence[str]) -> Counted:
        now = self._rows = _Counts(rows.identities, rows.counters)
        before = _Before(now, self._base_rows if isinstance(self._base_rows, _Counts) else None)
        span = self._span

        def rate_of(counter: str) -> Callable[[Places], list[Value]]:
            return lambda places: before.rates(counter, places, span)

        return replace(rows, rates={name + "_per_s": rate_of(name) for name in counters})


@dataclass(frozen=True, slots=True)
class _Counts:
    """What rates need of a Counted: not the bytes that its rows are written from."""

    identities: Identities
    counters: Mapping[str, Sequence[Any]]


_Readings = dict[Any, Rated] | _Counts


@dataclass(slots=True)
class _Before:
    """The rows of one reading beside those of the one before it, where there was one."""

    rows: _Counts
    base: _Counts | None
    _places: list[int | None] | None = None
    _columns: dict[str, list[Value]] = field(default_factory=dict)

    def rates(self, counter: str, places: Places, span: float) -> list[Value]:
        """The rates of some rows by one counter; those of all are kept."""
        if places != range(len(self.rows.identities)):
            return self._make(counter, places, span)
        if counter not in self._columns:
            self._columns[counter] = self._make(counter, places, span)
        return self._columns[counter]

    def _make(self, counter: str, places: Places, span: float) -> list[Value]:
        now = self.rows.counters.get(counter)
        if now is None or not span:
            return [None] * len(places)
        return [
            None
            if new is None or old is None
            else ((new - old if old <= new else new) * 1000.0 / span + 0.5) // 1 / 1000
            for new, old in zip(_pick(now, places), self._old(counter, places), strict=True)
        ]

    def _old(self, counter: str, places: Places) -> Sequence[Any]:
        """What the counter was before; 0 for rows that were not there."""
        if self.base is None:
            return [0] * len(places)
        was = self.base.counters[counter]
        if self.base.identities == self.rows.identities:
            return _pick(was, places)
        if self._places is None:
            known = {identity: at for at, identity in enumerate(self.base.identities)}
            self._places = list(map(known.get, self.rows.identities))
        return [0 if at is None else was[at] for at in _pick(self._places, places)]


def _pick(column: Sequence[Any], places: Places) -> Sequence[Any]:
    if places == range(len(column)):
        return column
    return [column[place] for place in places]


def _add_rates(row: Rated, was: Rated, names: Sequence[tuple[str, str]], span: float) -> None:
    """Give ``row`` the rate of each counter against ``was``, which is empty for a new row.

    Called for each of perhaps 10,000 rows a second: ``x // 1`` rounds in a tenth of round()'s time.
    """
    for counter, name in names:
        now: Any = row.get(counter)
        old: Any = was.get(counter) if was else 0
        if now is None or old is None or not span:
            row[name] = None
            continue
        if old <= now:
            now -= old
        row[name] = (now * 1000.0 / span + 0.5) // 1 / 1000
