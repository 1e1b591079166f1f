"""Where a program is to run: ``EbpfAttachType.xdp(iface="lo")`` as a value, ``xdp:lo`` as text.

The text is ``KIND:TARGET[,OPTION=VALUE...]`` and means the same on the command line, in messages
and between processes::

    xdp:eth0   xdp:eth0,mode=generic,replace   tc:eth0,direction=egress,priority=10
    kprobe:do_unlinkat+4   kretprobe:do_unlinkat   fentry:do_unlinkat   fexit:do_unlinkat
    tracepoint:syscalls:sys_enter_execve   raw_tracepoint:sched_process_exec
    uprobe:/bin/bash:readline   uretprobe:/bin/bash:readline,pid=4711   uprobe:/bin/bash:0x4a10
    usdt:/usr/sbin/mysqld:mysql:query__start   perf_event:cpu-clock,frequency=99
    lsm:bprm_check_security   cgroup:/sys/fs/cgroup/user.slice,attach=egress
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from hypermesh_ebpf.errors import UsageError

KINDS = (
    "xdp",
    "tc",
    "kprobe",
    "kretprobe",
    "tracepoint",
    "raw_tracepoint",
    "fentry",
    "fexit",
    "uprobe",
    "uretprobe",
    "usdt",
    "perf_event",
    "lsm",
    "cgroup",
)

CGROUP_POINTS = ("ingress", "egress", "sock_create", "sock_release", "post_bind4", "post_bind6")

_CHOICES = {
    "mode": ("auto", "native", "generic"),
    "direction": ("ingress", "egress"),
    "attach": CGROUP_POINTS,
}
# option: the least and the most that it can be
_NUMBERS = {
    "priority": (1, 65535),
    "pid": (1, 2**22),
    "cpu": (0, 8191),
    "period": (1, 2**63 - 1),
    "frequency": (1, 1_000_000),
}
# kind: its options with their defaults; None means "not given"
_OPTIONS: dict[str, dict[str, Any]] = {
    "xdp": {"mode": "auto", "replace": False, "link": False},
    "tc": {"direction": "ingress", "priority": None, "link": False},
    "uprobe": {"pid": None},
    "uretprobe": {"pid": None},
    "usdt": {"pid": None},
    "perf_event": {"frequency": None, "period": None, "pid": None, "cpu": None},
    "cgroup": {"attach": "ingress"},
}


@dataclass(frozen=True, slots=True)
class EbpfAttachType:
    """An attach point: ``kind`` (one of :data:`KINDS`), ``target`` in that kind's own notation.

    ``given`` holds the options that differ from their defaults, sorted; :meth:`option` reads one.
    Made by :meth:`parse` or by the constructor named like the kind.  Both raise UsageError for
    what cannot be an attach point; whether this kernel has it, the probes tell.
    """

    kind: str
    target: str
    given: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def make(cls, kind: str, target: str, **options: Any) -> EbpfAttachType:
        """One of that kind, options checked.  Raises UsageError."""
        what = f"attach point {kind}:{target}"
        if kind not in KINDS:
            raise UsageError(what, f"there is no attach type {kind!r}", f"use {', '.join(KINDS)}")
        if not target and kind != "perf_event":
            raise UsageError(what, "it names no target", f"for instance {_EXAMPLES[kind]}")
        if "\0" in target:
            raise UsageError(what.replace("\0", "\\0"), "it has a NUL in it", _EXAMPLES[kind])
        defaults = _OPTIONS.get(kind, {})
        for name, value in options.items():
            _check_option(what, kind, name, value)
        given = {n: v for n, v in options.items() if v is not None and v != defaults[n]}
        if kind in _TARGET_CHECKS:
            _TARGET_CHECKS[kind](what, target)
        if given.get("frequency") and given.get("period"):
            raise UsageError(what, "frequency and period are both given", "give one of them")
        return cls(kind, target, tuple(sorted(given.items())))

    @classmethod
    def parse(cls, text: str) -> EbpfAttachType:
        """The attach point that a text names.  Raises UsageError."""
        kind, _, rest = text.partition(":")
        target, *words = re.split(r"(?<!\\),", rest)
        target = target.replace("\\,", ",")
        options: dict[str, Any] = {}
        for word in words:
            name, has_value, value = word.partition("=")
            options[name] = _parse_value(text, name, value) if has_value else True
        return cls.make(kind, target, **options)

    @staticmethod
    def example(kind: str) -> str:
        """An attach point of that kind, to show how it is written."""
        return _EXAMPLES[kind]

    def __str__(self) -> str:
        options = [name if value is True else f"{name}={value}" for name, value in self.given]
        target = self.target.replace(",", "\\,")  # a path may have commas
        return ",".join([f"{self.kind}:{target}", *options])

    def option(self, name: str) -> Any:
        """The value of one of the kind's options, its default where it was not given."""
        return dict(self.given).get(name, _OPTIONS[self.kind][name])

    @classmethod
    def xdp(
        cls, iface: str, *, mode: str = "auto", replace: bool = False, link: bool = False
    ) -> EbpfAttachType:
        """Packets as an interface receives them.

        ``mode`` is auto, native or generic; ``replace`` takes over from another program; ``link``
        attaches by a kernel link (Linux 5.9), which ends with its last descriptor.
        """
        return cls.make("xdp", iface, mode=mode, replace=replace, link=link)

    @classmethod
    def tc(
        cls,
        iface: str,
        *,
        direction: str = "ingress",
        priority: int | None = None,
        link: bool = False,
    ) -> EbpfAttachType:
        """Packets in traffic control (clsact), "ingress" or "egress"; lower priorities run first.

        ``link`` attaches by a kernel link (TCX, Linux 6.6), which ends with its last descriptor.
        """
        return cls.make("tc", iface, direction=direction, priority=priority, link=link)

    @classmethod
    def kprobe(cls, function: str, offset: int = 0) -> EbpfAttachType:
        """The entry of a kernel function, or the instruction ``offset`` bytes into it."""
        return cls.make("kprobe", f"{function}+{offset}" if offset else function)

    @classmethod
    def kretprobe(cls, function: str) -> EbpfAttachType:
        """The return of a kernel function."""
        return cls.make("kretprobe", function)

    @classmethod
    def tracepoint(cls, category: str, name: str) -> EbpfAttachType:
        """A tracepoint of the kernel, such as ("syscalls", "sys_enter_execve")."""
        return cls.make("tracepoint", f"{category}:{name}")

    @classmethod
    def raw_tracepoint(cls, name: str) -> EbpfAttachType:
        """A tracepoint with its raw arguments."""
        return cls.make("raw_tracepoint", name)

    @classmethod
    def fentry(cls, function: str) -> EbpfAttachType:
        """The entry of a kernel function, by BTF (Linux 5.5)."""
        return cls.make("fentry", function)

    @classmethod
    def fexit(cls, function: str) -> EbpfAttachType:
        """The return of a kernel function with its arguments, by BTF (Linux 5.5)."""
        return cls.make("fexit", function)

    @classmethod
    def uprobe(
        cls, path: str, symbol: str | None = None, offset: int = 0, *, pid: int | None = None
    ) -> EbpfAttachType:
        """A function of a program or library; without ``symbol``, ``offset`` is the file's."""
        return cls.make("uprobe", _place(path, symbol, offset), pid=pid)

    @classmethod
    def uretprobe(
        cls, path: str, symbol: str | None = None, offset: int = 0, *, pid: int | None = None
    ) -> EbpfAttachType:
        """The return of a function of a program or library."""
        return cls.make("uretprobe", _place(path, symbol, offset), pid=pid)

    @classmethod
    def usdt(cls, path: str, provider: str, name: str, *, pid: int | None = None) -> EbpfAttachType:
        """A static probe that a program or library declares."""
        return cls.make("usdt", f"{path}:{provider}:{name}", pid=pid)

    @classmethod
    def perf_event(
        cls,
        event: str = "cpu-clock",
        *,
        frequency: int | None = None,
        period: int | None = None,
        pid: int | None = None,
        cpu: int | None = None,
    ) -> EbpfAttachType:
        """Samples of a perf event, ``frequency`` a second or one every ``period`` events.

        ``event`` is a software or hardware event as perf(1) names it ("cpu-clock", "page-faults",
        "cycles", "cache-misses").  On every CPU and for all processes unless one is given.
        """
        return cls.make("perf_event", event, frequency=frequency, period=period, pid=pid, cpu=cpu)

    @classmethod
    def lsm(cls, hook: str) -> EbpfAttachType:
        """A hook of the Linux Security Modules, without "security_" (Linux 5.7)."""
        return cls.make("lsm", hook)

    @classmethod
    def cgroup(cls, path: str, attach: str = "ingress") -> EbpfAttachType:
        """The packets or sockets of a cgroup (version 2), at one of :data:`CGROUP_POINTS`."""
        return cls.make("cgroup", path, attach=attach)


