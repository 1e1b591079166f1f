"""A plain BCC script that drains a ring buffer by a callback, as often as it is told to.

    ring_drain.py SOURCE.c

Reads lines "PROGRAM COUNT" and answers each with a line "RECORDS SECONDS".
"""

import ctypes as ct
import sys
import time

from bcc import BPF
from flags import FLAGS


class Options(ct.Structure):
    """struct bpf_test_run_opts of libbpf 1.0."""

    _fields_ = [
        ("sz", ct.c_size_t),
        ("data_in", ct.c_void_p),
        ("data_out", ct.c_void_p),
        ("data_size_in", ct.c_uint32),
        ("data_size_out", ct.c_uint32),
        ("ctx_in", ct.c_void_p),
        ("ctx_out", ct.c_void_p),
        ("ctx_size_in", ct.c_uint32),
        ("ctx_size_out", ct.c_uint32),
        ("retval", ct.c_uint32),
        ("repeat", ct.c_int),
        ("duration", ct.c_uint32),
        ("flags", ct.c_uint32),
        ("cpu", ct.c_uint32),
        ("batch_size", ct.c_uint32),
    ]


LIBBPF = ct.CDLL("libbpf.so.1", use_errno=True)
b = BPF(src_file=sys.argv[1], cflags=FLAGS)
programs = {name: b.load_func(name, BPF.XDP) for name in ("fixed", "half", "mixed")}
records = total = 0


def produce(name, count):
    packet = ct.create_string_buffer(64)
    options = Options(sz=ct.sizeof(Options), repeat=count)
    options.data_in, options.data_size_in = ct.addressof(packet), 64
    if LIBBPF.bpf_prog_test_run_opts(programs[name].fd, ct.byref(options)) < 0:
        raise OSError(ct.get_errno(), "bpf_prog_test_run_opts")


def handle(ctx, data, size):
    global records, total
    event = b["events"].event(data)
    total += event.length
    records += 1


b["events"].open_ring_buffer(handle)
for line in sys.stdin:
    name, count = line.split()
    produce(name, int(count))
    records = 0
    begin = time.perf_counter()
    b.ring_buffer_consume()
    print(records, time.perf_counter() - begin, flush=True)
