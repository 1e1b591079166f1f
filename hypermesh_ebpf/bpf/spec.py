"""What is to be made in the kernel, as values: maps and programs before they are loaded."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

PERF_COUNTERS = {"kind": "perf_counters"}
"""``value_desc`` of a perf event array that holds counters to be read by the program, no events."""


@dataclass(frozen=True, slots=True)
class MapSpec:
    """A map to create: sizes in bytes.

    ``key_desc`` and ``value_desc`` describe the types of its keys and values: as BCC does, or as
    :mod:`hypermesh_ebpf.bpf.types` does; those of a ring or perf buffer's records are under
    ``value_desc``.  ``histogram``: the values are counts by the key's power of two.  ``inner``
    names the map that is the pattern for those in a map of maps.  ``pinned`` is the path where the
    source wants the map to be found and kept, "" if nowhere.
    """

    name: str
    type: int
    key_size: int
    value_size: int
    max_entries: int
    flags: int
    key_desc: Any
    value_desc: Any
    histogram: bool = False
    inner: str = ""
    pinned: str = ""


@dataclass(frozen=True, slots=True)
class ProgramSpec:
    """A program: its instructions, and (byte offset, index into the maps) of each map reference.

    ``kind`` is one of :data:`hypermesh_ebpf.attach_type.KINDS`, None where only the attach tells;
    ``attach`` the attach point that the source names, as text.
    """

    name: str
    instructions: bytes
    map_refs: tuple[tuple[int, int], ...]
    kind: str | None = None
    attach: str | None = None


def pack_program(spec: ProgramSpec) -> dict[str, Any]:
    """The program as plain data, for a message."""
    return {**asdict(spec), "instructions": base64.b64encode(spec.instructions).decode()}


def unpack_program(data: Mapping[str, Any]) -> ProgramSpec:
    """The program that :func:`pack_program` told."""
    refs = tuple((offset, index) for offset, index in data["map_refs"])
    code = base64.b64decode(data["instructions"])
    return ProgramSpec(**{**data, "instructions": code, "map_refs": refs})
