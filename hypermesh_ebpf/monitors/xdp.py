"""xdp: packets and bytes of network interfaces, by protocol, source, port or size."""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hypermesh_ebpf.bpf.libbpf import possible_cpus
from hypermesh_ebpf.metrics import Row, Value
from hypermesh_ebpf.metrics.counted import Counted, Places, join
from hypermesh_ebpf.metrics.histogram import log2_buckets
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

if TYPE_CHECKING:
    from hypermesh_ebpf.bpf.entries import Entries

_WORDS = struct.Struct("=4I")
_IPV4_MAPPED = bytes(10) + b"\xff\xff"

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
        parts: dict[str, Sequence[Row]] = {}
        sums = dict.fromkeys(("packets", "bytes", "vlan", "fragments", "truncated"), 0)
        sizes: list[int] = []
        full = 0
        for iface, maps in self._targets.items():
            protocols = maps["protocols"].entries()
            marks = maps["marks"].entries().values()
            here = maps["sizes"].entries().values()
            sizes = [a + b for a, b in zip(sizes, here, strict=True)] if sizes else here
            packets = protocols.values("packets")
            sums["packets"] += sum(packets)
            sums["bytes"] += sum(protocols.values("bytes"))
            sums["vlan"] += marks[_VLAN]
            sums["fragments"] += marks[_FRAGMENT]
            sums["truncated"] += marks[_TRUNCATED]
            full += marks[_ETHERTYPES_FULL] + marks[_KEYS_FULL]
            seen = [slot for slot, count in enumerate(packets) if count]
            parts[iface] = self._rows(maps, protocols.select(seen), here)
        from hypermesh_ebpf.metrics.sample import Histogram  # the worker makes none

        histogram = Histogram("frame size", "bytes", log2_buckets(sizes, first_low=1))
        return Reading(sums, _join(parts), (histogram,), map_full=full)

    def _rows(self, maps: Maps, protocols: Entries, sizes: list[int]) -> Sequence[Row]:
        if self._by == "protocol":
            return _protocol_rows(maps, protocols)
        if self._by == "source":
            return _count(maps["keys"].entries(), lambda key: {"source": _name_source(key)})
        if self._by == "port":
            return _count(maps["keys"].entries(), _name_port)
        return [
            {"size": f"{low}-{high}", "packets": count, "bytes": None}
            for low, high, count in log2_buckets(sizes, first_low=1)
        ]


def _count(entries: Entries, label: Callable[[Any], dict[str, Value]]) -> Counted:
    """A row for each key: there may be tens of thousands."""
    counters = {name: entries.values(name) for name in ("packets", "bytes")}

    def write(places: Places) -> list[dict[str, Value]]:
        chosen = entries.select(places).items()
        return [{**label(key), **value._asdict()} for key, value in chosen]

    return Counted(entries.identities, counters, write)


def _join(parts: Mapping[str, Sequence[Row]]) -> Sequence[Row]:
    """Every interface's rows, with its name where there are several."""
    if len(parts) == 1:
        return next(iter(parts.values()))
    counted = {name: part for name, part in parts.items() if isinstance(part, Counted)}
    if len(counted) == len(parts):
        return join(counted, "iface")
    return [{"iface": name, **row} for name, part in parts.items() for row in part]


def _protocol_rows(maps: Maps, protocols: Entries) -> list[dict[str, Any]]:
    rows = []
    for slot, value in protocols.items():
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
    raw = _WORDS.pack(*key.address)
    if raw.startswith(_IPV4_MAPPED):
        return socket.inet_ntop(socket.AF_INET, raw[12:])
    return socket.inet_ntop(socket.AF_INET6, raw)


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
