// SPDX-License-Identifier: GPL-2.0-only
/* A map that its source wants to be pinned by name, and so shared between two objects. */
#include "vmlinux.h"
#include <bpf/bpf_helpers.h>

struct {
    __uint(type, BPF_MAP_TYPE_ARRAY);
    __uint(max_entries, 1);
    __type(key, __u32);
    __type(value, __u64);
    __uint(pinning, LIBBPF_PIN_BY_NAME);
} hmebpf_test_shared SEC(".maps");

SEC("xdp")
int count(struct xdp_md *ctx)
{
    __u32 slot = 0;
    __u64 *packets = bpf_map_lookup_elem(&hmebpf_test_shared, &slot);

    if (packets)
        __sync_fetch_and_add(packets, 1);
    return XDP_PASS;
}

char LICENSE[] SEC("license") = "GPL";
