"""The Image: a compiled program set as plain values, ready to be loaded by any process.

Instructions still refer to maps by their place in ``maps``: the loader patches in descriptors.
Nothing here is specific to a running kernel's ids, so an image can be kept in a file.
"""

from __future__ import annotations

import base64
import json
from dataclasses import asdict, dataclass

from hypermesh_ebpf.bpf.spec import MapSpec, ProgramSpec

FORMAT = 2
"""Version of :meth:`Image.to_bytes`; part of the cache key."""


@dataclass(frozen=True, slots=True)
class Image:
    """Maps and programs of one source, with its licence as the kernel wants to know it."""

    name: str
    license: str
    maps: tuple[MapSpec, ...]
    programs: tuple[ProgramSpec, ...]

    def program(self, name: str) -> ProgramSpec:
        """The program of that name.  Raises KeyError."""
        for program in self.programs:
            if program.name == name:
                return program
        raise KeyError(f"{self.name} has no program {name!r}")

    def to_bytes(self) -> bytes:
        """The image as a JSON document."""
        data = asdict(self)
        for program in data["programs"]:
            program["instructions"] = base64.b64encode(program["instructions"]).decode()
        return json.dumps(data).encode()

    @classmethod
    def from_bytes(cls, raw: bytes) -> Image:
        """The image that :meth:`to_bytes` wrote.  Raises ValueError, KeyError or TypeError."""
        data = json.loads(raw)
        return cls(
            data["name"],
            data["license"],
            tuple(MapSpec(**spec) for spec in data["maps"]),
            tuple(
                ProgramSpec(
                    spec["name"],
                    base64.b64decode(spec["instructions"], validate=True),
                    tuple((offset, index) for offset, index in spec["map_refs"]),
                    spec["kind"],
                    spec["attach"],
                )
                for spec in data["programs"]
            ),
        )


@dataclass(frozen=True, slots=True)
class LoadedSource:
    """A source's maps and programs in the kernel, by descriptors that are the receiver's to close.

    A program without a descriptor is loaded when it is attached.  ``notes`` are what the user
    should hear of (a program that was left out), ``tail_called`` the programs that stand in a
    program array of the source: they run by tail calls and need no hook of their own.
    """

    name: str
    license: str
    maps: tuple[tuple[MapSpec, int], ...]
    programs: tuple[tuple[ProgramSpec, int | None], ...]
    notes: tuple[str, ...] = ()
    tail_called: tuple[str, ...] = ()
