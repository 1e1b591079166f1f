// SPDX-License-Identifier: GPL-2.0-only
/* CO-RE: members found in the running kernel, questions to it, strings, bit fields and user memory.
 * Run by BPF_PROG_TEST_RUN as a raw tracepoint, in the test's own process. */
#include "vmlinux.h"
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_helpers.h>

/* A member and a structure that no kernel has. */
struct task_struct___wrong {
    int no_such_member;
} __attribute__((preserve_access_index));
struct no_such_structure {
    int member;
} __attribute__((preserve_access_index));

int tgid, helpers_tgid, parent_tgid, level;
char comm[16], parent_comm[16];
bool has_tgid, has_wrong, has_structure, has_type, has_value, in_execve;
__u64 value, member_size, member_offset, type_size;

SEC("raw_tp/sched_process_exit")
int look(void *ctx)
{
    struct task_struct *task = (void *)bpf_get_current_task();

    helpers_tgid = bpf_get_current_pid_tgid() >> 32;
    tgid = BPF_CORE_READ(task, tgid);
    parent_tgid = BPF_CORE_READ(task, real_parent, tgid);
    level = BPF_CORE_READ(task, thread_pid, level);
    BPF_CORE_READ_STR_INTO(&comm, task, comm);
    BPF_CORE_READ_STR_INTO(&parent_comm, task, real_parent, group_leader, comm);
    in_execve = BPF_CORE_READ_BITFIELD_PROBED(task, in_execve);

    has_tgid = bpf_core_field_exists(task->tgid);
    has_wrong = bpf_core_field_exists(struct task_struct___wrong, no_such_member);
    has_type = bpf_core_type_exists(struct task_struct);
    has_structure = bpf_core_type_exists(struct no_such_structure);
    has_value = bpf_core_enum_value_exists(enum bpf_map_type, BPF_MAP_TYPE_RINGBUF);
    value = bpf_core_enum_value(enum bpf_map_type, BPF_MAP_TYPE_RINGBUF);
    member_size = bpf_core_field_size(task->comm);
    member_offset = bpf_core_field_offset(struct task_struct, tgid);
    type_size = bpf_core_type_size(struct task_struct);
    return 0;
}

char LICENSE[] SEC("license") = "GPL";
