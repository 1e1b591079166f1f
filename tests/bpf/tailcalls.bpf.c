// SPDX-License-Identifier: GPL-2.0-only
/* A program array filled by its initialiser: the entry jumps to one of two programs. */
#include "vmlinux.h"
#include <bpf/bpf_helpers.h>

const volatile __u32 choice = 1;
__u32 reached;

int first(struct xdp_md *ctx);
int second(struct xdp_md *ctx);

struct {
    __uint(type, BPF_MAP_TYPE_PROG_ARRAY);
    __uint(max_entries, 4);
    __uint(key_size, sizeof(__u32));
    __array(values, int(struct xdp_md *));
} jumps SEC(".maps") = {
    .values = {[0] = (void *)&first, [1] = (void *)&second},
};

SEC("xdp")
int first(struct xdp_md *ctx)
{
    reached = 1;
    return XDP_PASS;
}

SEC("xdp")
int second(struct xdp_md *ctx)
{
    reached = 2;
    return XDP_PASS;
}

SEC("xdp")
int enter(struct xdp_md *ctx)
{
    bpf_tail_call(ctx, &jumps, choice);
    reached = 99;
    return XDP_PASS;
}

char LICENSE[] SEC("license") = "GPL";
