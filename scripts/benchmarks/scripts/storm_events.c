/* An event for each getppid(2) of one process (-DPID): a system call that does nothing else. */

struct event {
	u64 number;
	u64 time;
	u32 pid;
	u32 cpu;
	char comm[16];
};

BPF_RINGBUF_OUTPUT(events, 256); /* pages: 1 MiB */
BPF_ARRAY(numbers, u64, 1);

TRACEPOINT_PROBE(syscalls, sys_enter_getppid)
{
	u32 zero = 0;
	u32 pid = bpf_get_current_pid_tgid() >> 32;
	u64 *number = numbers.lookup(&zero);
	if (pid != PID || !number)
		return 0;
	struct event event = {};
	event.number = (*number)++;
	event.time = bpf_ktime_get_ns();
	event.pid = pid;
	event.cpu = bpf_get_smp_processor_id();
	bpf_get_current_comm(&event.comm, sizeof(event.comm));
	events.ringbuf_output(&event, sizeof(event), 0);
	return 0;
}
