// SPDX-License-Identifier: GPL-2.0-only
/* A map of maps with a pattern, and one of its inner maps put in by the initialiser. */
#include "vmlinux.h"
#include <bpf/bpf_helpers.h>

struct inner {
    __uint(type, BPF_MAP_TYPE_ARRAY);
    __uint(max_entries, 2);
    __type(key, __u32);
    __type(value, __u64);
} left SEC(".maps");

struct {
    __uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
    __uint(max_entries, 2);
    __type(key, __u32);
    __array(values, struct inner);
} outer SEC(".maps") = {.values = {[1] = &left}};

SEC("xdp")
int count(struct xdp_md *ctx)
{
    __u32 slot = 1, place = 0;
    void *map = bpf_map_lookup_elem(&outer, &slot);
    __u64 *packets = map ? bpf_map_lookup_elem(map, &place) : NULL;

    if (packets)
        __sync_fetch_and_add(packets, 1);
    return XDP_PASS;
}

char LICENSE[] SEC("license") = "GPL";
