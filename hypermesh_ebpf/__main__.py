"""``python -m hypermesh_ebpf`` is ``hmebpf``; the command line's way in."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType


def main() -> int:
    """Run the command line; its exit status.

    Ctrl-C is the normal way to end a monitor, also in the tenth of a second in which nothing is
    imported yet, let alone attached; any other command has failed if it was interrupted.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _leave)
    _start_worker(sys.argv[1:])
    from hypermesh_ebpf.cli import main

    status = main()
    # An interrupt that met exec() - dataclasses make their methods by it - is remembered by CPython
    # however it was handled, and would turn the status of `python -m` into 130.
    exec("")
    return status


def _start_worker(arguments: list[str]) -> None:
    """Start a worker for a command that will ask one; should its options be wrong, the worker ends
    with us."""
    from hypermesh_ebpf import monitors

    if not arguments or not {"-h", "--help"}.isdisjoint(arguments):
        return
    if arguments[0] in monitors.names():
        from hypermesh_ebpf import spawn

        spawn.spawn_ahead(arguments[0])
    elif arguments[0] in ("load", "run"):
        from hypermesh_ebpf import channel, spawn

        spawn.spawn_ahead(channel.PROGRAMS)


def _leave(number: int, frame: FrameType | None) -> None:
    """Imports nothing: what is wanted may be half imported just now."""
    command = sys.argv[1] if len(sys.argv) > 1 else ""
    declaration = os.path.join(os.path.dirname(__file__), "monitors", command.replace("-", "_"))
    live = command in ("load", "run", "top") or os.path.exists(declaration + ".py")
    os._exit(0 if live and "--pin" not in sys.argv else 1)


if __name__ == "__main__":
    sys.exit(main())
