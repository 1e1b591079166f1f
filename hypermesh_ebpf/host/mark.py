"""How a process that uses the library is known as one of ours."""

from __future__ import annotations

import os

MARK = "hmebpf"


def mark_process() -> int:
    """Make this process known as one of ours to every `hmebpf list`, until the descriptor that this
    gives is closed.

    A command line names itself; a program that uses the library does not.
    """
    return os.memfd_create(MARK)
