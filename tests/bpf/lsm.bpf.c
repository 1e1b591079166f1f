// SPDX-License-Identifier: GPL-2.0-only
/* LSM: counts executions as they are checked, and forbids none. */
#include "vmlinux.h"
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>

__u64 checks;

SEC("lsm/bprm_check_security")
int BPF_PROG(on_check, struct linux_binprm *bprm, int before)
{
    __sync_fetch_and_add(&checks, 1);
    return before;
}

char LICENSE[] SEC("license") = "GPL";
