"""What --max-overhead decides, with shares, clocks and counters that are made up."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest

from hypermesh_ebpf import monitors
from hypermesh_ebpf.bpf.statistics import Statistics
from hypermesh_ebpf.errors import MissingPrivilege, OverheadExceeded, Unsupported
from hypermesh_ebpf.metrics.sample import Overhead
from hypermesh_ebpf.monitors.declaration import Monitor
from hypermesh_ebpf.overhead import LOWEST, WINDOW_S, Governor, Limit, show

NET, XDP = monitors.load("net-monitor"), monitors.load("xdp")


def judge(governor: Governor, shares: Iterable[float]) -> list[int]:
    """How many events stand behind one that is taken after each of these; 0 where it gives up."""
    return [governor.one_in if governor.judge(share) else 0 for share in shares]


def test_below_the_limit_nothing_happens() -> None:
    assert judge(Governor(1.0, can_sample=True), [0.0, 0.5, 0.99, 1.0] * 10) == [1] * 40


def test_a_spike_changes_nothing() -> None:
    governor = Governor(1.0, can_sample=True)
    assert judge(governor, [90.0, 0.2] * 20) == [1] * 40
    user = Governor(1.0, can_sample=False)
    assert judge(user, [90.0, 90.0, 90.0, 90.0, 0.2] * 20) == [1] * 100


@pytest.mark.parametrize(
    ("share", "one_in"), [(1.1, 2), (2.0, 2), (2.1, 4), (7.0, 8), (50.0, 64), (5000.0, LOWEST)]
)
def test_takes_as_few_as_the_excess_asks_for(share: float, one_in: int) -> None:
    assert judge(Governor(1.0, can_sample=True), [share, share]) == [1, one_in]


def test_goes_on_until_it_fits() -> None:
    """Passing over costs as well: an eighth of the events is more than an eighth of the cost."""
    assert judge(Governor(1.0, can_sample=True), [8, 8, 3, 3, 1.4, 1.4, 0.9]) == [
        1,
        8,
        8,
        32,
        32,
        64,
        64,
    ]


def test_gives_up_at_the_lowest_share() -> None:
    governor = Governor(1.0, can_sample=True)
    assert judge(governor, [500.0] * 2) == [1, LOWEST]
    assert judge(governor, [3.0, 3.0, 3.0, 3.0, 4.0]) == [LOWEST] * 4 + [0]
    assert governor.excess == pytest.approx(3.2)


def test_relief_at_the_lowest_share_counts_from_anew() -> None:
    governor = Governor(1.0, can_sample=True)
    judge(governor, [500.0] * 2)
    assert judge(governor, [3.0] * 4 + [0.9] + [3.0] * 5) == [LOWEST] * 9 + [0]


def test_what_cannot_be_sampled_gives_up_after_five_windows() -> None:
    assert judge(Governor(1.0, can_sample=False), [2.0] * 5) == [1, 1, 1, 1, 0]


def test_recovers_when_the_load_falls() -> None:
    governor = Governor(1.0, can_sample=True)
    judge(governor, [30.0] * 2)
    assert governor.one_in == 32
    assert judge(governor, [0.3] * 5) == [32] * 4 + [16], "twice of it fits, four times does not"
    assert judge(governor, [0.01] * 5) == [16] * 4 + [1]
    assert judge(governor, [0.0] * 5) == [1] * 5


def test_does_not_recover_into_the_limit() -> None:
    """At a steady rate it stays where it is: twice the share would be too much again."""
    governor = Governor(1.0, can_sample=True)
    judge(governor, [8.0] * 2)
    assert judge(governor, [0.5] * 100) == [8] * 100


def test_one_busy_window_delays_recovery() -> None:
    governor = Governor(1.0, can_sample=True)
    judge(governor, [8.0] * 2)
    assert judge(governor, [0.0, 0.0, 0.9, 0.0, 0.0, 0.0, 0.0, 0.0]) == [8] * 7 + [1]


@pytest.mark.parametrize("rate", [10, 1_000, 300_000, 2_000_000])
def test_a_steady_load_comes_to_rest(rate: int) -> None:
    """Programs of 700 ns, of which 60 remain when an event is passed over."""
    governor = Governor(5.0, can_sample=True)
    seen = []
    for _ in range(100):
        share = rate * (60 + 640 / governor.one_in) / 1e7
        if not governor.judge(share):
            seen.append(0)
            break
        seen.append(governor.one_in)
    assert len(set(seen[-20:])) == 1 or seen[-1] == 0
    assert (seen[-1] == 0) == (rate * (60 + 640 / LOWEST) / 1e7 > 5.0)


# ---- the limit: statistics, the clock, and what is said ------------------------------------------


class On(Statistics):
    """Statistics that are on, as long as somebody says so."""

    def __init__(self) -> None:
        self.on, self.closed = True, False

    def are_on(self) -> bool:
        return self.on

    def close(self) -> None:
        self.closed = True


class Programs:
    """A session whose programs run for ``percent`` of a CPU of a clock that it keeps itself."""

    def __init__(self, monitor: Monitor = NET, *, can_sample: bool = True) -> None:
        self.monitor, self._can_sample = monitor, can_sample
        self.now, self.spent, self.percent, self.one_in = 100.0, 7_000, 0.0, 0

    def clock(self) -> float:
        return self.now

    def run_time_ns(self) -> int:
        return self.spent

    def sample_one_in(self, number: int) -> bool:
        self.one_in = number if self._can_sample else 1
        return self._can_sample

    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        self.spent += int(seconds * self.percent * 1e7)


def begin(most: float, session: Programs) -> tuple[Limit, list[str]]:
    said: list[str] = []
    limit = Limit(most, On(), session.clock)
    limit.watch(session, said.append)
    return limit, said


def run(limit: Limit, session: Programs, windows: int) -> bool:
    """Whether it still goes on after so many windows."""
    for _ in range(windows):
        session.pass_time(limit.due - session.now)
        if not limit.check():
            return False
    return True


def test_share_is_run_time_by_time() -> None:
    session = Programs()
    limit, said = begin(10, session)
    assert limit.due == session.now + WINDOW_S
    assert limit.value() == Overhead(None, 10, 1.0, False), "nothing was measured yet"
    session.percent = 2.5
    session.pass_time(1.0)
    assert limit.check()
    assert limit.value() == Overhead(2.5, 10, 1.0, False)
    session.pass_time(4.0)  # the machine was busy with other things
    assert limit.check()
    assert limit.value() == Overhead(2.5, 10, 1.0, False)
    assert said == []


def test_run_time_that_went_back_is_none() -> None:
    """A chain of programs that was made anew begins to count anew."""
    session = Programs()
    limit, _said = begin(10, session)
    session.spent = 0
    session.pass_time(1.0)
    assert limit.check()
    assert limit.value().percent == 0


def test_samples_and_recovers() -> None:
    session = Programs()
    limit, said = begin(1, session)
    session.percent = 3.21
    assert run(limit, session, 2)
    assert session.one_in == 4
    assert limit.value() == Overhead(3.21, 1, 0.25, True)
    assert said == [
        "its programs take 3.21 % of a CPU (--max-overhead 1): 1 event in 4 is taken from here on, "
        "and counts are estimates"
    ]
    session.percent = 0.01
    assert run(limit, session, 5)
    assert session.one_in == 1
    assert limit.value() == Overhead(0.01, 1, 1.0, True), "what was estimated stays an estimate"
    assert said[1:] == [
        "its programs take 0.01 % of a CPU (--max-overhead 1): every event is taken again"
    ]


def test_message_where_sampling_is_not_enough() -> None:
    session = Programs()
    limit, _said = begin(0.5, session)
    session.percent = 40.0
    assert run(limit, session, 2)
    session.percent = 2.04
    assert not run(limit, session, 5)
    error = limit.error()
    assert isinstance(error, OverheadExceeded)
    assert error.exit_code == 5
    assert str(error) == (
        "watch with net-monitor: its programs took 2.04 % of a CPU, more than --max-overhead 0.5, "
        "though they looked at 1 event in 64 only"
    )
    assert error.remedy == (
        "allow more (`--max-overhead 3`), or filter (--pid, --comm, --uid); "
        "a longer --interval does not help"
    )


def test_message_where_there_is_no_filter() -> None:
    session = Programs(XDP)
    limit, _said = begin(0.5, session)
    session.percent = 40.0
    assert not run(limit, session, 7)
    assert "or watch fewer interfaces; " in str(limit.error().remedy)


def test_message_where_nothing_can_be_sampled() -> None:
    session = Programs(can_sample=False)
    limit, said = begin(0.01, session)
    session.percent = 0.234
    assert not run(limit, session, 5)
    assert said == []
    assert str(limit.error()) == (
        "watch with net-monitor: its programs took 0.234 % of a CPU, more than "
        "--max-overhead 0.01, and programs of your own cannot be sampled"
    )
    assert limit.error().remedy == (
        "allow more (`--max-overhead 0.3`), or attach them to something that happens less often; "
        "a longer --interval does not help"
    )


def test_statistics_that_somebody_switched_off() -> None:
    """By the sysctl, which is all that keeps them on without CAP_SYS_ADMIN."""
    session, statistics = Programs(), On()
    limit = Limit(1, statistics, session.clock)
    limit.watch(session, lambda text: None)
    statistics.on = False
    session.pass_time(1.0)
    with pytest.raises(Unsupported) as caught:
        limit.check()
    assert str(caught.value) == (
        "limit the overhead to 1 %: kernel.bpf_stats_enabled was set to 0, so that nothing is "
        "measured any more"
    )
    assert "sudo sysctl kernel.bpf_stats_enabled=1" in str(caught.value.remedy)
    limit.close()
    assert statistics.closed


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (
            PermissionError(1, ""),
            MissingPrivilege,
            "Operation not permitted (EPERM): needs CAP_SYS",
        ),
        (OSError(22, ""), Unsupported, "cannot switch statistics on for a while (Linux 5.8)"),
    ],
)
def test_statistics_that_cannot_be_had(
    monkeypatch: pytest.MonkeyPatch, error: OSError, kind: type[Unsupported], words: str
) -> None:
    def refuse(result: int) -> int:
        raise error

    monkeypatch.setattr("hypermesh_ebpf.bpf.statistics.check", refuse)
    monkeypatch.setattr("hypermesh_ebpf.bpf.statistics.libbpf", lambda: _Library)
    monkeypatch.setattr("hypermesh_ebpf.bpf.statistics.STATS_SYSCTL", "/nowhere")
    with pytest.raises(kind) as caught:
        Limit(0.5)
    assert caught.value.exit_code == 3
    assert words in str(caught.value)
    assert "sudo sysctl kernel.bpf_stats_enabled=1" in str(caught.value.remedy)


class _Library:
    @staticmethod
    def bpf_enable_stats(kind: int) -> int:
        return -1


def test_statistics_that_are_on_for_good(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Then no privilege is needed."""

    def refuse(result: int) -> int:
        raise PermissionError(1, "")

    sysctl = tmp_path / "bpf_stats_enabled"
    sysctl.write_text("1\n")
    monkeypatch.setattr("hypermesh_ebpf.bpf.statistics.check", refuse)
    monkeypatch.setattr("hypermesh_ebpf.bpf.statistics.libbpf", lambda: _Library)
    monkeypatch.setattr("hypermesh_ebpf.bpf.statistics.STATS_SYSCTL", str(sysctl))
    statistics = Statistics("count", "be root")
    assert statistics.are_on()
    sysctl.write_text("0\n")
    assert not statistics.are_on()
    statistics.close()


@pytest.mark.parametrize(
    ("percent", "text"), [(0.01234, "0.0123"), (3.21, "3.21"), (99.96, "100"), (1234.5, "1234")]
)
def test_percentages_are_short(percent: float, text: str) -> None:
    assert show(percent) == text


def test_limit_that_is_next_to_nothing() -> None:
    """What is over it by more than a float can hold gets the lowest share at once."""
    governor = Governor(1e-320, can_sample=True)
    assert judge(governor, [50.0] * 2)[-1] == LOWEST
