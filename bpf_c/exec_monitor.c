/* exec-monitor: every execve and execveat, with its arguments, result and duration.
 *
 * One of these is compiled, by the rung of the ladder that was taken:
 *   RUNG_KPROBE      kprobes on the system calls' functions, 32-bit callers included
 *   RUNG_FENTRY      fentry on the same
 *   RUNG_TRACEPOINT  tracepoints syscalls:sys_enter_execve[at]
 *   RUNG_SCHED       raw tracepoint sched_process_exec alone: no failures, no duration
 * WITH_BTF adds what needs the kernel's structures: the parent, and arguments that could not be read
 * on entry.
 *
 * Costs some 2.5 us for each exec, which itself takes a few hundred; nothing on any other event.
 * A call is noted on entry (its strings may be gone when it ends) and reported when it ends: a success
 * by sched_process_exec, on every rung; a failure by the tracepoints sys_exit_execve[at] or by fexit.
 * These report a success, too, if it is still under way for them: on preemptible kernels (seen on 7.3)
 * a raw tracepoint's program is skipped while another task, preempted on this CPU, is inside it.
 * Not by kretprobes: execve sleeps, and the kernel follows only a few sleeping calls of a kretprobe at
 * a time, ten or twice the number of CPUs.  Nor do the tracepoints see the end of a success that turned
 * a 64-bit process into a 32-bit one.
 *
 * The entry is found again by its task_struct's address: when a thread execs, it takes over its
 * leader's thread id. */
#include "hmebpf.h"

#define FILENAME_SIZE 256
#define ARGS_SIZE 4096
#define ARG_SIZE 512
#define MAX_ARGS 128
#define COMM_SIZE 16

enum call { EXECVE, EXECVEAT, CALLS };

/* What is wrong with the strings of a record. */
#define ARGS_CUT 1        /* too many or too long: the rest is missing */
#define FILENAME_CUT 2
#define UNREADABLE 4      /* a page of them was not in memory on entry */
#define ARGS_FROM_STACK 8 /* args is the new program's own argument area */

struct exec {
	u64 start_ns;
	u64 duration_ns;
	u64 cgroup;
	u64 filename_at; /* user space addresses */
	u64 argv_at;
	u64 weight; /* how many execs it stands for */
	u32 pid;
	u32 ppid;
	u32 uid;
	s32 ret;
	u32 args_length;
	u8 call;
	u8 flags;
	u8 pointer_size;
	u8 has_parent;
	char comm[COMM_SIZE];
	char parent_comm[COMM_SIZE];
	char filename[FILENAME_SIZE];
	char args[ARGS_SIZE]; /* each ends in a zero byte; the record ends after args_length of them */
};

struct choices {
	u32 pid;
	u32 uid;
	u8 by_pid;
	u8 by_uid;
	u8 by_comm;
	u8 failed_only;
	char comm[COMM_SIZE];
};

enum count { SUCCEEDED, FAILED, LOST, INFLIGHT_FULL, COUNTS };

#ifdef FILTERED
BPF_ARRAY(settings, struct choices, 1);
#endif
BPF_PERCPU_ARRAY(counts, u64, COUNTS);
/* For each call, native and compat: fentry programs can be preempted by another one, not by themselves. */
BPF_PERCPU_ARRAY(scratch, struct exec, 2 * CALLS);
BPF_RINGBUF_OUTPUT(events, 1024); /* pages: 4 MiB */
#ifdef SAMPLED
BPF_PERCPU_ARRAY(sampling, struct sampling, 1);
#endif
#ifndef RUNG_SCHED
#ifndef PLACES
#define PLACES 64 /* 4.5 KB each; few, so that they stay in the cache */
#endif
/* Where a task notes its call. */
struct place {
	u64 task;   /* whose call it is, 0 if free */
	u32 claims; /* how many calls are under way of tasks that share this place */
	u32 unused;
	struct exec exec;
};
BPF_ARRAY(places, struct place, PLACES);
/* For those who find theirs taken.  All allocated at once: tracing programs that allocate while they run
 * make kernels before 6.1 warn and taint themselves, and PREEMPT_RT ones refuse them. */
BPF_HASH(overflow, u64, struct exec, 1024);
#endif

static __always_inline void add(u32 which, u64 weight)
{
	u64 *number = counts.lookup(&which);
	if (number)
		*number += weight;
}

static __always_inline void count(u32 which)
{
	add(which, 1);
}

/* How many execs this one stands for; 0 if it is to be passed over. */
static __always_inline u32 weigh_this(void)
{
#ifdef SAMPLED
	u32 zero = 0;
	return weigh(sampling.lookup(&zero));
#else
	return 1;
#endif
}

/* ---- filters: nothing at all where the user asked for none -------------------------------------- */

