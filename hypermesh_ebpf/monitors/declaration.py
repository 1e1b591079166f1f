"""The words in which a monitor is declared.  Values only: nothing here touches the kernel.

A monitor is a C file in ``bpf_c/`` and one module in this package that binds ``MONITOR`` to a
:class:`Monitor`.  Adding one touches nothing else: the command line, check-system and the library
find it by its file name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:  # the worker reads declarations, too, and makes no samples
    from hypermesh_ebpf.metrics.sample import Histogram, Row, Table

if TYPE_CHECKING:
    from hypermesh_ebpf.bpf.entries import Entries

Options = Mapping[str, Any]
"""The user's choices by option name ("by", "iface", ...), defaults filled in.

"events" is always among them: whether each event is wanted, or only what was counted.
"""


@dataclass(frozen=True, slots=True)
class Option:
    """One option of a monitor's command: ``Option("by", "how rows are grouped", choices=(...))``.

    ``kind`` is str, int, float or bool (a flag); ``multiple`` collects a tuple.
    """

    name: str
    help: str
    kind: type = str
    default: Any = None
    choices: tuple[str, ...] = ()
    multiple: bool = False
    required: bool = False
    metavar: str | None = None


@dataclass(frozen=True, slots=True)
class Hook:
    """A place where a program of the C file runs.

    ``kind`` is one of check-system's attach types (xdp, tc, kprobe, kretprobe, tracepoint,
    raw_tracepoint, fentry, fexit, uprobe, uretprobe, perf_event, lsm, cgroup).  ``target`` is the
    attach point in that kind's own notation ("syscalls:sys_enter_execve", "sched_process_exec");
    for kprobe, kretprobe, fentry and fexit "syscall:execve" stands for the architecture's name of
    that system call's function; for xdp it is empty, the interface comes from the user.
    ``program`` is the C function.  An ``optional`` hook is left out where this kernel lacks its
    target; "compat_syscall:execve" names the entry of 32-bit programs, which not every kernel has.
    """

    kind: str
    target: str
    program: str
    optional: bool = False


@dataclass(frozen=True, slots=True)
class Rung:
    """One way to run a monitor: its hooks, the event fields it gives, and what it lacks.

    ``defines`` are macros for this rung's compilation; ``needs_btf`` says that the C reads kernel
    structures.
    """

    name: str
    hooks: tuple[Hook, ...]
    fields: tuple[str, ...] = ()
    lost: tuple[str, ...] = ()
    defines: Mapping[str, str | int] = field(default_factory=dict)
    needs_btf: bool = False


@dataclass(frozen=True, slots=True)
class Column:
    """A column of the monitor's tables.

    ``kind`` decides the drawing: text, count, bytes, rate (per second), byte_rate, ns, time,
    percent; in events also "rest", for all fields that have no column of their own.  ``share``
    marks the one column whose share of the whole is drawn as a bar.
    """

    field: str
    heading: str
    kind: str = "text"
    share: bool = False


@dataclass(frozen=True, slots=True)
class TableLayout:
    """How the content of one map is drawn.

    ``kind`` is what the map is, in a word; ``key`` are the fields that name a row.  ``flatten``
    makes the columns' fields of a row of a :class:`~hypermesh_ebpf.metrics.sample.Table`.  ``busy``
    is the counter by whose rate, then count, rows are sorted, the busiest first, where they are
    Counted; None leaves them in the map's order.
    """

    name: str
    kind: str
    columns: tuple[Column, ...]
    key: tuple[str, ...]
    flatten: Callable[[Row], Row]
    busy: str | None = None


@dataclass(frozen=True, slots=True)
class Reading:
    """What a monitor's ``collect`` got from the maps: cumulative numbers, no rates yet.

    Many ``rows`` are a :class:`~hypermesh_ebpf.metrics.counted.Counted`: only those that are shown
    are written out.
    """

    totals: Row
    rows: Sequence[Row]
    histograms: tuple[Histogram, ...] = ()
    map_full: int | None = 0
    events_lost: int | None = 0
    tables: tuple[Table, ...] = ()


class MapReader(Protocol):
    """How a declaration sees a map of the loaded image."""

    def items(self) -> Sequence[tuple[Any, Any]]:
        """All (key, value) pairs; values of per-CPU maps come summed; structs as named tuples."""
        ...

    def entries(self) -> Entries:
        """The same for large maps: decoded column by column, or only where they are looked at."""
        ...

    def write(self, key: int, value: bytes) -> None:
        """Set one entry of an array map, before the hooks are attached."""
        ...


class Collector(Protocol):
    """The live side of a monitor: made when the hooks are attached, one for each run."""

    def decode(self, record: bytes) -> dict[str, Any] | None:
        """One ring buffer record as an event's fields, its time in seconds since the epoch under
        "time"; None when it is not to be shown."""
        ...

    def collect(self) -> Reading:
        """Everything counted so far."""
        ...


Maps = Mapping[str, MapReader]


@dataclass(frozen=True, slots=True)
class Monitor:
    """A thing the user asks for by name.

    ``rungs`` is the ladder, best first.  ``defines`` gives macros that depend on the options (they
    make another image), ``settings`` the bytes for the map ``settings`` (they do not).
    ``targets`` gives the names of what is watched: one image is loaded for each.
    ``collector`` makes the reader of the loaded maps (one mapping of maps per target).
    ``columns``, ``event_columns`` and ``headline`` say how tables are drawn; ``key`` and
    ``counters`` which fields identify a row and which ones get a ``_per_s`` companion.
    ``events``: "always" when events are what the monitor is for, "option" when --events asks for
    them, "never" when it has none.

    For users' programs: ``tables``, one for each map in place of ``columns``; ``event_fields``,
    those of all their events, and ``flatten_event``, which makes these of an event's fields.
    """

    name: str
    summary: str
    source: str
    rungs: tuple[Rung, ...]
    collector: Callable[[Options, Mapping[str, Maps]], Collector]
    columns: Callable[[Options], tuple[Column, ...]]
    key: Callable[[Options], tuple[str, ...]]
    counters: tuple[str, ...] = ()
    headline: str = ""
    options: tuple[Option, ...] = ()
    event_columns: tuple[Column, ...] = ()
    events: str = "never"
    defines: Callable[[Options], Mapping[str, str | int]] = lambda options: {}
    settings: Callable[[Options], bytes | None] = lambda options: None
    targets: Callable[[Options], tuple[str, ...]] = lambda options: ("system",)
    tables: tuple[TableLayout, ...] = ()
    event_fields: tuple[str, ...] = ()
    flatten_event: Callable[[Row], Row] | None = None
