// SPDX-License-Identifier: GPL-2.0-only
/* Events of one type in three buffers: a ring whose value is declared, one that is not, and a perf
 * buffer.  Run by BPF_PROG_TEST_RUN as a raw tracepoint. */
#include "vmlinux.h"
#include <bpf/bpf_helpers.h>

enum verdict { ALLOWED = 1, DENIED = -1 };

struct place {
    __u16 port;
    __u8 address[4];
};

struct event {
    __u64 number;
    enum verdict verdict;
    char comm[16];
    struct place from, to[2];
    union {
        __u32 whole;
        __u16 halves[2];
    };
    __u32 low : 4, high : 12;
    bool last;
};

struct {
    __uint(type, BPF_MAP_TYPE_RINGBUF);
    __uint(max_entries, 4096);
    __type(value, struct event);
} declared SEC(".maps");

struct {
    __uint(type, BPF_MAP_TYPE_RINGBUF);
    __uint(max_entries, 4096);
} events SEC(".maps");

struct {
    __uint(type, BPF_MAP_TYPE_PERF_EVENT_ARRAY);
    __type(value, struct event);
} perf_events SEC(".maps");

struct {
    __uint(type, BPF_MAP_TYPE_PERF_EVENT_ARRAY);
    __uint(key_size, sizeof(__u32));
    __uint(value_size, sizeof(__u32));
} plain SEC(".maps");

/* Without a use of it clang would leave the type out of the BTF. */
const struct event *unused __attribute__((unused));

__u64 lost;

static __always_inline void fill(struct event *event)
{
    event->number = 7;
    event->verdict = DENIED;
    bpf_get_current_comm(event->comm, sizeof(event->comm));
    event->from.port = 80;
    event->from.address[0] = 127;
    event->to[1].port = 443;
    event->whole = 0x00020001;
    event->low = 5;
    event->high = 1000;
    event->last = true;
}

SEC("raw_tp/sched_process_exit")
int send(void *ctx)
{
    struct event *event, copy = {};

    event = bpf_ringbuf_reserve(&declared, sizeof(*event), 0);
    if (event) {
        __builtin_memset(event, 0, sizeof(*event));
        fill(event);
        bpf_ringbuf_submit(event, 0);
    } else
        lost++;
    fill(&copy);
    if (bpf_ringbuf_output(&events, &copy, sizeof(copy), 0))
        lost++;
    if (bpf_perf_event_output(ctx, &perf_events, BPF_F_CURRENT_CPU, &copy, sizeof(copy)))
        lost++;
    if (bpf_perf_event_output(ctx, &plain, BPF_F_CURRENT_CPU, &copy, sizeof(copy)))
        lost++;
    return 0;
}

char LICENSE[] SEC("license") = "GPL";
