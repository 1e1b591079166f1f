"""Throw-away network namespaces and veth pairs for kernel tests.

A namespace here is nothing but an open descriptor: no name under /run/netns, no mount, no process.
The kernel destroys it, and every interface in it, when the descriptor and the last process in it
are gone, so nothing is left even when the test run is killed.

    with Namespace() as ns:
        ns.run("ping", "-c", "7", "127.0.0.1")     # lo is up
    with veth_pair() as veth:
        veth.left.run("ping", "-c", "7", veth.right_address)

Needs CAP_SYS_ADMIN; test modules skip by ``pytestmark = needs_namespaces``.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

_CLONE_NEWNET = 0x40000000
_LIBC = ctypes.CDLL(None, use_errno=True)
_serial = itertools.count(1)

needs_namespaces = pytest.mark.skipif(
    os.geteuid() != 0 or not shutil.which("ip") or not shutil.which("nsenter"),
    reason="network namespaces need root, iproute2 and nsenter",
)

# unshare(1) makes "/" private, which has to be a mount point for that: in a chroot it is none.
needs_own_mounts = pytest.mark.skipif(
    not re.search(r"^(\S+ ){4}/ ", Path("/proc/self/mountinfo").read_text(), re.M),
    reason='a mount namespace of its own needs "/" to be a mount point',
)


def wait_until(condition: Callable[[], Any], what: str, seconds: float = 60.0) -> Any:
    """Poll ``condition`` until it gives something true and return that; fail after ``seconds``."""
    deadline = time.monotonic() + seconds
    while True:
        result = condition()
        if result:
            return result
        if time.monotonic() > deadline:
            pytest.fail(f"waited {seconds:g} s in vain until {what}")
        time.sleep(0.005)


class Namespace:
    """A fresh network namespace, lo up.  A context manager; processes of ``start`` end with it."""

    def __init__(self) -> None:
        self.fd = -1
        self._started: list[subprocess.Popen[str]] = []

    def __enter__(self) -> Namespace:
        self.fd = _new_namespace()
        try:
            self.run("ip", "link", "set", "lo", "up")
        except BaseException:
            os.close(self.fd)
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        for process in self._started:
            if process.poll() is None:
                process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout, process.stderr):
                if stream:
                    stream.close()
        os.close(self.fd)

    @property
    def inode(self) -> int:
        """The number by which the kernel tells namespaces apart."""
        return os.fstat(self.fd).st_ino

    @property
    def path(self) -> str:
        """A path to the namespace that other processes (``nsenter --net=``) can open."""
        return f"/proc/{os.getpid()}/fd/{self.fd}"

    def run(
        self, *argv: str, check: bool = True, timeout: float = 60, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in the namespace to its end; stdout and stderr are captured as text."""
        options.setdefault("stdin", subprocess.DEVNULL)
        done = subprocess.run(
            self._command(argv), capture_output=True, text=True, timeout=timeout, **options
        )
        if check and done.returncode:
            pytest.fail(
                f"{' '.join(argv)} ended with {done.returncode}: {done.stdout}{done.stderr}"
            )
        return done

    def start(self, *argv: str, **options: Any) -> subprocess.Popen[str]:
        """Start a command in the namespace, text pipes by default.  Killed at the end if it lives.

        nsenter executes the command in its own place: ``.pid`` is the command's.
        """
        for stream in ("stdin", "stdout", "stderr"):
            options.setdefault(stream, subprocess.PIPE)
        process = subprocess.Popen(self._command(argv), text=True, **options)
        self._started.append(process)
        return process

    @contextmanager
    def entered(self) -> Iterator[None]:
        """The calling thread is in the namespace inside the ``with``; sockets made there stay."""
        before = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            _setns(self.fd)
            try:
                yield
            finally:
                _setns(before)
        finally:
            os.close(before)

    def _command(self, argv: tuple[str, ...]) -> list[str]:
        return ["nsenter", f"--net={self.path}", "--", *argv]


@dataclass(frozen=True, slots=True)
class VethPair:
    """Two namespaces joined by a cable: an interface in each, both up, with addresses."""

    left: Namespace
    right: Namespace
    left_iface: str
    right_iface: str
    left_address: str = "10.213.0.1"
    right_address: str = "10.213.0.2"
    left_address6: str = "fd00:213::1"
    right_address6: str = "fd00:213::2"


@contextmanager
def veth_pair(mtu: int | None = None) -> Iterator[VethPair]:
    """A veth pair between two fresh namespaces.

    IPv4 and, where the kernel has it, IPv6 addresses are set and usable at once (nodad).
    """
    number = next(_serial)
    name = f"hm{os.getpid() % 100000}n{number}"  # at most 15 characters
    with ExitStack() as stack:
        left = stack.enter_context(Namespace())
        right = stack.enter_context(Namespace())
        pair = VethPair(left, right, f"{name}l", f"{name}r")
        left.run("ip", "link", "add", pair.left_iface, "type", "veth",
                 "peer", "name", pair.right_iface, "netns", right.path)  # fmt: skip
        for ns, iface, address, address6 in (
            (left, pair.left_iface, pair.left_address, pair.left_address6),
            (right, pair.right_iface, pair.right_address, pair.right_address6),
        ):
            if mtu is not None:
                ns.run("ip", "link", "set", iface, "mtu", str(mtu))
            ns.run("ip", "address", "add", f"{address}/24", "dev", iface)
            if os.path.exists("/proc/net/if_inet6"):
                # No link-local address: nothing but the test sends on this cable.
                ns.run("ip", "link", "set", iface, "addrgenmode", "none")
                ns.run("ip", "address", "add", f"{address6}/64", "dev", iface, "nodad")
            ns.run("ip", "link", "set", iface, "up")
        yield pair


def _new_namespace() -> int:
    """A descriptor of a new namespace, made by a thread that ends at once (ours does not move)."""
    made: list[int | OSError] = []

    def make() -> None:
        if _LIBC.unshare(_CLONE_NEWNET):
            number = ctypes.get_errno()
            made.append(OSError(number, f"unshare: {os.strerror(number)}"))
        else:
            made.append(os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC))

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    (result,) = made
    if isinstance(result, OSError):
        raise result
    return result


def _setns(fd: int) -> None:
    if _LIBC.setns(fd, _CLONE_NEWNET):
        number = ctypes.get_errno()
        raise OSError(number, f"setns: {os.strerror(number)}")
