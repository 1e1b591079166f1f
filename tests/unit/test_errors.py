"""The tree of errors: what its docstring promises, and the way across the worker boundary."""

from __future__ import annotations

import errno
import importlib
import json
import pkgutil
import re

import pytest

import hypermesh_ebpf
from hypermesh_ebpf import errors
from hypermesh_ebpf.errors import HmebpfError, all_errors, describe_errno, from_dict

# "    │   └── MissingBtf          exit 3   the kernel's type information ..."
_LINE = re.compile(r"^    (?P<branch>[│├└─ ]*)(?P<name>[A-Z]\w+) +exit (?P<code>\d)   \S", re.M)


def drawn() -> dict[str, tuple[str | None, int]]:
    """The tree as the module's docstring draws it: name to (parent, exit code)."""
    found: dict[str, tuple[str | None, int]] = {}
    path: list[str] = []
    for match in _LINE.finditer(errors.__doc__ or ""):
        depth = len(match["branch"]) // 4
        path = [*path[:depth], match["name"]]
        found[match["name"]] = (path[-2] if depth else None, int(match["code"]))
    return found


def test_tree_is_as_drawn() -> None:
    real: dict[str, tuple[str | None, int]] = {"HmebpfError": (None, 1)}
    for name, cls in all_errors().items():
        if cls is not HmebpfError:
            (base,) = cls.__bases__
            real[name] = (base.__name__, cls.exit_code)
    assert drawn() == real
    assert len(real) > 15


def test_no_error_is_defined_elsewhere() -> None:
    """One tree, one file; what crosses the worker boundary must be known on the other side."""
    for module in pkgutil.walk_packages(hypermesh_ebpf.__path__, "hypermesh_ebpf."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    assert {cls.__module__ for cls in all_errors().values()} == {errors.__name__}


def test_all_are_public() -> None:
    for name, cls in all_errors().items():
        assert getattr(hypermesh_ebpf, name) is cls
        assert cls.__doc__


@pytest.mark.parametrize("name", all_errors())
def test_round_trip(name: str) -> None:
    cls = all_errors()[name]
    error = cls("attach xdp to eth0", "No such device", "ip link", errno=19, details="a\nb\udc80")
    again = from_dict(json.loads(json.dumps(error.as_dict())))
    assert type(again) is cls
    assert again.exit_code == cls.exit_code
    assert vars(again) == vars(error)
    assert str(again) == str(error) == "attach xdp to eth0: No such device"
    bare = from_dict(json.loads(json.dumps(cls("only what").as_dict())))
    assert str(bare) == "only what"
    assert (bare.cause, bare.remedy, bare.errno, bare.details) == (None,) * 4


def test_error_of_a_class_that_is_not_known_here() -> None:
    error = from_dict({"class": "FromTheFuture", "what": "do it", "cause": "because"})
    assert type(error) is HmebpfError
    assert str(error) == "do it: because"


def test_exit_codes_are_the_promised_ones() -> None:
    assert {name: cls.exit_code for name, cls in all_errors().items() if cls.exit_code != 1} == {
        "UsageError": 2,
        "Unsupported": 3,
        "MissingPrivilege": 3,
        "MissingBtf": 3,
        "LossSeen": 4,
        "OverheadExceeded": 5,
    }


def test_errno_in_words() -> None:
    assert describe_errno(errno.ENODEV) == "No such device (ENODEV)"
    assert describe_errno(4000) == "Unknown error 4000"
