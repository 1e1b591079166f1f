"""XDP attachment, judged by what iproute2 sees on the interface."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from hypermesh_ebpf.attach import xdp
from hypermesh_ebpf.bpf.libbpf import check, libbpf
from hypermesh_ebpf.errors import (
    AttachError,
    InterfaceBusy,
    InterfaceNotFound,
    TargetGone,
    UsageError,
)
from tests.netns import Namespace, VethPair, needs_namespaces, needs_own_mounts, veth_pair
from tests.programs import SOCKET_FILTER, load_program, program_id

pytestmark = [needs_namespaces, pytest.mark.kernel]

ROOT = str(Path(__file__).parents[2])
_BPF_XDP = 37  # enum bpf_attach_type
_IP_MODES = {1: "native", 2: "generic"}


def seen(ns: Namespace, iface: str) -> tuple[str, int] | None:
    """What `ip` says is on the interface: (mode, program id)."""
    (link,) = json.loads(ns.run("ip", "-j", "-d", "link", "show", "dev", iface).stdout)
    found = link.get("xdp")
    return (_IP_MODES[found["mode"]], found["prog"]["id"]) if found and "prog" in found else None


@pytest.fixture(scope="module")
def veth() -> Iterator[VethPair]:
    with veth_pair() as pair, pair.left.entered():
        yield pair


@pytest.fixture
def clean(veth: VethPair) -> Iterator[VethPair]:
    """The pair, with nothing attached on the left before and after."""
    yield veth
    for iface in ("lo", veth.left_iface):
        for mode in ("xdpdrv", "xdpgeneric"):
            veth.left.run("ip", "link", "set", iface, mode, "off", check=False)
        assert seen(veth.left, iface) is None


class Program:
    """A loaded program, its descriptor closed at the end."""

    def __init__(self, name: str) -> None:
        self.fd = load_program(name)
        self.id = program_id(self.fd)


@pytest.fixture
def programs() -> Iterator[tuple[Program, Program]]:
    """(ours, theirs)"""
    with ExitStack() as stack:
        pair = Program("hm_ours"), Program("somebody_else")
        for program in pair:
            stack.callback(os.close, program.fd)
        yield pair


@pytest.mark.vm_too
def test_auto_takes_native_where_the_driver_has_it(
    clean: VethPair, programs: tuple[Program, Program]
) -> None:
    ours, _ = programs
    attached = xdp.attach(ours.fd, ours.id, clean.left_iface)
    assert (attached.mode, attached.fallback) == ("native", None)
    assert attached.prog_id == ours.id
    assert attached.ifindex == xdp.find_interface(clean.left_iface)
    assert seen(clean.left, clean.left_iface) == ("native", ours.id)
    assert xdp.current(clean.left_iface) == (xdp.XdpOccupant("native", ours.id),)


@pytest.mark.vm_too
def test_auto_falls_back_to_generic_and_says_why(
    clean: VethPair, programs: tuple[Program, Program]
) -> None:
    ours, _ = programs
    attached = xdp.attach(ours.fd, ours.id, "lo")
    assert attached.mode == "generic"
    assert attached.fallback is not None
    assert "native mode" in attached.fallback  # the kernel's words
    assert "EOPNOTSUPP" in attached.fallback
    assert seen(clean.left, "lo") == ("generic", ours.id)


def test_generic_can_be_asked_for(clean: VethPair, programs: tuple[Program, Program]) -> None:
    ours, _ = programs
    attached = xdp.attach(ours.fd, ours.id, clean.left_iface, mode="generic")
    assert (attached.mode, attached.fallback) == ("generic", None)
    assert seen(clean.left, clean.left_iface) == ("generic", ours.id)


def test_native_asked_for_where_there_is_none(
    clean: VethPair, programs: tuple[Program, Program]
) -> None:
    ours, _ = programs
    with pytest.raises(AttachError) as caught:
        xdp.attach(ours.fd, ours.id, "lo", mode="native")
    assert caught.value.errno == errno.EOPNOTSUPP
    assert caught.value.what == "attach xdp to lo in native mode"
    assert "--mode generic" in (caught.value.remedy or "")
    assert seen(clean.left, "lo") is None


def test_mtu_too_large_for_native(programs: tuple[Program, Program]) -> None:
    ours, _ = programs
    with veth_pair(mtu=9000) as pair, pair.left.entered():
        with pytest.raises(AttachError) as caught:
            xdp.attach(ours.fd, ours.id, pair.left_iface, mode="native")
        assert caught.value.errno == errno.ERANGE
        assert "mtu 1500" in (caught.value.remedy or "")
        attached = xdp.attach(ours.fd, ours.id, pair.left_iface)
        assert attached.mode == "generic"
        assert attached.fallback is not None
        assert "MTU" in attached.fallback
        assert seen(pair.left, pair.left_iface) == ("generic", ours.id)


@pytest.mark.parametrize("ours_mode", ["auto", "native", "generic"])
@pytest.mark.parametrize("their_mode", ["native", "generic"])
def test_another_owners_program_is_left_alone(
    clean: VethPair, programs: tuple[Program, Program], their_mode: str, ours_mode: str
) -> None:
    ours, theirs = programs
    xdp.attach(theirs.fd, theirs.id, clean.left_iface, mode=their_mode)
    with pytest.raises(InterfaceBusy) as caught:
        xdp.attach(ours.fd, ours.id, clean.left_iface, mode=ours_mode)
    assert str(caught.value) == (
        f"attach xdp to {clean.left_iface}: another program "
        f'(id {theirs.id}, "somebody_else") is attached'
    )
    assert caught.value.remedy == (
        f"see it with `hmebpf list --iface {clean.left_iface}`; take it over with --replace"
    )
    assert seen(clean.left, clean.left_iface) == (their_mode, theirs.id)


@needs_own_mounts
def test_busy_names_the_pin(veth: VethPair) -> None:
    code = """
