"""What is to be made in the kernel, as values: maps and programs before they are loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class MapSpec:
    """A map to create: sizes in bytes; ``key_desc`` and ``value_desc`` are BCC's descriptions."""

    name: str
    type: int
    key_size: int
    value_size: int
    max_entries: int
    flags: int
    key_desc: Any
    value_desc: Any


@dataclass(frozen=True, slots=True)
class ProgramSpec:
    """A program: its instructions, and (byte offset, index into the maps) of each map reference."""

    name: str
    instructions: bytes
    map_refs: tuple[tuple[int, int], ...]
