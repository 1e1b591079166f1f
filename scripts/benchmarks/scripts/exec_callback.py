"""A plain BCC script that prints every execution, in a ring buffer's callback.

What execsnoop-bpfcc does with kprobes, on a tracepoint, without arguments.
"""

import sys

from bcc import BPF
from flags import FLAGS

TEXT = """
struct event { u64 time; u32 pid; u32 uid; char comm[16]; char filename[128]; };
BPF_RINGBUF_OUTPUT(events, 1024);
TRACEPOINT_PROBE(sched, sched_process_exec) {
    struct event event = {};
    event.time = bpf_ktime_get_ns();
    event.pid = bpf_get_current_pid_tgid() >> 32;
    event.uid = bpf_get_current_uid_gid();
    bpf_get_current_comm(&event.comm, sizeof(event.comm));
    TP_DATA_LOC_READ_CONST(event.filename, filename, sizeof(event.filename));
    events.ringbuf_output(&event, sizeof(event), 0);
    return 0;
}
"""
b = BPF(text=TEXT, cflags=FLAGS)


def handle(ctx, data, size):
    e = b["events"].event(data)
    print(
        e.time,
        e.pid,
        e.uid,
        e.comm.decode("utf-8", "replace"),
        e.filename.decode("utf-8", "replace"),
    )


b["events"].open_ring_buffer(handle)
while True:
    b.ring_buffer_poll(100)
    sys.stdout.flush()
