// SPDX-License-Identifier: GPL-2.0-only
/* One program under each section name that has no other test. */
#include "vmlinux.h"
#include <bpf/bpf_helpers.h>

#define PROGRAM(name, section) SEC(section) int on_##name(void *ctx) { return 0; }

PROGRAM(frags, "xdp.frags")
PROGRAM(action, "action")
PROGRAM(tcx, "tcx/egress")
PROGRAM(old_xdp, "xdp_old_name")
PROGRAM(kprobe_offset, "kprobe/do_unlinkat+0x4")
PROGRAM(kretsyscall, "kretsyscall/unlink")
PROGRAM(writable, "raw_tp.w/bpf_test_finish")
PROGRAM(raw_long, "raw_tracepoint/sched_switch")
PROGRAM(uprobe, "uprobe//bin/bash:readline+0x10")
PROGRAM(uretprobe, "uretprobe//bin/bash:readline")
PROGRAM(usdt, "usdt//usr/bin/python3:python:gc__start")
PROGRAM(skb, "cgroup/skb")
PROGRAM(release, "cgroup/sock_release")
PROGRAM(bind4, "cgroup/post_bind4")
PROGRAM(bind6, "cgroup/post_bind6")

char LICENSE[] SEC("license") = "GPL";
