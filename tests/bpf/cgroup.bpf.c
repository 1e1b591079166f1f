// SPDX-License-Identifier: GPL-2.0-only
/* A cgroup's packets in both directions, and the sockets that are made in it; forbids none. */
#include "vmlinux.h"
#include <bpf/bpf_helpers.h>

__u64 ingress_packets, egress_packets, sockets;

SEC("cgroup_skb/ingress")
int count_ingress(struct __sk_buff *skb)
{
    __sync_fetch_and_add(&ingress_packets, 1);
    return 1;
}

SEC("cgroup_skb/egress")
int count_egress(struct __sk_buff *skb)
{
    __sync_fetch_and_add(&egress_packets, 1);
    return 1;
}

SEC("cgroup/sock_create")
int count_sockets(struct bpf_sock *sk)
{
    __sync_fetch_and_add(&sockets, 1);
    return 1;
}

char LICENSE[] SEC("license") = "GPL";
