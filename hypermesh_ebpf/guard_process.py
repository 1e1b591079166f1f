"""The guard: takes our XDP programs and TC filters off their interfaces when their owner is gone.

What is attached through netlink belongs to nobody: it stays when its owner dies.  The guard is a
process of its own session that outlives the owner and removes exactly our programs, and it is the
only way out: an orderly end asks it to do the same.  :mod:`hypermesh_ebpf.guard` starts it as

    python -I -S guard_process.py OWNER_PID         (stdin: a SOCK_SEQPACKET socket to the owner)

It stays while a monitor runs, so it imports C modules only (under 9 MB resident) and nothing of
this package.  Each message is answered:

    h NUMBER PLACE LEDGER_PATH + descriptor   hold this program    -> h ERRNO
    d NUMBER                                  hold it no longer    -> h ERRNO
    x NUMBER                                  remove it now        -> OUTCOME
    r                                         remove all and exit  -> OUTCOME for each, end of file

Kernel knowledge: rtnetlink(7), netlink(7); net/core/dev.c dev_xdp_attach(); IFLA_XDP_EXPECTED_FD
came with Linux 5.7 (commit 92234c8f15c8), pidfd_open(2) with 5.3.  For filters: net/sched/
cls_api.c and cls_bpf.c; TCA_BPF_ID came with 4.13 (commit e86283071fc0).  The kernel cannot compare
programs while it deletes a filter: its program's id is looked up just before.
"""

from __future__ import annotations

import _socket
import errno
import posix
import select
import struct
import sys

HOLD, DROP, REMOVE, RELEASE, READY = b"h", b"d", b"x", b"r", b"+"
# HOLD, number; ifindex; a filter's parent (0: XDP), priority, handle, whether clsact is ours; then
# the path of the ledger entry
HOLD_HEADER = struct.Struct("=cIIIHI?")
NUMBERED = struct.Struct("=cI")  # DROP or REMOVE, number
HELD = struct.Struct("=ci")  # HOLD, errno
OUTCOME = struct.Struct("=cIi")  # one of the five below, ifindex, errno; then the kernel's words
REMOVED, MOVED, NOT_OURS, GONE, FAILED = b"R", b"M", b"N", b"G", b"F"

# Whoever attaches for the owner may have been inside that call when all were killed: what is not
# there yet is looked for again, after so many milliseconds each.
_LOOKS = (0, 200, 1000)

_RTM_NEWLINK, _RTM_GETLINK, _RTM_SETLINK = 16, 18, 19
_RTM_NEWQDISC, _RTM_DELQDISC, _RTM_GETQDISC = 36, 37, 38
_RTM_NEWTFILTER, _RTM_DELTFILTER, _RTM_GETTFILTER = 44, 45, 46
_TCA_KIND, _TCA_OPTIONS, _TCA_CHAIN, _TCA_BPF_ID = 1, 2, 11, 11
_CLSACT_HANDLE, _CLSACT_PARENT = 0xFFFF0000, 0xFFFFFFF1
_CLSACT_SIDES = (0xFFFFFFF2, 0xFFFFFFF3)  # ingress, egress
_TCMSG = struct.Struct("=BxxxiIII")  # family, ifindex, handle, parent, info
_NLM_F_REQUEST, _NLM_F_ACK, _NLM_F_DUMP = 1, 4, 0x300
_NLM_F_CAPPED, _NLM_F_ACK_TLVS = 0x100, 0x200
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_SOL_NETLINK, _NETLINK_CAP_ACK, _NETLINK_EXT_ACK = 270, 10, 11
_IFLA_XDP, _NLA_F_NESTED, _NLA_TYPE_MASK = 43, 0x8000, 0x3FFF
_IFLA_XDP_FD, _IFLA_XDP_FLAGS, _IFLA_XDP_EXPECTED_FD = 1, 3, 8
_IFLA_XDP_PROG_IDS = (4, 5, 6)  # PROG_ID, DRV_PROG_ID, SKB_PROG_ID
_XDP_FLAGS_SKB_MODE, _XDP_FLAGS_DRV_MODE, _XDP_FLAGS_REPLACE = 2, 4, 16
_CLONE_NEWNET = 0x40000000
_ETH_P_ALL = 3


