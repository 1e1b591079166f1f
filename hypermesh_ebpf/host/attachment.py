"""One attachment: a program at a place, in the words of the command line; what a link says of it.

Kernel knowledge: struct bpf_link_info (include/uapi/linux/bpf.h), bpf_get_perf_event_info() in
kernel/trace/bpf_trace.c, bpf_trampoline_compute_key() in include/linux/bpf_verifier.h.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from hypermesh_ebpf.bpf.link_info import LinkInfo
from hypermesh_ebpf.errors import Unsupported
from hypermesh_ebpf.host import filesystems

_CGROUP_NAMES = {
    "cgroup_inet_ingress": "ingress",
    "cgroup_inet_egress": "egress",
    "cgroup_inet_sock_create": "sock_create",
    "cgroup_inet_sock_release": "sock_release",
    "cgroup_inet4_post_bind": "post_bind4",
    "cgroup_inet6_post_bind": "post_bind6",
}
_TRACING = {
    "trace_fentry": "fentry",
    "trace_fexit": "fexit",
    "modify_return": "modify_return",
    "trace_raw_tp": "raw_tracepoint",
    "lsm_mac": "lsm",
    "trace_iter": "iter",
}
_FAMILIES = {2: "ipv4", 10: "ipv6", 7: "bridge", 3: "arp", 1: "inet"}
_NETFILTER_HOOKS = ("prerouting", "input", "forward", "output", "postrouting")

ResolveBtf = Callable[[int, int], "str | None"]
"""(id of a BTF object, id of a type in it) to the type's name."""


