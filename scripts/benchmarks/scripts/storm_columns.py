"""The library's way to take a storm: columns.  Prints how many events it took so far.

storm_columns.py SOURCE.c PID
"""

import select
import sys
import time
from pathlib import Path

from hypermesh_ebpf import create_os_abstraction

with create_os_abstraction() as os_:
    handle = os_.load_ebpf_program(Path(sys.argv[1]), flags=[f"-DPID={sys.argv[2]}"])
    os_.attach_ebpf_monitor(handle)
    with os_.open_ebpf_events(handle, "events") as events:
        events.read_columns()  # imports numpy
        poll = select.poll()
        poll.register(events.fileno(), select.POLLIN)
        total = 0
        while True:
            poll.poll()
            columns = events.read_columns()
            total += len(columns["number"])
            print(total, flush=True)
            if events.fill < 0.1:
                time.sleep(0.001)
