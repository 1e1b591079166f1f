"""The bundled monitors: every module here but ``declaration`` binds ``MONITOR``."""

from __future__ import annotations

import importlib
import os
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hypermesh_ebpf.monitors.declaration import Monitor

_SUMMARY = re.compile(r'^    summary="(.*)",$', re.M)


def names() -> list[str]:
    """The monitors' names as the user types them, in alphabetical order; imports none of them."""
    modules = (file[:-3] for file in os.listdir(_directory()) if file.endswith(".py"))
    return sorted(
        name.replace("_", "-") for name in modules if name not in ("__init__", "declaration")
    )


def summary(name: str) -> str:
    """What the monitor does, in one line.

    Read out of the declaration's text where it stands on a line of its own: importing all
    declarations would double the time of ``hmebpf --help``.
    """
    with open(os.path.join(_directory(), name.replace("-", "_") + ".py"), encoding="utf-8") as file:
        found = _SUMMARY.search(file.read())
    return found[1] if found else load(name).summary


def load(name: str) -> Monitor:
    """The declaration of one monitor.  Raises KeyError for a name that is not in :func:`names`."""
    if name not in names():
        raise KeyError(name)
    module = importlib.import_module(f"{__name__}.{name.replace('-', '_')}")
    monitor: Monitor = module.MONITOR
    return monitor


def _directory() -> str:
    return os.path.dirname(__file__)
