"""xdp: packets and bytes of network interfaces, by protocol, source, port or size."""

from __future__ import annotations

import ipaddress
import sys
from collections.abc import Mapping
from typing import Any

from hypermesh_ebpf.bpf.libbpf import possible_cpus
from hypermesh_ebpf.metrics.histogram import log2_buckets
from hypermesh_ebpf.metrics.sample import Histogram, Row
from hypermesh_ebpf.monitors.declaration import (
    Column,
    Hook,
    Maps,
    Monitor,
    Option,
    Options,
    Reading,
    Rung,
)

# Places in the map protocols, and in the map marks (bpf_c/xdp.c).
_IPV6, _OTHER = 256, 512
_VLAN, _FRAGMENT, _TRUNCATED, _ETHERTYPES_FULL, _KEYS_FULL = range(5)

# https://www.iana.org/assignments/ieee-802-numbers, include/uapi/linux/if_ether.h
_ETHERTYPES = {
    0: "802.3",  # what bpf_c/xdp.c makes of all values below 0x600, which are lengths
    0x0800: "IPv4",
    0x0806: "ARP",
    0x0842: "Wake-on-LAN",
    0x22F3: "TRILL",
    0x6558: "TEB",
    0x8035: "RARP",
    0x8100: "802.1Q",
    0x86DD: "IPv6",
    0x8808: "PAUSE",
    0x8809: "LACP",
    0x8847: "MPLS",
    0x8848: "MPLS-MC",
    0x8863: "PPPoE-D",
    0x8864: "PPPoE",
    0x888E: "EAPOL",
    0x88A8: "802.1ad",
    0x88CC: "LLDP",
    0x88E5: "MACsec",
    0x88F7: "PTP",
    0x9000: "loopback",
}
# https://www.iana.org/assignments/protocol-numbers
_PROTOCOLS = {
    0: "HOPOPT",
    1: "ICMP",
    2: "IGMP",
    4: "IPIP",
    6: "TCP",
    17: "UDP",
    33: "DCCP",
    41: "IPv6-in-IP",
    43: "IPv6-Route",
    44: "IPv6-Frag",
    46: "RSVP",
    47: "GRE",
    50: "ESP",
    51: "AH",
    58: "ICMPv6",
    59: "no next header",
    60: "IPv6-Opts",
    88: "EIGRP",
    89: "OSPF",
    94: "IPIP (94)",
    103: "PIM",
    108: "IPComp",
    112: "VRRP",
    115: "L2TP",
    132: "SCTP",
    136: "UDPLite",
    137: "MPLS-in-IP",
}

_COUNTER_COLUMNS = (
    Column("packets", "packets", "count"),
    Column("packets_per_s", "packets/s", "rate", share=True),
    Column("bytes", "bytes", "bytes"),
    Column("bytes_per_s", "bytes/s", "byte_rate"),
)
_KEY_COLUMNS = {
    "protocol": (Column("ethertype", "ethernet"), Column("protocol", "protocol")),
    "source": (Column("source", "source"),),
    "port": (Column("protocol", "protocol"), Column("port", "port")),
    "size": (Column("size", "frame bytes"),),
}


def name_ethertype(number: int) -> str:
    """ "IPv4" for 0x0800; the number for one that has no name here."""
    return _ETHERTYPES.get(number, f"0x{number:04x}")


def name_protocol(number: int) -> str:
    """ "TCP" for 6; the number for one that has no name here."""
    return _PROTOCOLS.get(number, f"protocol {number}")


