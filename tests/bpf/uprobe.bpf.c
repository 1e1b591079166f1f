// SPDX-License-Identifier: GPL-2.0-only
/* uprobe and uretprobe: calls of a function of the C library and their results. */
#include "vmlinux.h"
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>

__u64 calls, returns;
__s64 last_argument, last_result;

SEC("uprobe")
int BPF_UPROBE(on_call, long argument)
{
    last_argument = argument;
    __sync_fetch_and_add(&calls, 1);
    return 0;
}

SEC("uretprobe")
int BPF_URETPROBE(on_return, long result)
{
    last_result = result;
    __sync_fetch_and_add(&returns, 1);
    return 0;
}

char LICENSE[] SEC("license") = "GPL";
