"""What check-system found about one thing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at.

    ``status`` is "ok", "warn" (works, with less), "fail" (something cannot work) or "info";
    ``found`` what is there, None where it cannot be known; ``affects`` what depends on it;
    ``remedy`` what to type where there is something to mend; ``probed`` how it was found out.
    """

    group: str
    name: str
    status: str
    found: str | None
    affects: str
    probed: str
    remedy: str | None = None

    def as_dict(self) -> dict[str, Any]:
        return {
            "group": self.group,
            "name": self.name,
            "status": self.status,
            "found": self.found,
            "affects": self.affects,
            "remedy": self.remedy,
            "probed": self.probed,
        }
