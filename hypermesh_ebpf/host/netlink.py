"""A few read-only netlink requests, in plain sockets: pyroute2's import alone costs 200 ms.

rtnetlink(7); Documentation/netlink/specs/netdev.yaml; include/uapi/linux/{netlink,genetlink}.h.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator

NETLINK_ROUTE, NETLINK_GENERIC = 0, 16
_REQUEST, _DUMP = 0x1, 0x300
_ERROR, _DONE = 2, 3
_HEADER = struct.Struct("=IHHII")  # length, type, flags, sequence, port
_ATTRIBUTE = struct.Struct("=HH")  # length, type
_TYPE_MASK = 0x3FFF  # without NLA_F_NESTED and NLA_F_NET_BYTEORDER

_RTM_GETLINK, _RTM_GETQDISC, _RTM_GETTFILTER = 18, 38, 46
_TC = struct.Struct("=BxxxiIII")  # struct tcmsg: family, ifindex, handle, parent, info
_GENL_ID_CTRL = 16
_CTRL_CMD_GETFAMILY, _CTRL_ATTR_FAMILY_ID, _CTRL_ATTR_FAMILY_NAME = 3, 1, 2
_NETDEV_CMD_DEV_GET, _NETDEV_A_DEV_IFINDEX, _NETDEV_A_DEV_XDP_FEATURES = 1, 1, 3
_IFLA_EXT_MASK, _SKIP_STATS = 29, 1 << 3

Attributes = dict[int, bytes]


def parse_attributes(data: bytes) -> Attributes:
    """Netlink attributes by type (a later one of the same type wins)."""
    found: Attributes = {}
    at = 0
    while at + _ATTRIBUTE.size <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, at)
        if length < _ATTRIBUTE.size:
            break
        found[kind & _TYPE_MASK] = data[at + _ATTRIBUTE.size : at + length]
        at += (length + 3) & ~3
    return found


def _attribute(kind: int, payload: bytes) -> bytes:
    length = _ATTRIBUTE.size + len(payload)
    return _ATTRIBUTE.pack(length, kind) + payload + bytes(-length % 4)


def _ask(family: int, message_type: int, payload: bytes, dump: bool) -> Iterator[bytes]:
    """The payloads of all answers to one request.  Raises OSError with the kernel's errno."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, family) as link:
        link.settimeout(5)
        flags = _REQUEST | (_DUMP if dump else 0)
        header = _HEADER.pack(_HEADER.size + len(payload), message_type, flags, 1, 0)
        link.sendto(header + payload, (0, 0))
        while True:
            data = link.recv(1 << 18)
            at = 0
            while at + _HEADER.size <= len(data):
                length, kind, _, _, _ = _HEADER.unpack_from(data, at)
                body = data[at + _HEADER.size : at + length]
                if kind in (_DONE, _ERROR):
                    code = -struct.unpack_from("=i", body)[0] if len(body) >= 4 else 0
                    if code:
                        raise OSError(code, os.strerror(code))
                    return
                yield body
                at += (length + 3) & ~3
            if not dump:
                return


def dump_links() -> Iterator[tuple[int, int, Attributes]]:
    """Every interface: (ifindex, flags, IFLA_* attributes).  Raises OSError."""
    info = struct.Struct("=BxHiII")  # family, type, index, flags, change
    request = info.pack(0, 0, 0, 0, 0)
    request += _attribute(_IFLA_EXT_MASK, struct.pack("=I", _SKIP_STATS))
    for body in _ask(NETLINK_ROUTE, _RTM_GETLINK, request, dump=True):
        _, _, index, flags, _ = info.unpack_from(body)
        yield index, flags, parse_attributes(body[info.size :])


def read_link(ifindex: int) -> Attributes:
    """The IFLA_* attributes of one interface.  Raises OSError, ENODEV if there is none."""
    request = struct.pack("=BxHiII", 0, 0, ifindex, 0, 0)
    request += _attribute(_IFLA_EXT_MASK, struct.pack("=I", _SKIP_STATS))
    (body,) = _ask(NETLINK_ROUTE, _RTM_GETLINK, request, dump=False)
    return parse_attributes(body[16:])


def dump_qdiscs() -> Iterator[tuple[int, int, Attributes]]:
    """Every queueing discipline: (ifindex, handle, TCA_* attributes).  Raises OSError."""
    for body in _ask(NETLINK_ROUTE, _RTM_GETQDISC, _TC.pack(0, 0, 0, 0, 0), dump=True):
        _, ifindex, handle, _, _ = _TC.unpack_from(body)
        yield ifindex, handle, parse_attributes(body[_TC.size :])


def dump_filters(ifindex: int, parent: int) -> Iterator[tuple[int, int, Attributes]]:
    """Traffic control filters below a parent: (priority, handle, TCA_* attributes).

    Raises OSError.
    """
    request = _TC.pack(0, ifindex, 0, parent, 0)
    for body in _ask(NETLINK_ROUTE, _RTM_GETTFILTER, request, dump=True):
        _, _, handle, _, info = _TC.unpack_from(body)
        yield info >> 16, handle, parse_attributes(body[_TC.size :])


def dump_xdp_features() -> dict[int, int] | None:
    """What each driver says it can do with XDP: ifindex to NETDEV_XDP_ACT_* bits.

    From the netdev generic netlink family (Linux 6.3); None where the kernel has it not.
    """
    generic = struct.Struct("=BBxx")  # command, version
    name = _attribute(_CTRL_ATTR_FAMILY_NAME, b"netdev\0")
    try:
        request = generic.pack(_CTRL_CMD_GETFAMILY, 1) + name
        answer = next(_ask(NETLINK_GENERIC, _GENL_ID_CTRL, request, dump=False))
        family = struct.unpack(
            "=H", parse_attributes(answer[generic.size :])[_CTRL_ATTR_FAMILY_ID]
        )[0]
        request = generic.pack(_NETDEV_CMD_DEV_GET, 1)
        found = {}
        for body in _ask(NETLINK_GENERIC, family, request, dump=True):
            attributes = parse_attributes(body[generic.size :])
            index = struct.unpack("=I", attributes[_NETDEV_A_DEV_IFINDEX])[0]
            found[index] = struct.unpack("=Q", attributes[_NETDEV_A_DEV_XDP_FEATURES])[0]
        return found
    except (OSError, KeyError, StopIteration):
        return None
