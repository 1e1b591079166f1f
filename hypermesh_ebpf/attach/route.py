"""Route netlink by pyroute2: the socket, and the boundary at which refusals become our errors."""

from __future__ import annotations

import errno
import importlib
import importlib.util
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from hypermesh_ebpf.errors import (
    AttachError,
    HmebpfError,
    MissingDependency,
    MissingPrivilege,
    TargetGone,
    describe_errno,
)


class Refused(Exception):
    """The kernel's no to a netlink request."""

    def __init__(self, number: int, words: str) -> None:
        self.words = describe_errno(number, words)
        self.errno = number
        super().__init__(self.words)


@lru_cache(maxsize=1)
def load_iproute() -> tuple[Any, type[Exception]]:
    """pyroute2's classes IPRoute and NetlinkError, without what they can do without.

    pyroute2/__init__.py imports every protocol that there is a class for: 344 modules, 150 to
    190 ms of this process's time.  With stubs in the place of two packages, only while these
    classes are imported, they bring 266 of them in two thirds of that.  Raises ImportError.
    """
    if "pyroute2" in sys.modules:
        from pyroute2 import IPRoute, NetlinkError

        return IPRoute, NetlinkError
    found = importlib.util.find_spec("pyroute2")
    if found is None or found.submodule_search_locations is None:
        raise ImportError("No module named 'pyroute2'")
    (place, *_others) = found.submodule_search_locations
    stubs = {"pyroute2": place, "pyroute2.iproute": f"{place}/iproute"}
    for name, path in stubs.items():
        sys.modules[name] = stub = types.ModuleType(name)
        stub.__path__ = [path]
    try:
        linux = importlib.import_module("pyroute2.iproute.linux")
        exceptions = importlib.import_module("pyroute2.netlink.exceptions")
    finally:
        for name in stubs:
            del sys.modules[name]
    return linux.IPRoute, exceptions.NetlinkError


@contextmanager
def open_route(what: str) -> Iterator[Any]:
    """A route netlink socket.  What nobody inside explained is raised as AttachError, TargetGone,
    or MissingDependency without pyroute2."""
    try:
        make_route, _refused = load_iproute()
    except ImportError as error:
        raise MissingDependency(
            what, str(error), "install it with `python3 -m pip install pyroute2`"
        ) from error
    try:
        with make_route(ext_ack=True) as route:
            yield route
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