def netlink_socket() -> _socket.socket:
    """A route netlink socket of the calling thread's network namespace."""
    sock = _socket.socket(_socket.AF_NETLINK, _socket.SOCK_RAW | _socket.SOCK_CLOEXEC, 0)
    for option in (_NETLINK_CAP_ACK, _NETLINK_EXT_ACK):  # Linux 4.3, 4.12: the kernel's own words
        try:
            sock.setsockopt(_SOL_NETLINK, option, 1)
        except OSError as error:
            if error.errno != errno.ENOPROTOOPT:
                raise
    return sock


def _attribute(kind: int, payload: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(payload), kind) + payload + bytes(-len(payload) % 4)


def _attributes(data: bytes) -> list[tuple[int, bytes]]:
    """The (type, payload) pairs of a netlink attribute stream."""
    found = []
    while len(data) >= 4:
        length, kind = struct.unpack_from("=HH", data)
        if length < 4:
            break
        found.append((kind & _NLA_TYPE_MASK, data[4:length]))
        data = data[(length + 3) & ~3 :]
    return found


def _request(kind: int, flags: int, ifindex: int, attributes: bytes = b"") -> bytes:
    body = struct.pack("=BxHiII", _socket.AF_UNSPEC, 0, ifindex, 0, 0) + attributes
    return struct.pack("=IHHII", 16 + len(body), kind, flags | _NLM_F_REQUEST, 1, 0) + body


def acknowledge(netlink: _socket.socket, request: bytes) -> tuple[int, str]:
    """Have a request done; (0, "") or the errno and the kernel's words."""
    netlink.send(request)
    answer = netlink.recv(16384)
    length, kind, flags = struct.unpack_from("=IHH", answer)
    if kind != _NLMSG_ERROR:
        return errno.EPROTO, "unexpected netlink answer"
    (number,) = struct.unpack_from("=i", answer, 16)
    words = ""
    if flags & _NLM_F_ACK_TLVS:
        (echoed,) = struct.unpack_from("=I", answer, 20)
        skip = 36 if flags & _NLM_F_CAPPED else 20 + ((echoed + 3) & ~3)
        for name, payload in _attributes(answer[skip:length]):
            if name == 1:  # NLMSGERR_ATTR_MSG
                words = payload.rstrip(b"\0").decode(errors="replace")
    return -number, words if number else ""


def _dump(netlink: _socket.socket, request: bytes, wanted: int) -> list[bytes]:
    """The bodies of all answers of one kind to a dump request; nothing where it is refused."""
    netlink.send(request)
    found: list[bytes] = []
    while True:
        data = netlink.recv(65536)
        while len(data) >= 16:
            length, kind = struct.unpack_from("=IH", data)
            if kind in (_NLMSG_DONE, _NLMSG_ERROR) or length < 16:
                return found
            if kind == wanted:
                found.append(data[16:length])
            data = data[(length + 3) & ~3 :]


def _detach(netlink: _socket.socket, ifindex: int, mode: int, prog_fd: int) -> tuple[int, str]:
    """Take the XDP program off if it is this one; (0, "") or the errno and the kernel's words."""
    xdp = _attribute(_IFLA_XDP_FD, struct.pack("=i", -1))
    xdp += _attribute(_IFLA_XDP_FLAGS, struct.pack("=I", mode | _XDP_FLAGS_REPLACE))
    xdp += _attribute(_IFLA_XDP_EXPECTED_FD, struct.pack("=i", prog_fd))
    xdp = _attribute(_IFLA_XDP | _NLA_F_NESTED, xdp)
    return acknowledge(netlink, _request(_RTM_SETLINK, _NLM_F_ACK, ifindex, xdp))


