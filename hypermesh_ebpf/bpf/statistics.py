"""Run statistics: the kernel counts the runs of all programs, and their time, while they are on.

They cost each run two clock reads.  They are switched on by a descriptor (BPF_ENABLE_STATS, Linux
5.8), so they are off again when this process is gone, however it ends - unless the sysctl
kernel.bpf_stats_enabled (Linux 5.1) or somebody else has them on.
"""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path

from hypermesh_ebpf.bpf.info import STATS_SYSCTL
from hypermesh_ebpf.bpf.libbpf import check, libbpf
from hypermesh_ebpf.errors import HmebpfError, MissingPrivilege, Unsupported, describe_errno

_RUN_TIME = 0  # enum bpf_stats_type


def switch_statistics_on() -> int | None:
    """Let the kernel count runs while the descriptor is open; None where it may not (root only)."""
    try:
        return check(libbpf().bpf_enable_stats(_RUN_TIME))
    except OSError:
        return None


class Statistics:
    """Statistics that somebody relies on: on until :meth:`close`, or switched on for good.

    ``what`` is what they are wanted for, ``remedy`` what to type without the privilege.  Raises
    MissingPrivilege; Unsupported on a kernel that is too old.
    """

    def __init__(self, what: str, remedy: str) -> None:
        self._fd: int | None = None
        try:
            self._fd = check(libbpf().bpf_enable_stats(_RUN_TIME))
        except OSError as error:
            if not _on_for_good():
                raise _refusal(what, remedy, error) from error

    def are_on(self) -> bool:
        """False if only the sysctl had them on, and somebody has set it back since."""
        return self._fd is not None or _on_for_good()

    def close(self) -> None:
        """Switch them off, if nobody else has them on."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


def _on_for_good() -> bool:
    with suppress(OSError):
        return Path(STATS_SYSCTL).read_text().strip() == "1"
    return False


def _refusal(what: str, remedy: str, error: OSError) -> HmebpfError:
    words = describe_errno(error.errno or errno.EINVAL)
    if isinstance(error, PermissionError):
        cause = f"{words}: needs CAP_SYS_ADMIN"
        return MissingPrivilege(what, cause, remedy, errno=error.errno)
    return Unsupported(
        what,
        f"this kernel cannot switch statistics on for a while (Linux 5.8): {words}",
        "switch them on for good: `sudo sysctl kernel.bpf_stats_enabled=1` (Linux 5.1)",
        errno=error.errno,
    )
