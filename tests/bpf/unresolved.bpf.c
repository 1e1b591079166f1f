// SPDX-License-Identifier: GPL-2.0-only
/* CO-RE that cannot be resolved: a member that no kernel has, read without a question. */
#include "vmlinux.h"
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_helpers.h>

struct task_struct___other {
    int no_such_member;
} __attribute__((preserve_access_index));

int value;

SEC("raw_tp/sched_process_exit")
int look(void *ctx)
{
    struct task_struct___other *task = (void *)bpf_get_current_task();

    value = BPF_CORE_READ(task, no_such_member);
    return 0;
}

char LICENSE[] SEC("license") = "GPL";