def remove(netlink: _socket.socket, ifindex: int, prog_fd: int) -> tuple[bytes, int, str]:
    """Take exactly this XDP program off the interface, whichever mode it is in.

    Gives (outcome, errno, the kernel's words).  Somebody else's program, a kernel link, nothing at
    all there (NOT_OURS) and no such interface (GONE) are no failures.
    """
    words = ""
    for mode in (_XDP_FLAGS_DRV_MODE, _XDP_FLAGS_SKB_MODE):
        number, words = _detach(netlink, ifindex, mode, prog_fd)
        if number == 0:
            return REMOVED, 0, ""
        if number == errno.ENODEV:
            return GONE, number, words
        # EEXIST: not the expected program.  EBUSY: a kernel link, which ours never is.
        if number not in (errno.EEXIST, errno.EBUSY):
            return FAILED, number, words
    return NOT_OURS, 0, words


def _program_id(prog_fd: int) -> int:
    """The kernel's id of a program, from fdinfo; 0 where /proc does not tell."""
    fd = posix.open(f"/proc/self/fdinfo/{prog_fd}", posix.O_RDONLY)
    try:
        for line in posix.read(fd, 4096).splitlines():
            if line.startswith(b"prog_id:"):
                return int(line[8:])
    finally:
        posix.close(fd)
    return 0


def _interfaces_with(netlink: _socket.socket, prog_id: int) -> list[int]:
    """The interfaces that carry this XDP program."""
    found = []
    for body in _dump(netlink, _request(_RTM_GETLINK, _NLM_F_DUMP, 0), _RTM_NEWLINK):
        for name, value in _attributes(body[16:]):
            if name == _IFLA_XDP and any(
                field in _IFLA_XDP_PROG_IDS and struct.unpack("=I", number) == (prog_id,)
                for field, number in _attributes(value)
            ):
                found.append(struct.unpack_from("=i", body, 4)[0])
    return found


def _traffic(
    kind: int, flags: int, ifindex: int, handle: int, parent: int, info: int, words: bytes
) -> bytes:
    """A request about queueing disciplines or filters, of the kind ``words``."""
    body = _TCMSG.pack(_socket.AF_UNSPEC, ifindex, handle, parent, info)
    body += _attribute(_TCA_KIND, words + b"\0") if words else b""
    return struct.pack("=IHHII", 16 + len(body), kind, flags | _NLM_F_REQUEST, 1, 0) + body


def list_filters(
    netlink: _socket.socket, ifindex: int, parent: int
) -> list[tuple[int, int, int, int]]:
    """(priority, handle, program id, chain) of a parent's filters; id 0 for what is not BPF."""
    found = []
    for body in _dump(
        netlink,
        _traffic(_RTM_GETTFILTER, _NLM_F_DUMP, ifindex, 0, parent, 0, b""),
        _RTM_NEWTFILTER,
    ):
        _, where, handle, _, info = _TCMSG.unpack_from(body)
        attributes = dict(_attributes(body[_TCMSG.size :]))
        prog_id = chain = 0
        if attributes.get(_TCA_KIND) == b"bpf\0":
            inner = dict(_attributes(attributes.get(_TCA_OPTIONS, b"")))
            (prog_id,) = struct.unpack("=I", inner.get(_TCA_BPF_ID, bytes(4)))
        if _TCA_CHAIN in attributes:
            (chain,) = struct.unpack("=I", attributes[_TCA_CHAIN])
        if where == ifindex and handle:  # 0: a priority as such, before the filters that have it
            found.append((info >> 16, handle, prog_id, chain))
    return found


def find_qdisc(netlink: _socket.socket, ifindex: int) -> bytes:
    """b"clsact" or b"ingress", whichever the interface has; b"" for neither."""
    request = _traffic(_RTM_GETQDISC, _NLM_F_DUMP, ifindex, 0, 0, 0, b"")
    for body in _dump(netlink, request, _RTM_NEWQDISC):
        _, where, handle, _, _ = _TCMSG.unpack_from(body)
        if where == ifindex and handle == _CLSACT_HANDLE:
            return dict(_attributes(body[_TCMSG.size :])).get(_TCA_KIND, b"").rstrip(b"\0")
    return b""


