"""What a worker will need to attach with, loaded while it does other things.

libbcc brings LLVM, 55 ms of mapping and relocating files in C, in which Python's other threads run.
"""

from __future__ import annotations

import ctypes
import threading

from hypermesh_ebpf import monitors

# Kinds of hooks that libbcc attaches; XDP and TC are pyroute2's.
_BY_LIBBCC = {"kprobe", "kretprobe", "tracepoint", "raw_tracepoint", "fentry", "fexit", "lsm"}


def begin(monitor: str) -> None:
    """Start loading what the hooks of this monitor are attached with; returns at once."""
    kinds = {hook.kind for rung in monitors.load(monitor).rungs for hook in rung.hooks}
    if kinds & _BY_LIBBCC:
        threading.Thread(target=_load_libbcc, daemon=True).start()


def _load_libbcc() -> None:
    """Where it cannot be loaded, the one who attaches will say so."""
    try:
        ctypes.CDLL("libbcc.so.0")
    except OSError:
        return
