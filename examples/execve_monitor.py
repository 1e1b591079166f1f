#!/usr/bin/env python3
"""Count process executions with a program of two instructions, given as raw bytes.

    sudo .venv/bin/python examples/execve_monitor.py 10

The shortest program, a lone exit, is refused by the kernel's verifier: it would return a register
that nobody set.  The example shows that first.
"""

import sys
import time

from hypermesh_ebpf import (
    EbpfAttachType,
    HookUnsupported,
    VerifierError,
    create_os_abstraction,
)

EXIT = bytes([0x95, 0, 0, 0, 0, 0, 0, 0])
R0_IS_0 = bytes([0xB7, 0, 0, 0, 0, 0, 0, 0])

# Where the kernel has no kprobes, the system call's tracepoint sees the same executions.
PLACES = (
    EbpfAttachType.kprobe("syscall:execve"),
    EbpfAttachType.tracepoint("syscalls", "sys_enter_execve"),
)


def main(seconds: str = "10") -> None:
    with create_os_abstraction() as os_:
        for place in PLACES:
            try:
                os_.attach_ebpf_monitor(os_.load_ebpf_program(EXIT), place)
            except HookUnsupported as error:
                print(f"{error}")
                continue
            except VerifierError as error:
                print(f"{error}\nhint: {error.remedy}")
            handle = os_.load_ebpf_program(R0_IS_0 + EXIT)
            os_.attach_ebpf_monitor(handle, place)
            break
        else:
            sys.exit("no way to see executions here: `hmebpf check-system` says why")
        for _ in range(int(seconds)):
            time.sleep(1)
            metrics = os_.read_ebpf_metrics(handle)
            hook, hits = metrics.metadata["hook"], metrics.values["probe_hits"]
            print(f"{hook}: {hits} executions", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