def remove_empty_clsact(netlink: _socket.socket, ifindex: int) -> None:
    """Take the interface's clsact off if it has no filter any more."""
    if find_qdisc(netlink, ifindex) == b"clsact" and not any(
        list_filters(netlink, ifindex, side) for side in _CLSACT_SIDES
    ):
        acknowledge(
            netlink,
            _traffic(
                _RTM_DELQDISC, _NLM_F_ACK, ifindex, _CLSACT_HANDLE, _CLSACT_PARENT, 0, b"clsact"
            ),
        )


def remove_filter(
    netlink: _socket.socket,
    ifindex: int,
    prog_fd: int,
    parent: int,
    priority: int,
    handle: int,
    clsact_ours: bool,
) -> tuple[bytes, int, str]:
    """Take exactly this program's filter off, and with the last one a clsact of ours.

    Gives (outcome, errno, the kernel's words), as :func:`remove`.  Filters do not follow an
    interface that is moved to another namespace: the kernel deletes them.
    """
    outcome: tuple[bytes, int, str] = NOT_OURS, 0, ""
    ours = (priority, handle, _program_id(prog_fd), 0)
    if ours in list_filters(netlink, ifindex, parent):
        info = priority << 16 | _socket.htons(_ETH_P_ALL)
        number, words = acknowledge(
            netlink, _traffic(_RTM_DELTFILTER, _NLM_F_ACK, ifindex, handle, parent, info, b"bpf")
        )
        if number == 0:
            outcome = REMOVED, 0, ""
        elif number == errno.ENODEV:
            outcome = GONE, number, words
        elif number not in (errno.ENOENT, errno.EINVAL):  # these: it, or its clsact, is just gone
            return FAILED, number, words
    else:
        # Answered with the interface, which acknowledge() does not expect, or with why not.
        number, words = acknowledge(netlink, _request(_RTM_GETLINK, 0, ifindex))
        if number == errno.ENODEV:
            outcome = GONE, number, words
    if clsact_ours and outcome[0] != GONE:
        remove_empty_clsact(netlink, ifindex)
    return outcome


def _namespaces() -> dict[int, str]:
    """A path for every network namespace that a process is in or that has a name, by inode."""
    paths = [f"/proc/{pid}/ns/net" for pid in posix.listdir("/proc") if pid.isdigit()]
    try:  # noqa: SIM105 - importing contextlib would cost the guard a megabyte
        paths += [f"/run/netns/{name}" for name in posix.listdir("/run/netns")]
    except FileNotFoundError:
        pass
    found: dict[int, str] = {}
    for path in paths:
        try:
            found.setdefault(posix.stat(path).st_ino, path)
        except OSError:  # a process that ended, or not ours to look at
            continue
    return found


def remove_elsewhere(prog_fd: int) -> bool:
    """Remove the program from interfaces that were moved to another network namespace.

    Changes the namespace of the calling thread: for the guard only.  True if one was found.
    """
    import ctypes  # 2 MB, and only in this rare case

    prog_id = _program_id(prog_fd)
    setns = ctypes.CDLL(None).setns
    found = False
    for path in _namespaces().values() if prog_id else ():
        try:
            fd = posix.open(path, posix.O_RDONLY)
        except OSError:
            continue
        entered = setns(fd, _CLONE_NEWNET) == 0
        posix.close(fd)
        if entered:
            netlink = netlink_socket()
            for ifindex in _interfaces_with(netlink, prog_id):
                found |= remove(netlink, ifindex, prog_fd)[0] == REMOVED
            netlink.close()
    return found


def settle(
    netlink: _socket.socket,
    ifindex: int,
    filter: tuple[int, int, int, bool],
    prog_fd: int,
    ledger_path: bytes,
    look_again: bool,
) -> bytes:
    """Remove one program and, when it is certainly off, its ledger entry; the answer to send.

    ``filter`` is (parent, priority, handle, whether clsact is ours), parent 0 for XDP.
    """
    try:
        if filter[0]:
            outcome, number, words = remove_filter(netlink, ifindex, prog_fd, *filter)
        else:
            outcome, number, words = remove(netlink, ifindex, prog_fd)
            if outcome == GONE and remove_elsewhere(prog_fd):
                outcome = MOVED
        if outcome != FAILED and not (outcome == NOT_OURS and look_again):
            _forget(ledger_path)
    except OSError as error:
        outcome, number, words = FAILED, error.errno or errno.EIO, str(error)
    return OUTCOME.pack(outcome, ifindex, number) + words.encode()


