"""Loads and attaches by BCC, on request: one line in, seconds out.

load                 compile the XDP counter of this script, make its map, load its program
KIND TARGET          attach an empty program, and detach it: "ATTACHED DETACHED"
"""

import mmap
import os
import platform
import re
import sys
import time

from bcc import BPF, BPFAttachType, PerfSWConfig, PerfType

COUNTER = """
BPF_PERCPU_ARRAY(packets, u64, 256);
int count(struct xdp_md *ctx) {
    void *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
    u32 protocol = data + 24 <= end ? *(u8 *)(data + 23) : 0;
    u64 *count = packets.lookup(&protocol);
    if (count)
        *count += 1;
    return XDP_PASS;
}
"""
EMPTY = "int empty(void *ctx) { return RESULT; }"

major, minor, patch = map(int, re.findall(r"\d+", platform.release())[:3])
version = (major << 16) + (minor << 8) + min(patch, 255)
flags = [f"-DLINUX_VERSION_CODE={version}", f"-DPAGE_SIZE={mmap.PAGESIZE}"]
types = {
    "xdp": BPF.XDP,
    "tracepoint": BPF.TRACEPOINT,
    "raw_tracepoint": BPF.RAW_TRACEPOINT,
    "uprobe": BPF.KPROBE,
    "perf_event": BPF.PERF_EVENT,
    "cgroup": BPF.CGROUP_SKB,
}
programs = {}


def load():
    begin = time.perf_counter()
    program = BPF(text=COUNTER, cflags=flags)
    program.load_func("count", BPF.XDP)
    took = time.perf_counter() - begin
    program.cleanup()
    return took


def attach(kind, target):
    """Seconds of attaching and of detaching; the program is loaded before."""
    if kind not in programs:
        result = {"xdp": 2, "cgroup": 1}.get(kind, 0)
        programs[kind] = BPF(text=EMPTY, cflags=[*flags, f"-DRESULT={result}"])
    program = programs[kind]
    function = program.load_func("empty", types[kind])
    group = os.open(target, os.O_RDONLY) if kind == "cgroup" else -1
    begin = time.perf_counter()
    if kind == "xdp":
        program.attach_xdp(target, function, BPF.XDP_FLAGS_SKB_MODE)
    elif kind == "tracepoint":
        program.attach_tracepoint(tp=target, fn_name="empty")
    elif kind == "raw_tracepoint":
        program.attach_raw_tracepoint(tp=target, fn_name="empty")
    elif kind == "uprobe":
        path, symbol = target.split(":")
        program.attach_uprobe(name=path, sym=symbol, fn_name="empty")
    elif kind == "perf_event":
        event = {"ev_type": PerfType.SOFTWARE, "ev_config": PerfSWConfig.CPU_CLOCK}
        program.attach_perf_event(**event, fn_name="empty", sample_freq=99)
    else:
        allow_multi = 2
        program.attach_func(function, group, BPFAttachType.CGROUP_INET_INGRESS, allow_multi)
    middle = time.perf_counter()
    if kind == "xdp":
        program.remove_xdp(target, BPF.XDP_FLAGS_SKB_MODE)
    elif kind == "tracepoint":
        program.detach_tracepoint(tp=target)
    elif kind == "raw_tracepoint":
        program.detach_raw_tracepoint(tp=target)
    elif kind == "uprobe":
        program.detach_uprobe(name=path, sym=symbol)
    elif kind == "perf_event":
        program.detach_perf_event(**event)
    else:
        program.detach_func(function, group, BPFAttachType.CGROUP_INET_INGRESS)
    end = time.perf_counter()
    if group >= 0:
        os.close(group)
    return f"{middle - begin} {end - middle}"


for line in sys.stdin:
    asked = line.split()
    print(load() if asked == ["load"] else attach(*asked), flush=True)
