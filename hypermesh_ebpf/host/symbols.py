"""Kernel functions by name, from /proc/kallsyms."""

from __future__ import annotations

import os
from functools import lru_cache

from hypermesh_ebpf.errors import Unsupported, UsageError
from hypermesh_ebpf.host import architecture, filesystems
from hypermesh_ebpf.spelling import find_close

_KALLSYMS = "/proc/kallsyms"
_CHUNK = 1 << 16


@lru_cache(maxsize=64)
def find_function(*candidates: str) -> str | None:
    """The first of ``candidates`` that is a kernel function here, None if none is.

    Reads /proc/kallsyms, some 5 MB that the kernel formats anew (13-45 ms), only as far as the
    first candidate.  A name alone is not proof: its address may be hidden from us, and the
    function may be one that no kprobe is allowed on (:func:`is_blacklisted`).
    """
    wanted = {name: f" {name}".encode() for name in candidates}
    seen: set[str] = set()
    tail = b"\n"
    try:
        with open(_KALLSYMS, "rb", buffering=0) as file:
            while chunk := file.read(_CHUNK):
                text = tail + chunk
                for name, needle in wanted.items():
                    if name not in seen and _is_function_in(text, needle):
                        seen.add(name)
                if candidates[0] in seen:
                    return candidates[0]
                tail = text[text.rfind(b"\n") :]
    except OSError:
        return None
    return next((name for name in candidates if name in seen), None)


def _is_function_in(text: bytes, needle: bytes) -> bool:
    """True if a line "address [tTwW] name" or "... name\\t[module]" ends with ``needle``."""
    at = text.find(needle)
    while at >= 0:
        after = text[at + len(needle) : at + len(needle) + 1]
        if after in (b"\n", b"\t") and text[at - 1 : at] in (b"t", b"T", b"w", b"W"):
            return True
        at = text.find(needle, at + 1)
    return False


def find_variants(name: str) -> list[str]:
    """What the compiler made of function ``name`` instead: "name.isra.0", "name.constprop.0"."""
    needle = f" {name}.".encode()
    try:
        with open(_KALLSYMS, "rb") as file:
            lines = [line for line in file if needle in line]
    except OSError:
        return []
    return [line.split()[2].decode() for line in lines][:3]


def find_similar(name: str) -> list[str]:
    """Functions whose names are spelled nearly like this one, the likeliest first.

    Only for an error's words: it reads all of kallsyms.
    """
    ending, beginning = name[-4:].encode(), name[:4].encode()
    known = set()
    try:
        with open(_KALLSYMS, "rb") as file:
            for line in file:
                _, kind, found, *_ = line.split()
                if (
                    kind in b"tTwW"
                    and abs(len(found) - len(name)) <= 3
                    and (found.startswith(beginning) or found.endswith(ending))
                ):
                    known.add(found.decode())
    except OSError:
        return []
    return find_close(name, known, 3, 0.7)


def resolve_syscall_function(name: str, *, compat: bool = False) -> str:
    """The kernel function behind system call ``name``: "execve" is "__x64_sys_execve" on x86-64.

    Raises Unsupported where the kernel has none of the names that architectures use.
    """
    name_of = architecture.compat_syscall_functions if compat else architecture.syscall_functions
    candidates = name_of(name)
    found = find_function(*candidates) if candidates else None
    if found is None:
        raise Unsupported(
            f"find the function of system call {name}",
            f"none of {', '.join(candidates)} is in /proc/kallsyms",
            f"use the tracepoint syscalls:sys_enter_{name}",
        )
    return found


def resolve_target(target: str) -> str:
    """A hook's target, "syscall:NAME" and "compat_syscall:NAME" replaced by the function's name.

    Raises Unsupported.
    """
    prefix, _, name = target.partition(":")
    if prefix not in ("syscall", "compat_syscall"):
        return target
    name, plus, offset = name.partition("+")
    return resolve_syscall_function(name, compat=prefix == "compat_syscall") + plus + offset


def split_offset(target: str) -> tuple[str, int]:
    """ "do_unlinkat+0x4" as name and number.  Raises UsageError."""
    name, _, offset = target.partition("+")
    try:
        return name, int(offset, 0) if offset else 0
    except ValueError:
        cause = f"{offset!r} is no number"
        raise UsageError(f"function {target}", cause, f"for instance {name}+4") from None


@lru_cache(maxsize=1)
def _blacklist() -> frozenset[str]:
    try:
        directory = filesystems.open_filesystem(filesystems.DEBUGFS)
    except Unsupported:
        return frozenset()
    try:
        text = filesystems.read_at(directory, "kprobes/blacklist")
    except OSError:
        return frozenset()
    finally:
        os.close(directory)
    return frozenset(line.split()[-1] for line in text.splitlines() if line)


def is_blacklisted(function: str) -> bool:
    """True if kprobes are known to be forbidden on ``function`` (debugfs kprobes/blacklist)."""
    return function in _blacklist()
