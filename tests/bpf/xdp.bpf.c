// SPDX-License-Identifier: GPL-2.0-only
/* XDP: packets by protocol in a hash, and the bytes of each; always passes the packet. */
#include "vmlinux.h"
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#define ETH_P_IP 0x0800

struct traffic {
    __u64 packets;
    __u64 bytes;
};

struct {
    __uint(type, BPF_MAP_TYPE_HASH);
    __uint(max_entries, 256);
    __type(key, __u8);
    __type(value, struct traffic);
} protocols SEC(".maps");

SEC("xdp")
int count_protocols(struct xdp_md *ctx)
{
    void *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
    struct ethhdr *eth = data;
    struct iphdr *ip = (void *)(eth + 1);
    struct traffic zero = {}, *traffic;
    __u8 protocol = 0;

    if ((void *)(ip + 1) <= end && eth->h_proto == bpf_htons(ETH_P_IP))
        protocol = ip->protocol;
    bpf_map_update_elem(&protocols, &protocol, &zero, BPF_NOEXIST);
    traffic = bpf_map_lookup_elem(&protocols, &protocol);
    if (traffic) {
        __sync_fetch_and_add(&traffic->packets, 1);
        __sync_fetch_and_add(&traffic->bytes, end - data);
    }
    return XDP_PASS;
}

char LICENSE[] SEC("license") = "GPL";
