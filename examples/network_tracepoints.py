#!/usr/bin/env python3
"""Count four network system calls at once, with one object of four tracepoint programs.

scripts/build-objects
sudo .venv/bin/python examples/network_tracepoints.py 10
"""

import sys
import time
from pathlib import Path

from hypermesh_ebpf import EbpfAttachType, create_os_abstraction

OBJECT = Path(__file__).resolve().parent.parent / "build" / "tracepoint_network.o"
TRACEPOINTS = (
    ("syscalls", "sys_enter_connect"),
    ("syscalls", "sys_enter_accept"),
    ("syscalls", "sys_exit_sendto"),
    ("syscalls", "sys_exit_recvfrom"),
)


def main(seconds: str = "10") -> None:
    with create_os_abstraction() as os_:
        handle = os_.load_ebpf_program(OBJECT.read_bytes())
        for category, name in TRACEPOINTS:
            os_.attach_ebpf_monitor(handle, EbpfAttachType.tracepoint(category, name))
            print(f"attached to {category}:{name}")
        for _ in range(int(seconds)):
            time.sleep(1)
            values = os_.read_ebpf_metrics(handle).values
            print(", ".join(f"{name} {value}" for name, value in values.items()), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
