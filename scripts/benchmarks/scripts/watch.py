"""The jobs of the bundled monitors, as plain BCC scripts do them: exec, net, xdp.

    watch.py exec|net|xdp SECONDS [READINGS] [INTERFACE]

Prints one line for each reading, the first SECONDS after everything is attached.
"""

import mmap
import platform
import re
import signal
import sys
import time

from bcc import BPF

EXEC = """
struct event {
    u64 start_ns;
    u32 pid;
    int ret;
    char comm[16];
    char filename[256];
};
BPF_HASH(inflight, u64, struct event, 1024);
BPF_HASH(counts, u32, u64);
BPF_PERCPU_ARRAY(scratch, struct event, 1);
BPF_RINGBUF_OUTPUT(events, 64);

static int enter(const char *filename) {
    u32 zero = 0;
    u64 thread = bpf_get_current_pid_tgid();
    struct event *event = scratch.lookup(&zero);
    if (!event)
        return 0;
    event->start_ns = bpf_ktime_get_ns();
    event->pid = thread >> 32;
    bpf_probe_read_user_str(event->filename, sizeof(event->filename), filename);
    inflight.update(&thread, event);
    return 0;
}

static int leave(long ret) {
    u64 thread = bpf_get_current_pid_tgid();
    struct event *event = inflight.lookup(&thread);
    if (!event)
        return 0;
    event->ret = ret;
    bpf_get_current_comm(event->comm, sizeof(event->comm));
    counts.increment(ret < 0);
    events.ringbuf_output(event, sizeof(*event), 0);
    inflight.delete(&thread);
    return 0;
}

TRACEPOINT_PROBE(syscalls, sys_enter_execve) { return enter(args->filename); }
TRACEPOINT_PROBE(syscalls, sys_enter_execveat) { return enter(args->filename); }
TRACEPOINT_PROBE(syscalls, sys_exit_execve) { return leave(args->ret); }
TRACEPOINT_PROBE(syscalls, sys_exit_execveat) { return leave(args->ret); }
"""

CALLS = (
    *("connect", "accept", "accept4", "sendto", "sendmsg", "sendmmsg"),
    *("recvfrom", "recvmsg", "recvmmsg", "close"),
)
NET = """
struct who { u32 pid; u32 call; char comm[16]; };
struct count { u64 calls; u64 errors; u64 bytes; u64 ns; };
BPF_HASH(inflight, u64, u64, 16384);
BPF_TABLE("percpu_hash", struct who, struct count, rows, 4096);

static int begin(void) {
    u64 thread = bpf_get_current_pid_tgid(), now = bpf_ktime_get_ns();
    inflight.update(&thread, &now);
    return 0;
}

static int end(u32 call, long ret) {
    u64 thread = bpf_get_current_pid_tgid();
    u64 *start = inflight.lookup(&thread);
    if (!start)
        return 0;
    struct who who = { .pid = thread >> 32, .call = call };
    struct count none = {};
    bpf_get_current_comm(&who.comm, sizeof(who.comm));
    struct count *count = rows.lookup_or_try_init(&who, &none);
    if (count) {
        count->calls++;
        count->ns += bpf_ktime_get_ns() - *start;
        if (ret < 0)
            count->errors++;
        else
            count->bytes += ret;
    }
    inflight.delete(&thread);
    return 0;
}
""" + "".join(
    f"""
TRACEPOINT_PROBE(syscalls, sys_enter_{call}) {{ return begin(); }}
TRACEPOINT_PROBE(syscalls, sys_exit_{call}) {{ return end({number}, args->ret); }}
"""
    for number, call in enumerate(CALLS)
)

XDP = """
struct ethernet { u8 addresses[12]; u16 type; } __attribute__((packed));
struct count { u64 packets; u64 bytes; };
BPF_PERCPU_ARRAY(protocols, struct count, 256);

int count_packet(struct xdp_md *ctx) {
    void *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
    struct ethernet *ethernet = data;
    u8 *header = data + sizeof(*ethernet);
    u32 protocol = 255;
    if (header + 20 <= (u8 *)end) {
        if (ethernet->type == __builtin_bswap16(0x0800))
            protocol = header[9];
        else if (ethernet->type == __builtin_bswap16(0x86DD))
            protocol = header[6];
    }
    struct count *count = protocols.lookup(&protocol);
    if (count) {
        count->packets++;
        count->bytes += end - data;
    }
    return XDP_PASS;
}
"""

job, seconds = sys.argv[1], float(sys.argv[2])
readings = int(sys.argv[3]) if len(sys.argv) > 3 else 0
interface = sys.argv[4] if len(sys.argv) > 4 else "lo"

# What the light headers leave to the command line.
major, minor, patch = map(int, re.findall(r"\d+", platform.release())[:3])
version = (major << 16) + (minor << 8) + min(patch, 255)
flags = [f"-DLINUX_VERSION_CODE={version}", f"-DPAGE_SIZE={mmap.PAGESIZE}"]
program = BPF(text={"exec": EXEC, "net": NET, "xdp": XDP}[job], cflags=flags)
if job == "xdp":
    function = program.load_func("count_packet", BPF.XDP)
    program.attach_xdp(interface, function, BPF.XDP_FLAGS_SKB_MODE)
elif job == "exec":
    program["events"].open_ring_buffer(
        lambda context, data, size: print("event", program["events"].event(data).filename)
    )

signal.signal(signal.SIGTERM, signal.default_int_handler)
try:
    while True:
        time.sleep(seconds)
        if job == "exec":
            program.ring_buffer_consume()
            counts = {key.value: value.value for key, value in program["counts"].items()}
        elif job == "net":
            counts = {
                (key.pid, key.call): (
                    sum(each.calls for each in values),
                    sum(each.errors for each in values),
                    sum(each.bytes for each in values),
                    sum(each.ns for each in values),
                )
                for key, values in program["rows"].items()
            }
        else:
            rows = {key.value: list(values) for key, values in program["protocols"].items()}
            counts = {
                protocol: (sum(v.packets for v in values), sum(v.bytes for v in values))
                for protocol, values in rows.items()
                if any(v.packets for v in values)
            }
        print("reading", counts, flush=True)
        readings -= 1
        if readings == 0:
            break
except KeyboardInterrupt:
    pass
if job == "xdp":
    program.remove_xdp(interface, BPF.XDP_FLAGS_SKB_MODE)
