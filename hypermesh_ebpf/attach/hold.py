"""What has to be taken off again: an attachment made through netlink, which belongs to nobody.

A value that crosses process boundaries: the worker names it before it attaches, the ledger writes
it down, the guard keeps it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class TcFilter:
    """Where a filter is on its interface: tc(8)'s parent, priority and handle.

    ``clsact_ours``: hmebpf made the interface's clsact, which goes with its last filter.
    """

    parent: int
    priority: int
    handle: int
    clsact_ours: bool


@dataclass(frozen=True, slots=True)
class Hold:
    """A program on an interface; ``filter`` is None for XDP.

    Two are equal that mean the same attachment, whichever descriptor of the program they have.
    """

    ifindex: int
    iface: str
    prog_id: int
    prog_fd: int = field(compare=False)
    filter: TcFilter | None = None

    @property
    def kind(self) -> str:
        """ "xdp" or "tc"."""
        return "tc" if self.filter else "xdp"

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], prog_fd: int) -> Hold:
        """What dataclasses.asdict() told; the descriptor is the receiver's own."""
        found = data.get("filter")
        return cls(
            data["ifindex"],
            data["iface"],
            data["prog_id"],
            prog_fd,
            TcFilter(**found) if found else None,
        )