class _Collector:
    """Reads the counters of every interface."""

    def __init__(self, options: Options, targets: Mapping[str, Maps]) -> None:
        self._by: str = options["by"]
        self._targets = targets

    def decode(self, record: bytes) -> None:
        return None

    def collect(self) -> Reading:
        rows: list[Row] = []
        sums = dict.fromkeys(("packets", "bytes", "vlan", "fragments", "truncated"), 0)
        sizes: list[int] = []
        full = 0
        for iface, maps in self._targets.items():
            protocols = [(key, value) for key, value in maps["protocols"].items() if value.packets]
            marks = [value for _key, value in maps["marks"].items()]
            here = [value for _key, value in maps["sizes"].items()]
            sizes = [a + b for a, b in zip(sizes, here, strict=True)] if sizes else here
            sums["packets"] += sum(value.packets for _key, value in protocols)
            sums["bytes"] += sum(value.bytes for _key, value in protocols)
            sums["vlan"] += marks[_VLAN]
            sums["fragments"] += marks[_FRAGMENT]
            sums["truncated"] += marks[_TRUNCATED]
            full += marks[_ETHERTYPES_FULL] + marks[_KEYS_FULL]
            label = {"iface": iface} if len(self._targets) > 1 else {}
            rows += [{**label, **row} for row in self._rows(maps, protocols, here)]
        histogram = Histogram("frame size", "bytes", log2_buckets(sizes, first_low=1))
        return Reading(sums, rows, (histogram,), map_full=full)

    def _rows(
        self, maps: Maps, protocols: list[tuple[int, Any]], sizes: list[int]
    ) -> list[dict[str, Any]]:
        if self._by == "protocol":
            return _protocol_rows(maps, protocols)
        if self._by == "source":
            return [
                {"source": _name_source(key), **value._asdict()}
                for key, value in maps["keys"].items()
            ]
        if self._by == "port":
            return [{**_name_port(key), **value._asdict()} for key, value in maps["keys"].items()]
        return [
            {"size": f"{low}-{high}", "packets": count, "bytes": None}
            for low, high, count in log2_buckets(sizes, first_low=1)
        ]


def _protocol_rows(maps: Maps, protocols: list[tuple[int, Any]]) -> list[dict[str, Any]]:
    rows = []
    for slot, value in protocols:
        if slot < _OTHER:
            name = name_protocol(slot % _IPV6)
            rows.append(
                {
                    "ethertype": "IPv6" if slot >= _IPV6 else "IPv4",
                    "protocol": name,
                    **value._asdict(),
                }
            )
    for number, value in maps["ethertypes"].items():
        name = name_ethertype(number)
        rows.append({"ethertype": name, "protocol": name, **value._asdict()})
    return rows


def _name_source(key: Any) -> str | None:
    """An address out of four words as they stood in the packet; None for what is not IP."""
    if not key.is_ip:
        return None
    address = ipaddress.IPv6Address(b"".join(w.to_bytes(4, sys.byteorder) for w in key.address))
    return str(address.ipv4_mapped or address)


def _defines(options: Options) -> dict[str, int]:
    """What the C file is compiled with: the kind of key, and how many of them there is room for.

    Each CPU that the kernel may ever have holds a copy of each, allocated at once.
    """
    if options["by"] not in _KEY_MACROS:
        return {}
    return {_KEY_MACROS[options["by"]]: 1, "KEYS": min(_MOST_KEYS, _KEY_COPIES // possible_cpus())}


def _name_port(key: Any) -> dict[str, Any]:
    """Protocol and destination port; both None for packets that have no ports."""
    if not key.protocol:
        return {"protocol": None, "port": None}
    return {"protocol": name_protocol(key.protocol), "port": key.number}


def _columns(options: Options) -> tuple[Column, ...]:
    iface = (Column("iface", "interface"),) if len(options["iface"]) > 1 else ()
    return iface + _KEY_COLUMNS[options["by"]] + _COUNTER_COLUMNS


def _key(options: Options) -> tuple[str, ...]:
    iface = ("iface",) if len(options["iface"]) > 1 else ()
    return iface + tuple(column.field for column in _KEY_COLUMNS[options["by"]])


_KEY_MACROS = {"source": "BY_SOURCE", "port": "BY_PORT"}
_MOST_KEYS = 65536
_KEY_COPIES = 1 << 21  # 16 bytes each: 32 MB at most

MONITOR = Monitor(
    name="xdp",
    summary="Packets and bytes of network interfaces, as early as the kernel sees them.",
    source="xdp.c",
    rungs=(Rung("xdp", (Hook("xdp", "", "count_packet"),)),),
    collector=_Collector,
    columns=_columns,
    key=_key,
    counters=("packets", "bytes"),
    headline="packets",
    options=(
        Option(
            "iface",
            "network interface to watch; may be given more than once",
            multiple=True,
            required=True,
            metavar="IF",
        ),
        Option(
            "by",
            "what a row stands for",
            default="protocol",
            choices=("protocol", "source", "port", "size"),
        ),
        Option(
            "mode",
            "where in the network stack: in the driver (native), behind it (generic), "
            "or the better of what the interface has",
            default="auto",
            choices=("auto", "native", "generic"),
        ),
        Option(
            "replace",
            "take the place of a program that somebody else attached",
            kind=bool,
            default=False,
        ),
    ),
    defines=_defines,
    targets=lambda options: tuple(dict.fromkeys(options["iface"])),
)
