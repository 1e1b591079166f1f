"""Trial runs of the system calls behind every hook, with programs that do nothing.

Each function opens what it tries and gives back the descriptor, or raises OSError with the
kernel's errno.  What is opened is closed again within microseconds by :mod:`host.hooks`.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
from functools import lru_cache

from hypermesh_ebpf.bpf.libbpf import ProgLoadOpts, check, libbpf
from hypermesh_ebpf.host import architecture, capabilities
from hypermesh_ebpf.host.kernel import read_kernel_release

# enum bpf_prog_type and bpf_attach_type of include/uapi/linux/bpf.h
SOCKET_FILTER = 1
KPROBE, SCHED_CLS, TRACEPOINT, XDP, PERF_EVENT, CGROUP_SKB, RAW_TRACEPOINT = 2, 3, 5, 6, 7, 8, 17
TRACING, LSM = 26, 29
TRACE_FENTRY, TRACE_FEXIT, LSM_MAC = 24, 25, 27
CGROUP_INET_INGRESS, TCX_INGRESS = 0, 46

# What a program returns so that it changes nothing: let the packet pass.
_XDP_PASS, _CGROUP_ALLOW = 2, 1
_RETURNS = {XDP: _XDP_PASS, CGROUP_SKB: _CGROUP_ALLOW}

_PERF_TYPE_SOFTWARE, _PERF_COUNT_SW_CPU_CLOCK = 1, 0
_PERF_ATTR_SIZE_VER1 = 72  # up to config2, the first size that probes need (Linux 3.3)
_PERF_SAMPLE_RAW = 1 << 10
_PERF_FLAG_FD_CLOEXEC = 8
_PERF_DISABLED, _PERF_FREQ = 1, 1 << 10
_PERF_EVENT_IOC_SET_BPF = 0x40042408


def load_program(prog_type: int, attach_type: int = 0, btf_id: int = 0) -> int:
    """Load "r0 = harmless; exit" as this type and give its descriptor.  Raises OSError."""
    code = struct.pack("=BBhiBBhi", 0xB7, 0, 0, _RETURNS.get(prog_type, 0), 0x95, 0, 0, 0)
    opts = ProgLoadOpts()
    opts.sz = ctypes.sizeof(opts)
    opts.expected_attach_type = attach_type
    opts.attach_btf_id = btf_id
    if prog_type == KPROBE:
        opts.kern_version = read_kernel_release().code  # asked for before Linux 5.0
    buffer = ctypes.create_string_buffer(code, len(code))
    return check(
        libbpf().bpf_prog_load(
            prog_type, b"hmebpf_probe", b"GPL", buffer, len(code) // 8, ctypes.byref(opts)
        )
    )


def probe_types(which: str) -> dict[str, bool | None]:
    """Every "prog" or "map" type that libbpf knows by name: can one be made here?

    None where the probe itself failed, or was refused for want of a privilege, so that it says
    nothing about the kernel.
    """
    name_of = getattr(libbpf(), f"libbpf_bpf_{which}_type_str")
    probe = getattr(libbpf(), f"libbpf_probe_bpf_{which}_type")
    privileged = not capabilities.missing("CAP_BPF", "CAP_PERFMON", "CAP_NET_ADMIN")
    found: dict[str, bool | None] = {}
    number = 1  # 0 is "unspec"
    while name := name_of(number):
        result = probe(number, None)
        found[name.decode()] = True if result > 0 else False if not result and privileged else None
        number += 1
    return found


def open_raw_tracepoint(name: str | None, program: int) -> int:
    """Attach to a raw tracepoint; with no name, to what the program was loaded for."""
    return check(libbpf().bpf_raw_tracepoint_open(None if name is None else name.encode(), program))


def query_programs(target: int, attach_type: int) -> None:
    """Ask what is attached to a cgroup descriptor or (TCX) an ifindex.  Raises OSError."""
    count = ctypes.c_uint32(0)
    check(libbpf().bpf_prog_query(target, attach_type, 0, None, None, ctypes.byref(count)))


@lru_cache(maxsize=1)
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def open_perf_event(
    event_type: int,
    config: int = 0,
    period: int = 1,
    config1: int = 0,
    config2: int = 0,
    *,
    is_frequency: bool = False,
    pid: int = -1,
    cpu: int | None = None,
) -> int:
    """perf_event_open(2), disabled; for all processes on the first CPU unless told otherwise.

    ``period`` is a number of events, or of samples a second.  Raises OSError, Unsupported.
    """
    attr = ctypes.create_string_buffer(
        struct.pack(
            "=IIQQQQQIIQQ",
            event_type,
            _PERF_ATTR_SIZE_VER1,
            config,
            period,
            _PERF_SAMPLE_RAW,  # as libbcc asks; perf_event_paranoid looks at it
            0,
            _PERF_DISABLED | (_PERF_FREQ if is_frequency else 0),
            0,
            0,
            config1,
            config2,
        ),
        _PERF_ATTR_SIZE_VER1,
    )
    fd = int(
        _libc().syscall(
            ctypes.c_long(architecture.perf_event_open_number()),
            attr,
            ctypes.c_int(pid),
            ctypes.c_int(_first_cpu() if cpu is None else cpu),
            ctypes.c_int(-1),
            ctypes.c_ulong(_PERF_FLAG_FD_CLOEXEC),
        )
    )
    if fd < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return fd


def _first_cpu() -> int:
    """A CPU that is online (CPU 0 may not be)."""
    try:
        with open("/sys/devices/system/cpu/online") as file:
            return int(file.read().replace("-", ",").split(",")[0])
    except (OSError, ValueError):
        return 0


def open_cpu_clock() -> int:
    """A software event that fires every 1000 s of CPU time, for all processes.  Raises OSError."""
    return open_perf_event(_PERF_TYPE_SOFTWARE, _PERF_COUNT_SW_CPU_CLOCK, period=10**12)


def set_program(event: int, program: int) -> None:
    """Let a program run on a perf event.  Raises OSError."""
    fcntl.ioctl(event, _PERF_EVENT_IOC_SET_BPF, program)


def event_source(name: str) -> int | None:
    """The perf type of event source "kprobe" or "uprobe", None where the kernel has it not."""
    try:
        with open(f"/sys/bus/event_source/devices/{name}/type") as file:
            return int(file.read())
    except OSError:
        return None


def refuse_probe(source: str, is_return: bool) -> OSError:
    """What the kernel says to a kprobe or uprobe on something that does not exist.

    It checks the privilege first (perf_kprobe_event_init(), perf_uprobe_event_init()), so ENOENT
    means: allowed.  A real one would be registered, and to close it takes two or three RCU grace
    periods, 50 to 100 ms.
    """
    perf_type = event_source(source)
    if perf_type is None:
        return OSError(errno.ENODEV, os.strerror(errno.ENODEV))
    name = b"hmebpf_no_such_function" if source == "kprobe" else b"/proc/hmebpf_no_such_file"
    buffer = ctypes.create_string_buffer(name)
    config = 1 << return_bit(source) if is_return else 0
    try:
        fd = open_perf_event(perf_type, config, 1, ctypes.addressof(buffer), 0)
    except OSError as error:
        return error
    os.close(fd)
    return OSError(errno.ENOENT, os.strerror(errno.ENOENT))


def return_bit(source: str) -> int:
    """The bit of an event's config that asks for the function's return.  Raises OSError."""
    with open(f"/sys/bus/event_source/devices/{source}/format/retprobe") as file:
        return int(file.read().rpartition(":")[2])
