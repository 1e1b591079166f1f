// SPDX-License-Identifier: GPL-2.0-only
/* fentry and fexit, with the function's arguments and result. */
#include "vmlinux.h"
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>

__u64 entries, returns;
__s64 last_result;

SEC("fentry/do_unlinkat")
int BPF_PROG(on_entry, int dfd, struct filename *name)
{
    __sync_fetch_and_add(&entries, 1);
    return 0;
}

SEC("fexit/do_unlinkat")
int BPF_PROG(on_return, int dfd, struct filename *name, long result)
{
    last_result = result;
    __sync_fetch_and_add(&returns, 1);
    return 0;
}

char LICENSE[] SEC("license") = "GPL";
