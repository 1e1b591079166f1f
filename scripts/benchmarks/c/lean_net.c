/* The leanest net-monitor, for two of its calls: what it keeps of them and nothing else - no filters, no
 * events, no totals beside the rows, no call but send and recv, nothing for threads whose places
 * collide. */
#include "hmebpf.h"

enum call { SEND = 2, RECV };

struct underway {
	u64 thread;
	u64 start_ns;
	u64 flags;
};

struct process {
	u32 pid;
	u32 call;
	char comm[16];
};

struct failure {
	struct process process;
	u64 number;
};

struct counter {
	u64 calls;
	u64 errors;
	u64 bytes;
	u64 ns;
	u64 slots[32];
};

BPF_ARRAY(places, struct underway, 32768);
BPF_TABLE("percpu_hash", struct process, struct counter, rows, 8192);
BPF_TABLE("percpu_hash", struct failure, u64, failures, 8192);

static __always_inline struct underway *place_of(u64 thread)
{
	u32 index = (u32)thread * 0x9E35 % 32768;
	return places.lookup(&index);
}

static __always_inline int enter(u64 flags)
{
	u64 thread = bpf_get_current_pid_tgid();
	struct underway *place = place_of(thread);
	if (place) {
		place->flags = flags;
		place->start_ns = bpf_ktime_get_ns();
		place->thread = thread;
	}
	return 0;
}

static __always_inline int leave(u32 call, s64 ret)
{
	u64 thread = bpf_get_current_pid_tgid(), zero = 0;
	struct underway *place = place_of(thread);
	if (!place || place->thread != thread)
		return 0;
	u64 ns = bpf_ktime_get_ns() - place->start_ns;
	place->thread = 0;
	struct process process = {.pid = thread >> 32, .call = call};
	if (thread >> 32 == (u32)thread) {
		bpf_get_current_comm(process.comm, sizeof(process.comm));
	} else {
		struct task_struct *task = (struct task_struct *)bpf_get_current_task();
		struct task_struct *leader = NULL;
		bpf_probe_read_kernel(&leader, sizeof(leader), &task->group_leader);
		bpf_probe_read_kernel_str(process.comm, sizeof(process.comm), &leader->comm);
	}
	struct counter *row = rows.lookup(&process);
	if (!row) {
		struct counter none = {};
		row = rows.lookup_or_try_init(&process, &none);
		if (!row)
			return 0;
	}
	row->calls++;
	row->ns += ns;
	row->slots[log2_of(min_of(ns >> 7, 0xFFFFFFFF)) & 31]++;
	if (ret < 0) {
		struct failure failure = {.process = process, .number = -ret};
		row->errors++;
		u64 *times = failures.lookup_or_try_init(&failure, &zero);
		if (times)
			(*times)++;
	} else if (!(place->flags & 0x2002)) { /* MSG_PEEK, MSG_ERRQUEUE */
		row->bytes += ret;
	}
	return 0;
}

int begin_send(struct sys_enter *ctx)
{
	return enter(0);
}

int begin_recvfrom(struct sys_enter *ctx)
{
	return enter(ctx->args[3]);
}

int end_send(struct sys_exit *ctx)
{
	return leave(SEND, ctx->ret);
}

int end_recv(struct sys_exit *ctx)
{
	return leave(RECV, ctx->ret);
}
