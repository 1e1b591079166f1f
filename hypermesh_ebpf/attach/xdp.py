"""XDP: attach a program to a network interface through netlink, by pyroute2, or by a kernel link.

Needs Linux 5.7 (IFLA_XDP_EXPECTED_FD, commit 92234c8f15c8) and CAP_NET_ADMIN.  A netlink
attachment belongs to nobody and outlives its owner: :mod:`hypermesh_ebpf.guard` holds the program
before :func:`attach` is called, and takes it off.

Native means in the driver, generic in the network stack, on every kind of interface.  The rules by
which the kernel refuses are in net/core/dev.c, dev_xdp_attach().
"""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass

from hypermesh_ebpf.attach import links
from hypermesh_ebpf.attach.route import Links, Refused, common_refusal, open_links
from hypermesh_ebpf.bpf.info import open_by_id, read_program
from hypermesh_ebpf.bpf.libbpf import libbpf
from hypermesh_ebpf.errors import (
    AttachError,
    HmebpfError,
    InterfaceBusy,
    MissingPrivilege,
    UsageError,
    describe_errno,
)
from hypermesh_ebpf.host.interfaces import read_attached
from hypermesh_ebpf.host.targets import find_interface as find_interface

_NOEXIST, _REPLACE = 1, 16  # XDP_FLAGS_UPDATE_IF_NOEXIST, XDP_FLAGS_REPLACE
_MODE_FLAGS = {"generic": 2, "native": 4, "offload": 8}
_PINS_SEARCHED = 1000


@dataclass(frozen=True, slots=True)
class XdpAttachment:
    """A program of ours on an interface.

    ``mode`` is "native" or "generic"; ``fallback`` says, in the kernel's words, why native was not
    taken where it was tried.  ``link`` is the kernel link's descriptor, -1 where there is none.
    """

    iface: str
    ifindex: int
    mode: str
    prog_id: int
    fallback: str | None
    link: int = -1


@dataclass(frozen=True, slots=True)
class XdpOccupant:
    """A program that is on an interface now; ``mode`` is "native", "generic" or "offload"."""

    mode: str
    prog_id: int


def current(iface: str) -> tuple[XdpOccupant, ...]:
    """What is attached to an interface now: nothing, or one program, or one and an offloaded one.

    Raises InterfaceNotFound, TargetGone.
    """
    ifindex = find_interface(iface)
    with open_links(f"look at xdp on {iface}"):
        return _occupants(ifindex)


def attach(
    prog_fd: int,
    prog_id: int,
    iface: str,
    mode: str = "auto",
    replace: bool = False,
    *,
    ifindex: int | None = None,
    link: bool = False,
) -> XdpAttachment:
    """Attach an XDP program to an interface.

    ``ifindex`` is the interface's where it was found before: the guard then holds the program for
    the very interface that gets it, even if another one takes the name in between.

    ``mode`` "auto" takes native where the driver has it, else generic.  ``replace`` takes the place
    of another program in one step, in the mode that it had unless another one is asked for; without
    it nobody's program is touched.

    ``link`` attaches by a kernel link (Linux 5.9), which ends with its last descriptor or pin; it
    cannot take another program's place, and nobody can take it off but who holds it.

    Raises InterfaceNotFound, InterfaceBusy, MissingPrivilege, TargetGone, AttachError, UsageError.
    """
    if mode not in ("auto", "native", "generic"):
        raise UsageError(f"attach xdp in mode {mode!r}", "modes are auto, native and generic")
    if ifindex is None:
        ifindex = find_interface(iface)
    with open_links(f"attach xdp to {iface}") as netlink:
        place = _Place(netlink, iface, ifindex, prog_fd, link)
        occupant = _occupant(ifindex)
        if occupant and replace and not link:
            taken = place.swap(occupant, mode)
            fallback = None
            if mode == "auto" and taken != "native":
                fallback = f"the program replaced ran in {taken} mode"
            return XdpAttachment(iface, ifindex, taken, prog_id, fallback)
        if mode == "auto":
            taken, fallback, made = place.take_best()
        else:
            taken, fallback, made = mode, None, place.take(mode)
        return XdpAttachment(iface, ifindex, taken, prog_id, fallback, made)


