"""The kernel's configuration as its headers have it: CONFIG_ macros."""

from __future__ import annotations

import gzip
import platform
import re
from collections.abc import Mapping
from pathlib import Path

# Without a configuration file, the kernel's structures tell: an option is set where a structure has
# this member.
_TOLD_BY = {
    "BLK_CGROUP": ("bio", "bi_blkg"),
    "CGROUPS": ("task_struct", "cgroups"),
    "COMPACTION": ("zone", "compact_considered"),
    "FAIR_GROUP_SCHED": ("sched_entity", "my_q"),
    "INET": ("net", "ipv4"),
    "IPV6": ("sock_common", "skc_v6_daddr"),
    "KASAN": ("task_struct", "kasan_depth"),
    "LOCKDEP": ("task_struct", "lockdep_depth"),
    "MEMCG": ("mm_struct", "owner"),
    "NETFILTER": ("net", "nf"),
    "NET_NS": ("net", "user_ns"),
    "NUMA": ("task_struct", "mempolicy"),
    "SECURITY": ("cred", "security"),
    "SMP": ("task_struct", "on_cpu"),
    "SWAP": ("mm_struct", "mmlist"),
    "THREAD_INFO_IN_TASK": ("task_struct", "thread_info"),
}
_ALWAYS = ("64BIT", "BLOCK", "BPF", "BPF_SYSCALL", "MMU", "MODULES", "NET", "PROC_FS", "SYSFS")
_SLUB = "slab_sheaf", "kmem_cache_cpu"


def configuration(release: str, types: Mapping[str, str]) -> str:
    """CONFIG_ macros: the kernel's configuration where it can be read, else what its types tell.

    ``types``: the C text of each structure, by tag.
    """
    options = dict.fromkeys(_ALWAYS, "y") | read_configuration(release)
    if len(options) == len(_ALWAYS):
        for option, (tag, member) in _TOLD_BY.items():
            if re.search(rf"\b{member}\b", types.get(tag, "")):
                options[option] = "y"
        if any(tag in types for tag in _SLUB):
            options["SLUB"] = "y"
        if platform.machine() == "x86_64":
            # As distributions build it.  It lowers where programs take kernel addresses to begin to
            # the place for five-level page tables, which is right for four levels, too.
            options |= {"DYNAMIC_MEMORY_LAYOUT": "y", "X86_5LEVEL": "y"}
    machine = {"x86_64": ("X86", "X86_64"), "aarch64": ("ARM64",)}.get(platform.machine(), ())
    options |= dict.fromkeys((*machine, "ARCH_HAS_SYSCALL_WRAPPER"), "y")
    for undone in ("BPF_SYSCALL", "ARCH_HAS_SYSCALL_WRAPPER"):  # the prelude has them
        options.pop(undone, None)
    return "".join(_define_option(name, value) for name, value in sorted(options.items()))


def _define_option(name: str, value: str) -> str:
    if value == "m":
        return f"#define CONFIG_{name}_MODULE 1\n"
    return f"#define CONFIG_{name} {1 if value == 'y' else value}\n"


def read_configuration(release: str) -> dict[str, str]:
    """The options from where kernels and distributions keep them; nothing where none does."""
    running = release == platform.release()
    places = [f"/boot/config-{release}", f"/lib/modules/{release}/config"]
    for place in (["/proc/config.gz"] if running else []) + places:
        try:
            raw = Path(place).read_bytes()
            text = (gzip.decompress(raw) if place.endswith(".gz") else raw).decode()
        except (OSError, EOFError, UnicodeDecodeError):
            continue  # most systems have one of the three
        return dict(re.findall(r"^CONFIG_(\w+)=([^\n]+)$", text, re.M))
    return {}
