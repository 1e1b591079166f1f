"""Histograms: slots to buckets, buckets to percentiles."""

import random
from itertools import pairwise

import pytest

from hypermesh_ebpf.metrics.histogram import log2_buckets, percentile, percentiles


def slots_of(values, slot_of):
    counts = [0] * 64
    for value in values:
        counts[slot_of(value)] += 1
    return counts


@pytest.mark.parametrize(
    ("first_low", "slot_of", "values"),
    [
        (0, int.bit_length, range(3000)),
        (1, lambda value: value.bit_length() - 1, range(1, 3000)),
        (64, lambda value: value.bit_length() - 7, range(64, 9000)),
    ],
)
def test_every_value_lies_in_the_bucket_it_was_counted_in(first_low, slot_of, values):
    buckets = log2_buckets(slots_of(values, slot_of), first_low)
    for low, high, count in buckets:
        assert count == sum(low <= value <= high for value in values)
    assert sum(count for _, _, count in buckets) == len(values)
    for (_, high, _), (low, _, _) in pairwise(buckets):
        assert low == high + 1


def test_empty_ends_are_left_out_and_empty_middles_kept():
    assert log2_buckets([0, 0, 3, 0, 1, 0, 0]) == ((2, 3, 3), (4, 7, 0), (8, 15, 1))
    assert log2_buckets([0, 0]) == log2_buckets([]) == ()
    assert log2_buckets([2]) == ((0, 0, 2),)


def test_percentiles_lie_within_a_bucket_of_the_true_ones():
    chance = random.Random(3)
    values = sorted(int(chance.lognormvariate(9, 1.5)) for _ in range(5000))
    buckets = log2_buckets(slots_of(values, int.bit_length))
    for percent in (1, 25, 50, 90, 95, 99, 99.9):
        true = values[int(len(values) * percent / 100)]
        assert true / 2 <= percentile(buckets, percent) <= true * 2


def test_percentiles_interpolate_within_a_bucket():
    assert percentile([(100, 200, 10)], 50) == 150
    assert percentile([(0, 0, 50), (64, 128, 50)], 75) == 96
    assert percentiles([(8, 15, 4)], (0, 100)) == (8, 15)


def test_nothing_counted_has_no_percentile():
    assert percentile([], 50) is None
    assert percentiles([(1, 1, 0)]) == (None, None, None)
