"""libbpf's words about an object, heard and turned into one error each.

libbpf writes what it has to say, the verifier's log included, through one C callback; its return
values are errnos, and numbers of its own from 4000 on.
"""

from __future__ import annotations

import ctypes as ct
import errno
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from hypermesh_ebpf import log
from hypermesh_ebpf.attach_type import EbpfAttachType
from hypermesh_ebpf.bpf.libbpf import libbpf
from hypermesh_ebpf.bpf.verifier import explain_refusal
from hypermesh_ebpf.errors import (
    ForeignObject,
    HmebpfError,
    HookUnsupported,
    LoadError,
    MalformedObject,
    MissingBtf,
    PinError,
    Unsupported,
    describe_errno,
)
from hypermesh_ebpf.host.security import refusal

_PRINT = ct.CFUNCTYPE(ct.c_int, ct.c_int, ct.c_char_p, ct.c_void_p)
_WARNING, _DEBUG = 0, 2
_LIBBPF_ERRNO, _ENDIAN = 4000, 4003
_ENOTSUPP = 524
_TELLING_LINES = 4

_NEEDS = ("CAP_BPF", "CAP_PERFMON", "CAP_NET_ADMIN")
_VERIFIER_LOG = re.compile(
    r"prog '([^'\n]*)': -- BEGIN PROG LOAD LOG --\n(.*?)-- END PROG LOAD LOG --", re.S
)
# Lines that say only that something above them failed.
_EMPTY_WORDS = re.compile(
    r"failed to load object|prog '.*': failed to load: -?\d+|prog '.*': BPF program load failed"
    r"|failed to perform CO-RE relocations|prog '.*': -- BEGIN PROG LOAD LOG"
    r"|failed to init libelf|failed to relocate"
    # Types are for others to look at: libbpf goes on without, or says what else was wrong.
    r"|BTF loading error|-- BEGIN BTF LOAD LOG|Error loading \.BTF|.*Retrying without BTF"
)
_UNRELOCATED = re.compile(r"^.*failed to resolve CO-RE relocation.*$", re.M)
_UNKNOWN_HELPER = re.compile(r"^(?:\d+: .*\n)?.*(?:invalid|unknown) func .*#(\d+).*$", re.M)


@dataclass(frozen=True, slots=True)
class Line:
    """Something that libbpf said: its level (0 warning, 1 information), and the text."""

    level: int
    text: str


@contextmanager
def listen() -> Iterator[list[Line]]:
    """Collect libbpf's warnings and remarks; its debug output goes to our debug log."""
    libc, lines = ct.CDLL(None), list[Line]()
    libc.vasprintf.argtypes = [ct.c_void_p, ct.c_char_p, ct.c_void_p]
    libc.free.argtypes = [ct.c_void_p]
    debug = log.listens("debug")

    def hear(level: int, template: bytes, values: int) -> int:
        if level >= _DEBUG and not debug:
            return 0
        # A va_list is passed as a pointer, on x86-64 as on arm64: hand it on as it comes.
        text = ct.c_void_p()
        if libc.vasprintf(ct.byref(text), template, values) < 0 or not text.value:
            return 0
        said = ct.string_at(text.value).decode(errors="replace").removeprefix("libbpf: ")
        libc.free(text)
        if level >= _DEBUG:
            log.debug("libbpf: %s", said.rstrip())
        else:
            lines.append(Line(level, said.rstrip("\n")))
        return 0

    callback = _PRINT(hear)
    before = libbpf().libbpf_set_print(ct.cast(callback, ct.c_void_p))
    try:
        yield lines
    finally:
        libbpf().libbpf_set_print(before)


def open_error(name: str, number: int, said: list[Line]) -> HmebpfError:
    """Why libbpf could not make sense of an object."""
    cause, details = _telling(said, number), _all(said)
    if number == _ENDIAN:
        return ForeignObject(
            f"open {name}",
            cause,
            "compile it on this machine: `clang -target bpf -O2 -g -c FILE.c`",
            details=details,
        )
    remedy = "compile it again: `clang -target bpf -O2 -g -c FILE.c -o FILE.o`"
    if "legacy map definitions" in cause:
        remedy = 'declare the maps with types, in SEC(".maps"): see `__uint(type, ...)` in libbpf'
    elif "BTF is required" in cause:
        remedy = "compile it with -g: its maps are described by debug information (BTF)"
    elif "BTF for extern" in cause:
        remedy = "define it in the source: an object is loaded as it is, not linked with others"
    return MalformedObject(f"open {name}", cause, remedy, details=details)


def target_error(program: str, point: EbpfAttachType, number: int) -> HmebpfError:
    """A target of fentry, fexit or LSM was refused: the probe says it best."""
    return _unsupported_hook(point) or HookUnsupported(
        f"load program {program} for {point}",
        f"the kernel's type information has no such target: {_words(number)}",
        "check the name with `grep NAME /proc/kallsyms`",
        errno=number,
    )


