#!/usr/bin/env python3
"""Which processes read files most, from a map as numpy arrays.

    sudo .venv/bin/python examples/busiest_readers.py 10

Argument: for how many seconds (10).
"""

import sys
import time

import numpy as np

from hypermesh_ebpf import create_os_abstraction

SOURCE = """
struct process { u32 pid; char comm[16]; };
struct reads { u64 calls; u64 asked; };
BPF_TABLE("lru_percpu_hash", struct process, struct reads, readers, 10240);

TRACEPOINT_PROBE(syscalls, sys_enter_read) {
    struct process process = {.pid = bpf_get_current_pid_tgid() >> 32};
    struct reads none = {};
    bpf_get_current_comm(&process.comm, sizeof(process.comm));
    struct reads *reads = readers.lookup_or_try_init(&process, &none);
    if (reads) {
        reads->calls++;
        reads->asked += args->count;
    }
    return 0;
}
"""


def main(seconds: str = "10") -> None:
    with create_os_abstraction() as os_:
        handle = os_.load_ebpf_program(source=SOURCE)
        os_.attach_ebpf_monitor(handle)
        print("counting", flush=True)
        time.sleep(float(seconds))
        found = os_.read_ebpf_columns(handle, "readers")
        calls = found.values["calls"]
        for place in np.argsort(calls)[:-11:-1]:
            pid, comm = found.keys["pid"][place], found.keys["comm"][place].decode()
            asked = found.values["asked"][place]
            print(
                f"{pid:>8} {comm:16} {calls[place]:>10} reads {asked / calls[place]:>10.0f} bytes"
            )
        print(f"processes {len(found)}  reads {calls.sum()}")


if __name__ == "__main__":
    main(*sys.argv[1:])
