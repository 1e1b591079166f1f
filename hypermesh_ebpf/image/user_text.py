"""A user's C text for BCC with what belongs to it: its own headers, flags, the kernel's headers.

Light on purpose: what of it an image depends on is asked before it is known whether the compiler
has to run.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hypermesh_ebpf.attach_type import EbpfAttachType
from hypermesh_ebpf.image import conventions

LIGHT_HEADERS = Path(__file__).parent / "include"
"""What BCC asks for of a kernel source tree: kconfig.h and a few stand-ins."""

_INCLUDE_OPTIONS = ("-I", "-iquote", "-isystem")
# Brought by clang itself.
_CLANGS_OWN = frozenset({"stdarg.h", "stddef.h", "stdbool.h", "stdint.h", "limits.h"})


@dataclass(frozen=True, slots=True)
class UserSource:
    """A text, and what belongs to it.

    ``headers`` are the texts of its own headers by path, ``code`` is the text behind them, all
    without comments; ``flags`` clang's arguments for it; ``kernel_headers`` the headers that it
    includes and that are nobody's but the kernel's; ``readers`` C that reads arguments of static
    probes for it.
    """

    name: str
    text: str
    flags: tuple[str, ...]
    headers: dict[str, str]
    code: str
    kernel_headers: tuple[str, ...]
    readers: str = ""

    @classmethod
    def read(
        cls,
        name: str,
        text: str,
        cflags: Sequence[str] = (),
        directory: Path | None = None,
        attach: Mapping[str, EbpfAttachType] = {},
    ) -> UserSource:
        """Follow the text's includes, beside it and where ``cflags`` point with -I.

        See :func:`hypermesh_ebpf.image.user_source.compile_user`.
        """
        beside = (directory or Path(name).parent).absolute()
        flags = _absolute(cflags)
        places = [beside, *_include_directories(flags)]
        headers: dict[str, str] = {}
        kernel: dict[str, None] = {}
        todo = [(conventions.strip_comments(text), beside)]
        code = ""
        while todo:
            stripped, folder = todo.pop()
            code = stripped + "\n" + code
            for header, angle in conventions.includes(stripped):
                near = places[1:] if angle else [folder, *places]
                path = next((each / header for each in near if (each / header).is_file()), None)
                if path is not None and str(path) not in headers:
                    headers[str(path)] = path.read_text(errors="replace")
                    todo.append((conventions.strip_comments(headers[str(path)]), path.parent))
                elif path is None and header not in _CLANGS_OWN:
                    kernel[header] = None
        readers = ""
        if any(point.kind == "usdt" for point in attach.values()):
            from hypermesh_ebpf.image.usdt import write_readers

            readers = write_readers(attach).replace("#include <uapi/linux/ptrace.h>\n", "")
        flags = [f"-iquote{beside}", *flags]
        return cls(name, text, tuple(flags), headers, code, tuple(kernel), readers)

    @property
    def needs_kernel_headers(self) -> bool:
        """True if it includes what the light stand-ins for the kernel's headers have not."""
        return any(not (LIGHT_HEADERS / name).is_file() for name in self.kernel_headers)


def _absolute(cflags: Sequence[str]) -> list[str]:
    """The flags with directories as seen from here: BCC runs clang in another one."""
    found: list[str] = []
    option = ""
    for flag in cflags:
        if option:
            found.append(option + os.path.abspath(flag))
            option = ""
        elif flag in _INCLUDE_OPTIONS:
            option = flag
        elif flag.startswith(_INCLUDE_OPTIONS):
            start = next(each for each in _INCLUDE_OPTIONS if flag.startswith(each))
            found.append(start + os.path.abspath(flag[len(start) :]))
        else:
            found.append(flag)
    return found


def _include_directories(flags: Sequence[str]) -> list[Path]:
    return [
        Path(flag[len(option) :])
        for flag in flags
        for option in _INCLUDE_OPTIONS
        if flag.startswith(option)
    ]
