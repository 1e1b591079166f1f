"""Control groups: programs on the packets and sockets of their processes, by kernel links.

Needs Linux 5.7 (bpf_link_create on cgroups, commit af6eea57437a); BPF on cgroups came with 4.10.
Every program attached to a group and its ancestors runs; a packet passes if all of them allow it
(return 1).
"""

from __future__ import annotations

import errno
import os

from hypermesh_ebpf.attach import links
from hypermesh_ebpf.bpf.programs import CGROUP_ATTACH_TYPES
from hypermesh_ebpf.errors import (
    AttachError,
    HmebpfError,
    HookUnsupported,
    MissingPrivilege,
    describe_errno,
)
from hypermesh_ebpf.host.targets import find_cgroup


def attach(prog_fd: int, path: str, point: str = "ingress") -> int:
    """Attach to a cgroup; the link's descriptor, which keeps it attached.

    ``point`` is one of :data:`hypermesh_ebpf.attach_type.CGROUP_POINTS`.  Raises AttachError,
    HookUnsupported, MissingPrivilege.
    """
    path = find_cgroup(path)
    what = f"attach cgroup {point} to {path}"
    try:
        group = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise _refusal(what, error) from error
    try:
        return links.create_link(prog_fd, group, CGROUP_ATTACH_TYPES[point])
    except OSError as error:
        raise _refusal(what, error) from error
    finally:
        os.close(group)


def _refusal(what: str, error: OSError) -> HmebpfError:
    number = error.errno or 0
    cause = describe_errno(number)
    if number in (errno.EPERM, errno.EACCES):
        return MissingPrivilege(
            what,
            f"{cause}: needs CAP_BPF and CAP_NET_ADMIN, and no parent group that forbids it",
            "run it as root, or give the process CAP_BPF and CAP_NET_ADMIN",
            errno=number,
        )
    if links.is_unknown(error):
        return HookUnsupported(
            what,
            f"{cause}: no links to cgroups at this point (Linux 5.7; sock_release 5.9), or the "
            "program is of another type",
            "see `hmebpf check-system`",
            errno=number,
        )
    if number == errno.E2BIG:
        return AttachError(what, f"{cause}: 64 programs are attached", "detach one", errno=number)
    return AttachError(what, cause, "see `hmebpf list`", errno=number)
