"""Numbers, bars and safe text."""

import unicodedata

import pytest

from hypermesh_ebpf.output import draw
from hypermesh_ebpf.output.grid import cells, crop


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain", "plain"),
        ("größe 名前", "größe 名前"),
        ("[red]markup[/red]", "[red]markup[/red]"),
        ("\x1b[2J\x07", "\\x1b[2J\\x07"),
        ("a\nb\tc\rd", "a\\nb\\tc\\rd"),
        ("\x7f\x9b31m", "\\x7f\\x9b31m"),
        (b"\xff\xc3(".decode("utf-8", "surrogateescape"), "\\xff\\xc3("),
        ("exe\u202etxt.sh", "exe\\u202etxt.sh"),
        ("a\u200bb\ufeff\u2028", "a\\u200bb\\ufeff\\u2028"),
        ("\U000e0041", "\\U000e0041"),
    ],
)
def test_nothing_that_a_terminal_obeys_gets_through(text, shown):
    assert draw.printable(text) == shown


def test_no_character_at_all_is_obeyed():
    everything = "".join(map(chr, range(0x11000)))
    shown = draw.printable(everything)
    assert not {unicodedata.category(each) for each in shown} & {"Cc", "Cf", "Cs", "Co", "Cn"}
    shown.encode()
    assert draw.printable(everything, ascii=True).isascii()


@pytest.mark.parametrize(
    ("kind", "value", "shown", "exact"),
    [
        ("count", 0, "0", "0"),
        ("count", 1994, "1,994", "1994"),
        ("count", 9_999_999, "9,999,999", "9999999"),
        ("count", 12_345_678, "12.3 M", "12345678"),
        ("bytes", 512, "512 B", "512"),
        ("bytes", 1023, "1023 B", "1023"),
        ("bytes", 3500, "3.4 KiB", "3500"),
        ("bytes", 1024 * 1024 - 1, "1.0 MiB", "1048575"),
        ("bytes", 5 << 50, "5.0 PiB", str(5 << 50)),
        ("rate", 0.0, "0/s", "0.0"),
        ("rate", 0.04, "0.04/s", "0.0"),
        ("rate", 1.998, "2.0/s", "2.0"),
        ("rate", 162.4, "162/s", "162.4"),
        ("rate", 999.7, "1.0 K/s", "999.7"),
        ("rate", 1234.0, "1.2 K/s", "1234.0"),
        ("byte_rate", 3.4 * 1024 * 1024, "3.4 MiB/s", "3565158.4"),
        ("ns", 850, "850 ns", "850ns"),
        ("ns", 12_345, "12.3 µs", "12.3us"),
        ("ns", 1_500_000_000, "1.5 s", "1.5s"),
        ("ns", 3_600_000_000_000, "3600 s", "3600s"),
        ("percent", 12.34, "12.3%", "12.3%"),
        ("text", 4711, "4711", "4711"),
        ("text", ["sh", "-c", "echo 'hi'", ""], "sh -c \"echo 'hi'\" ''", "sh -c \"echo 'hi'\" ''"),
        ("text", ["$x'", "\n"], "'$x'\"'\"'' '\\n'", "'$x'\"'\"'' '\\n'"),
        ("text", True, "yes", "yes"),
        ("count", None, "-", "-"),
        ("rate", None, "-", "-"),
        ("text", None, "-", "-"),
    ],
)
def test_values_by_kind(kind, value, shown, exact):
    assert draw.format_value(kind, value) == shown
    assert draw.format_value(kind, value, exact=True) == exact


def test_no_number_is_wider_than_eleven_cells():
    """Columns stay narrow whatever is counted."""
    for kind in ("count", "bytes", "rate", "byte_rate", "ns"):
        for power in range(64):
            for value in (2**power - 1, 2**power, 2**power * 0.9999, 10 ** (power % 20)):
                if kind == "ns" and value > 10**17:  # three years
                    continue
                assert len(draw.format_value(kind, value)) <= 11, (kind, value)


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0.04, "0.0 s"),
        (9.96, "10 s"),
        (59.94, "1:00"),
        (60, "1:00"),
        (185, "3:05"),
        (7385, "2:03:05"),
        (90_000, "1 d 01:00:00"),
    ],
)
def test_elapsed(seconds, shown):
    assert draw.format_elapsed(seconds) == shown


def test_bars_fill_their_share():
    assert draw.bar(0, 8) == " " * 8
    assert draw.bar(1, 8) == "█" * 8
    assert draw.bar(0.5, 8) == "████    "
    assert draw.bar(0.5 + 1 / 16, 8) == "████▌   "
    assert draw.bar(0.00001, 8) == "▏       ", "something is not nothing"
    assert draw.bar(7.0, 8) == "█" * 8
    assert draw.bar(0.5, 8, ascii=True) == "####    "
    assert draw.bar(0.00001, 8, ascii=True) == "#       "


def test_sparkline_shows_the_last_values_and_tells_one_packet_from_none():
    assert draw.sparkline([0, 1, 7000], 10) == "▁▂█"
    assert draw.sparkline([9, 9, 1, 1], 2) == "██"
    assert draw.sparkline([None, 0, 0], 3) == " ▁▁"
    assert draw.sparkline([], 5) == draw.sparkline([1], 0) == ""
    assert draw.sparkline([0, 1, 7000], 10, ascii=True).isascii()


@pytest.mark.parametrize(
    ("low", "high", "unit", "shown"),
    [
        (0, 0, "bytes", "0"),
        (64, 127, "bytes", "64-127"),
        (32768, 65535, "bytes", "32768-65535"),
        (65536, 131071, "bytes", "64K-128K"),
        (1 << 20, (1 << 21) - 1, "bytes", "1M-2M"),
        (512, 1023, "ns", "512ns..1µs"),
        (1024, 2047, "ns", "1µs..2µs"),
        (8192, 16383, "ns", "8.2µs..16µs"),
        (1 << 20, (1 << 21) - 1, "us", "1s..2.1s"),
        (4, 7, "packets", "4-7"),
    ],
)
def test_bucket_labels(low, high, unit, shown):
    assert draw.bucket_label(low, high, unit) == shown


def test_cells_are_what_a_terminal_takes():
    assert cells("abc") == cells("größ") - 1 == 3
    assert cells("名前") == 4
    assert cells("e\u0301") == 1
    assert cells("▁█…") == 3


def test_crop_keeps_to_the_width_and_marks_the_cut():
    assert crop("abcdef", 6) == "abcdef"
    assert crop("abcdef", 4) == "abc…"
    assert crop("abcdef", 4, ascii=True) == "abc~"
    assert crop("名前プロセス", 6) == "名前…"
    assert crop("abc", 0) == ""