#ifdef FILTERED
static __always_inline struct choices *find_choices(void)
{
	u32 zero = 0;
	return settings.lookup(&zero);
}

/* Is this process one the user asked for?  Decided before any work is done, on entry and on return. */
static __always_inline bool wanted_process(struct choices *choices)
{
	return choices && (!choices->by_pid || choices->pid == bpf_get_current_pid_tgid() >> 32);
}

/* And is its user?  On entry alone: the call may change it. */
static __always_inline bool wanted_user(struct choices *choices)
{
	return !choices->by_uid || choices->uid == (u32)bpf_get_current_uid_gid();
}

/* And is this result? */
static __always_inline bool wanted_result(struct choices *choices, struct exec *exec)
{
	if (choices->failed_only && exec->ret == 0)
		return false;
	if (choices->by_comm) {
		u64 *is = (u64 *)exec->comm, *asked = (u64 *)choices->comm;
		if (is[0] != asked[0] || is[1] != asked[1])
			return false;
	}
	return true;
}
#else
#define find_choices() NULL
#define wanted_process(choices) true
#define wanted_user(choices) true
#define wanted_result(choices, exec) true
#endif

/* ---- what is reported ---------------------------------------------------------------------------- */

/* Who calls; the parent as the kernel's task tree has it. */
static __always_inline void describe_caller(struct exec *exec)
{
	exec->pid = bpf_get_current_pid_tgid() >> 32;
	exec->uid = bpf_get_current_uid_gid();
	exec->cgroup = bpf_get_current_cgroup_id();
	exec->has_parent = 0;
#ifdef WITH_BTF
	struct task_struct *task = (struct task_struct *)bpf_get_current_task(), *parent = NULL;
	bpf_probe_read_kernel(&parent, sizeof(parent), &task->real_parent);
	if (parent) {
		bpf_probe_read_kernel(&exec->ppid, sizeof(exec->ppid), &parent->tgid);
		bpf_probe_read_kernel(exec->parent_comm, sizeof(exec->parent_comm), &parent->comm);
		exec->has_parent = 1;
	}
#endif
}

#ifdef WITH_BTF
/* The strings as the new program has them, in pages that the kernel itself has just written: its
 * arguments, and behind its environment the name by which it was executed. */
static __always_inline void read_stack_strings(struct exec *exec)
{
	struct task_struct *task = (struct task_struct *)bpf_get_current_task();
	struct mm_struct *mm = NULL;
	u64 start = 0, end = 0, environment_end = 0;
	bpf_probe_read_kernel(&mm, sizeof(mm), &task->mm);
	if (!mm)
		return;
	bpf_probe_read_kernel(&start, sizeof(start), &mm->arg_start);
	bpf_probe_read_kernel(&end, sizeof(end), &mm->arg_end);
	u64 length = end - start;
	exec->flags |= ARGS_FROM_STACK;
	if (length > ARGS_SIZE) {
		length = ARGS_SIZE;
		exec->flags |= ARGS_CUT;
	}
	exec->args_length = 0;
	if (bpf_probe_read_user(exec->args, length, (void *)start) == 0)
		exec->args_length = length;
	if (exec->filename[0])
		return;
	bpf_probe_read_kernel(&environment_end, sizeof(environment_end), &mm->env_end);
	s32 got = bpf_probe_read_user_str(exec->filename, FILENAME_SIZE, (void *)environment_end);
	if (got == FILENAME_SIZE)
		exec->flags |= FILENAME_CUT;
}
#endif

static __always_inline void report(struct choices *choices, struct exec *exec)
{
	bpf_get_current_comm(exec->comm, sizeof(exec->comm));
	if (!wanted_result(choices, exec))
		return;
	add(exec->ret == 0 ? SUCCEEDED : FAILED, exec->weight);
	u32 length = exec->args_length;
	if (length > ARGS_SIZE)
		length = ARGS_SIZE;
	if (events.ringbuf_output(exec, offsetof(struct exec, args) + length, 0))
		count(LOST);
}

#ifndef RUNG_SCHED

