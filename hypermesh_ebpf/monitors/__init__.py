"""The bundled monitors: every module here but ``declaration`` binds ``MONITOR``."""

from __future__ import annotations

import importlib
import pkgutil

from hypermesh_ebpf.monitors.declaration import Monitor


def names() -> list[str]:
    """The monitors' names as the user types them, in alphabetical order; imports none of them."""
    modules = (module.name for module in pkgutil.iter_modules(__path__))
    return sorted(name.replace("_", "-") for name in modules if name != "declaration")


def load(name: str) -> Monitor:
    """The declaration of one monitor.  Raises KeyError for a name that is not in :func:`names`."""
    if name not in names():
        raise KeyError(name)
    module = importlib.import_module(f"{__name__}.{name.replace('-', '_')}")
    monitor: Monitor = module.MONITOR
    return monitor
