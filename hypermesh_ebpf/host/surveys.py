"""The checks of check-system that go through many things alike: types, interfaces, hooks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from hypermesh_ebpf.errors import MissingDependency, describe_errno
from hypermesh_ebpf.host import interfaces, trials
from hypermesh_ebpf.host.finding import Finding
from hypermesh_ebpf.host.hooks import Availability

if TYPE_CHECKING:
    from hypermesh_ebpf.monitors.declaration import Monitor

# Which types hmebpf itself uses, and for what; lacking another one is only worth knowing.
_USES = {
    "program": {
        "xdp": "XDP",
        "sched_cls": "TC",
        "kprobe": "kprobes and uprobes",
        "tracepoint": "tracepoints",
        "raw_tracepoint": "raw tracepoints",
        "perf_event": "sampling",
        "tracing": "fentry and fexit",
        "lsm": "LSM hooks",
        "cgroup_skb": "cgroup programs",
    },
    "map": {
        "hash": "every monitor",
        "array": "every monitor",
        "percpu_hash": "per-CPU counters",
        "percpu_array": "per-CPU counters",
        "lru_hash": "tables that may overflow",
        "lru_percpu_hash": "tables that may overflow",
        "ringbuf": "event streams",
        "stack_trace": "stack traces",
        "prog_array": "chains of programs",
    },
}


def check_types() -> list[Finding]:
    """Every program type and map type that libbpf knows."""
    findings = []
    for kind, uses in _USES.items():
        try:
            types = trials.probe_types("prog" if kind == "program" else kind)
        except MissingDependency:
            continue  # already a finding of check_tools
        for name, available in types.items():
            findings.append(
                Finding(
                    f"{kind} types",
                    name,
                    "ok"
                    if available
                    else "warn"
                    if available is False and name in uses
                    else "info",
                    {True: "available", False: "not available", None: None}[available],
                    uses.get(name, "programs of your own"),
                    f"libbpf_probe_bpf_{'prog' if kind == 'program' else kind}_type()",
                )
            )
    return findings


def check_interfaces() -> list[Finding]:
    """XDP modes of every interface of this network namespace, nothing being attached."""
    try:
        found = interfaces.read_interfaces()
    except OSError as error:
        cause = describe_errno(error.errno or 0)
        return [Finding("interfaces", "all", "warn", cause, "xdp", "rtnetlink dump")]
    return [_check_interface(interface) for interface in found]


def _check_interface(interface: interfaces.Interface) -> Finding:
    modes = ["native"] if interface.native else []
    modes += ["offload"] if interface.offload else []
    words = f"XDP {', '.join([*modes, 'generic'])}"
    driver = interface.driver or interface.kind
    if interface.native is None:
        since = interfaces.NATIVE_SINCE.get(driver or "")
        hint = f" (its driver has it since {since[0]}.{since[1]})" if since else ""
        words += f"; native unknown{hint}"
    words += f"; {driver or 'driver unknown'}, {'up' if interface.up else 'down'}"
    for attached in interface.attached:
        words += f"; program {attached.prog_id} attached ({attached.mode})"
    return Finding(
        "interfaces",
        interface.name,
        "info" if interface.attached or interface.native is None else "ok",
        words,
        "native mode is the fastest; a driver may still ask for another MTU or fewer queues",
        "rtnetlink IFLA_XDP; netdev family xdp-features (Linux 6.3), ethtool driver name",
        f"see it: `bpftool prog show id {interface.attached[0].prog_id}`"
        if interface.attached
        else None,
    )


def check_hooks(
    attach_types: Mapping[str, Availability], monitors: Iterable[Monitor]
) -> list[Finding]:
    """The attach types once more as findings, with the monitors that have a rung on each."""
    same = {"kretprobe": "kprobe", "fexit": "fentry", "uretprobe": "uprobe"}
    users: dict[str, list[str]] = {}
    for monitor in monitors:
        kinds = {hook.kind for rung in monitor.rungs for hook in rung.hooks}
        for kind in {same.get(kind, kind) for kind in kinds}:
            users.setdefault(kind, []).append(monitor.name)
    return [
        Finding(
            "hooks",
            kind,
            "ok" if found.available else "warn" if kind in users else "info",
            "available" if found.available else found.reason,
            ", ".join(users.get(kind, ())) or "programs of your own",
            found.probed,
            found.remedy,
        )
        for kind, found in attach_types.items()
    ]
