// SPDX-License-Identifier: GPL-2.0-only
/* Counts four system calls of network programs: connect and accept as they begin, sendto and recvfrom
 * as they end, with the bytes that went through and the calls that failed.
 *
 * Attaches to tracepoints of category syscalls, each its own program.  Costs some hundred nanoseconds
 * per call of one of these four, and nothing for others.  Metrics: connects, accepts, sends, recvs,
 * bytes_sent, bytes_received, failures.
 */
#include "vmlinux.h"
#include <bpf/bpf_helpers.h>

struct totals {
    __u64 connects;
    __u64 accepts;
    __u64 sends;
    __u64 recvs;
    __u64 bytes_sent;
    __u64 bytes_received;
    __u64 failures;
};

struct {
    __uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
    __uint(max_entries, 1);
    __type(key, __u32);
    __type(value, struct totals);
} counters SEC(".maps");

static __always_inline struct totals *find_totals(void)
{
    __u32 slot = 0;

    return bpf_map_lookup_elem(&counters, &slot);
}

SEC("tracepoint/syscalls/sys_enter_connect")
int count_connect(struct trace_event_raw_sys_enter *ctx)
{
    struct totals *totals = find_totals();

    if (totals)
        totals->connects++;
    return 0;
}

/* Most programs call accept4, which is another system call; this counts accept alone. */
SEC("tracepoint/syscalls/sys_enter_accept")
int count_accept(struct trace_event_raw_sys_enter *ctx)
{
    struct totals *totals = find_totals();

    if (totals)
        totals->accepts++;
    return 0;
}

SEC("tracepoint/syscalls/sys_exit_sendto")
int count_sendto(struct trace_event_raw_sys_exit *ctx)
{
    struct totals *totals = find_totals();

    if (!totals)
        return 0;
    totals->sends++;
    if (ctx->ret < 0)
        totals->failures++;
    else
        totals->bytes_sent += ctx->ret;
    return 0;
}

SEC("tracepoint/syscalls/sys_exit_recvfrom")
int count_recvfrom(struct trace_event_raw_sys_exit *ctx)
{
    struct totals *totals = find_totals();

    if (!totals)
        return 0;
    totals->recvs++;
    if (ctx->ret < 0)
        totals->failures++;
    else
        totals->bytes_received += ctx->ret;
    return 0;
}

char LICENSE[] SEC("license") = "GPL";
