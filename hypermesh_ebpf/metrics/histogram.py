"""Histograms with buckets by powers of two, as BPF programs count them."""

from __future__ import annotations

from collections.abc import Sequence

Bucket = tuple[int, int, int]
"""(low, high, count), both ends inclusive."""


def log2_buckets(counts: Sequence[int], first_low: int = 0) -> tuple[Bucket, ...]:
    """``counts`` by slot as buckets, without the empty ones at either end.

    Slot 0 begins at ``first_low`` and every slot is as wide as all that lies below it.  So with
    ``first_low`` 0 the slot of a value is its bit length (0; 1; 2-3; 4-7; ...), with 1 it is the
    value's log2 (1; 2-3; 4-7; ...), and with 64 the slots are 64-127; 128-255; ...
    """
    filled = [slot for slot, count in enumerate(counts) if count]
    if not filled:
        return ()
    buckets = []
    for slot in range(filled[0], filled[-1] + 1):
        if first_low:
            low = first_low << slot
            high = 2 * low - 1
        else:
            low = 1 << slot >> 1
            high = (1 << slot) - 1
        buckets.append((low, high, int(counts[slot])))
    return tuple(buckets)


def percentile(buckets: Sequence[Bucket], percent: float) -> float | None:
    """The value below which ``percent`` of all counted values lie, or None if there are none.

    An estimate: values are taken as spread evenly over their bucket, so it is off by less than the
    bucket's width.
    """
    total = sum(count for _, _, count in buckets)
    if not total:
        return None
    rank = total * min(max(percent, 0.0), 100.0) / 100
    below = 0
    for low, high, count in buckets:
        if count and below + count >= rank:
            return low + (high - low) * (rank - below) / count
        below += count
    return float(buckets[-1][1])


def percentiles(
    buckets: Sequence[Bucket], percents: Sequence[float] = (50, 95, 99)
) -> tuple[float | None, ...]:
    """:func:`percentile` for each of ``percents``."""
    return tuple(percentile(buckets, percent) for percent in percents)
