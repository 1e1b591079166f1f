"""Values as the reader sees them: numbers with units, bars, sparklines, safe text.

Pure functions from values to strings.  ``ascii`` asks for characters that every terminal has,
``exact`` for plain numbers that a program can read again.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from datetime import datetime
from typing import Any

UNKNOWN = "-"

_BLOCKS = " ▁▂▃▄▅▆▇█"
_EIGHTHS = " ▏▎▍▌▋▊▉█"
_ASCII_BLOCKS = " .:-=+*#@"


def printable(text: str, ascii: bool = False) -> str:
    """``text`` with everything that a terminal might obey, or not show, escaped visibly.

    Control characters and bytes that were no UTF-8 become ``\\xNN``; direction marks, zero-width
    and private characters ``\\uNNNN``.  Names come from the kernel as any process chose them.
    """
    if text.isprintable() and (not ascii or text.isascii()):
        return text
    return "".join(
        [
            each if each.isprintable() and (not ascii or each.isascii()) else _escape(each)
            for each in text
        ]
    )


def _escape(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # PEP 383: the byte code - 0xDC00 was no UTF-8
        return f"\\x{code - 0xDC00:02x}"
    if code < 0x100:
        return {"\n": "\\n", "\t": "\\t", "\r": "\\r"}.get(character, f"\\x{code:02x}")
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def format_text(value: Any, ascii: bool = False) -> str:
    """Any value as text; a list (arguments) joined by spaces and quoted as a shell wants it."""
    if value is None:
        return UNKNOWN
    if isinstance(value, str):
        return printable(value, ascii)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, bytes):
        return printable(value.decode("utf-8", "surrogateescape"), ascii)
    if isinstance(value, (list, tuple)):
        return printable(" ".join([_quote(str(each)) for each in value]), ascii)
    if isinstance(value, float):
        return f"{value:.3f}".rstrip("0").rstrip(".")
    return printable(str(value), ascii)


def _quote(word: str) -> str:
    """``word`` as one word for a shell, in double quotes where these are easier to read."""
    if "'" in word and not any(each in '"$`\\!' for each in word):
        return f'"{word}"'
    return shlex.quote(word)


def words(name: str) -> str:
    """A field's name as a person writes it."""
    return name.replace("_", " ")


def format_count(value: float) -> str:
    """A count: exact with separators up to ten million, then ``12.3 M``."""
    if value < 10_000_000:
        return f"{value:,.0f}" if value == int(value) else f"{value:,.1f}"
    return _scaled(value, 1000, ("", " K", " M", " G", " T", " P", " E"))


def format_bytes(value: float) -> str:
    """``512 B``, ``3.4 KiB``."""
    return _scaled(value, 1024, (" B", " KiB", " MiB", " GiB", " TiB", " PiB", " EiB"))


def format_rate(value: float) -> str:
    """Things per second: ``0.4/s``, ``162/s``, ``1.2 K/s``."""
    return _scaled(value, 1000, ("/s", " K/s", " M/s", " G/s", " T/s", " P/s", " E/s"))


def format_byte_rate(value: float) -> str:
    """``512 B/s``, ``3.4 MiB/s``."""
    return format_bytes(value) + "/s"


def format_ns(value: float, ascii: bool = False) -> str:
    """Nanoseconds: ``850 ns``, ``12.3 µs``, ``1.5 s``."""
    return _scaled(value, 1000, (" ns", " us" if ascii else " µs", " ms", " s"))


def format_percent(value: float) -> str:
    """A number of hundredths: ``12.3%``."""
    return f"{value:.1f}%"


def format_time(value: float) -> str:
    """Seconds since the epoch as local time of day: ``14:00:00.123``."""
    return datetime.fromtimestamp(value).isoformat(" ", "milliseconds")[11:]