from hypermesh_ebpf.attach import xdp
from hypermesh_ebpf.bpf.libbpf import check, libbpf
from hypermesh_ebpf.errors import InterfaceBusy
from tests.programs import load_program, program_id
theirs = load_program("pinned_one")
check(libbpf().bpf_obj_pin(theirs, b"/sys/fs/bpf/their_pin"))
xdp.attach(theirs, program_id(theirs), "lo")
ours = load_program()
try:
    xdp.attach(ours, program_id(ours), "lo")
except InterfaceBusy as error:
    print(error)
"""
    shell = 'mount -t bpf bpf /sys/fs/bpf && exec "$0" -c "$1"'
    with Namespace() as ns:
        done = ns.run(
            "unshare", "--mount", "sh", "-c", shell, sys.executable, code,
            env={**os.environ, "PYTHONPATH": ROOT},
        )  # fmt: skip
    assert '"pinned_one", pinned at /sys/fs/bpf/their_pin) is attached' in done.stdout


@pytest.mark.parametrize("ours_mode", ["auto", "native", "generic"])
@pytest.mark.parametrize("their_mode", ["native", "generic"])
def test_replace_swaps(
    clean: VethPair, programs: tuple[Program, Program], their_mode: str, ours_mode: str
) -> None:
    ours, theirs = programs
    xdp.attach(theirs.fd, theirs.id, clean.left_iface, mode=their_mode)
    attached = xdp.attach(ours.fd, ours.id, clean.left_iface, mode=ours_mode, replace=True)
    expected = their_mode if ours_mode == "auto" else ours_mode
    assert attached.mode == expected
    assert seen(clean.left, clean.left_iface) == (expected, ours.id)
    assert (attached.fallback is not None) == (ours_mode == "auto" and their_mode == "generic")


def test_replace_of_nothing_attaches(clean: VethPair, programs: tuple[Program, Program]) -> None:
    ours, _ = programs
    assert xdp.attach(ours.fd, ours.id, clean.left_iface, replace=True).mode == "native"


def test_failed_replace_puts_the_other_program_back(
    clean: VethPair, programs: tuple[Program, Program]
) -> None:
    ours, theirs = programs
    xdp.attach(theirs.fd, theirs.id, "lo")
    with pytest.raises(AttachError) as caught:  # lo has no native mode
        xdp.attach(ours.fd, ours.id, "lo", mode="native", replace=True)
    assert caught.value.errno == errno.EOPNOTSUPP
    assert seen(clean.left, "lo") == ("generic", theirs.id)


def test_replace_hits_nobody_who_came_meanwhile(
    clean: VethPair, programs: tuple[Program, Program], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = programs
    third = Program("third_party")
    xdp.attach(theirs.fd, theirs.id, clean.left_iface)
    looked = xdp._program_fd

    def look_while_a_third_comes(prog_id: int, what: str) -> int:
        fd = looked(prog_id, what)
        monkeypatch.undo()
        xdp.attach(third.fd, third.id, clean.left_iface, replace=True)
        return fd

    monkeypatch.setattr(xdp, "_program_fd", look_while_a_third_comes)
    with pytest.raises(InterfaceBusy, match="third_party"):
        xdp.attach(ours.fd, ours.id, clean.left_iface, replace=True)
    os.close(third.fd)
    assert seen(clean.left, clean.left_iface) == ("native", third.id)


@pytest.mark.parametrize("link_mode", ["native", "generic"])
@pytest.mark.parametrize("mode", ["auto", "native", "generic"])
@pytest.mark.parametrize("replace", [False, True])
def test_kernel_link_is_told_as_such(
    clean: VethPair,
    programs: tuple[Program, Program],
    link_mode: str,
    mode: str,
    replace: bool,
) -> None:
    ours, theirs = programs
    ifindex = xdp.find_interface(clean.left_iface)
    options = (ctypes.c_uint32 * 16)(64, 0, xdp._MODE_FLAGS[link_mode])  # sz (64 bit), flags
    link = check(libbpf().bpf_link_create(theirs.fd, ifindex, _BPF_XDP, options))
    try:
        with pytest.raises(InterfaceBusy) as caught:
            xdp.attach(ours.fd, ours.id, clean.left_iface, mode=mode, replace=replace)
        assert "attached by a kernel link" in str(caught.value)
        assert f"id {theirs.id}" in str(caught.value)
        assert "--replace" not in (caught.value.remedy or "")
        assert seen(clean.left, clean.left_iface) == (link_mode, theirs.id)
    finally:
        os.close(link)


def test_upper_device_has_a_program(programs: tuple[Program, Program]) -> None:
    ours, theirs = programs
    with veth_pair() as pair, pair.left.entered():
        if pair.left.run("ip", "link", "add", "br0", "type", "bridge", check=False).returncode:
            pytest.skip("this kernel has no bridge")
        pair.left.run("ip", "link", "set", pair.left_iface, "master", "br0")
        xdp.attach(theirs.fd, theirs.id, "br0", mode="generic")
        with pytest.raises(InterfaceBusy, match="upper device already has a program"):
            xdp.attach(ours.fd, ours.id, pair.left_iface)


def test_unknown_interface_names_the_close_ones_first(clean: VethPair) -> None:
    with pytest.raises(InterfaceNotFound) as caught:
        xdp.find_interface(clean.left_iface[:-1] + "x")
    assert caught.value.what == f"find interface '{clean.left_iface[:-1]}x'"
    assert caught.value.remedy == f"interfaces here: {clean.left_iface}, lo"


@pytest.mark.parametrize("name", ["", "a" * 40, "lo\0", "no such", "../lo"])
def test_nonsense_is_no_interface(clean: VethPair, name: str) -> None:
    with pytest.raises(InterfaceNotFound):
        xdp.find_interface(name)


def test_many_interfaces_are_not_all_listed() -> None:
    with Namespace() as ns, ns.entered():
        for number in range(0, 20, 2):
            ns.run("ip", "link", "add", f"many{number}", "type", "veth",
                   "peer", "name", f"many{number + 1}")  # fmt: skip
        with pytest.raises(InterfaceNotFound) as caught:
            xdp.find_interface("eth7")
    assert "and 9 more (`ip -br link`)" in (caught.value.remedy or "")


def test_interface_that_vanishes(clean: VethPair, programs: tuple[Program, Program]) -> None:
    ours, _ = programs
    for mode in ("auto", "native", "generic"):
        with pytest.raises(TargetGone) as caught:
            xdp.attach(ours.fd, ours.id, clean.left_iface, mode=mode, ifindex=4321)
        assert caught.value.errno == errno.ENODEV


def test_program_of_another_type(clean: VethPair) -> None:
    fd = load_program(kind=SOCKET_FILTER)
    try:
        with pytest.raises(AttachError) as caught:
            xdp.attach(fd, program_id(fd), clean.left_iface)
        assert caught.value.errno == errno.EINVAL
    finally:
        os.close(fd)


def test_descriptor_that_is_no_program(clean: VethPair) -> None:
    with open("/dev/null") as null, pytest.raises(AttachError):
        xdp.attach(null.fileno(), 1, clean.left_iface)
    assert seen(clean.left, clean.left_iface) is None


def test_unknown_mode(clean: VethPair) -> None:
    with pytest.raises(UsageError, match="modes are auto, native and generic"):
        xdp.attach(0, 0, "lo", mode="fast")


_UNPRIVILEGED = """
import os, sys, pyroute2
from hypermesh_ebpf.attach import xdp
from hypermesh_ebpf.errors import MissingPrivilege
from tests.programs import load_program, program_id
theirs = load_program("theirs")
replace = sys.argv[1] == "replace"
if replace:
    xdp.attach(theirs, program_id(theirs), "lo")
fd = load_program()
user = None if replace else os.setresuid(65534, 65534, 65534)
try:
    xdp.attach(fd, program_id(fd), "lo", replace=replace)
except MissingPrivilege as error:
    print(error, "|", error.remedy)
"""


@pytest.mark.parametrize(
    ("what", "setpriv", "capability"),
    [("plain", "+all", "CAP_NET_ADMIN"), ("replace", "-sys_admin", "CAP_SYS_ADMIN")],
)
def test_missing_privilege(what: str, setpriv: str, capability: str) -> None:
    with Namespace() as ns:
        done = ns.run(
            "setpriv", f"--bounding-set={setpriv}",
            sys.executable, "-c", _UNPRIVILEGED, what,
            env={**os.environ, "PYTHONPATH": ROOT},
        )  # fmt: skip
    assert "Operation not permitted (EPERM)" in done.stdout, done.stderr
    assert f"{capability} is missing" in done.stdout
    assert "run it as root" in done.stdout
