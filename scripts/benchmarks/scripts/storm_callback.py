"""A plain BCC script that prints every event of a ring buffer, in a callback.

storm_callback.py SOURCE.c PID
"""

import sys

from bcc import BPF
from flags import FLAGS

b = BPF(src_file=sys.argv[1], cflags=[*FLAGS, f"-DPID={sys.argv[2]}"])


def handle(ctx, data, size):
    e = b["events"].event(data)
    print(e.number, e.time, e.pid, e.cpu, e.comm.decode("utf-8", "replace"))


b["events"].open_ring_buffer(handle)
while True:
    b.ring_buffer_poll(100)
    sys.stdout.flush()
