"""Reads one map by BCC, again and again.

    read_map.py hash|percpu_hash|array ENTRIES

Prints "ready".  For each line "items", "batch" or "rows" on standard input it reads the whole map
into a list - by items(), items_lookup_batch(), or items() and then the numbers themselves, those of
all CPUs added - and prints the seconds of CPU time that took.
"""

import platform
import re
import sys
import time

from bcc import BPF

PROGRAM = """
struct counter { u64 packets; u64 bytes; };
BPF_TABLE("%s", %s, struct counter, filled, %s);
"""

major, minor, patch = [int(n) for n in re.findall(r"\d+", platform.release())[:3]]
code = major << 16 | minor << 8 | min(patch, 255)
kind, entries = sys.argv[1:3]
text = PROGRAM % (kind, "u32" if kind == "array" else "u64", entries)
bpf = BPF(text=text, cflags=[f"-DLINUX_VERSION_CODE={code}"])
table = bpf["filled"]
print("ready", flush=True)


def rows():
    if "percpu" in kind:
        return [
            (
                key.value,
                sum(each.packets for each in counters),
                sum(each.bytes for each in counters),
            )
            for key, counters in table.items()
        ]
    return [(key.value, counter.packets, counter.bytes) for key, counter in table.items()]


def batch():
    return list(table.items_lookup_batch())


reads = {"items": table.items, "batch": batch, "rows": rows}
for line in sys.stdin:
    begin = time.process_time()
    found = reads[line.strip()]()
    print(time.process_time() - begin, len(found), flush=True)
    del found
