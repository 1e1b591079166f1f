"""Put another program of ours in the place of one that runs, with no packet in between.

XDP: netlink with the expected program (Linux 5.7), or bpf_link_update (5.9).  TC: the filter's
program is replaced in its place (cls_bpf_change()), or bpf_link_update on a TCX link.  Each packet
meets the old or the new program, never none and never both.

The guard has to hold the new program before, and to drop the old one after: at no moment is there
a program that nobody would take off.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence

from hypermesh_ebpf.attach import links, tc, xdp
from hypermesh_ebpf.attach.hold import Hold
from hypermesh_ebpf.attach_type import EbpfAttachType
from hypermesh_ebpf.errors import AttachError, describe_errno


def replace(
    point: EbpfAttachType,
    old_fd: int,
    new_fd: int,
    hold: Hold | None = None,
    descriptors: Sequence[int] = (),
) -> None:
    """Swap the programs.  ``hold`` is the old one's; without one, ``descriptors`` has its link.

    Raises AttachError where the old program is not there any more (taken off or replaced by
    somebody else), TargetGone, MissingPrivilege.
    """
    if hold is None:
        (link,) = descriptors
        try:
            links.update_link(link, new_fd, old_fd)
        except OSError as error:
            raise AttachError(
                f"swap the program of {point}",
                describe_errno(error.errno or errno.EIO),
                "attach it anew",
                errno=error.errno,
            ) from error
    elif hold.filter is None:
        xdp.swap(hold.iface, hold.ifindex, hold.prog_id, old_fd, new_fd)
    else:
        tc.swap(hold.iface, hold.ifindex, hold.filter, hold.prog_id, new_fd)
