"""Section names: what libbpf's documentation says of each, as kind and attach point."""

from __future__ import annotations

import pytest

from hypermesh_ebpf.attach_type import KINDS, EbpfAttachType
from hypermesh_ebpf.image.sections import parse_section


@pytest.mark.parametrize(
    ("section", "kind", "attach"),
    [
        ("xdp", "xdp", None),
        ("xdp.frags", "xdp", None),
        ("?xdp", "xdp", None),
        ("tc", "tc", None),
        ("classifier", "tc", None),
        ("action", "tc", None),
        ("tc/ingress", "tc", "tc:,direction=ingress"),
        ("tc/egress", "tc", "tc:,direction=egress"),
        ("tcx/egress", "tc", "tc:,direction=egress"),
        ("kprobe/do_unlinkat", "kprobe", "kprobe:do_unlinkat"),
        ("kprobe/do_unlinkat+0x10", "kprobe", "kprobe:do_unlinkat+16"),
        ("kretprobe/vfs_read.isra.0", "kretprobe", "kretprobe:vfs_read.isra.0"),
        ("kprobe", "kprobe", None),
        ("ksyscall/execve", "kprobe", "kprobe:syscall:execve"),
        ("kretsyscall/execve", "kretprobe", "kretprobe:syscall:execve"),
        ("tracepoint/sched/sched_switch", "tracepoint", "tracepoint:sched:sched_switch"),
        ("tp/sched/sched_switch", "tracepoint", "tracepoint:sched:sched_switch"),
        ("raw_tp/sched_switch", "raw_tracepoint", "raw_tracepoint:sched_switch"),
        ("raw_tracepoint/sched_switch", "raw_tracepoint", "raw_tracepoint:sched_switch"),
        ("raw_tp.w/nbd_send_request", "raw_tracepoint", "raw_tracepoint:nbd_send_request"),
        ("tp_btf/sched_switch", "raw_tracepoint", "raw_tracepoint:sched_switch"),
        ("fentry/do_unlinkat", "fentry", "fentry:do_unlinkat"),
        ("fentry.s/do_unlinkat", "fentry", "fentry:do_unlinkat"),
        ("fexit/do_unlinkat", "fexit", "fexit:do_unlinkat"),
        ("lsm/file_open", "lsm", "lsm:file_open"),
        ("lsm.s/file_open", "lsm", "lsm:file_open"),
        ("uprobe//bin/bash:readline", "uprobe", "uprobe:/bin/bash:readline"),
        ("uprobe.s//bin/bash:readline+4", "uprobe", "uprobe:/bin/bash:readline+4"),
        ("uretprobe/libc.so.6:malloc", "uretprobe", "uretprobe:libc.so.6:malloc"),
        (
            "usdt//usr/bin/python3:python:gc__start",
            "usdt",
            "usdt:/usr/bin/python3:python:gc__start",
        ),
        ("perf_event", "perf_event", None),
        ("cgroup_skb/egress", "cgroup", "cgroup:,attach=egress"),
        ("cgroup/skb", "cgroup", None),
        ("cgroup/sock", "cgroup", "cgroup:,attach=sock_create"),
        ("cgroup/post_bind6", "cgroup", "cgroup:,attach=post_bind6"),
        ("xdp_pass", "xdp", None),
        ("classifier_a", "tc", None),
    ],
)
def test_known(section: str, kind: str, attach: str | None) -> None:
    place = parse_section(section)
    assert place is not None
    assert (place.kind, place.attach) == (kind, attach)
    assert kind in KINDS
    if attach is not None:  # it can be read, once its target is filled in
        text = attach.replace(":,", ":/sys,")
        assert EbpfAttachType.parse(text).kind == kind


@pytest.mark.parametrize(
    "section",
    ["", "my_section", "freplace/f", "fmod_ret/f", "iter/task", "socket", "xdp/devmap", "sockops",
     "kprobe.multi/vfs_*", "lsm_cgroup/x", "struct_ops/x", "xdpx", "tracepoint/one"],
)  # fmt: skip
def test_not_for_us(section: str) -> None:
    assert parse_section(section) is None
