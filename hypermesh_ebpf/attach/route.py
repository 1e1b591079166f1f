"""Route netlink by pyroute2: the socket, and the boundary at which refusals become our errors."""

from __future__ import annotations

import errno
import importlib
import importlib.util
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import lru_cache
from typing import Any

from hypermesh_ebpf import guard_process as raw
from hypermesh_ebpf.errors import (
    AttachError,
    HmebpfError,
    MissingDependency,
    MissingPrivilege,
    TargetGone,
    describe_errno,
)

_RTM_SETLINK, _REQUEST, _ACK = 19, 1, 4  # include/uapi/linux/{rtnetlink,netlink}.h


class Refused(Exception):
    """The kernel's no to a netlink request."""

    def __init__(self, number: int, words: str) -> None:
        self.words = describe_errno(number, words)
        self.errno = number
        super().__init__(self.words)


def _import_part(name: str, *packages: str) -> types.ModuleType:
    """A module of pyroute2, without what the packages around it import.

    pyroute2/__init__.py imports every protocol that there is a class for: 344 modules, 150 to
    190 ms of this process's time.  So empty ones stand in for those packages meanwhile: for the
    worker process, where no other thread imports pyroute2.  Raises ImportError.
    """
    if "pyroute2" in sys.modules:
        return importlib.import_module(name)
    found = importlib.util.find_spec("pyroute2")
    if found is None or found.submodule_search_locations is None:
        raise ImportError("No module named 'pyroute2'")
    (place, *_others) = found.submodule_search_locations
    for package in packages:
        sys.modules[package] = stub = types.ModuleType(package)
        stub.__path__ = [place + package.removeprefix("pyroute2").replace(".", "/")]
    try:
        return importlib.import_module(name)
    finally:
        for package in packages:
            sys.modules.pop(package, None)


@lru_cache(maxsize=1)
def load_iproute() -> tuple[Any, type[Exception]]:
    """pyroute2's classes IPRoute and NetlinkError: 266 modules, 100 to 120 ms.

    Raises ImportError.
    """
    linux = _import_part("pyroute2.iproute.linux", "pyroute2", "pyroute2.iproute")
    return linux.IPRoute, linux.NetlinkError


@lru_cache(maxsize=1)
def load_link_message() -> Any:
    """pyroute2's class for messages about interfaces, ifinfmsg: 70 modules, 40 ms.

    Raises ImportError.
    """
    return _import_part("pyroute2.netlink.rtnl.ifinfmsg", "pyroute2").ifinfmsg


class Links:
    """Requests about interfaces: written by pyroute2, sent by a socket of ours.

    For XDP alone, which is attached at the start of a monitor: IPRoute's own socket comes with
    asyncio and all that it needs.
    """

    def __init__(self) -> None:
        self._message = load_link_message()
        self._socket = raw.netlink_socket()

    def set_xdp(self, ifindex: int, attributes: Sequence[tuple[str, int]]) -> None:
        """RTM_SETLINK with these attributes of IFLA_XDP.  Raises Refused."""
        message = self._message()
        message["header"]["type"] = _RTM_SETLINK
        message["header"]["flags"] = _REQUEST | _ACK
        message["index"] = ifindex
        message["attrs"] = [("IFLA_XDP", {"attrs": list(attributes)})]
        message.encode()
        number, words = raw.acknowledge(self._socket, bytes(message.data))
        if number:
            raise Refused(number, words)

    def close(self) -> None:
        self._socket.close()


@contextmanager
def open_links(what: str) -> Iterator[Links]:
    """For requests about interfaces; errors as of :func:`open_route`."""
    with _explained(what), closing(Links()) as links:
        yield links


@contextmanager
def open_route(what: str) -> Iterator[Any]:
    """A route netlink socket, pyroute2's IPRoute.  What nobody inside explained is raised as
    AttachError, TargetGone, or MissingDependency without pyroute2."""
    with _explained(what):
        make_route, _refusal = load_iproute()
        with make_route(ext_ack=True) as route:
            yield route


@contextmanager
def _explained(what: str) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise MissingDependency(
            what, str(error), "install it with `python3 -m pip install pyroute2`"
        ) from error
    except Refused as refused:
        kind = TargetGone if refused.errno == errno.ENODEV else AttachError
        raise kind(what, refused.words, errno=refused.errno) from refused
    except OSError as error:
        raise AttachError(what, str(error), errno=error.errno) from error


def ask(request: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """One request's answer.  Raises Refused."""
    _route, refusal = load_iproute()
    try:
        return request(*arguments, **options)
    except refusal as error:
        raise Refused(error.args[0], str(error.args[1])) from error


def common_refusal(what: str, refused: Refused) -> HmebpfError | None:
    """The error for what is refused alike everywhere: privileges, an interface that is gone."""
    number, words = refused.errno, refused.words
    if number in (errno.EPERM, errno.EACCES):
        return MissingPrivilege(
            what,
            f"{words}: CAP_NET_ADMIN is missing",
            "run it as root, or give the process CAP_NET_ADMIN, CAP_BPF and CAP_PERFMON",
            errno=number,
        )
    if number == errno.ENODEV:
        return TargetGone(what, words, "see what is there with `ip -br link`", errno=number)
    return None
