"""Users by number and name."""

from __future__ import annotations

import pwd
from functools import lru_cache

from hypermesh_ebpf.errors import UsageError


@lru_cache(maxsize=1024)
def name_user(uid: int) -> str | None:
    """The user's name, None for a uid that has none here."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return None


def find_uid(text: str) -> int:
    """The uid of a user given by number or name, as in ``--uid``.  Raises UsageError."""
    if text.isdecimal() and int(text) < 1 << 32:
        return int(text)
    try:
        return pwd.getpwnam(text).pw_uid
    except KeyError:
        raise UsageError(
            f"--uid {text}", "no such user", "give a number, or a name that `getent passwd` lists"
        ) from None
