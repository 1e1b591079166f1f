"""``hmebpf xdp`` on real traffic, against known packets and the kernel's own counters."""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Iterator
from operator import itemgetter
from typing import Any

import pytest

from tests.netns import Namespace, VethPair, needs_namespaces, veth_pair, wait_until
from tests.packets import ethernet, ipv4, ipv6, received_packets, send_frames, tcp, udp
from tests.running import COMMAND, ROOT, Running, running

pytestmark = needs_namespaces

PRIME = 211


@pytest.fixture
def veth() -> Iterator[VethPair]:
    with veth_pair() as pair:
        yield pair


@pytest.fixture
def wire(veth: VethPair) -> VethPair:
    """A cable between interfaces without addresses: nobody answers, and only our frames travel."""
    for ns, iface in ((veth.left, veth.left_iface), (veth.right, veth.right_iface)):
        ns.run("ip", "address", "flush", "dev", iface)
        ns.run("sh", "-c", f"echo 1 > /proc/sys/net/ipv6/conf/{iface}/disable_ipv6")
    return veth


def watch(veth: VethPair, *arguments: str, **options: Any) -> Any:
    """hmebpf xdp on the right end of the cable."""
    return running("xdp", "--iface", veth.right_iface, *arguments, namespace=veth.right, **options)


def rows_by(monitor: Running, *fields: str) -> dict[Any, int]:
    """The last sample's packets by these fields."""
    rows = monitor.last["rows"]
    return {itemgetter(*fields)(row): row["packets"] for row in rows}


def attached(ns: Namespace, iface: str) -> bool:
    return "xdp" in ns.run("ip", "-d", "link", "show", iface).stdout


@pytest.mark.vm_too
def test_pings_on_loopback_agree_with_proc_net_dev() -> None:
    with Namespace() as ns, running("xdp", "--iface", "lo", namespace=ns) as monitor:
        before = received_packets(ns, "lo")
        ns.run("ping", "-q", "-i", "0.002", "-c", str(PRIME), "127.0.0.1")
        after = received_packets(ns, "lo")
        monitor.finish()
    assert monitor.start["hooks"] == ["xdp:generic"]
    assert after - before == 2 * PRIME, "each ping is a request and a reply"
    assert monitor.last["totals"]["packets"] == after - before
    assert rows_by(monitor, "ethertype", "protocol") == {("IPv4", "ICMP"): 2 * PRIME}
    # 56 bytes of data, 8 of ICMP, 20 of IP, 14 of Ethernet
    assert monitor.last["totals"]["bytes"] == 2 * PRIME * 98
    assert monitor.last["histograms"][0]["buckets"] == [[64, 127, 2 * PRIME]]


def test_udp_over_veth_in_native_mode(wire: VethPair) -> None:
    with watch(wire, "--mode", "native") as monitor:
        before = received_packets(wire.right, wire.right_iface)
        send_frames(
            wire.left, wire.left_iface, [ethernet(0x0800, ipv4(17, udp(53, b"x" * 64)))] * PRIME
        )
        wait_until(
            lambda: received_packets(wire.right, wire.right_iface) - before >= PRIME, "received"
        )
        monitor.finish()
    assert monitor.start["hooks"] == ["xdp:native"]
    assert rows_by(monitor, "ethertype", "protocol") == {("IPv4", "UDP"): PRIME}
    assert monitor.last["totals"]["bytes"] == PRIME * (14 + 20 + 8 + 64)


def test_tcp_over_veth_agrees_with_proc_net_dev(veth: VethPair) -> None:
    before = received_packets(veth.right, veth.right_iface)
    with watch(veth) as monitor:
        with veth.right.entered():
            server = socket.create_server((veth.right_address, 0))
        with server:
            with veth.left.entered():
                client = socket.create_connection(server.getsockname())
            accepted, _peer = server.accept()
            with client, accepted:
                for _ in range(PRIME):
                    client.sendall(b"y" * 1000)
                    assert accepted.recv(1000, socket.MSG_WAITALL) == b"y" * 1000
        monitor.finish()
        received = received_packets(veth.right, veth.right_iface) - before
    packets = rows_by(monitor, "protocol")
    assert packets["TCP"] >= PRIME
    assert set(packets) <= {"TCP", "ARP", "ICMPv6"}
    # A neighbour's question may come before the attach, and a closing segment between the last
    # sample and the look at /proc/net/dev.
    assert 0 <= received - monitor.last["totals"]["packets"] <= 6


