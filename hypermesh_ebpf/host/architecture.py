"""The one place that knows how processor architectures differ.

Numbers from the kernel's syscall tables (arch/*/entry/syscalls, include/uapi/asm-generic/unistd.h);
names of system call functions from each architecture's asm/syscall_wrapper.h (Linux 4.17).
"""

from __future__ import annotations

import os

from hypermesh_ebpf.errors import Unsupported

# Since Linux 5.1 all architectures number new system calls alike.
FSOPEN, FSCONFIG, FSMOUNT = 430, 431, 432
LSM_LIST_MODULES = 461

_PERF_EVENT_OPEN = {
    "x86_64": 298,
    "aarch64": 241,
    "riscv64": 241,
    "loongarch64": 241,
    "s390x": 331,
    "ppc64le": 319,
    "ppc64": 319,
    "armv7l": 364,
}

_SYSCALL_PREFIX = {
    "x86_64": "__x64_sys_",
    "aarch64": "__arm64_sys_",
    "riscv64": "__riscv_sys_",
    "s390x": "__s390x_sys_",
}

# Entries of 32-bit programs (CONFIG_COMPAT; on x86-64 also CONFIG_IA32_EMULATION).
_COMPAT_PREFIX = {"x86_64": "__ia32_compat_sys_", "aarch64": "__arm64_compat_sys_"}


def perf_event_open_number() -> int:
    """The number of perf_event_open(2).  Raises Unsupported on an architecture not listed here."""
    machine = os.uname().machine
    try:
        return _PERF_EVENT_OPEN[machine]
    except KeyError:
        raise Unsupported(
            "perf_event_open",
            f"its number on {machine} is not known to hmebpf",
            "report the machine",
        ) from None


def syscall_functions(name: str) -> tuple[str, ...]:
    """The names under which the kernel may keep system call ``name``, most likely first."""
    prefix = _SYSCALL_PREFIX.get(os.uname().machine)
    common = (f"__se_sys_{name}", f"sys_{name}", f"SyS_{name}")
    return (prefix + name, *common) if prefix else common


def compat_syscall_functions(name: str) -> tuple[str, ...]:
    """The same for the entry that 32-bit programs take; empty where none is known."""
    prefix = _COMPAT_PREFIX.get(os.uname().machine)
    return (prefix + name,) if prefix else ()