def format_elapsed(seconds: float) -> str:
    """``0.4 s``, ``12 s``, ``3:05``, ``2:03:05``, ``4 d 02:03:05``."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    minutes, second = divmod(round(seconds), 60)
    if not minutes:
        return f"{second} s"
    hours, minute = divmod(minutes, 60)
    if not hours:
        return f"{minute}:{second:02}"
    days, hour = divmod(hours, 24)
    if not days:
        return f"{hour}:{minute:02}:{second:02}"
    return f"{days} d {hour:02}:{minute:02}:{second:02}"


def _scaled(value: float, step: int, units: Sequence[str]) -> str:
    """Two or three significant digits and the largest unit of which there is one."""
    last = len(units) - 1
    number, unit = float(value), 0
    while number >= step - 0.5 and unit < last:
        number /= step
        unit += 1
    if not unit and (number >= 9.95 or isinstance(value, int) or not number):
        return f"{number:.0f}{units[0]}"
    if not unit and number < 0.1:
        return f"{number:.2g}{units[0]}"
    return f"{number:.0f}{units[unit]}" if number >= 99.95 else f"{number:.1f}{units[unit]}"


_FORMATS = {
    "count": format_count,
    "bytes": format_bytes,
    "rate": format_rate,
    "byte_rate": format_byte_rate,
    "percent": format_percent,
    "time": format_time,
}

NUMERIC = frozenset(_FORMATS) - {"time"} | {"ns"}
"""Kinds of column that are set flush right."""


def format_value(kind: str, value: Any, *, exact: bool = False, ascii: bool = False) -> str:
    """``value`` as a column of that ``kind`` shows it (see Column); ``-`` for None."""
    if value is None:
        return UNKNOWN
    if kind == "text" or isinstance(value, str):
        return format_text(value, ascii)
    if kind == "ns":
        text = format_ns(value, ascii or exact)
        return text.replace(" ", "") if exact else text
    if exact and kind in ("count", "bytes"):
        return str(value) if isinstance(value, int) else format_text(value)
    if exact and kind in ("rate", "byte_rate"):
        return f"{value:.1f}"
    formatter = _FORMATS.get(kind)
    return formatter(value) if formatter else format_text(value, ascii)


def bar(fraction: float, width: int, ascii: bool = False) -> str:
    """A bar that fills ``fraction`` (0 to 1) of ``width`` cells, padded to ``width``.

    What is more than nothing shows as something.
    """
    fraction = min(max(fraction, 0.0), 1.0)
    if ascii:
        full = round(fraction * width)
        return ("#" * (full or (1 if fraction else 0))).ljust(width)
    eighths = round(fraction * width * 8) or (1 if fraction else 0)
    full, rest = divmod(eighths, 8)
    return ("█" * full + (_EIGHTHS[rest] if rest else "")).ljust(width)


def sparkline(values: Sequence[float | None], width: int, ascii: bool = False) -> str:
    """The last ``width`` values as one row of blocks, the highest as high as can be.

    None is a gap and 0 the lowest block; anything above 0 is higher, so that one packet shows.
    """
    shown = values[-width:] if width > 0 else ()
    highest = max([value for value in shown if value is not None], default=0) or 1
    blocks = _ASCII_BLOCKS if ascii else _BLOCKS
    steps = len(blocks) - 2
    return "".join(
        [
            " " if value is None else blocks[1 + math.ceil(value / highest * steps)]
            for value in shown
        ]
    )


def bucket_label(low: int, high: int, unit: str, ascii: bool = False) -> str:
    """What a histogram's bucket holds: ``64-127`` bytes, ``64K-128K`` bytes, ``1µs..2µs``."""
    scale = _NS.get(unit)
    if scale:
        edge = high + 1 if high > low else high
        return f"{_short_ns(low * scale, ascii)}..{_short_ns(edge * scale, ascii)}"
    if low == high:
        return str(low)
    for shift, letter in ((30, "G"), (20, "M"), (10, "K")):
        if low >= 64 * 1024 and low >= 1 << shift:
            return f"{low >> shift}{letter}-{high + 1 >> shift}{letter}"
    return f"{low}-{high}"


_NS = {"ns": 1, "us": 1000, "ms": 1_000_000, "s": 1_000_000_000}


def _short_ns(value: int, ascii: bool) -> str:
    """Two significant digits at least: ``0``, ``512ns``, ``4.1µs``, ``131ms``."""
    if not value:
        return "0"
    number, unit = float(value), 0
    while number >= 999.5 and unit < 3:
        number /= 1000
        unit += 1
    digits = f"{number:.0f}" if number >= 9.95 else f"{number:.1f}".removesuffix(".0")
    return digits + ("ns", "us" if ascii else "µs", "ms", "s")[unit]