@pytest.mark.vm_too
def test_every_header_is_walked(wire: VethPair) -> None:
    udp6 = udp(53, b"data")
    hop_by_hop, options = bytes([60, 0]) + bytes(6), bytes([17, 1]) + bytes(14)
    first = bytes([17, 0, 0, 1]) + bytes(4)  # offset 0, more fragments
    later = bytes([17, 0, 0, 8]) + bytes(4)  # offset 8
    authentication = bytes([17, 4]) + bytes(22)
    frames = {
        "plain": ethernet(0x0800, ipv4(6, tcp(80))),
        "one tag": ethernet(0x0800, ipv4(17, udp(53)), [(0x8100, 7)]),
        "two tags": ethernet(0x86DD, ipv6(17, udp6), [(0x88A8, 7), (0x8100, 8)]),
        "extensions": ethernet(0x86DD, ipv6(0, hop_by_hop + options + udp6)),
        "authentication": ethernet(0x86DD, ipv6(51, authentication + udp6)),
        "first fragment": ethernet(0x86DD, ipv6(44, first + udp6)),
        "later fragment": ethernet(0x86DD, ipv6(44, later + udp6)),
        "fragment 4": ethernet(0x0800, ipv4(17, b"middle", fragment=5)),
        "first fragment 4": ethernet(0x0800, ipv4(17, udp(53), fragment=0x2000)),
        "icmp6": ethernet(0x86DD, ipv6(58, bytes(8))),
        "arp": ethernet(0x0806, bytes(28)),
        "lldp": ethernet(0x88CC, bytes(30)),
        "unknown": ethernet(0xABCD, bytes(30)),
        "802.3": ethernet(40, bytes(40)),
        "802.3 of another length": ethernet(41, bytes(41)),
        "no ip header": ethernet(0x0800),
        "short ip": ethernet(0x0800, ipv4(17)[:19]),
        "short tcp": ethernet(0x0800, ipv4(6, b"\0\x50")),
        "short tag": ethernet(0x8100, b"\0"),
        "short extension": ethernet(0x86DD, ipv6(0, b"\x11\0")),
    }
    with watch(wire, "--mode", "native") as monitor:
        before = received_packets(wire.right, wire.right_iface)
        for _ in range(3):
            send_frames(wire.left, wire.left_iface, frames.values())
        count = 3 * len(frames)
        wait_until(
            lambda: received_packets(wire.right, wire.right_iface) - before >= count, "received"
        )
        monitor.finish()
    assert rows_by(monitor, "ethertype", "protocol") == {
        ("IPv4", "TCP"): 6,
        ("IPv4", "UDP"): 9,
        ("IPv6", "UDP"): 15,
        ("IPv6", "ICMPv6"): 3,
        ("IPv6", "HOPOPT"): 3,
        ("ARP", "ARP"): 3,
        ("LLDP", "LLDP"): 3,
        ("0xabcd", "0xabcd"): 3,
        ("802.3", "802.3"): 6,
        ("IPv4", "IPv4"): 6,
        ("802.1Q", "802.1Q"): 3,
    }
    totals = monitor.last["totals"]
    assert totals["packets"] == count
    assert totals["bytes"] == 3 * sum(map(len, frames.values()))
    assert (totals["vlan"], totals["fragments"], totals["truncated"]) == (9, 12, 15)


