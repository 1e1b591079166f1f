// SPDX-License-Identifier: GPL-2.0-only
/* kprobe and kretprobe on a function, and on a system call by its name. */
#include "vmlinux.h"
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>

__u64 entries, returns, calls;
__s64 last_result;
pid_t last_pid_argument;
char last_name[64];

SEC("kprobe/do_unlinkat")
int BPF_KPROBE(on_entry, int dfd, struct filename *name)
{
    const char *text = BPF_CORE_READ(name, name);

    bpf_probe_read_kernel_str(last_name, sizeof(last_name), text);
    __sync_fetch_and_add(&entries, 1);
    return 0;
}

SEC("kretprobe/do_unlinkat")
int BPF_KRETPROBE(on_return, long result)
{
    last_result = result;
    __sync_fetch_and_add(&returns, 1);
    return 0;
}

SEC("ksyscall/getpgid")
int BPF_KSYSCALL(on_call, pid_t pid)
{
    last_pid_argument = pid;
    __sync_fetch_and_add(&calls, 1);
    return 0;
}

char LICENSE[] SEC("license") = "GPL";
