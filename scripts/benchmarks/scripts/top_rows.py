"""The 40 busiest of a per-CPU hash each second, as a plain BCC script prints them.

top_rows.py
"""

import platform
import re
import socket
import struct
import time

from bcc import BPF

PROGRAM = """
struct source { u32 is_ip; u32 address[4]; };
struct counter { u64 packets; u64 bytes; };
BPF_TABLE("percpu_hash", struct source, struct counter, keys, 65536);
"""

major, minor, patch = [int(n) for n in re.findall(r"\d+", platform.release())[:3]]
code = major << 16 | minor << 8 | min(patch, 255)
bpf = BPF(text=PROGRAM, cflags=[f"-DLINUX_VERSION_CODE={code}"])
keys = bpf["keys"]
before = {}
print("ready", flush=True)
while True:
    time.sleep(1)
    rows = []
    now = {}
    for key, counters in keys.items():
        packets = sum(each.packets for each in counters)
        size = sum(each.bytes for each in counters)
        address = tuple(key.address)
        now[address] = packets
        rows.append((packets - before.get(address, 0), packets, size, address))
    before = now
    rows.sort(reverse=True)
    print(f"\x1b[J{'source':40} {'packets':>12} {'packets/s':>12} {'bytes':>14}")
    for rate, packets, size, address in rows[:40]:
        text = socket.inet_ntop(socket.AF_INET6, struct.pack("=4I", *address))
        print(f"{text:40} {packets:12} {rate:12} {size:14}")
    print(flush=True)
