"""C written for libbpf, compiled to an ELF object by the clang that is installed.

Such a source includes vmlinux.h and bpf/bpf_helpers.h and names its hooks by sections; the object
is then :mod:`hypermesh_ebpf.image.elf`'s.  vmlinux.h is made from the running kernel's BTF, and the
bpf/*.h are our own (``include_bpf``); with -I the user puts others, libbpf's for instance, before
them.  clang is a program here, not a library: it runs in a process of its own.
"""

from __future__ import annotations

import ctypes as ct
import errno
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from hypermesh_ebpf.bpf.libbpf import ProgLoadOpts, libbpf
from hypermesh_ebpf.errors import CompileError, MissingDependency

HEADERS = Path(__file__).parent / "include_bpf"

_INSTALL = (
    "install clang: Debian/Ubuntu `apt install clang`, Fedora `dnf install clang`, "
    "Arch `pacman -S clang`, Alpine `apk add clang`; or name it with HMEBPF_CLANG=PATH"
)
_NEWEST, _OLDEST = 30, 10  # clang-N; BTF for programs came with clang 9, CO-RE with 10
_TARGETS = {"x86_64": "x86", "aarch64": "arm64", "riscv64": "riscv", "s390x": "s390"}
_TELLING_LINES = 6
_SECONDS = 300.0
_SOCKET_FILTER = 1
# w0 = 0; if w0 != 0 goto +0; exit: a 32-bit jump (BPF_JMP32, Linux 5.1)
_JMP32 = bytes.fromhex("b4000000000000005600000000000000b7000000000000009500000000000000")

_NO_CODE = re.compile(r"""/\*.*?\*/|//[^\n]*""", re.S)
_LIBBPF_STYLE = re.compile(
    r"""^\s*\#\s*include\s*[<"](?:bpf/bpf_\w+\.h|bpf_helpers\.h|(?:\.\.?/)*vmlinux\.h)[>"]"""
    r"""|\bSEC\s*\(\s*"|__attribute__\s*\(\(\s*section\s*\(""",
    re.M,
)
_ERROR = re.compile(r"(.*:\d+:\d+: )?(fatal )?error: ")
_NEXT = re.compile(r"\S+:\d+:\d+: |\d+ (?:error|warning)s? |In file included from ")
_MISSING_HEADER = re.compile(r"error: '(.+)' file not found")


def is_libbpf_style(text: str) -> bool:
    """Whether a C text is written for libbpf rather than for BCC.

    It is if it includes vmlinux.h or libbpf's headers, or puts functions into sections itself.
    """
    return bool(_LIBBPF_STYLE.search(_NO_CODE.sub(" ", text)))


def compile_object(path: Path, text: str, cflags: Sequence[str]) -> bytes:
    """The ELF object of a C text.

    ``path`` names it in messages, and includes are looked for beside it; ``cflags`` go to clang
    after our own.  Raises CompileError with clang's words, MissingDependency without clang,
    MissingBtf where vmlinux.h is wanted and this kernel has no BTF.
    """
    clang = find_clang()
    with tempfile.TemporaryDirectory(prefix="hmebpf-") as folder:
        output = Path(folder) / "program.o"
        command = [clang, *compiler_flags(path, text), *cflags, "-c", "-o", str(output), "-"]
        done = _run(command, _numbered(path, text), path.name)
        if done.returncode:
            raise _compile_error(path.name, done.stderr)
        return output.read_bytes()


def compiler_flags(path: Path, text: str) -> list[str]:
    """clang's arguments for a source of this name and text, all but the input and output."""
    machine = platform.machine()
    flags = [
        "-x",
        "c",
        "-target",
        "bpf",
        f"-mcpu={instruction_set()}",
        "-O2",
        "-g",
        "-fno-stack-protector",  # some distributions turn it on; programs have no stack guard
        "-Wall",
        "-Wno-unused-function",
        "-Wno-missing-declarations",
        f"-D__TARGET_ARCH_{_TARGETS.get(machine, machine)}",
        f"-I{path.absolute().parent}",
    ]
    if re.search(r"\bvmlinux\.h\b", text):
        from hypermesh_ebpf.image.headers import vmlinux_header

        flags.append(f"-isystem{vmlinux_header().parent}")
    # <asm/types.h> is in the architecture's own folder, which -target bpf does not know.
    multiarch = Path("/usr/include") / f"{machine}-linux-gnu"
    # -isystem: behind every -I, the user's too, and before a libbpf-dev that is installed.
    return [*flags, f"-isystem{HEADERS}", f"-idirafter{multiarch}"]


def find_clang() -> str:
    """The path of clang: HMEBPF_CLANG, clang, or the newest clang-N.  Raises MissingDependency."""
    named = os.environ.get("HMEBPF_CLANG")
    names = [named] if named else ["clang", *(f"clang-{n}" for n in range(_NEWEST, _OLDEST, -1))]
    for name in names:
        found = shutil.which(name)
        if found:
            return found
    raise MissingDependency(
        "compile C for libbpf",
        f"HMEBPF_CLANG={named} is no program" if named else "there is no clang on PATH",
        _INSTALL,
    )


@lru_cache(maxsize=1)
def instruction_set() -> str:
    """clang's -mcpu for this kernel: v3 where it takes 32-bit jumps (Linux 5.1), else v2.

    Where we may not load a program, v3: every kernel that is still maintained takes it.
    """
    options = ProgLoadOpts(sz=ct.sizeof(ProgLoadOpts))
    fd = libbpf().bpf_prog_load(
        _SOCKET_FILTER, b"", b"GPL", _JMP32, len(_JMP32) // 8, ct.byref(options)
    )
    if fd >= 0:
        os.close(fd)
    return "v2" if fd < 0 and ct.get_errno() == errno.EINVAL else "v3"


def _numbered(path: Path, text: str) -> str:
    """The text, said to be the file: messages and line information name it so."""
    name = str(path).replace("\\", "\\\\").replace('"', '\\"')
    return f'#line 1 "{name}"\n{text}'


def _run(command: Sequence[str], text: str, name: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command,
            input=text,
            capture_output=True,
            text=True,
            errors="surrogateescape",
            env={**os.environ, "LC_ALL": "C"},
            timeout=_SECONDS,
        )
    except subprocess.TimeoutExpired as error:
        raise CompileError(
            f"compile {name}",
            f"clang did not end within {_SECONDS:.0f} s",
            "simplify the source: an #include of itself, or macros without end?",
        ) from error
    except OSError as error:
        raise MissingDependency(f"run {command[0]}", error.strerror, _INSTALL) from error


def _compile_error(name: str, said: str) -> CompileError:
    """clang's output as one error: its first error line is the cause, the rest are details."""
    lines = said.strip().splitlines()
    first = next((i for i, line in enumerate(lines) if _ERROR.match(line)), None)
    if first is None:
        cause = lines[-1] if lines else "clang gave no reason"
        return CompileError(f"compile {name}", cause, "see all that was said with -v", details=said)
    telling = lines[first : first + _TELLING_LINES]
    end = next((i for i, line in enumerate(telling[1:], 1) if _NEXT.match(line)), None)
    telling = telling[:end]
    cause = "\n  ".join(telling)
    omitted = len(lines) - len(telling)
    if omitted > 0:
        cause += f"\n  ({omitted} more lines; see them with -v)"
    remedy = "correct the source at the line given"
    header = _MISSING_HEADER.search(telling[0])
    if header:
        remedy = f"say where {header[1]} is: --cflag -IFOLDER; kernel types are all in vmlinux.h"
    return CompileError(f"compile {name}", cause, remedy, details=said)