_EXAMPLES = {
    "xdp": "xdp:lo",
    "tc": "tc:lo,direction=egress",
    "kprobe": "kprobe:do_unlinkat",
    "kretprobe": "kretprobe:do_unlinkat",
    "tracepoint": "tracepoint:syscalls:sys_enter_execve",
    "raw_tracepoint": "raw_tracepoint:sched_process_exec",
    "fentry": "fentry:do_unlinkat",
    "fexit": "fexit:do_unlinkat",
    "uprobe": "uprobe:/bin/bash:readline",
    "uretprobe": "uretprobe:/bin/bash:readline",
    "usdt": "usdt:/usr/sbin/mysqld:mysql:query__start",
    "perf_event": "perf_event:cpu-clock,frequency=99",
    "lsm": "lsm:bprm_check_security",
    "cgroup": "cgroup:/sys/fs/cgroup,attach=egress",
}


def _place(path: str, symbol: str | None, offset: int) -> str:
    if symbol is None:
        return f"{path}:{offset:#x}"
    return f"{path}:{symbol}+{offset}" if offset else f"{path}:{symbol}"


def _check_option(what: str, kind: str, name: str, value: Any) -> None:
    known = _OPTIONS.get(kind, {})
    if name not in known:
        remedy = f"{kind} takes {', '.join(known)}" if known else f"{kind} takes no options"
        raise UsageError(what, f"there is no option {name!r}", remedy)
    if value is None:
        return
    if name in _CHOICES and value not in _CHOICES[name]:
        raise UsageError(what, f"{name} is {value!r}", f"use {', '.join(_CHOICES[name])}")
    if name in _NUMBERS and type(value) is not int:
        raise UsageError(what, f"{name} is {value!r}, which is no number", f"{name}=1")
    if name in _NUMBERS and not _NUMBERS[name][0] <= value <= _NUMBERS[name][1]:
        least, most = _NUMBERS[name]
        raise UsageError(what, f"{name} is {value}", f"take {least} to {most}")
    if isinstance(known[name], bool) and not isinstance(value, bool):
        raise UsageError(what, f"{name} takes no value", f"write `{name}` alone")


def _parse_value(text: str, name: str, value: str) -> Any:
    """An option's value from text: numbers as such, everything else as it stands."""
    if name not in _NUMBERS:
        return value
    try:
        return int(value, 0)
    except ValueError:
        cause = f"{name} is {value!r}, which is no number"
        raise UsageError(f"attach point {text}", cause, f"{name}=1") from None


def _check_tracepoint(what: str, target: str) -> None:
    category, _, name = target.partition(":")
    if not category or not name:
        raise UsageError(what, "a tracepoint has a category and a name", _EXAMPLES["tracepoint"])


def _check_place(what: str, target: str) -> None:
    path, _, symbol = target.rpartition(":")
    if not path or not symbol:
        raise UsageError(what, "it names no function in the file", _EXAMPLES["uprobe"])


def _check_usdt(what: str, target: str) -> None:
    if len([part for part in target.rsplit(":", 2) if part]) != 3:
        raise UsageError(what, "a static probe has a file, provider and name", _EXAMPLES["usdt"])


_TARGET_CHECKS: Mapping[str, Callable[[str, str], None]] = {
    "tracepoint": _check_tracepoint,
    "uprobe": _check_place,
    "uretprobe": _check_place,
    "usdt": _check_usdt,
}