def load_error(
    name: str, number: int, said: list[Line], points: Mapping[str, EbpfAttachType]
) -> HmebpfError:
    """Why an object could not be loaded; ``points`` are its programs' known attach points."""
    everything = _all(said)
    refused = _VERIFIER_LOG.search(everything)
    if refused and refused[2].strip():
        return _refused(name, refused[1], refused[2].strip(), number, everything)
    failed = re.search(r"prog '(.*?)': ", everything)
    program = failed[1] if failed else ""
    what = f"load program {program} of {name}" if program else f"load {name}"
    cause = _telling(said, number)
    for pattern, error, remedy in _KNOWN_CAUSES:
        if re.search(pattern, everything):
            return (error is MissingBtf and _missing_btf()) or error(
                what, cause, remedy, errno=_system_errno(number), details=everything
            )
    if program in points:
        hook = _unsupported_hook(points[program])
        if hook:
            return hook
    return _by_errno(what, cause, number, everything)


def _refused(
    program_set: str, program: str, text: str, number: int, everything: str
) -> HmebpfError:
    """What the verifier said, with a better remedy for what only an older kernel refuses."""
    error = explain_refusal(program, _system_errno(number), text)
    error.what = f"load program {program} of {program_set}: refused by the kernel's verifier"
    error.details = everything
    missing = _UNRELOCATED.search(text)
    helper = _UNKNOWN_HELPER.search(text)
    if missing:
        error.cause = f"this kernel lacks a type or member: {missing[0].strip()}"
        error.remedy = "ask first: if (bpf_core_field_exists(...)), and do without it if not"
    elif helper:
        error.cause = f"this kernel has no such helper: {helper[0].splitlines()[-1].strip()}"
        error.remedy = (
            f"do without helper {helper[1]} for this kind of program, or use a newer kernel"
        )
    return error


_KNOWN_CAUSES: list[tuple[str, type[HmebpfError], str]] = [
    (
        r"failed to (?:parse|get) target BTF|failed to find valid kernel BTF"
        r"|[Ee]rror loading vmlinux BTF|kernel BTF is missing",
        MissingBtf,
        "use a kernel built with CONFIG_DEBUG_INFO_BTF=y, or name a BTF file of this kernel with "
        "HMEBPF_BTF=FILE",
    ),
    (
        r"failed to find kernel BTF type ID of",
        HookUnsupported,
        "check the name of the function with `grep NAME /proc/kallsyms`",
    ),
    (
        r"extern .*not found|extern .*not resolved|failed to resolve extern",
        Unsupported,
        "this kernel lacks it; declare it __weak in the source and test for it",
    ),
    (
        r"failed to (?:auto-)?pin|failed to mkdir .*sys/fs/bpf|is not a BPF FS",
        PinError,
        "the path must be in a BPF file system: `sudo mount -t bpf bpf /sys/fs/bpf` where none is "
        "mounted",
    ),
    (
        r"couldn't reuse pinned map",
        PinError,
        "another map is pinned there: remove it with `rm`, or give this one another name",
    ),
    (r"missing BPF prog type", MalformedObject, 'name its section as libbpf does: SEC("xdp")'),
]


def _by_errno(what: str, cause: str, number: int, details: str) -> HmebpfError:
    code = _system_errno(number)
    if number in (errno.EPERM, errno.EACCES):
        error = refusal(what, OSError(number, ""), _NEEDS, "see `hmebpf check-system`")
        error.details = details
        return error
    if number in (errno.EINVAL, _ENOTSUPP, errno.EOPNOTSUPP):
        return Unsupported(
            what,
            cause,
            "this kernel does not know it, or the source asks for sizes that it refuses; "
            "see `hmebpf check-system` and -v",
            errno=code,
            details=details,
        )
    if number == errno.ENOMEM:
        remedy = "free memory, or raise `ulimit -l` on kernels before 5.11"
    elif number in (errno.EMFILE, errno.ENFILE):
        remedy = "allow more open files: `ulimit -n 4096`"
    elif number > _LIBBPF_ERRNO:
        return MalformedObject(what, cause, "compile it again", details=details)
    else:
        remedy = "see `hmebpf check-system`, and all that libbpf said with -v"
    return LoadError(what, cause, remedy, errno=code, details=details)


def _unsupported_hook(point: EbpfAttachType) -> HmebpfError | None:
    """What the probe of a hook says against it, if anything."""
    from hypermesh_ebpf.host.hooks import require_hook

    try:
        require_hook(point)
    except HmebpfError as error:
        return error
    return None


def _missing_btf() -> MissingBtf | None:
    """What is wrong with the kernel's type information, if that can be seen from here."""
    from hypermesh_ebpf.host.kernel_btf import require_btf

    try:
        require_btf()
    except MissingBtf as error:
        return error
    return None


def _telling(said: list[Line], number: int) -> str:
    """libbpf's warnings that carry the reason, else the number's meaning."""
    lines = [
        line.text.partition("\n")[0]
        for line in said
        if line.level == _WARNING and not _EMPTY_WORDS.match(line.text)
    ]
    shown = lines[:_TELLING_LINES]
    cause = "\n  ".join(shown) or _words(number)
    if len(lines) > len(shown):
        cause += f"\n  ({len(lines) - len(shown)} more lines; see them with -v)"
    return cause


def _all(said: list[Line]) -> str:
    return "\n".join(line.text for line in said)


def _system_errno(number: int) -> int | None:
    """libbpf's own numbers mean nothing to others."""
    return number if number < _LIBBPF_ERRNO else None


def _words(number: int) -> str:
    if number < _LIBBPF_ERRNO:
        return describe_errno(number)
    text = ct.create_string_buffer(256)
    libbpf().libbpf_strerror(number, text, len(text))
    return text.value.decode(errors="replace")
