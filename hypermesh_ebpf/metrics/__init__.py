"""What was read from a session, as values: samples, events, loss, rates and histograms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Value = int | float | str | bool | None | Sequence[Any] | Mapping[str, Any]
Row = Mapping[str, Value]