/* The strings that the caller passed, out of its memory.  On entry clang knows the size of its pointers. */
static __always_inline void read_strings(struct exec *exec, u8 pointer_size)
{
	exec->flags = 0;
	exec->args_length = 0;
	s32 length = bpf_probe_read_user_str(exec->filename, FILENAME_SIZE, (void *)exec->filename_at);
	if (length < 0) {
		exec->filename[0] = 0;
		exec->flags |= UNREADABLE;
	} else if (length == FILENAME_SIZE) {
		exec->flags |= FILENAME_CUT;
	}
	/* No branch in this loop but those that leave it: the verifier follows each way through it, and
	 * two ways in each of 128 rounds would be too many. */
	u64 argv = exec->argv_at, pointer_mask = pointer_size == 4 ? 0xFFFFFFFF : ~0ULL;
	u32 used = 0;
	u32 i = 0;
	for (; i < MAX_ARGS; i++) {
		u64 arg = 0;
		void *at = (void *)(argv + i * pointer_size);
		if (bpf_probe_read_user(&arg, sizeof(arg), at)) {
			exec->flags |= UNREADABLE;
			break;
		}
		arg &= pointer_mask;
		if (!arg)
			break;
		if (used > ARGS_SIZE - ARG_SIZE) {
			exec->flags |= ARGS_CUT;
			break;
		}
		length = bpf_probe_read_user_str(&exec->args[used], ARG_SIZE, (void *)arg);
		if (length < 0) {
			exec->flags |= UNREADABLE;
			break;
		}
		exec->flags |= (length / ARG_SIZE) & ARGS_CUT; /* 1 if it filled its place */
		used += length & (2 * ARG_SIZE - 1);
		/* An empty string's length, with its zero byte, is 1; but Linux 5.10 says 0. */
		used += (u32)(length - 1) >> 31;
	}
	if (i == MAX_ARGS)
		exec->flags |= ARGS_CUT;
	exec->args_length = used;
}

/* A call is written straight into its task's place: copying 4.5 KB into a hash costs a quarter of all.
 * Tasks that share a place do as in net_monitor.c, which tells why that is safe. */
static __always_inline struct place *place_of(u64 task)
{
	/* The upper bits of a product: the lower ones of an address are those of its place in a slab. */
	u32 index = ((u32)(task >> 6) * 0x9E3779B1 >> 16) % PLACES;
	return places.lookup(&index);
}

/* Whether the place is this task's now. */
static __always_inline bool take(struct place *place, u64 task)
{
	if (place->task == task)
		return true; /* the return of its last call was missed */
	__sync_fetch_and_add(&place->claims, 1);
	return *(volatile u32 *)&place->claims == 1 && !*(volatile u64 *)&place->task;
}

static __always_inline void forget(struct place *place, u64 task)
{
	if (place->task == task)
		*(volatile u64 *)&place->task = 0;
	else
		overflow.delete(&task);
	__sync_fetch_and_add(&place->claims, -1);
}

static __always_inline int enter(u32 call, u64 filename, u64 argv, u8 pointer_size)
{
	struct choices *choices = find_choices();
	if (!wanted_process(choices) || !wanted_user(choices))
		return 0;
	u64 task = bpf_get_current_task();
	u32 slot = pointer_size == 8 ? call : CALLS + call;
	struct place *place = place_of(task);
	if (!place)
		return 0;
	u32 weight = weigh_this();
	if (!weight) {
		/* What was left by an exec that killed its process must not be found when this one ends. */
		if (place->task == task || (place->claims && overflow.lookup(&task)))
			forget(place, task);
		return 0;
	}
	bool taken = take(place, task);
	struct exec *exec = taken ? &place->exec : scratch.lookup(&slot);
	if (!exec)
		return 0;
	exec->start_ns = bpf_ktime_get_ns();
	exec->weight = weight;
	exec->call = call;
	exec->filename_at = filename;
	exec->argv_at = argv;
	exec->pointer_size = pointer_size;
	describe_caller(exec);
	read_strings(exec, pointer_size);
	if (taken) {
		place->task = task;
	} else if (overflow.update(&task, exec)) {
		__sync_fetch_and_add(&place->claims, -1);
		count(INFLIGHT_FULL);
	}
	return 0;
}

/* The call of this task is over. */
static __always_inline int leave(s64 ret)
{
	struct choices *choices = find_choices();
	if (!wanted_process(choices))
		return 0;
	u64 task = bpf_get_current_task();
	struct place *place = place_of(task);
	if (!place || !place->claims)
		return 0;
	struct exec *exec = place->task == task ? &place->exec : overflow.lookup(&task);
	if (!exec)
		return 0;
	exec->duration_ns = bpf_ktime_get_ns() - exec->start_ns;
	exec->ret = ret;
	if (exec->flags & UNREADABLE) {
		if (ret < 0)
			read_strings(exec, exec->pointer_size); /* by now the kernel itself has touched what it read */
#ifdef WITH_BTF
		else
			read_stack_strings(exec);
#endif
	}
	report(choices, exec);
	forget(place, task);
	return 0;
}

#endif

/* ---- the rungs: thin programs around enter() and leave() ---------------------------------------- */

#ifdef RUNG_TRACEPOINT
/* Of either call: one program has its strings verified once. */
int enter_call(struct sys_enter *ctx)
{
	u64 first = ctx->args[0], second = ctx->args[1], third = ctx->args[2];
	bool at = ctx->nr == NR_EXECVEAT;
	return enter(at ? EXECVEAT : EXECVE, at ? second : first, at ? third : second, 8);
}
#endif

