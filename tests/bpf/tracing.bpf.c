// SPDX-License-Identifier: GPL-2.0-only
/* Tracepoint, raw tracepoint and perf event: each counts under a variable of its own. */
#include "vmlinux.h"
#include <bpf/bpf_helpers.h>

__u64 tracepoint_hits, raw_hits, samples;

SEC("tp/syscalls/sys_enter_getpgid")
int on_tracepoint(struct trace_event_raw_sys_enter *ctx)
{
    __sync_fetch_and_add(&tracepoint_hits, 1);
    return 0;
}

SEC("raw_tp/sched_process_exec")
int on_raw_tracepoint(struct bpf_raw_tracepoint_args *ctx)
{
    __sync_fetch_and_add(&raw_hits, 1);
    return 0;
}

SEC("perf_event")
int on_sample(struct bpf_perf_event_data *ctx)
{
    __sync_fetch_and_add(&samples, 1);
    return 0;
}

char LICENSE[] SEC("license") = "GPL";