def swap(iface: str, ifindex: int, old_id: int, old_fd: int, new_fd: int) -> str:
    """Put another program in the place of ours, in its mode, with no packet in between; the mode.

    Raises AttachError where ours is not there any more, TargetGone, MissingPrivilege.
    """
    what = f"swap xdp program {old_id} on {iface}"
    with open_links(what) as netlink:
        modes = [each.mode for each in _occupants(ifindex) if each.prog_id == old_id]
        if not modes:
            raise AttachError(
                what,
                "our program was taken off or replaced by somebody else",
                f"see what is there with `hmebpf list --iface {iface}`",
            )
        try:
            _set_xdp(netlink, ifindex, new_fd, modes[0], expected=old_fd)
        except Refused as refused:
            error = common_refusal(what, refused)
            raise error or AttachError(what, refused.words, errno=refused.errno) from refused
        return modes[0]


@dataclass(frozen=True, slots=True)
class _Place:
    """The interface that a program is to be attached to."""

    links: Links
    iface: str
    ifindex: int
    prog_fd: int
    by_link: bool = False

    def _put(self, mode: str) -> int:
        """Attach where nothing is attached; the link's descriptor or -1.  Raises Refused."""
        if not self.by_link:
            # "Expecting nothing" besides NOEXIST: a kernel too old to take exactly our program off
            # again does not know REPLACE either and refuses.
            _set_xdp(self.links, self.ifindex, self.prog_fd, mode, _NOEXIST, expected=-1)
            return -1
        try:
            return links.create_link(self.prog_fd, self.ifindex, links.XDP, _MODE_FLAGS[mode])
        except OSError as error:  # without the kernel's words: bpf(2) has no place for them
            raise Refused(error.errno or 0, "") from error

    def take(self, mode: str) -> int:
        """Attach in one mode where nothing is attached; the link's descriptor or -1."""
        try:
            return self._put(mode)
        except Refused as refused:
            raise self.refusal(refused, mode) from refused

    def take_best(self) -> tuple[str, str | None, int]:
        """Attach in native mode or else in generic mode; the mode, why not native, the link."""
        try:
            return "native", None, self._put("native")
        except Refused as refused:
            error = self.refusal(refused, "native")
            if type(error) is not AttachError or refused.errno == errno.EBADF:
                raise error from refused
            try:
                return "generic", refused.words, self.take("generic")
            except AttachError as generic:
                if type(generic) is AttachError:
                    generic.cause = f"{generic.cause}; in native mode: {refused.words}"
                raise

    def swap(self, occupant: XdpOccupant, mode: str) -> str:
        """Take the place of exactly that program; the mode."""
        what = f"replace xdp program {occupant.prog_id} on {self.iface}"
        theirs = _program_fd(occupant.prog_id, what)
        wanted = occupant.mode if mode == "auto" else mode
        try:
            if wanted == occupant.mode:
                _set_xdp(self.links, self.ifindex, self.prog_fd, wanted, expected=theirs)
                return wanted
            # The kernel has no single step from one mode to the other.
            _set_xdp(self.links, self.ifindex, -1, occupant.mode, expected=theirs)
            try:
                self.take(wanted)
                return wanted
            except HmebpfError:
                _set_xdp(self.links, self.ifindex, theirs, occupant.mode, expected=-1)
                raise
        except Refused as refused:
            raise self.refusal(refused, wanted) from refused
        finally:
            os.close(theirs)

    def refusal(self, refused: Refused, mode: str) -> HmebpfError:
        """The kernel's no, as an error that says what to do."""
        what = f"attach xdp to {self.iface}"
        number, words = refused.errno, refused.words
        if error := common_refusal(what, refused):
            return error
        if number in (errno.EBUSY, errno.EEXIST):
            try:
                occupant = _occupant(self.ifindex)
            except Refused as gone:
                return self.refusal(gone, mode)
            if occupant:
                return self.busy(occupant, number)
            if number == errno.EEXIST:  # "Cannot attach when an upper device already has a program"
                return InterfaceBusy(
                    what, words, f"see it with `ip -d link show {self.iface}`", errno=number
                )
        remedy = None
        if mode == "native":
            remedy = "take --mode generic, or auto to fall back to it"
            if number == errno.ERANGE:
                remedy = f"lower the MTU (`ip link set {self.iface} mtu 1500`), or {remedy}"
        elif number == errno.EINVAL and words == describe_errno(number):
            way = "by a link needs Linux 5.9" if self.by_link else "through netlink needs Linux 5.7"
            remedy = f"attaching XDP {way} or newer: see `uname -r`"
        return AttachError(f"{what} in {mode} mode", words, remedy, errno=number)

    def busy(self, occupant: XdpOccupant, number: int) -> InterfaceBusy:
        """The error that names the program that is in the way."""
        program = _describe_program(occupant.prog_id)
        see = f"see it with `hmebpf list --iface {self.iface}`"
        if self.held_by_link(occupant.mode):
            cause = f"another program ({program}) is attached by a kernel link"
            remedy = f"{see}; only the process that holds the link, or its pin, can take it off"
        elif self.by_link:
            cause = f"another program ({program}) is attached, whose place no link can take"
            remedy = f"{see}; attach without a link to take it over with --replace"
        else:
            cause = f"another program ({program}) is attached"
            remedy = f"{see}; take it over with --replace"
        return InterfaceBusy(f"attach xdp to {self.iface}", cause, remedy, errno=number)

    def held_by_link(self, mode: str) -> bool:
        """Whether a kernel link holds the interface.

        The kernel looks for a link before it compares programs: asking it to take off ours, which
        is not there, gives EBUSY for a link and EEXIST for none, and changes nothing.
        """
        try:
            _set_xdp(self.links, self.ifindex, -1, mode, expected=self.prog_fd)
        except Refused as refused:
            return refused.errno == errno.EBUSY
        return False