#if defined(RUNG_TRACEPOINT) || defined(RUNG_KPROBE)
int leave_call(struct sys_exit *ctx)
{
	return leave(ctx->ret);
}
#endif

#if defined(RUNG_KPROBE) || defined(RUNG_FENTRY)

/* The registers with which user space made the call; a kernel address. */
#define read_argument(variable, argument) \
	bpf_probe_read_kernel(&variable, sizeof(variable), &argument(user))

static __always_inline int enter_native(u32 call, struct pt_regs *user)
{
	u64 filename = 0, argv = 0;
	if (call == EXECVE) {
		read_argument(filename, SYSCALL_ARG1);
		read_argument(argv, SYSCALL_ARG2);
	} else {
		read_argument(filename, SYSCALL_ARG2);
		read_argument(argv, SYSCALL_ARG3);
	}
	return enter(call, filename, argv, 8);
}

static __always_inline int enter_compat(u32 call, struct pt_regs *user)
{
	u64 filename = 0, argv = 0;
	if (call == EXECVE) {
		read_argument(filename, COMPAT_ARG1);
		read_argument(argv, COMPAT_ARG2);
	} else {
		read_argument(filename, COMPAT_ARG2);
		read_argument(argv, COMPAT_ARG3);
	}
	return enter(call, (u32)filename, (u32)argv, 4);
}

#endif

#ifdef RUNG_KPROBE
int enter_execve(struct pt_regs *ctx)
{
	return enter_native(EXECVE, (struct pt_regs *)FUNCTION_ARG1(ctx));
}

int enter_execveat(struct pt_regs *ctx)
{
	return enter_native(EXECVEAT, (struct pt_regs *)FUNCTION_ARG1(ctx));
}

int enter_compat_execve(struct pt_regs *ctx)
{
	return enter_compat(EXECVE, (struct pt_regs *)FUNCTION_ARG1(ctx));
}

int enter_compat_execveat(struct pt_regs *ctx)
{
	return enter_compat(EXECVEAT, (struct pt_regs *)FUNCTION_ARG1(ctx));
}

/* 32-bit callers, for whose return there is no tracepoint. */
int leave_compat_call(struct pt_regs *ctx)
{
	return leave((s32)FUNCTION_RESULT(ctx));
}
#endif

#ifdef RUNG_FENTRY
/* The function's argument.  Not ctx[0]: where the kernel's BTF has pt_regs as a forward declaration
 * only (__x64_sys_execveat in Debian's 5.10), the verifier refuses to load that. */
static __always_inline struct pt_regs *argument_of(u64 *ctx)
{
	struct pt_regs *user = NULL;
	bpf_probe_read_kernel(&user, sizeof(user), ctx);
	return user;
}

int enter_execve(u64 *ctx)
{
	return enter_native(EXECVE, argument_of(ctx));
}

int enter_execveat(u64 *ctx)
{
	return enter_native(EXECVEAT, argument_of(ctx));
}

int enter_compat_execve(u64 *ctx)
{
	return enter_compat(EXECVE, argument_of(ctx));
}

int enter_compat_execveat(u64 *ctx)
{
	return enter_compat(EXECVEAT, argument_of(ctx));
}

/* One argument, then the result. */
int leave_call(u64 *ctx)
{
	return leave((s32)ctx[1]);
}
#endif

#ifndef RUNG_SCHED
/* sched_process_exec, raised in the task when its exec can no longer fail */
int leave_done(struct bpf_raw_tracepoint_args *ctx)
{
	return leave(0);
}
#endif

#ifdef RUNG_SCHED
/* sched_process_exec(task, old pid, binprm), raised when an exec can no longer fail */
int exec_done(struct bpf_raw_tracepoint_args *ctx)
{
	u32 call = EXECVE;
	struct choices *choices = find_choices();
	if (!wanted_process(choices) || !wanted_user(choices))
		return 0;
	u32 weight = weigh_this();
	if (!weight)
		return 0;
	struct exec *exec = scratch.lookup(&call);
	if (!exec)
		return 0;
	struct linux_binprm *binprm = (struct linux_binprm *)ctx->args[2];
	char *filename = NULL;
	exec->start_ns = bpf_ktime_get_ns();
	exec->duration_ns = 0;
	exec->weight = weight;
	exec->flags = 0;
	exec->ret = 0;
	exec->call = CALLS; /* which of the two is not known */
	describe_caller(exec);
	bpf_probe_read_kernel(&filename, sizeof(filename), &binprm->filename);
	if (bpf_probe_read_kernel_str(exec->filename, FILENAME_SIZE, filename) == FILENAME_SIZE)
		exec->flags |= FILENAME_CUT;
	read_stack_strings(exec);
	report(choices, exec);
	return 0;
}
#endif
