// SPDX-License-Identifier: GPL-2.0-only
/* What no verifier accepts: a pointer that may be NULL is followed. */
#include "vmlinux.h"
#include <bpf/bpf_helpers.h>

struct {
    __uint(type, BPF_MAP_TYPE_HASH);
    __uint(max_entries, 4);
    __type(key, __u32);
    __type(value, __u64);
} counts SEC(".maps");

SEC("xdp")
int unchecked(struct xdp_md *ctx)
{
    __u32 key = 1;
    __u64 *count = bpf_map_lookup_elem(&counts, &key);

    *count += 1;
    return XDP_PASS;
}

char LICENSE[] SEC("license") = "GPL";
