// SPDX-License-Identifier: GPL-2.0-only
/* A raw tracepoint with types: its arguments are pointers that may be followed directly. */
#include "vmlinux.h"
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>

__u64 execs;
pid_t last_tgid;

SEC("tp_btf/sched_process_exec")
int BPF_PROG(on_exec, struct task_struct *task, pid_t old_pid, struct linux_binprm *bprm)
{
    last_tgid = task->tgid;
    __sync_fetch_and_add(&execs, 1);
    return 0;
}

char LICENSE[] SEC("license") = "GPL";
