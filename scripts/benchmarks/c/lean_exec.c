/* The leanest exec-monitor: the same record of each execve and nothing else - no filters, no other way to
 * call, nothing for tasks whose places collide, nothing for strings that are not in memory yet. */
#include "hmebpf.h"

#define ARGS_SIZE 4096
#define ARG_SIZE 512

struct exec {
	u64 task;
	u64 start_ns;
	u64 duration_ns;
	u64 cgroup;
	u32 pid;
	u32 ppid;
	u32 uid;
	s32 ret;
	u32 args_length;
	u32 cut;
	char comm[16];
	char parent_comm[16];
	char filename[256];
	char args[ARGS_SIZE];
};

BPF_PERCPU_ARRAY(counts, u64, 3); /* succeeded, failed, lost */
BPF_ARRAY(places, struct exec, 64);
BPF_RINGBUF_OUTPUT(events, 1024);

static __always_inline struct exec *place_of(u64 task)
{
	u32 index = (u32)(task >> 6) * 0x9E35 % 64;
	return places.lookup(&index);
}

static __always_inline void count(u32 which)
{
	u64 *number = counts.lookup(&which);
	if (number)
		(*number)++;
}

int enter_call(struct sys_enter *ctx)
{
	struct task_struct *task = (struct task_struct *)bpf_get_current_task(), *parent = NULL;
	struct exec *exec = place_of((u64)task);
	u64 argv = ctx->args[1];
	u32 used = 0;
	if (!exec)
		return 0;
	exec->start_ns = bpf_ktime_get_ns();
	exec->pid = bpf_get_current_pid_tgid() >> 32;
	exec->uid = bpf_get_current_uid_gid();
	exec->cgroup = bpf_get_current_cgroup_id();
	bpf_probe_read_kernel(&parent, sizeof(parent), &task->real_parent);
	bpf_probe_read_kernel(&exec->ppid, sizeof(exec->ppid), &parent->tgid);
	bpf_probe_read_kernel(exec->parent_comm, sizeof(exec->parent_comm), &parent->comm);
	s32 length = bpf_probe_read_user_str(exec->filename, 256, (void *)ctx->args[0]);
	exec->cut = length == 256;
	for (u32 i = 0; i < 128; i++) {
		u64 arg = 0;
		if (bpf_probe_read_user(&arg, sizeof(arg), (void *)(argv + i * 8)) || !arg)
			break;
		if (used > ARGS_SIZE - ARG_SIZE)
			break;
		length = bpf_probe_read_user_str(&exec->args[used], ARG_SIZE, (void *)arg);
		if (length < 0)
			break;
		exec->cut |= length / ARG_SIZE;
		used += length & (2 * ARG_SIZE - 1);
	}
	exec->args_length = used;
	exec->task = (u64)task;
	return 0;
}

static __always_inline int leave(s64 ret)
{
	u64 task = bpf_get_current_task();
	struct exec *exec = place_of(task);
	if (!exec || exec->task != task)
		return 0;
	exec->task = 0;
	exec->duration_ns = bpf_ktime_get_ns() - exec->start_ns;
	exec->ret = ret;
	bpf_get_current_comm(exec->comm, sizeof(exec->comm));
	u32 length = exec->args_length;
	if (length > ARGS_SIZE)
		length = ARGS_SIZE;
	count(ret < 0);
	if (events.ringbuf_output(exec, offsetof(struct exec, args) + length, 0))
		count(2);
	return 0;
}

int leave_done(struct bpf_raw_tracepoint_args *ctx)
{
	return leave(0);
}

int leave_call(struct sys_exit *ctx)
{
	return leave(ctx->ret);
}
