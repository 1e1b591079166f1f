/* read(2) by command: how many calls, how many bytes, how long they take.
 * Run it with `hmebpf run examples/reads.c`.  Attaches to two tracepoints; about 200 ns a call. */

struct reads {
    u64 calls;
    u64 bytes;
};

struct command {
    char comm[16];
};

BPF_HASH(commands, struct command, struct reads);
BPF_HASH(starts, u32, u64);
BPF_HISTOGRAM(latency_ns);

TRACEPOINT_PROBE(syscalls, sys_enter_read)
{
    u32 thread = bpf_get_current_pid_tgid();
    u64 now = bpf_ktime_get_ns();

    starts.update(&thread, &now);
    return 0;
}

TRACEPOINT_PROBE(syscalls, sys_exit_read)
{
    u32 thread = bpf_get_current_pid_tgid();
    u64 *start = starts.lookup(&thread);
    struct command command = {};
    struct reads zero = {}, *reads;

    if (!start)
        return 0;
    latency_ns.increment(bpf_log2l(bpf_ktime_get_ns() - *start));
    starts.delete(&thread);
    bpf_get_current_comm(&command.comm, sizeof(command.comm));
    reads = commands.lookup_or_try_init(&command, &zero);
    if (reads) {
        lock_xadd(&reads->calls, 1);
        if (args->ret > 0)
            lock_xadd(&reads->bytes, args->ret);
    }
    return 0;
}
