"""Ethernet frames made byte by byte, and a way to put them on a wire."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterable

from tests.netns import Namespace

BROADCAST = b"\xff" * 6
SENDER = b"\x02\x00\x00\x00\x00\x01"


def ethernet(kind: int, payload: bytes = b"", tags: Iterable[tuple[int, int]] = ()) -> bytes:
    """A frame; ``tags`` are (tag protocol, VLAN id), outermost first."""
    header = BROADCAST + SENDER
    for protocol, vlan in tags:
        header += struct.pack("!HH", protocol, vlan)
    return header + struct.pack("!H", kind) + payload


def ipv4(
    protocol: int, payload: bytes = b"", *, source: str = "10.1.2.3", fragment: int = 0
) -> bytes:
    """An IPv4 packet; ``fragment`` is the flags-and-offset field."""
    length = 20 + len(payload)
    header = struct.pack("!BBHHHBBH", 0x45, 0, length, 1, fragment, 64, protocol, 0)
    return header + socket.inet_aton(source) + socket.inet_aton("10.9.9.9") + payload


def ipv6(next_header: int, payload: bytes = b"", *, source: str = "fd00::5") -> bytes:
    header = struct.pack("!IHBB", 6 << 28, len(payload), next_header, 64)
    addresses = [socket.inet_pton(socket.AF_INET6, a) for a in (source, "fd00::9")]
    return header + b"".join(addresses) + payload


def udp(port: int, data: bytes = b"") -> bytes:
    return struct.pack("!HHHH", 40000, port, 8 + len(data), 0) + data


def tcp(port: int) -> bytes:
    return struct.pack("!HHIIHHHH", 40000, port, 0, 0, 0x5000, 0, 0, 0)


def send_frames(ns: Namespace, iface: str, frames: Iterable[bytes]) -> int:
    """Send frames out of an interface of a namespace as they are; how many."""
    with ns.entered(), socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as sender:
        sender.bind((iface, 0))
        count = 0
        for frame in frames:
            sender.send(frame)
            count += 1
        return count


def received_packets(ns: Namespace, iface: str) -> int:
    """What /proc/net/dev counts as received: the kernel's own, independent number."""
    for line in ns.run("cat", "/proc/net/dev").stdout.splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == iface:
            return int(numbers.split()[1])
    raise AssertionError(f"{iface} is not in /proc/net/dev")
