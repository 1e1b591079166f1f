// SPDX-License-Identifier: GPL-2.0-only
/* BPF-to-BPF calls, also through a callback, and a map that only a subprogram uses. */
#include "vmlinux.h"
#include <bpf/bpf_helpers.h>

struct {
    __uint(type, BPF_MAP_TYPE_ARRAY);
    __uint(max_entries, 1);
    __type(key, __u32);
    __type(value, __u64);
} sums SEC(".maps");

static __noinline int add(__u64 amount)
{
    __u32 slot = 0;
    __u64 *sum = bpf_map_lookup_elem(&sums, &slot);

    if (sum)
        *sum += amount;
    return 0;
}

__noinline int square(int number)
{
    return number * number;
}

SEC("xdp")
int sum_squares(struct xdp_md *ctx)
{
    for (int i = 1; i <= 3; i++)
        add(square(i));
    return XDP_PASS;
}

char LICENSE[] SEC("license") = "GPL";
