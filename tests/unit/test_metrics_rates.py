"""Rates: what a reader of ``_per_s`` may rely on."""

import random

import pytest

from hypermesh_ebpf.metrics.rates import SHORT_S, Rates

KEY, COUNTERS = ("iface", "protocol"), ("packets", "bytes")


def row(packets, size=100, protocol="TCP"):
    bytes_ = None if packets is None else packets * size
    return {"iface": "lo", "protocol": protocol, "packets": packets, "bytes": bytes_}


def test_first_interval_counts_from_zero():
    totals, rows = Rates().apply({"packets": 7, "vlan": 1}, [row(6)], KEY, COUNTERS, 2.0)
    assert totals == {"packets": 7, "vlan": 1, "packets_per_s": 3.5}
    assert rows == [{**row(6), "packets_per_s": 3.0, "bytes_per_s": 300.0}]


def test_rates_are_over_the_last_interval_alone():
    rates = Rates()
    rates.apply({"packets": 1000}, [row(1000)], KEY, COUNTERS, 1.0)
    totals, rows = rates.apply({"packets": 1010}, [row(1005)], KEY, COUNTERS, 2.0)
    assert totals["packets_per_s"] == 5.0
    assert (rows[0]["packets_per_s"], rows[0]["bytes_per_s"]) == (2.5, 250.0)


def test_row_that_stands_still_has_rate_zero_and_one_that_is_new_counts_from_zero():
    rates = Rates()
    rates.apply({}, [row(5)], KEY, COUNTERS, 1.0)
    _, rows = rates.apply({}, [row(5), row(9, protocol="UDP")], KEY, COUNTERS, 3.0)
    assert [each["packets_per_s"] for each in rows] == [0.0, 3.0]


def test_rows_are_told_apart_by_their_whole_key_and_not_by_their_place():
    rates = Rates()
    one, other = {**row(10), "iface": "eth1"}, row(100)
    rates.apply({}, [one, other], KEY, COUNTERS, 1.0)
    _, rows = rates.apply({}, [{**other, "packets": 103}, one], KEY, COUNTERS, 1.0)
    assert [each["packets_per_s"] for each in rows] == [3.0, 0.0]


def test_counter_that_went_back_counts_from_zero_and_no_rate_is_negative():
    rates = Rates()
    rates.apply({"packets": 900}, [row(900)], KEY, COUNTERS, 1.0)
    totals, rows = rates.apply({"packets": 4}, [row(4)], KEY, COUNTERS, 2.0)
    assert totals["packets_per_s"] == rows[0]["packets_per_s"] == 2.0


def test_unknown_stays_unknown():
    rates = Rates()
    _, rows = rates.apply({}, [row(None)], KEY, COUNTERS, 1.0)
    assert rows[0]["packets_per_s"] is None
    _, rows = rates.apply({}, [row(8)], KEY, COUNTERS, 1.0)
    assert rows[0]["packets_per_s"] is None, "since when the 8 are counted is not known"
    _, rows = rates.apply({}, [row(9)], KEY, COUNTERS, 1.0)
    assert rows[0]["packets_per_s"] == 1.0
    _, rows = rates.apply({}, [{"iface": "lo", "protocol": "TCP"}], KEY, COUNTERS, 1.0)
    assert rows[0]["bytes_per_s"] is None


@pytest.mark.parametrize("elapsed", [0.0, -1.0])
def test_no_time_no_rate(elapsed):
    totals, rows = Rates().apply({"packets": 5}, [row(5)], KEY, COUNTERS, elapsed)
    assert totals["packets_per_s"] is None
    assert rows[0]["packets_per_s"] is None


def test_interval_too_short_to_measure_is_taken_with_the_one_before():
    rates = Rates()
    rates.apply({"packets": 100}, [], KEY, COUNTERS, 1.0)
    rates.apply({"packets": 300}, [], KEY, COUNTERS, 1.0)
    totals, _ = rates.apply({"packets": 301}, [], KEY, COUNTERS, SHORT_S / 5)
    assert totals["packets_per_s"] == pytest.approx(201 / (1 + SHORT_S / 5), abs=0.001)
    totals, _ = rates.apply({"packets": 303}, [], KEY, COUNTERS, 1.0)
    assert totals["packets_per_s"] == 2.0


def test_what_was_given_is_left_as_it_was():
    totals, rows = {"packets": 1}, [row(1)]
    Rates().apply(totals, rows, KEY, COUNTERS, 1.0)
    assert totals == {"packets": 1}
    assert rows == [row(1)]


@pytest.mark.parametrize("key", [(), ("protocol",)])
def test_keys_of_any_length(key):
    rates = Rates()
    rates.apply({}, [row(1)], key, ("packets",), 1.0)
    assert rates.apply({}, [row(4)], key, ("packets",), 1.0)[1][0]["packets_per_s"] == 3.0


def test_rates_and_times_give_the_counter_back():
    """Whatever the intervals, the rates times their intervals add up to what was counted."""
    rates, chance, count, summed = Rates(), random.Random(7), 0, 0.0
    for _ in range(200):
        elapsed = chance.uniform(SHORT_S, 3)
        count += chance.randrange(10_000)
        totals, _ = rates.apply({"packets": count}, [], (), ("packets",), elapsed)
        assert totals["packets_per_s"] == round(totals["packets_per_s"], 3)
        summed += totals["packets_per_s"] * elapsed
    assert summed == pytest.approx(count, abs=200 * 3 * 0.001)