def test_the_longest_chain_of_extensions_is_walked() -> None:
    kinds = (0, 60, 43, 60, 43, 60, 17)  # six headers of 2048 bytes, then UDP
    chain = b"".join(bytes([following, 255]) + bytes(2046) for following in kinds[1:])
    frame = ethernet(0x86DD, ipv6(kinds[0], chain + udp(53, b"data")))
    with (
        Namespace() as ns,
        running("xdp", "--iface", "lo", "--by", "port", namespace=ns) as monitor,
    ):
        before = received_packets(ns, "lo")
        send_frames(ns, "lo", [frame] * PRIME)
        wait_until(lambda: received_packets(ns, "lo") - before >= PRIME, "received")
        monitor.finish()
    assert rows_by(monitor, "protocol", "port") == {("UDP", 53): PRIME}
    assert monitor.last["totals"]["truncated"] == 0


def test_by_source(wire: VethPair) -> None:
    frames = [ethernet(0x0800, ipv4(17, udp(1), source="10.1.1.1"))] * 5
    frames += [ethernet(0x86DD, ipv6(17, udp(1), source="fd00::77"))] * 7
    frames += [ethernet(0x86DD, ipv6(58, bytes(8), source="::"))] * 2
    frames += [ethernet(0x0806, bytes(28))] * 3
    with watch(wire, "--by", "source") as monitor:
        send_all(wire, frames)
        monitor.finish()
    assert rows_by(monitor, "source") == {"10.1.1.1": 5, "fd00::77": 7, "::": 2, None: 3}


def test_by_port(wire: VethPair) -> None:
    frames = [ethernet(0x0800, ipv4(6, tcp(443)))] * 5
    frames += [ethernet(0x86DD, ipv6(17, udp(443)))] * 7
    frames += [ethernet(0x0800, ipv4(17, b"rest of it", fragment=9))] * 2
    with watch(wire, "--by", "port") as monitor:
        send_all(wire, frames)
        monitor.finish()
    expected = {("TCP", 443): 5, ("UDP", 443): 7, (None, None): 2}
    assert rows_by(monitor, "protocol", "port") == expected


def test_by_size(wire: VethPair) -> None:
    frames = [ethernet(0x0806, bytes(28))] * 3 + [ethernet(0x0800, ipv4(17, bytes(1000)))] * 5
    with watch(wire, "--by", "size") as monitor:
        send_all(wire, frames)
        monitor.finish()
    rows = {row["size"]: row["packets"] for row in monitor.last["rows"] if row["packets"]}
    assert rows == {"32-63": 3, "1024-2047": 5}


def send_all(veth: VethPair, frames: list[bytes]) -> None:
    """Send, and wait until the other end has received all."""
    before = received_packets(veth.right, veth.right_iface)
    send_frames(veth.left, veth.left_iface, frames)
    wait_until(
        lambda: received_packets(veth.right, veth.right_iface) - before >= len(frames), "received"
    )


def test_full_map_is_told_and_totals_stay_right(wire: VethPair) -> None:
    room, extra = 65536, 101
    with watch(wire, "--by", "source", "--fail-on-loss") as monitor:
        frames = [
            ethernet(0x0800, ipv4(17, source=f"10.{n >> 16}.{n >> 8 & 255}.{n & 255}"))
            for n in range(room + extra)
        ]
        for at in range(0, len(frames), 256):  # a veth ring has 256 places
            send_all(wire, frames[at : at + 256])
        monitor.process.send_signal(signal.SIGINT)
        while monitor.read():
            pass
        assert monitor.process.wait(60) == 4
    assert len(monitor.last["rows"]) == room
    assert monitor.last["loss"]["map_full"] == extra
    assert monitor.last["totals"]["packets"] == room + extra


def test_several_interfaces(wire: VethPair) -> None:
    with running(
        "xdp", "--iface", wire.right_iface, "--iface", "lo", namespace=wire.right
    ) as monitor:
        send_all(wire, [ethernet(0x0806, bytes(28))] * 3)
        wire.right.run("ping", "-q", "-i", "0.002", "-c", "5", "127.0.0.1")
        monitor.finish()
    assert monitor.start["target"] == [wire.right_iface, "lo"]
    assert len(monitor.start["prog_ids"]) == 2
    assert monitor.start["hooks"] == ["xdp:native", "xdp:generic"]
    assert rows_by(monitor, "iface", "protocol") == {
        (wire.right_iface, "ARP"): 3,
        ("lo", "ICMP"): 10,
    }


