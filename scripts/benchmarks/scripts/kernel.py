#!/usr/bin/python3
"""What a BCC script does to see what a monitor of hmebpf sees: ``kernel.py net|exec|received``.

Written as bcc's own tools are: hashes that all CPUs share, a perf buffer, one record per argument.
"""

import sys
import time

from bcc import BPF

NET = r"""
struct process { u32 pid; u32 call; char comm[16]; };
struct counter { u64 calls, bytes, ns; u64 slots[32]; };
struct failure { struct process process; u64 number; };
BPF_HASH(start, u64, u64);
BPF_HASH(rows, struct process, struct counter, 8192);
BPF_HASH(failures, struct failure, u64, 8192);

static int enter(void)
{
	u64 thread = bpf_get_current_pid_tgid(), now = bpf_ktime_get_ns();
	start.update(&thread, &now);
	return 0;
}

static int leave(u32 call, long ret)
{
	u64 thread = bpf_get_current_pid_tgid();
	u64 *began = start.lookup(&thread);
	if (!began)
		return 0;
	u64 ns = bpf_ktime_get_ns() - *began;
	start.delete(&thread);
	struct process process = {.pid = thread >> 32, .call = call};
	struct counter none = {};
	bpf_get_current_comm(process.comm, sizeof(process.comm));
	struct counter *row = rows.lookup_or_try_init(&process, &none);
	if (!row)
		return 0;
	lock_xadd(&row->calls, 1);
	lock_xadd(&row->ns, ns);
	lock_xadd(&row->slots[bpf_log2l(ns) & 31], 1);
	if (ret < 0) {
		struct failure failure = {.process = process, .number = -ret};
		failures.increment(failure);
	} else {
		lock_xadd(&row->bytes, ret);
	}
	return 0;
}

TRACEPOINT_PROBE(syscalls, sys_enter_sendto) { return enter(); }
TRACEPOINT_PROBE(syscalls, sys_enter_recvfrom) { return enter(); }
TRACEPOINT_PROBE(syscalls, sys_exit_sendto) { return leave(2, args->ret); }
TRACEPOINT_PROBE(syscalls, sys_exit_recvfrom) { return leave(3, args->ret); }
"""

EXEC = r"""
struct record { u64 start_ns, ns; u32 pid, uid; int ret; u32 type; char comm[16]; char text[128]; };
BPF_HASH(start, u64, u64);
BPF_PERF_OUTPUT(events);

static int submit(void *ctx, struct record *record, const char *text)
{
	bpf_probe_read_user_str(record->text, sizeof(record->text), text);
	events.perf_submit(ctx, record, sizeof(*record));
	return 0;
}

TRACEPOINT_PROBE(syscalls, sys_enter_execve)
{
	struct record record = {};
	u64 thread = bpf_get_current_pid_tgid(), now = bpf_ktime_get_ns();
	record.pid = thread >> 32;
	bpf_get_current_comm(record.comm, sizeof(record.comm));
	start.update(&thread, &now);
	submit(args, &record, args->filename);
	#pragma unroll
	for (int i = 0; i < 20; i++) {
		const char *arg = NULL;
		bpf_probe_read_user(&arg, sizeof(arg), &args->argv[i]);
		if (!arg)
			break;
		submit(args, &record, arg);
	}
	return 0;
}

TRACEPOINT_PROBE(syscalls, sys_exit_execve)
{
	struct record record = {.ret = args->ret, .type = 1};
	u64 thread = bpf_get_current_pid_tgid();
	u64 *began = start.lookup(&thread);
	if (!began)
		return 0;
	record.ns = bpf_ktime_get_ns() - *began;
	start.delete(&thread);
	record.pid = thread >> 32;
	record.uid = bpf_get_current_uid_gid();
	bpf_get_current_comm(record.comm, sizeof(record.comm));
	events.perf_submit(args, &record, sizeof(record));
	return 0;
}
"""

RECEIVED = r"""
struct command { char comm[16]; };
BPF_HASH(received, struct command, u64);
TRACEPOINT_PROBE(syscalls, sys_exit_recvfrom)
{
	struct command command = {};
	if (args->ret <= 0)
		return 0;
	bpf_get_current_comm(command.comm, sizeof(command.comm));
	received.increment(command, args->ret);
	return 0;
}
"""

name = sys.argv[1]
text = {"net": NET, "exec": EXEC, "received": RECEIVED}[name]
bpf = BPF(text=text, cflags=["-DLINUX_VERSION_CODE=0"])  # light headers leave it to the caller
if name == "exec":
    bpf["events"].open_perf_buffer(lambda cpu, data, size: bpf["events"].event(data))
while True:
    if name == "exec":
        bpf.perf_buffer_poll()
    else:
        time.sleep(1)
