"""Netlink's answers against iproute2's."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess

import pytest

from hypermesh_ebpf.host.interfaces import read_interfaces
from hypermesh_ebpf.host.netlink import parse_attributes


def test_attributes_are_padded_and_typed() -> None:
    data = struct.pack("=HH3sx", 7, 3, b"lo\0") + struct.pack("=HHI", 8, 0x8000 | 43, 5)
    assert parse_attributes(data) == {3: b"lo\0", 43: struct.pack("=I", 5)}


@pytest.mark.parametrize("data", [b"", b"\0", b"\0" * 8, struct.pack("=HH", 2, 1)])
def test_broken_attributes_end_the_walk(data: bytes) -> None:
    assert parse_attributes(data) == {}


def test_interfaces_are_those_of_iproute2() -> None:
    if not shutil.which("ip"):
        pytest.skip("no iproute2 here")
    listing = subprocess.run(["ip", "-d", "-j", "link"], capture_output=True, text=True, check=True)
    expected = set()
    for link in json.loads(listing.stdout):
        kind = link.get("linkinfo", {}).get("info_kind")
        expected.add((link["ifname"], link["ifindex"], link["mtu"], "UP" in link["flags"], kind))
    found = read_interfaces()
    assert {(i.name, i.ifindex, i.mtu, i.up, i.kind) for i in found} == expected
    assert [i.ifindex for i in found] == sorted(i.ifindex for i in found)