@pytest.mark.vm_too
@pytest.mark.parametrize("whole_group", [False, True])
def test_nothing_is_left_after_kill_9(veth: VethPair, whole_group: bool) -> None:
    with watch(veth, start_new_session=True) as monitor:
        assert attached(veth.right, veth.right_iface)
        if whole_group:
            os.killpg(os.getpgid(monitor.process.pid), signal.SIGKILL)
        else:
            monitor.process.kill()
        monitor.process.wait()
        wait_until(lambda: not attached(veth.right, veth.right_iface), "detached")
    with watch(veth) as monitor:  # and the next start works
        monitor.finish()
    assert not attached(veth.right, veth.right_iface)


def test_nothing_is_left_after_ctrl_c_and_sigterm(veth: VethPair) -> None:
    for number, reason in ((signal.SIGINT, "interrupt"), (signal.SIGTERM, "terminated")):
        with watch(veth) as monitor:
            objects = monitor.finish(number)
            assert objects[-1]["reason"] == reason
            assert objects[-2]["type"] == "sample", "a last reading is always taken"
            assert not attached(veth.right, veth.right_iface)


def test_interface_that_goes_away_ends_the_run_with_an_error() -> None:
    with veth_pair() as veth, watch(veth) as monitor:
        veth.right.run("ip", "link", "delete", veth.right_iface)
        while monitor.read() is not None:
            pass
        assert monitor.process.wait(60) == 1
        assert monitor.process.stderr is not None
        said = monitor.process.stderr.read()
    assert monitor.objects[-1]["reason"] == "error"
    assert f"error: watch {veth.right_iface}: the interface is gone" in said
    assert "hint: " in said


def test_program_that_somebody_takes_off_ends_the_run_with_an_error(veth: VethPair) -> None:
    with watch(veth) as monitor:
        veth.right.run("ip", "link", "set", veth.right_iface, "xdp", "off")
        while monitor.read() is not None:
            pass
        assert monitor.process.wait(60) == 1
        assert monitor.process.stderr is not None
        said = monitor.process.stderr.read()
    assert "was taken off or replaced by somebody else" in said
    assert "hint: " in said


def test_interface_that_is_taken(veth: VethPair) -> None:
    with watch(veth) as first:
        argv = [*COMMAND, "xdp", "--iface", veth.right_iface, "-d", "1"]
        second = veth.right.run(*argv, check=False, cwd=ROOT, timeout=300)
        assert second.returncode == 1
        lines = second.stderr.splitlines()
        (ours,) = first.start["prog_ids"]
        assert lines[-2] == (
            f'error: attach xdp to {veth.right_iface}: another program (id {ours}, "count_packet") '
            "is attached"
        )
        assert "--replace" in lines[-1]
        assert second.stdout == ""
        assert attached(veth.right, veth.right_iface), "the first one is untouched"
        with watch(veth, "--replace") as third:
            assert third.start["prog_ids"] != first.start["prog_ids"]
            while first.read() is not None:
                pass
            assert first.process.wait(60) == 1, "the first one says that it lost its place"
            third.finish()


def test_reader_that_goes_away_ends_the_run(veth: VethPair) -> None:
    command = " ".join([sys.executable, "-m", "hypermesh_ebpf", "xdp", "--iface"])
    shell = f"{command} {veth.right_iface} -i 0.1 -o json | head -n 2; exit ${{PIPESTATUS[0]}}"
    done = veth.right.run("bash", "-c", shell, check=False, cwd=ROOT, timeout=300)
    assert done.returncode == 0
    assert done.stdout.count("\n") == 2
    assert "Traceback" not in done.stderr
    assert not attached(veth.right, veth.right_iface)


def test_full_disk_is_an_error() -> None:
    with Namespace() as ns, open("/dev/full", "w") as full:
        process = ns.start(
            *COMMAND, "xdp", "--iface", "lo", "-d", "1", "-o", "json", stdout=full, cwd=ROOT
        )
        assert process.wait(300) == 1
        assert process.stderr is not None
        assert "error: " in (said := process.stderr.read()) and "No space left" in said
        assert not attached(ns, "lo")
