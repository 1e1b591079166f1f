"""How often buffers of events are emptied: seldom enough to cost little, before they are full.

The kernel wakes a reader of a ring buffer only when a record is submitted at the very place up to
which the reader has read (bpf_ringbuf_commit): when it had caught up, so once for each time that
the ring was emptied, not for each record, and it never tells how full the ring is.  So the first
record after a silence is shown at once, and what follows may gather for a while; for how long
depends on how fast the buffer fills, of which the last emptying is the only witness.
"""

from __future__ import annotations

LONGEST_S = 0.02
"""A storm costs no more than 50 wake-ups a second, and 20 ms is no delay that a reader notices."""
_SHORTEST_S = 0.001  # what poll(2) can wait
_WANTED = 0.25  # of the buffer; what comes faster than before finds the rest


class Pace:
    """Tells how long to wait after buffers were emptied; not for several threads at once.

    The pause begins short and at most doubles each time, so that a burst after a silence meets a
    reader that comes soon; it becomes as short as need be at once.
    """

    def __init__(self) -> None:
        self._wait = 0.0  # from one emptying to the next
        self._emptied = float("-inf")

    def pause(self, began: float, fill: float, now: float) -> float:
        """Seconds, 0 for not at all.

        ``began`` is when the emptying began that ended with the buffers ``fill`` full (0 to 1), and
        ``now`` when what came of it was dealt with; both by time.monotonic().
        """
        gap, self._emptied = began - self._emptied, began
        if gap > 2 * max(self._wait, LONGEST_S):  # there was nothing for a while
            self._wait = _SHORTEST_S
        else:
            self._wait = max(2 * self._wait, _SHORTEST_S)
        if fill > 0:
            self._wait = min(self._wait, gap * _WANTED / fill)
        self._wait = min(self._wait, LONGEST_S)
        left = began + self._wait - now
        return left if left >= _SHORTEST_S else 0.0
