"""Rows that are written out when they are looked at give what rows written at once give."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from typing import Any

import pytest

from hypermesh_ebpf.metrics.counted import Counted, column, join, pick
from hypermesh_ebpf.metrics.rates import Rates

KEY, COUNTERS = ("pid",), ("calls", "bytes")
Rows = list[dict[str, Any]]


def counted(rows: Rows) -> Counted:
    """The rows as a map's reading would give them."""

    def write(places: Sequence[int]) -> Rows:
        return [dict(rows[place]) for place in places]

    columns = {name: [row[name] for row in rows] for name in COUNTERS}
    return Counted([row["pid"] for row in rows], columns, write)


def readings(seed: int) -> list[tuple[Rows, float]]:
    """Rows that come, go, count, begin anew, stay unknown; intervals, one of them very short."""
    chance = random.Random(seed)
    found: list[tuple[Rows, float]] = []
    counts: dict[int, dict[str, Any]] = {}
    for elapsed in (1.0, 0.5, 1.25, 0.01, 0.01, 1.0, 2.0):
        for pid in chance.sample(range(12), 6):
            before = counts.get(pid)
            if before is None or chance.random() < 0.2:
                counts[pid] = {"calls": chance.randrange(50), "bytes": chance.choice([None, 7])}
            elif chance.random() < 0.2:
                del counts[pid]
            else:
                known = before["bytes"]
                counts[pid] = {
                    "calls": before["calls"] + chance.randrange(1000),
                    "bytes": None if known is None else known + chance.randrange(1 << 40),
                }
        order = list(counts)
        if chance.random() < 0.5:
            chance.shuffle(order)
        found.append(([{"pid": pid, **counts[pid]} for pid in order], elapsed))
    return found


@pytest.mark.parametrize("seed", range(20))
def test_rates_are_those_of_rows_written_at_once(seed: int) -> None:
    lazy, eager = Rates(), Rates()
    for rows, elapsed in readings(seed):
        expected_totals, expected = eager.apply({"calls": 5}, rows, KEY, COUNTERS, elapsed)
        totals, found = lazy.apply({"calls": 5}, counted(rows), KEY, COUNTERS, elapsed)
        assert totals == expected_totals
        assert list(found) == list(expected)
        assert [list(row) for row in found] == [list(row) for row in expected], "fields in order"
        assert found[-1] == expected[-1]
        assert found[1:3] == expected[1:3]
        backwards = range(len(rows) - 1, -1, -1)
        assert pick(found, backwards) == list(reversed(expected))
        for name in ("calls", "bytes", "calls_per_s", "bytes_per_s", "pid", "nothing"):
            assert list(column(found, name)) == list(column(expected, name))


def test_they_are_a_sequence_of_rows_like_any_other() -> None:
    rows = [{"pid": pid, "calls": pid, "bytes": None} for pid in range(3)]
    found = counted(rows)
    assert len(found) == 3
    assert found == rows
    assert rows[1] in found
    with pytest.raises(IndexError):
        found[3]
    found[0]["calls"] = 99  # type: ignore[index]
    assert found[0]["calls"] == 0, "each look makes new ones"
    assert json.loads(json.dumps(found, default=list)) == rows


def test_several_readings_as_one() -> None:
    parts = {
        name: counted([{"pid": pid, "calls": pid, "bytes": 1} for pid in pids])
        for name, pids in (("lo", (1, 2)), ("eth9", ()), ("eth0", (2, 3, 4)))
    }
    both = join(parts, "iface")
    expected = [{"iface": name, **row} for name, part in parts.items() for row in part]
    assert both == expected
    assert pick(both, [4, 0, 3]) == [expected[4], expected[0], expected[3]]
    assert both.column("calls") == [1, 2, 2, 3, 4]
    _totals, rated = Rates().apply({}, both, ("iface", "pid"), COUNTERS, 1.0)
    assert [row["calls_per_s"] for row in rated] == [1.0, 2.0, 2.0, 3.0, 4.0]


def test_no_rows() -> None:
    rates = Rates()
    for _ in range(2):
        _totals, found = rates.apply({}, counted([]), KEY, COUNTERS, 1.0)
        assert list(found) == []
        assert list(column(found, "calls_per_s")) == []
