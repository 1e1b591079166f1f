"""JSON lines: one object per line, as other people's scripts read it.

Shapes are those of docs/output.md.  Output is UTF-8 whatever the locale says (RFC 8259, 8.1).
Names in the kernel are bytes: one that is no UTF-8 comes here with surrogate escapes, and each such
byte is written as the four characters ``\\xNN``, as the tables show it.  On a terminal everything
beyond ASCII is written as ``\\uNNNN``, because a terminal obeys some of these characters.  A number
that is none (NaN) is null.
"""

from __future__ import annotations

import codecs
import math
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timezone
from itertools import islice
from json.encoder import JSONEncoder
from typing import Any

from hypermesh_ebpf.errors import OutputError
from hypermesh_ebpf.metrics.event_log import EventLog, Records
from hypermesh_ebpf.metrics.sample import End, Event, Histogram, Overhead, Sample, Start
from hypermesh_ebpf.output.record_lines import JsonLines
from hypermesh_ebpf.output.writer import OutputClosed, Writer

_BATCH = 1000


def format_time(seconds: float) -> str:
    """Seconds since the epoch as RFC 3339: ``2026-11-23T14:00:00.123456Z``."""
    moment = datetime.fromtimestamp(seconds, timezone.utc)
    return moment.isoformat(timespec="microseconds")[:-6] + "Z"


class JsonSink:
    """Writes every line at once and in the order it was given.

    ``terminal`` keeps the output to ASCII.  A monitor's own event fields may not be called type,
    time or monitor.
    """

    def __init__(self, writer: Writer, *, terminal: bool = False) -> None:
        self.lost = 0
        self._writer = writer
        encoder = JSONEncoder(
            ensure_ascii=False,
            check_circular=False,
            allow_nan=False,
            separators=(",", ":"),
            default=_plain,
        )
        self._encode = encoder.encode
        self._records = JsonLines(self._encode_finite)
        self._charset = "ascii" if terminal else "utf-8"

    def start(self, start: Start) -> None:
        self._write(
            [
                {
                    "type": "start",
                    "time": format_time(start.time),
                    "monitor": start.monitor,
                    "target": start.target,
                    "hooks": start.hooks,
                    "degraded": start.degraded.as_dict() if start.degraded else None,
                    "prog_ids": start.prog_ids,
                }
            ]
        )

    def events(self, events: Sequence[Event]) -> None:
        left = len(events)
        try:
            for texts in self._batches(events):
                self._write_lines(texts)
                left -= len(texts)
        except (OutputClosed, OutputError):
            self.lost += left
            raise

    def _batches(self, events: Sequence[Event]) -> Iterator[list[str]]:
        """The events' lines, so many at a time that a reader sees them soon."""
        parts = events.parts if isinstance(events, EventLog) else [events]
        for part in parts:
            if isinstance(part, Records) and part.regular:
                head = {"type": "event", "time": format_time(part.time), "monitor": part.monitor}
                for first in range(0, len(part.rows), _BATCH):
                    yield self._records.lines(part, part.rows[first : first + _BATCH], head)
                continue
            each = iter(part.events() if isinstance(part, Records) else part)
            while batch := list(islice(each, _BATCH)):
                yield self._encode_all(
                    [
                        {
                            "type": "event",
                            "time": format_time(event.time),
                            "monitor": event.monitor,
                            **event.fields,
                        }
                        for event in batch
                    ]
                )

    def sample(self, sample: Sample) -> None:
        line: dict[str, Any] = {
            "type": "sample",
            "time": format_time(sample.time),
            "monitor": sample.monitor,
            "target": sample.target,
            "elapsed_s": round(sample.elapsed_s, 3),
            "totals": sample.totals,
            "rows": list(sample.rows),
            "loss": sample.loss.as_dict(),
        }
        line |= _overhead(sample.overhead)
        if sample.histograms:
            line["histograms"] = [_histogram(each) for each in sample.histograms]
        left_out = {each.name: each.left_out for each in sample.tables if each.left_out != 0}
        not_shown = {each.name: each.reason for each in sample.tables if each.reason is not None}
        line |= {"left_out": left_out} if left_out else {}
        line |= {"not_shown": not_shown} if not_shown else {}
        self._write([line])

    def end(self, end: End) -> None:
        if self._writer.gone:
            return
        self._write(
            [
                {
                    "type": "end",
                    "time": format_time(end.time),
                    "monitor": end.monitor,
                    "target": end.target,
                    "reason": end.reason,
                    "loss": end.loss.as_dict(),
                    **_overhead(end.overhead),
                }
            ]
        )

    def close(self) -> None:
        """Nothing is held back, so there is nothing to do."""

    def _write(self, objects: list[dict[str, Any]]) -> None:
        self._write_lines(self._encode_all(objects))

    def _encode_all(self, objects: list[dict[str, Any]]) -> list[str]:
        encode = self._encode
        try:
            return [encode(each) for each in objects]
        except ValueError:  # NaN or an infinity somewhere: JSON has no word for them
            return [encode(_finite(each)) for each in objects]

    def _encode_finite(self, value: Any) -> str:
        return self._encode_all([value])[0]

    def _write_lines(self, lines: list[str]) -> None:
        self._writer.write(("\n".join(lines) + "\n").encode(self._charset, "hmebpf-json"))


def _overhead(overhead: Overhead | None) -> dict[str, Any]:
    return {} if overhead is None else {"overhead": overhead.as_dict()}


def _histogram(histogram: Histogram) -> dict[str, Any]:
    drawn = {"name": histogram.name, "unit": histogram.unit, "buckets": histogram.buckets}
    return drawn if histogram.key is None else {**drawn, "key": histogram.key}


def _plain(value: Any) -> Any:
    """What the encoder does not know: mappings that are no dicts, bytes, numpy's scalars, sets."""
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, (bytes, bytearray)):
        return value.decode("utf-8", "surrogateescape")
    if hasattr(value, "item"):
        return value.item()
    return list(value)


def _finite(value: Any) -> Any:
    """``value`` with None in place of every float that is not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return value


def _escape_all(error: UnicodeError) -> tuple[str, int]:
    """An error handler for encoding JSON text: escapes for what the charset cannot hold."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(map(_escape, error.object[error.start : error.end])), error.end


def _escape(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # PEP 383: the byte code - 0xDC00 was no UTF-8
        return f"\\\\x{code - 0xDC00:02x}"
    if 0xD800 <= code <= 0xDFFF:
        return "\\ufffd"
    if code > 0xFFFF:
        code -= 0x10000
        return f"\\u{0xD800 + (code >> 10):04x}\\u{0xDC00 + (code & 0x3FF):04x}"
    return f"\\u{code:04x}"


codecs.register_error("hmebpf-json", _escape_all)
