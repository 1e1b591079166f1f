// SPDX-License-Identifier: GPL-2.0-only
/* Traffic control: packets in each direction, counted in one array; lets the next program decide. */
#include "vmlinux.h"
#include <bpf/bpf_helpers.h>

#define TC_ACT_UNSPEC (-1)

struct {
    __uint(type, BPF_MAP_TYPE_ARRAY);
    __uint(max_entries, 2);
    __type(key, __u32);
    __type(value, __u64);
} directions SEC(".maps");

static __always_inline int count(__u32 direction)
{
    __u64 *packets = bpf_map_lookup_elem(&directions, &direction);

    if (packets)
        __sync_fetch_and_add(packets, 1);
    return TC_ACT_UNSPEC;
}

SEC("tc/ingress")
int count_ingress(struct __sk_buff *skb)
{
    return count(0);
}

SEC("tc/egress")
int count_egress(struct __sk_buff *skb)
{
    return count(1);
}

SEC("classifier")
int old_name(struct __sk_buff *skb)
{
    return TC_ACT_UNSPEC;
}

char LICENSE[] SEC("license") = "GPL";
