"""What an object's section names say: the kind of hook, and the place to attach to.

The names are libbpf's (https://docs.kernel.org/bpf/libbpf/program_types.html); those that came
later than a libbpf in use (tc/ingress, tcx/egress: 1.3) are understood here all the same, and so
are names of libbpf before 1.0 that only began like one of today's (xdp_pass, classifier_a).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

# BPF_PROG_TYPE_* and an attach type (include/uapi/linux/bpf.h)
SCHED_CLS, SCHED_ACT, RAW_TRACEPOINT, RAW_TRACEPOINT_WRITABLE, TRACING = 3, 4, 17, 24, 26
TRACE_RAW_TP = 23

NEEDS_TARGET = ("fentry", "fexit", "lsm")
"""Kinds whose target is part of the loaded program."""


@dataclass(frozen=True, slots=True)
class Place:
    """What a section's name says of its programs.

    ``kind`` is None for what cannot be attached here.  ``attach`` is an attach point as text; its
    target is empty where the name tells only an option ("tc:,direction=egress").
    """

    kind: str | None
    attach: str | None = None


def parse_section(section: str) -> Place | None:
    """The place that a section's name stands for; None for a name that means nothing."""
    name = section.removeprefix("?")  # libbpf: not to be loaded unless asked for
    for pattern, place in _RULES:
        found = pattern.fullmatch(name)
        if found:
            return place(found)
    return None


def _target(kind: str, prefix: str = "") -> Callable[[re.Match[str]], Place]:
    """The rest of the name is the target."""
    return lambda found: Place(kind, f"{kind}:{prefix}{found[1]}" if found[1] else None)


def _kprobe(found: re.Match[str]) -> Place:
    kind, function, offset = found.groups()
    if not function:
        return Place(kind)
    distance = int(offset, 0) if offset else 0
    return Place(kind, f"{kind}:{function}+{distance}" if distance else f"{kind}:{function}")


def _direction(found: re.Match[str]) -> Place:
    return Place("tc", f"tc:,direction={found[1]}")


def _cgroup(found: re.Match[str]) -> Place:
    point = {"sock": "sock_create", "skb": None}.get(found[1], found[1])
    return Place("cgroup", f"cgroup:,attach={point}" if point else None)


def _first(found: re.Match[str]) -> Place:
    """The kind is the first word, and there is no more to it."""
    return Place(found[1])


_RULES: list[tuple[re.Pattern[str], Callable[[re.Match[str]], Place]]] = [
    (re.compile(pattern), place)
    for pattern, place in (
        (r"(xdp)(?:\.frags)?", _first),
        (r"(?:tc|tcx)/(ingress|egress)", _direction),
        (r"tc|classifier|action", lambda _found: Place("tc")),
        (r"(kprobe|kretprobe)(?:/([\w.]+)(?:\+(\w+))?)?", _kprobe),
        (r"ksyscall(?:/(\w+))?", _target("kprobe", "syscall:")),
        (r"kretsyscall(?:/(\w+))?", _target("kretprobe", "syscall:")),
        (
            r"(?:tracepoint|tp)/([\w-]+)/([\w-]+)",
            lambda found: Place("tracepoint", f"tracepoint:{found[1]}:{found[2]}"),
        ),
        (r"tracepoint|tp", lambda _found: Place("tracepoint")),
        (r"(?:raw_tp|raw_tracepoint)(?:\.w)?(?:/(\w+))?", _target("raw_tracepoint")),
        (r"tp_btf(?:/(\w+))?", _target("raw_tracepoint")),
        (r"fentry(?:\.s)?(?:/([\w.]+))?", _target("fentry")),
        (r"fexit(?:\.s)?(?:/([\w.]+))?", _target("fexit")),
        (r"lsm(?:\.s)?(?:/(\w+))?", _target("lsm")),
        (r"uprobe(?:\.s)?(?:/(.+:.+))?", _target("uprobe")),
        (r"uretprobe(?:\.s)?(?:/(.+:.+))?", _target("uretprobe")),
        (r"usdt(?:\.s)?(?:/(.+:.+:.+))?", _target("usdt")),
        (r"(perf_event)", _first),
        (r"cgroup_skb/(ingress|egress)", _cgroup),
        (r"cgroup/(skb|sock|sock_create|sock_release|post_bind4|post_bind6)", _cgroup),
        # libbpf before 1.0
        (r"(xdp|perf_event)_\w+", _first),
        (r"(?:tc|classifier|action)_\w+", lambda _found: Place("tc")),
    )
]
