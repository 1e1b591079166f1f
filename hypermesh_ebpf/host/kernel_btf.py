"""The kernel's type information (BTF): where it is and whether it can be read.

``HMEBPF_BTF`` names another file.  Pointing it to nothing simulates a kernel without BTF; pointing
it to a copy serves kernels that have none of their own (btfhub).
"""

from __future__ import annotations

import ctypes
import os
from functools import lru_cache

from hypermesh_ebpf.bpf.libbpf import check, libbpf
from hypermesh_ebpf.errors import MissingBtf, describe_errno

KIND_FUNC = 12
_MAGIC = (b"\x9f\xeb", b"\xeb\x9f")


def btf_path() -> str:
    """The file that holds the kernel's BTF; everybody reads this one."""
    return os.environ.get("HMEBPF_BTF") or "/sys/kernel/btf/vmlinux"


def require_btf() -> str:
    """The path of a BTF file that can be read.  Raises MissingBtf."""
    path = btf_path()
    try:
        with open(path, "rb") as file:
            head = file.read(2)
    except FileNotFoundError as error:
        raise MissingBtf(
            "read the kernel's type information (BTF)",
            f"{path}: {describe_errno(error.errno or 0)}",
            "boot a kernel built with CONFIG_DEBUG_INFO_BTF=y (every current distribution's is), "
            "or name a BTF file of this kernel with HMEBPF_BTF=FILE",
            errno=error.errno,
        ) from error
    except OSError as error:
        raise MissingBtf(
            "read the kernel's type information (BTF)",
            f"{path}: {describe_errno(error.errno or 0)}",
            f"make it readable: `sudo chmod a+r {path}`",
            errno=error.errno,
        ) from error
    if head not in _MAGIC:
        raise MissingBtf(
            "read the kernel's type information (BTF)",
            f"{path} is not a BTF file",
            "unset HMEBPF_BTF, or name a BTF file of this kernel",
        )
    return path


@lru_cache(maxsize=1)
def _kernel_btf() -> int:
    """libbpf's handle of the parsed file (13-24 ms), kept for the life of the process."""
    path = require_btf()
    handle = libbpf().btf__parse(path.encode(), None)
    if not handle:
        number = ctypes.get_errno()
        raise MissingBtf(
            "parse the kernel's type information (BTF)",
            f"{path}: {describe_errno(number)}",
            "unset HMEBPF_BTF, or name a BTF file of this kernel",
            errno=number,
        )
    return int(handle)


@lru_cache(maxsize=256)
def function_btf_id(name: str) -> int | None:
    """The BTF id of a kernel function, None if the kernel's BTF does not list it.

    Raises MissingBtf.  Functions of modules are not in the kernel's own BTF.
    """
    try:
        return check(libbpf().btf__find_by_name_kind(_kernel_btf(), name.encode(), KIND_FUNC))
    except OSError:
        return None
