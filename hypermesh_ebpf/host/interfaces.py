"""The network interfaces, and how XDP can run on each, without attaching to any.

Generic mode works on every interface (Linux 4.12).  Native mode is the driver's: since Linux 6.3 it
says so itself (netdev family, "xdp-features"); before, only an attach shows it, and nothing is
attached here, so the answer is "unknown", with a hint from the drivers known to have it.
"""

from __future__ import annotations

import array
import fcntl
import os
import socket
import struct
from dataclasses import dataclass

from hypermesh_ebpf.host import netlink

# include/uapi/linux/if_link.h
_IFLA_IFNAME, _IFLA_MTU, _IFLA_LINKINFO, _IFLA_XDP = 3, 4, 18, 43
_IFLA_INFO_KIND = 1
_XDP_ATTACHED, _XDP_PROG_ID, _XDP_DRV_ID, _XDP_SKB_ID, _XDP_HW_ID = 2, 4, 5, 6, 7
_MODES = ((_XDP_DRV_ID, "native"), (_XDP_SKB_ID, "generic"), (_XDP_HW_ID, "offload"))
_ATTACHED_MODES = {1: "native", 2: "generic", 3: "offload"}

# enum netdev_xdp_act, include/uapi/linux/netdev.h
_ACT_BASIC, _ACT_HW_OFFLOAD = 1 << 0, 1 << 4

_IFF_UP = 1
_SIOCETHTOOL, _ETHTOOL_GDRVINFO = 0x8946, 0x3

# Drivers with native XDP and the release that brought it (their commits' tags): a hint, no verdict.
NATIVE_SINCE = {
    "mlx4_en": (4, 8),
    "mlx5_core": (4, 9),
    "virtio_net": (4, 10),
    "nfp": (4, 10),
    "qede": (4, 10),
    "bnxt_en": (4, 11),
    "ixgbe": (4, 12),
    "nicvf": (4, 12),
    "i40e": (4, 13),
    "tun": (4, 14),
    "ixgbevf": (4, 17),
    "veth": (4, 19),
    "dpaa2-eth": (5, 0),
    "ice": (5, 5),
    "mvneta": (5, 5),
    "hv_netvsc": (5, 6),
    "ena": (5, 6),
    "vif": (5, 9),
    "igb": (5, 10),
    "bonding": (5, 15),
    "igc": (5, 13),
    "st_gmac": (5, 13),
    "mana": (5, 17),
    "gve": (6, 4),
    "vmxnet3": (6, 6),
}


@dataclass(frozen=True, slots=True)
class Attached:
    """An XDP program that is on an interface: mode ("native", ...) and the kernel's program id."""

    mode: str
    prog_id: int


@dataclass(frozen=True, slots=True)
class Interface:
    """A network interface.

    ``driver`` as ethtool names it, ``kind`` its link type ("veth"), None for a device; ``native``
    and ``offload`` say whether the driver offers these XDP modes, None where the kernel does not
    tell; ``attached`` are the XDP programs on it now.
    """

    name: str
    ifindex: int
    up: bool
    mtu: int
    driver: str | None
    kind: str | None
    native: bool | None
    offload: bool | None
    attached: tuple[Attached, ...]


def _read_driver(name: str, link: socket.socket) -> str | None:
    """The driver's name by ETHTOOL_GDRVINFO, else from sysfs; None if neither tells."""
    information = array.array("B", struct.pack("=I", _ETHTOOL_GDRVINFO) + bytes(192))
    request = struct.pack("16sP16x", name.encode()[:15], information.buffer_info()[0])
    try:
        fcntl.ioctl(link, _SIOCETHTOOL, request)
        driver = information.tobytes()[4:36].split(b"\0")[0].decode(errors="replace")
        if driver:
            return driver
    except OSError:  # the driver does not implement it
        pass
    try:
        return os.path.basename(os.readlink(f"/sys/class/net/{name}/device/driver"))
    except OSError:
        return None


def _attached(attributes: netlink.Attributes) -> tuple[Attached, ...]:
    def number(kind: int) -> int:
        return struct.unpack("=I", attributes[kind])[0] if kind in attributes else 0

    found = tuple(Attached(mode, number(kind)) for kind, mode in _MODES if number(kind))
    if found:
        return found
    # Before Linux 4.19 there is one program at most, and these two describe it.
    mode = _ATTACHED_MODES.get(attributes.get(_XDP_ATTACHED, b"\0")[0])
    return (Attached(mode, number(_XDP_PROG_ID)),) if mode else ()


def read_attached(ifindex: int) -> tuple[Attached, ...]:
    """The XDP programs on one interface now.  Raises OSError, ENODEV if it is gone."""
    attributes = netlink.read_link(ifindex)
    return _attached(netlink.parse_attributes(attributes.get(_IFLA_XDP, b"")))


@dataclass(frozen=True, slots=True)
class Carrier:
    """An interface by what is needed to see what is attached to it."""

    name: str
    ifindex: int
    kind: str | None
    attached: tuple[Attached, ...]


def list_carriers() -> tuple[Carrier, ...]:
    """The interfaces of this network namespace, with their XDP programs.  Raises OSError."""
    found = []
    for index, _flags, attributes in netlink.dump_links():
        info = netlink.parse_attributes(attributes.get(_IFLA_LINKINFO, b""))
        kind = info.get(_IFLA_INFO_KIND, b"").rstrip(b"\0").decode() or None
        name = attributes[_IFLA_IFNAME].rstrip(b"\0").decode(errors="replace")
        xdp = _attached(netlink.parse_attributes(attributes.get(_IFLA_XDP, b"")))
        found.append(Carrier(name, index, kind, xdp))
    return tuple(found)


def read_interfaces() -> tuple[Interface, ...]:
    """The interfaces of this network namespace, by ifindex.  Raises OSError."""
    features = netlink.dump_xdp_features()
    found = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as link:
        for index, flags, attributes in netlink.dump_links():
            name = attributes[_IFLA_IFNAME].rstrip(b"\0").decode(errors="replace")
            info = netlink.parse_attributes(attributes.get(_IFLA_LINKINFO, b""))
            kind = info.get(_IFLA_INFO_KIND, b"").rstrip(b"\0").decode() or None
            bits = features.get(index) if features is not None else None
            found.append(
                Interface(
                    name,
                    index,
                    bool(flags & _IFF_UP),
                    struct.unpack("=I", attributes.get(_IFLA_MTU, bytes(4)))[0],
                    _read_driver(name, link) or ("loopback" if name == "lo" else None),
                    kind,
                    None if bits is None else bool(bits & _ACT_BASIC),
                    None if bits is None else bool(bits & _ACT_HW_OFFLOAD),
                    _attached(netlink.parse_attributes(attributes.get(_IFLA_XDP, b""))),
                )
            )
    return tuple(sorted(found, key=lambda interface: interface.ifindex))
