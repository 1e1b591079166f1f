"""Kernel addresses to names, for stack traces, by /proc/kallsyms.

Some 200,000 names: 0.1 s and 15 MB, once in a process's life, when the first one is asked for.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

_KALLSYMS = "/proc/kallsyms"
_KERNEL = 1 << 63  # addresses of the kernel have the highest bit set, on 64-bit machines


class KernelSymbols:
    """The functions of the kernel and its modules, by address."""

    def __init__(self, lines: Sequence[bytes]) -> None:
        found = []
        for line in lines:
            address, kind, name = line.split(None, 2)
            if kind in b"tTwW":
                found.append((int(address, 16), name.split(b"\t", 1)[0]))
        found.sort()
        self._addresses = array("Q", [address for address, _name in found])
        self._names = b"\n".join(name for _address, name in found).split(b"\n")

    def name(self, address: int) -> str | None:
        """``do_sys_openat2+0x85``; None for what is no address of the kernel, or not told."""
        if address < _KERNEL or not self._addresses or not self._addresses[-1]:
            return None  # the addresses are hidden from us (kernel.kptr_restrict): all are 0
        at = bisect_right(self._addresses, address) - 1
        if at < 0 or not self._addresses[at]:
            return None
        offset = address - self._addresses[at]
        name = self._names[at].decode(errors="replace")
        return f"{name}+{offset:#x}" if offset else name


@lru_cache(maxsize=1)
def kernel_symbols() -> KernelSymbols:
    """The running kernel's; none at all where /proc/kallsyms cannot be read."""
    try:
        with open(_KALLSYMS, "rb") as file:
            return KernelSymbols(file.read().splitlines())
    except OSError:
        return KernelSymbols(())


def name_frames(frames: Sequence[Any]) -> list[Any]:
    """A stack trace with the kernel's functions by name; other addresses stay as they are."""
    return [_name_frame(frame) for frame in frames]


def _name_frame(frame: Any) -> Any:
    if not isinstance(frame, str) or not frame.startswith("0x"):
        return frame  # with build ids: where in a file it is, not at which address
    return kernel_symbols().name(int(frame, 16)) or frame
