"""Debug logging with the standard logging module, which is imported only where somebody listens.

``HMEBPF_LOG=debug`` (or ``info``), ``-v`` (info: what is attached and detached) and ``-vv`` (debug:
every bpf(2) command with its size and time) turn it on; so does a program that configured the
logger "hypermesh_ebpf" before it uses this library.  The worker's lines come to the same logger
through the channel.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import logging

_NAME = "hypermesh_ebpf"
_LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40}


def level() -> int:
    """The lowest level that is listened to, as logging counts; 0 when nobody listens."""
    if "logging" not in sys.modules:
        return 0
    import logging

    logger = logging.getLogger(_NAME)
    return logger.getEffectiveLevel() if logger.hasHandlers() else 0


def listens(name: str) -> bool:
    """Whether lines of that level ("debug", "info") are wanted."""
    return 0 < level() <= _LEVELS[name]


def configure(verbose: int = 0) -> None:
    """Write to stderr what HMEBPF_LOG or ``verbose`` -v ask for, unless logging is set up already.

    Raises UsageError for a level that does not exist.
    """
    wanted = os.environ.get("HMEBPF_LOG", "").lower()
    if wanted and wanted not in _LEVELS:
        from hypermesh_ebpf.errors import UsageError

        raise UsageError(
            f"HMEBPF_LOG={wanted}", "there is no such level", f"use {', '.join(_LEVELS)}"
        )
    number = _LEVELS[wanted] if wanted else {0: 0, 1: 20}.get(verbose, 10)
    if not number:
        return
    import logging

    logger = logging.getLogger(_NAME)
    logger.setLevel(number)
    if not logger.hasHandlers():
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-5s %(message)s"))
        logger.addHandler(handler)


def info(text: str, *values: object) -> None:
    """A line about something that was attached, detached or pinned."""
    if listens("info"):
        _logger().info(text, *values)


def debug(text: str, *values: object) -> None:
    """A line about a step on the way."""
    if listens("debug"):
        _logger().debug(text, *values)


def _logger() -> logging.Logger:
    import logging

    return logging.getLogger(_NAME)


def relay(message: Mapping[str, Any]) -> None:
    """Hand a line from the worker to whoever listens here."""
    if "logging" in sys.modules:
        _logger().log(message["level"], "%s", message["text"])


def send_to(send: Callable[[dict[str, Any]], None], number: int) -> None:
    """In the worker: lines of that level and above become messages to the parent."""
    import logging

    class Relay(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            send({"type": "log", "level": record.levelno, "text": record.getMessage()})

    logger = logging.getLogger(_NAME)
    logger.setLevel(number)
    logger.addHandler(Relay())


def timed(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    """A C function of libbpf that tells of each call: its scalars, result and time."""

    def run(*arguments: Any) -> Any:
        begin = time.perf_counter()
        result = call(*arguments)
        spent = (time.perf_counter() - begin) * 1e6
        _logger().debug("%s(%s) = %s in %.0f us", name, _describe(arguments), result, spent)
        return result

    return run


def _describe(arguments: tuple[Any, ...]) -> str:
    """Numbers and names as they are; of what is in memory, only how much it is."""
    words = []
    for argument in arguments:
        if argument is None or isinstance(argument, int):
            words.append(str(argument) if argument is None or argument < 1 << 32 else "...")
        elif isinstance(argument, bytes) and argument.isascii() and len(argument) < 64:
            words.append(repr(argument)[1:])
        else:
            try:
                words.append(f"<{len(argument)} bytes>")
            except TypeError:
                words.append("...")
    return ", ".join(words)