def _set_xdp(
    netlink: Links, ifindex: int, prog_fd: int, mode: str, flags: int = 0, *, expected: int
) -> None:
    """Put a program (-1: none) where the expected one (-1: none) is.  Raises Refused."""
    netlink.set_xdp(
        ifindex,
        [
            ("IFLA_XDP_FD", prog_fd),
            ("IFLA_XDP_FLAGS", _MODE_FLAGS[mode] | _REPLACE | flags),
            ("IFLA_XDP_EXPECTED_FD", expected),
        ],
    )


def _occupants(ifindex: int) -> tuple[XdpOccupant, ...]:
    try:
        return tuple(XdpOccupant(each.mode, each.prog_id) for each in read_attached(ifindex))
    except OSError as error:
        raise Refused(error.errno or 0, "") from error


def _occupant(ifindex: int) -> XdpOccupant | None:
    """The program that is in our way: one that runs on the card is not."""
    found = [entry for entry in _occupants(ifindex) if entry.mode != "offload"]
    return found[0] if found else None


def _program_fd(prog_id: int, what: str) -> int:
    """A descriptor of any program; the caller closes it."""
    try:
        return open_by_id("program", prog_id)
    except OSError as error:
        if error.errno == errno.EPERM:
            raise MissingPrivilege(
                what, f"{describe_errno(error.errno)}: CAP_SYS_ADMIN is missing", "run it as root"
            ) from error
        raise AttachError(what, str(error), "try again", errno=error.errno) from error


def _describe_program(prog_id: int) -> str:
    """``id 303, "cilium_xdp", pinned at /sys/fs/bpf/x``, as much as this process may know."""
    try:
        fd = open_by_id("program", prog_id)
    except OSError:  # without CAP_SYS_ADMIN, or gone by now
        return f"id {prog_id}"
    try:
        name = read_program(fd).name
    finally:
        os.close(fd)
    pin = _find_pin(prog_id)
    parts = (f"id {prog_id}", f'"{name}"' if name else "", f"pinned at {pin}" if pin else "")
    return ", ".join(part for part in parts if part)


def _find_pin(prog_id: int) -> str | None:
    """Where the program is pinned, if that is among the first pins in /sys/fs/bpf."""
    searched = 0
    for directory, _, names in os.walk("/sys/fs/bpf"):
        for name in names:
            searched += 1
            if searched > _PINS_SEARCHED:
                return None
            path = os.path.join(directory, name)
            fd = libbpf().bpf_obj_get(os.fsencode(path))
            if fd < 0:
                continue
            try:
                with open(f"/proc/self/fdinfo/{fd}") as fdinfo:
                    if f"prog_id:\t{prog_id}\n" in fdinfo.read():
                        return path
            finally:
                os.close(fd)
    return None
