"""BPF links: attachments that end with their last descriptor or pin (bpf_link_create, 5.7)."""

from __future__ import annotations

import ctypes as ct
import errno
import fcntl
import os

from hypermesh_ebpf.bpf.libbpf import check, libbpf

# enum bpf_attach_type
XDP, PERF_EVENT, TCX_INGRESS, TCX_EGRESS = 37, 41, 46, 47

_REPLACE = 1 << 2  # BPF_F_REPLACE
_PERF_EVENT_IOC_ENABLE = 0x2400


class _CreateOptions(ct.Structure):
    """struct bpf_link_create_opts of libbpf 1.0, as far as it is needed."""

    _fields_ = [("sz", ct.c_size_t), ("flags", ct.c_uint32), ("iter_info", ct.c_void_p * 4)]


class _UpdateOptions(ct.Structure):
    """struct bpf_link_update_opts of libbpf 1.0."""

    _fields_ = [("sz", ct.c_size_t), ("flags", ct.c_uint32), ("old_prog_fd", ct.c_uint32)]


def create_link(prog_fd: int, target: int, attach_type: int, flags: int = 0) -> int:
    """Attach by a link to a descriptor or an ifindex; the link's descriptor.  Raises OSError."""
    options = _CreateOptions(ct.sizeof(_CreateOptions), flags)
    return check(libbpf().bpf_link_create(prog_fd, target, attach_type, ct.byref(options)))


def update_link(link_fd: int, new_fd: int, old_fd: int) -> None:
    """Put another program in a link's place of the old one, in one step.  Raises OSError."""
    options = _UpdateOptions(ct.sizeof(_UpdateOptions), _REPLACE, old_fd)
    check(libbpf().bpf_link_update(link_fd, new_fd, ct.byref(options)))


def is_unknown(error: OSError) -> bool:
    """Whether the kernel knows no such link: EINVAL for a type or field that it has not."""
    return error.errno in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, 524)


def link_perf_event(event_fd: int, prog_fd: int) -> int:
    """Attach to a perf event by a link (Linux 5.15), which then holds the event.  Raises OSError.

    The event's descriptor is closed in every case.
    """
    try:
        link_fd = create_link(prog_fd, event_fd, PERF_EVENT)
        try:
            enable_perf_event(event_fd)
        except OSError:
            os.close(link_fd)
            raise
        return link_fd
    finally:
        os.close(event_fd)


def enable_perf_event(event_fd: int) -> None:
    """Let an event that was opened disabled begin.  Raises OSError."""
    fcntl.ioctl(event_fd, _PERF_EVENT_IOC_ENABLE, 0)
