"""What somebody may have meant who misspelt a name."""

from __future__ import annotations

from collections.abc import Iterable


def find_close(word: str, known: Iterable[str], most: int = 3, cutoff: float = 0.6) -> list[str]:
    """Up to ``most`` of the known words that resemble this one, best first.

    ``cutoff`` is how much they have to, from 0 to 1, as :func:`difflib.get_close_matches` has it.
    """
    import difflib  # not needed where nothing was misspelt, and a millisecond of every start

    return difflib.get_close_matches(word, list(known), n=most, cutoff=cutoff)
