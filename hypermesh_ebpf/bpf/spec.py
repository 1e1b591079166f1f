"""What is to be made in the kernel, as values: maps and programs before they are loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class MapSpec:
    """A map to create: sizes in bytes.

    ``key_desc`` and ``value_desc`` describe the types of its keys and values: as BCC does, or as
    :mod:`hypermesh_ebpf.bpf.types` does; those of a ring or perf buffer's records are under
    ``value_desc``.  ``histogram``: the values are counts by the key's power of two.  ``inner``
    names the map that is the pattern for those in a map of maps.
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
