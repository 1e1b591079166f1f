"""What may forbid BPF here beside capabilities: lockdown, LSMs, sysctls, seccomp.

:func:`refusal` turns a kernel's errno into the error that names the true cause.
"""

from __future__ import annotations

import ctypes
import errno
import os
from functools import lru_cache
from pathlib import Path

from hypermesh_ebpf.errors import MissingPrivilege, Unsupported, describe_errno
from hypermesh_ebpf.host import architecture, capabilities, filesystems

# include/uapi/linux/lsm.h (Linux 6.8)
_LSM_IDS = {
    100: "capability",
    101: "selinux",
    102: "smack",
    103: "tomoyo",
    104: "apparmor",
    105: "yama",
    106: "loadpin",
    107: "safesetid",
    108: "lockdown",
    109: "bpf",
    110: "landlock",
    111: "ima",
    112: "evm",
    113: "ipe",
}


def read_sysctl(name: str) -> str | None:
    """The value of a sysctl ("kernel.perf_event_paranoid"), None where it cannot be read."""
    try:
        return Path("/proc/sys", *name.split(".")).read_text().strip()
    except OSError:
        return None


@lru_cache(maxsize=8)
def _read_securityfs(name: str) -> str | None:
    """A securityfs file, or None where this process cannot see securityfs."""
    try:
        directory = filesystems.open_filesystem(filesystems.SECURITYFS)
    except Unsupported:
        return None
    try:
        return filesystems.read_at(directory, name).strip()
    except OSError:
        return None
    finally:
        os.close(directory)


def lockdown() -> str | None:
    """The lockdown level: "none", "integrity" or "confidentiality"; None if it cannot be read.

    kernel_lockdown(7).  A kernel without the lockdown LSM has no such file, and no lockdown.
    """
    text = _read_securityfs("lockdown")
    if text is not None:
        return text[text.find("[") + 1 : text.find("]")] if "[" in text else text
    lsms = active_lsms()
    return "none" if lsms is not None and "lockdown" not in lsms else None


@lru_cache(maxsize=1)
def active_lsms() -> tuple[str, ...] | None:
    """The active security modules in their order, None if the kernel does not tell this process.

    From securityfs, else lsm_list_modules(2) (Linux 6.8), which anybody may call.
    """
    text = _read_securityfs("lsm")
    if text:
        return tuple(text.split(","))
    ids = (ctypes.c_uint64 * 64)()
    size = ctypes.c_uint32(ctypes.sizeof(ids))
    libc = ctypes.CDLL(None, use_errno=True)
    count = libc.syscall(
        ctypes.c_long(architecture.LSM_LIST_MODULES), ids, ctypes.byref(size), ctypes.c_uint32(0)
    )
    if count < 0:
        return None
    return tuple(_LSM_IDS.get(ids[i], f"lsm{ids[i]}") for i in range(count))


def refusal(
    what: str, error: OSError, needs: tuple[str, ...] = (), otherwise: str | None = None
) -> Unsupported:
    """The error for a call that the kernel refused: MissingPrivilege if a privilege would help.

    ``needs`` are the capabilities that the call asks for, ``otherwise`` the remedy where the
    kernel just cannot do it.
    """
    number = error.errno or 0
    cause = describe_errno(number)
    if number not in (errno.EPERM, errno.EACCES):
        return Unsupported(what, cause, otherwise, errno=number)
    lacking = capabilities.missing(*needs)
    if lacking and capabilities.in_user_namespace():
        return MissingPrivilege(
            what,
            f"{cause}: in a user namespace capabilities do not count for BPF",
            capabilities.IN_INITIAL_NAMESPACE,
            errno=number,
        )
    if lacking:
        return MissingPrivilege(
            what,
            f"{cause}: lacks {', '.join(lacking)}",
            capabilities.grant_remedy(lacking),
            errno=number,
        )
    if lockdown() == "confidentiality":
        return Unsupported(
            what,
            f"{cause}: the kernel is locked down (confidentiality)",
            "boot with lockdown=integrity (or without Secure Boot); see kernel_lockdown(7)",
            errno=number,
        )
    if capabilities.seccomp_filtered():
        return MissingPrivilege(
            what,
            f"{cause} with {' and '.join(needs)} held: a seccomp filter is active",
            "run the container with `--security-opt seccomp=unconfined`",
            errno=number,
        )
    return Unsupported(
        what,
        f"{cause} with {' and '.join(needs) or 'privileges'} held: the kernel itself refuses it",
        otherwise,
        errno=number,
    )


def perf_refusal(what: str, error: OSError, needs: tuple[str, ...] = ()) -> Unsupported:
    """As :func:`refusal`, for perf_event_open(2), which kernel.perf_event_paranoid also governs.

    Debian's and Ubuntu's level 3 and above lets nobody without CAP_SYS_ADMIN open any event.
    """
    paranoid = read_sysctl("kernel.perf_event_paranoid")
    if (
        error.errno in (errno.EPERM, errno.EACCES)
        and not capabilities.missing(*needs)
        and not capabilities.has("CAP_SYS_ADMIN")
        and paranoid is not None
        and int(paranoid) > 2
    ):
        return MissingPrivilege(
            what,
            f"{describe_errno(error.errno)}: kernel.perf_event_paranoid is {paranoid}",
            "run it as root, or `sudo sysctl kernel.perf_event_paranoid=2`",
            errno=error.errno,
        )
    return refusal(what, error, needs)
