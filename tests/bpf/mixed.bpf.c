// SPDX-License-Identifier: GPL-2.0-only
/* Programs of which some can be loaded and attached, some only loaded, some neither. */
#include "vmlinux.h"
#include <bpf/bpf_helpers.h>

SEC("xdp")
int good(struct xdp_md *ctx)
{
    return XDP_PASS;
}

SEC("socket")
int loaded_only(struct __sk_buff *skb)
{
    return 0;
}

SEC("my_own_section")
int nameless(void *ctx)
{
    return 2;
}

SEC("fentry")
int no_target(void *ctx)
{
    return 0;
}

SEC("?tc")
int on_request(struct __sk_buff *skb)
{
    return -1;
}

char LICENSE[] SEC("license") = "GPL";