def _forget(ledger_path: bytes) -> None:
    try:  # noqa: SIM105
        posix.unlink(ledger_path)  # b"" is not found either
    except FileNotFoundError:
        pass


def _receive(sock: _socket.socket) -> tuple[bytes, int]:
    """One message and the descriptor that came with it (-1 for none)."""
    message, control, _, _ = sock.recvmsg(8192, _socket.CMSG_SPACE(4), _socket.MSG_CMSG_CLOEXEC)
    fd = -1
    for level, kind, data in control:
        if (level, kind) == (_socket.SOL_SOCKET, _socket.SCM_RIGHTS) and len(data) >= 4:
            (fd,) = struct.unpack_from("=i", data)
    return message, fd


def guard(sock: _socket.socket, owner: int) -> None:
    """Hold what the owner hands over; remove it all when told to or when the owner is gone."""
    netlink = netlink_socket()  # now: no later lack of descriptors or change of namespace matters
    poll = select.poll()
    poll.register(sock.fileno(), select.POLLIN)
    try:
        pidfd = posix.pidfd_open(owner)
        poll.register(pidfd, select.POLLIN)
    except OSError:  # before Linux 5.3, or a seccomp filter: the end of the socket has to do
        pidfd = -1
    if posix.getppid() != owner:
        return
    sock.send(READY)
    held: dict[int, tuple[int, tuple[int, int, int, bool], int, bytes]] = {}
    message = b""
    while message != RELEASE:
        if pidfd in (fd for fd, _ in poll.poll()):
            break
        try:
            message, prog_fd = _receive(sock)
        except ConnectionError:
            break
        if not message:
            break
        if message[:1] == HOLD:
            _, hold, ifindex, *place = HOLD_HEADER.unpack_from(message)
            if prog_fd >= 0:
                held[hold] = ifindex, tuple(place), prog_fd, message[HOLD_HEADER.size :]
            _send(sock, HELD.pack(HOLD, 0 if prog_fd >= 0 else errno.EBADF))
        elif message[:1] == DROP:
            _, hold = NUMBERED.unpack(message)
            if hold in held:
                *_, prog_fd, ledger_path = held.pop(hold)
                _forget(ledger_path)
                posix.close(prog_fd)
            _send(sock, HELD.pack(HOLD, 0))
        elif message[:1] == REMOVE:
            _, hold = NUMBERED.unpack(message)
            answer = OUTCOME.pack(NOT_OURS, 0, 0)
            if hold in held:
                answer = settle(netlink, *held[hold], look_again=False)
                if answer[:1] != FAILED:
                    posix.close(held.pop(hold)[2])
            _send(sock, answer)
    if message == RELEASE:
        for answer in [settle(netlink, *hold, look_again=False) for hold in held.values()]:
            _send(sock, answer)
        return
    left = list(held.values())
    for wait in _LOOKS:
        if left:
            select.poll().poll(wait)
        again = wait != _LOOKS[-1]
        left = [hold for hold in left if settle(netlink, *hold, again)[:1] == NOT_OURS]


def _send(sock: _socket.socket, message: bytes) -> None:
    try:  # noqa: SIM105
        sock.send(message)
    except ConnectionError:
        pass  # the owner died meanwhile: the loop sees that next, or all is done already


def main() -> None:
    """Leave what is the user's - descriptors, directory - and guard.

    The session is new and all signals are blocked already: the parent asked posix_spawn(3) for it.
    """
    posix.closerange(3, posix.sysconf("SC_OPEN_MAX"))
    posix.chdir("/")
    try:  # the name that ps shows
        comm = posix.open("/proc/self/comm", posix.O_WRONLY)
        posix.write(comm, b"hmebpf-guard")
        posix.close(comm)
    except OSError:
        pass  # no /proc: it works without a name
    guard(_socket.socket(fileno=0), int(sys.argv[1]))


if __name__ == "__main__":
    main()
