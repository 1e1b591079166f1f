#!/usr/bin/env python3
"""Count the packets and bytes that an interface receives, with a compiled object.

    scripts/build-objects
    sudo .venv/bin/python examples/xdp_counter.py lo 10

Arguments: the interface (lo) and for how many seconds (10).
"""

import sys
import time
from pathlib import Path

from hypermesh_ebpf import EbpfAttachType, create_os_abstraction

OBJECT = Path(__file__).resolve().parent.parent / "build" / "xdp_packet_counter.o"


def main(iface: str = "lo", seconds: str = "10") -> None:
    with create_os_abstraction() as os_:
        if not os_.is_ebpf_supported():
            sys.exit("eBPF cannot be used here: `hmebpf check-system` says why")
        handle = os_.load_ebpf_program(OBJECT.read_bytes())
        os_.attach_ebpf_monitor(handle, EbpfAttachType.xdp(iface=iface))
        for _ in range(int(seconds)):
            time.sleep(1)
            values = os_.read_ebpf_metrics(handle).values
            print(
                f"packets {values['packets_processed']:>10}  bytes {values['bytes_processed']:>12}",
                flush=True,
            )


if __name__ == "__main__":
    main(*sys.argv[1:])