@dataclass(frozen=True, slots=True)
class Attachment:
    """A program at a place.

    ``kind`` is an attach type (``hypermesh_ebpf.attach_type.KINDS``) or, for what hmebpf itself
    does not attach, the kernel's word; ``target`` is in that kind's notation.  ``position`` is the
    place among the programs of one TCX point or cgroup, which run in that order, from 0.  ``netns``
    is the inode of a network namespace that is not ours.  None is what does not apply.
    """

    kind: str
    target: str
    program_id: int
    link_id: int | None = None
    attach_type: str | None = None
    iface: str | None = None
    ifindex: int | None = None
    netns: int | None = None
    mode: str | None = None
    direction: str | None = None
    priority: int | None = None
    parent: int | None = None
    handle: int | None = None
    position: int | None = None
    cgroup: str | None = None
    cgroup_id: int | None = None
    pids: tuple[int, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """As ``hmebpf list -o json`` writes it."""
        return {"hook": str(self), **asdict(self)}

    def __str__(self) -> str:
        """As on the command line of `hmebpf detach`: "tc:lo,direction=egress,priority=10"."""
        options = []
        if self.kind == "cgroup" and self.attach_type:
            options.append(f"attach={name_cgroup_point(self.attach_type)}")
        for name in ("mode", "direction", "priority"):
            value = getattr(self, name)
            if value is not None:
                options.append(f"{name}={value}")
        if self.kind in ("xdp", "tc") and self.link_id is not None:
            options.append("link")
        if self.netns is not None:
            options.append(f"netns={self.netns}")
        return ",".join([f"{self.kind}:{self.target}", *options])


def name_cgroup_point(attach_type: str) -> str:
    """ "ingress" for cgroup_inet_ingress: the word of ``cgroup:PATH,attach=...``."""
    return _CGROUP_NAMES.get(attach_type, attach_type.removeprefix("cgroup_"))


def name_place(kind: str, name: str | None, offset: int) -> str:
    """What a probe is on, as `hmebpf run --attach KIND:...` takes it."""
    if name is None:
        return "?"
    if kind in ("uprobe", "uretprobe"):
        return f"{name}:{offset:#x}"
    if kind == "tracepoint":
        category = _find_category(name)
        return f"{category}:{name}" if category else name
    return f"{name}+{offset}" if offset else name


@lru_cache(maxsize=1024)
def _find_category(tracepoint: str) -> str | None:
    """The category of a tracepoint, which the kernel names without it; None where tracefs is not
    to be read."""
    try:
        categories = os.open("events", os.O_RDONLY, dir_fd=filesystems.open_tracefs())
    except (OSError, Unsupported):  # a name without its category will do
        return None
    try:
        for category in os.listdir(categories):
            with suppress(OSError):
                os.stat(f"{category}/{tracepoint}", dir_fd=categories)
                return category
    finally:
        os.close(categories)
    return None


def describe_perf_link(link: LinkInfo) -> Attachment:
    details = link.details
    kind = details["kind"]
    if kind == "perf_event":
        target = _name_event(details["event_type"], details["config"])
    else:
        target = name_place(kind, details["name"], details["offset"])
    return Attachment(kind, target, link.prog_id, link.id)


_SOFTWARE = (
    "cpu-clock task-clock page-faults context-switches cpu-migrations minor-faults "
    "major-faults alignment-faults emulation-faults dummy bpf-output cgroup-switches"
)
_HARDWARE = (
    "cycles instructions cache-references cache-misses branches branch-misses bus-cycles "
    "stalled-cycles-frontend stalled-cycles-backend ref-cycles"
)


def _name_event(type_: int, config: int) -> str:
    """A perf event as perf(1) calls it: PERF_TYPE_HARDWARE is 0, PERF_TYPE_SOFTWARE 1.

    Newer kernels show the two software clocks as devices of their own, which are the first that
    get a number (perf_event_init() in kernel/events/core.c) and may not be in sysfs.
    """
    names = {0: _HARDWARE.split(), 1: _SOFTWARE.split()}.get(type_, [])
    if config < len(names):
        return names[config]
    device = _name_device(type_) or {6: "cpu_clock", 7: "task_clock"}.get(type_)
    if device in ("cpu_clock", "task_clock"):
        return device.replace("_", "-")
    return f"{device or f'type {type_}'} {config:#x}"


@lru_cache(maxsize=64)
def _name_device(type_: int) -> str | None:
    """The perf device of a type, as /sys/bus/event_source/devices knows it."""
    with suppress(OSError):
        for path in Path("/sys/bus/event_source/devices").iterdir():
            if (path / "type").read_text().strip() == str(type_):
                return path.name
    return None


def describe_link(
    link: LinkInfo,
    resolve: ResolveBtf,
    targets: Mapping[int, tuple[int, int]],
    program_types: Mapping[int, str],
) -> Attachment:
    """What a link holds, by its own word alone."""
    details: dict[str, Any] = link.details
    make = partial(Attachment, program_id=link.prog_id, link_id=link.id)
    attach_type = details.get("attach_type")
    if link.type == "raw_tracepoint":
        return make("raw_tracepoint", details["name"] or "?")
    if link.type == "tracing":
        program_type = program_types.get(link.prog_id)
        kind = "freplace" if program_type == "ext" else _TRACING.get(str(attach_type), "tracing")
        named = _name_target(link, resolve, targets)
        return make(kind, named or "?", attach_type=attach_type)
    if link.type == "cgroup":  # the group is gone, or below a root that is not mounted here
        return make(
            "cgroup",
            f"id {details['cgroup_id']}",
            attach_type=attach_type,
            cgroup_id=details["cgroup_id"],
        )
    if link.type in ("xdp", "tcx", "netkit"):
        kind = "tc" if link.type == "tcx" else link.type
        direction = str(attach_type).removeprefix("tcx_") if link.type == "tcx" else None
        ifindex = details["ifindex"]
        # 0: the interface is gone and the link holds nothing any more
        place = f"ifindex {ifindex}" if ifindex else "nothing"
        return make(
            kind, place, ifindex=ifindex or None, direction=direction, attach_type=attach_type
        )
    if link.type == "netfilter":
        family = _FAMILIES.get(details["pf"], str(details["pf"]))
        number = details["hooknum"]
        hook = _NETFILTER_HOOKS[number] if number < len(_NETFILTER_HOOKS) else str(number)
        return make("netfilter", f"{family}:{hook}", priority=details["priority"])
    if link.type == "uprobe_multi":
        return make("uprobe_multi", f"{details['path'] or '?'}:{details['count']} places")
    if link.type == "kprobe_multi":
        return make("kprobe_multi", f"{details['count']} functions")
    if link.type == "iter":
        return make("iter", details["name"] or "?")
    if link.type == "netns":
        return make("netns", str(details["netns_ino"]), attach_type=attach_type)
    if link.type in ("struct_ops", "sockmap"):
        return make(link.type, f"map:{details['map_id']}", attach_type=attach_type)
    if link.type == "perf_event":
        kinds = {"tracepoint": "tracepoint", "perf_event": "perf_event", "kprobe": "kprobe"}
        return make(kinds.get(program_types.get(link.prog_id, ""), "perf_event"), "?")
    return make(link.type, "?")


def _name_target(
    link: LinkInfo, resolve: ResolveBtf, targets: Mapping[int, tuple[int, int]]
) -> str | None:
    """The function, tracepoint or hook that a tracing program is for."""
    found = targets.get(link.prog_id, (0, 0))
    if not all(found):  # before Linux 6.0 the program does not tell, since 5.13 the link does
        found = (link.details["target_obj_id"], link.details["target_btf_id"])
    name = resolve(*found) if all(found) else None
    if name is None:
        return None
    for prefix in ("btf_trace_", "bpf_lsm_", "bpf_iter_"):
        name = name.removeprefix(prefix)
    return name
