"""Histograms in the maps of users' programs: by BCC's conventions, and those of libbpf's tools."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hypermesh_ebpf.bpf.maps import TypedMap
from hypermesh_ebpf.bpf.types import flatten, is_number
from hypermesh_ebpf.metrics.histogram import log2_buckets
from hypermesh_ebpf.metrics.sample import Histogram, Row

_LAST_SLOT = 64  # log2 of a number of 64 bits, and one


class Slots:
    """Where a map's histograms are: in its keys (BCC) or in an array of each value (libbpf-tools).

    ``beside``: the values hold more than the histogram.
    """

    def __init__(self, member: str, in_value: bool, beside: bool) -> None:
        self._member, self._in_value, self.beside = member, in_value, beside

    def draw(self, name: str, rows: Sequence[Row]) -> Iterator[Histogram]:
        """A histogram for each section: the rest of the key, or the whole key."""
        if self._in_value:
            drawn = [(row["key"], self._counts(row["value"])) for row in rows]
            first_low, several = 1, len(rows) > 1
        else:
            drawn = self._sections(rows)
            first_low, several = 0, any(key is not None for key, _counts in drawn)
        for key, counts in drawn:
            buckets = _from_zero(log2_buckets(counts, first_low))
            title = f"{name} {_label(key)}" if several else name
            yield Histogram(name, _unit(name), buckets, title, key if several else None)

    def _counts(self, value: Any) -> Sequence[int]:
        counts: Sequence[int] = value[self._member]
        return counts

    def _sections(self, rows: Sequence[Row]) -> list[tuple[Any, Sequence[int]]]:
        """(the rest of the key or None, counts by slot), in the order of these keys."""
        sections: dict[str, tuple[Any, dict[int, int]]] = {}
        for row in rows:
            slot: Any = row["key"]
            count: Any = row["value"]
            section = None
            if isinstance(slot, dict):
                section = {name: part for name, part in slot.items() if name != self._member}
                slot = slot[self._member]
            if is_number(slot) and 0 <= slot <= _LAST_SLOT and is_number(count):
                label = "" if section is None else _label(section)
                sections.setdefault(label, (section, {}))[1][slot] = count
        return [
            (section, [slots.get(slot, 0) for slot in range(max(slots) + 1)])
            for _label, (section, slots) in sorted(sections.items())
        ]


def _from_zero(buckets: tuple[tuple[int, int, int], ...]) -> tuple[tuple[int, int, int], ...]:
    """bpf_log2l() of 0 and of 1 are the same: the bucket that begins with 1 begins with 0."""
    return tuple((0 if (low, high) == (1, 1) else low, high, count) for low, high, count in buckets)


def find_slots(typed: TypedMap) -> Slots | None:
    description = typed.key.description if typed.spec.histogram else typed.value.description
    if typed.spec.histogram:
        if description["kind"] != "struct":
            return Slots("", False, False) if description["kind"] in ("int", "enum") else None
        names = list(typed.key.members)
        # BCC takes the second member, whatever it is called.
        slot = "slot" if "slot" in names else names[1] if len(names) > 1 else ""
        return Slots(slot, False, False) if slot else None
    if description["kind"] != "struct":
        return None
    for member in description["members"]:
        type_ = member["type"]
        if member["name"] == "slots" and type_["kind"] == "array" and _is_number(type_["element"]):
            return Slots("slots", True, len(description["members"]) > 1)
    return None


def _is_number(description: Mapping[str, Any]) -> bool:
    return bool(description["kind"] == "int")


def _unit(name: str) -> str:
    """The unit that a map's name ends with, "" if none."""
    found = re.search(r"_(ns|us|ms|s|bytes)$|^(bytes)$", name.lower())
    return (found[1] or found[2]) if found else ""


def _label(key: Any) -> str:
    """A key in a histogram's title: ``sda``, ``disk=sda op=1``."""
    flat = flatten("", key)
    if len(flat) == 1:
        return str(next(iter(flat.values())))
    return " ".join(f"{name}={value}" for name, value in flat.items())
