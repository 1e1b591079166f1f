"""What a C text for BCC says about itself: where its functions run, and what its maps are for.

BCC attaches by the name of a function (``kprobe__do_unlinkat``, TRACEPOINT_PROBE and the like,
``BPF._trace_autoload`` of its Python package), and keeps to itself what only its Python half needs:
which maps are histograms, which map is the pattern of a map of maps, where a map is to be pinned,
of which type a ring's records are.  These are read here from the text.  Pure functions; comments
are no part of the text for them.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from hypermesh_ebpf.errors import CompileError, Unsupported

# BPF._syscall_prefixes of bcc/__init__.py: what a system call's function is called elsewhere, too.
_SYSCALL_PREFIXES = (
    "sys_",
    "__x64_sys_",
    "__x32_compat_sys_",
    "__ia32_compat_sys_",
    "__arm64_sys_",
    "__s390x_sys_",
    "__s390_sys_",
)
_PREFIXES = {
    "kprobe__": "kprobe",
    "kretprobe__": "kretprobe",
    "tracepoint__": "tracepoint",
    "raw_tracepoint__": "raw_tracepoint",
    "kfunc__": "fentry",
    "kretfunc__": "fexit",
    "lsm__": "lsm",
}
_NOT_OURS = {
    "kmod_ret__": "a program that changes what a kernel function returns (KMOD_RET)",
    "bpf_iter__": "an iterator (BPF_ITER)",
}
# The first argument's structure, where it leaves one kind of hook only.
_CONTEXTS = {
    "xdp_md": "xdp",
    "__sk_buff": "tc",
    "bpf_perf_event_data": "perf_event",
    "bpf_raw_tracepoint_args": "raw_tracepoint",
    "bpf_sock": "cgroup",
}
_TRACEPOINT_STRUCT = re.compile(r"tracepoint__([a-zA-Z0-9]\w*?)__(\w+)")

_COMMENT = re.compile(
    r"""/\*.*?\*/|//(?:\\\n|[^\n])*|("(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*')""", re.S
)
_STRING = re.compile(r'"((?:[^"\\\n]|\\.)*)"')
# Which argument is the map's name, and which the path of its pin.
_PINNED = {"BPF_TABLE_PINNED": (3, 5), "BPF_QUEUESTACK_PINNED": (1, 5), "BPF_XSKMAP": (0, 2)}
_HISTOGRAM = re.compile(r"\bBPF_HISTOGRAM\s*\(\s*(\w+)")
_LOG2 = re.compile(r"\b\w*log2l?\s*\(")
_PERF_ARRAY = re.compile(r"\bBPF_PERF_ARRAY\s*\(\s*(\w+)")
_TRACEPOINT_PROBE = re.compile(r"\bTRACEPOINT_PROBE\s*\(\s*(\w+)\s*,\s*(\w+)\s*\)")
_INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*([<"])([^>"\n]+)[>"]', re.M)


def strip_comments(text: str) -> str:
    """The text without its comments; strings and the number of lines stay."""
    return _COMMENT.sub(lambda m: m[1] or " " + "\n" * m[0].count("\n"), text)


def includes(code: str) -> list[tuple[str, bool]]:
    """(name, whether in angle brackets) of each #include, in order."""
    return [(name, bracket == "<") for bracket, name in _INCLUDE.findall(code)]


def tracepoints(code: str) -> list[tuple[str, str]]:
    """(category, name) of each tracepoint whose arguments the text wants from tracefs."""
    found = _TRACEPOINT_PROBE.findall(code)
    found += _TRACEPOINT_STRUCT.findall(" ".join(re.findall(r"\bstruct\s+(\w+)", code)))
    return list(dict.fromkeys(found))


def attach_point(function: str, code: str, modules: Collection[str] = ()) -> tuple[
    str | None, str | None
]:  # fmt: skip
    """(kind of hook, attach point as text) of a function, each None where only the user can tell.

    ``code`` is the text without comments, ``modules`` are the kernel modules by whose name newer
    versions of BCC let a function be qualified (``kfunc__MODULE__FUNCTION``).  A system call's
    function, under whatever prefix, becomes "syscall:NAME": it differs between architectures.

    Raises Unsupported for what hmebpf does not attach.
    """
    for prefix, words in _NOT_OURS.items():
        if function.startswith(prefix):
            raise Unsupported(
                f"load {function}",
                f"it is {words}, which hmebpf does not attach",
                "observe the function's return with KRETFUNC_PROBE, or use BCC's own Python",
            )
    for prefix, kind in _PREFIXES.items():
        if function.startswith(prefix):
            return kind, f"{kind}:{_target(kind, function[len(prefix) :], modules)}"
    context = _context(function, code)
    tracepoint = _TRACEPOINT_STRUCT.fullmatch(context)
    if tracepoint:
        return "tracepoint", f"tracepoint:{tracepoint[1]}:{tracepoint[2]}"
    return _CONTEXTS.get(context), None


def _target(kind: str, name: str, modules: Collection[str]) -> str:
    if kind in ("kprobe", "kretprobe"):
        for prefix in _SYSCALL_PREFIXES:
            if name.startswith(prefix):
                return f"syscall:{name[len(prefix) :]}"
    if kind == "tracepoint":
        category, _, event = name.partition("__")
        return f"{category}:{event}"
    if kind in ("fentry", "fexit"):
        module, _, function = name.partition("__")
        if function and module == "vmlinux":
            return function
        if function and module in modules:
            raise Unsupported(
                f"attach {kind} to {function} of module {module}",
                "hmebpf finds the functions of the kernel itself alone by BTF",
                f"use a kprobe: kprobe__{function}",
            )
    return name


def _context(function: str, code: str) -> str:
    """The structure that the function's first argument points to; "" if it is none."""
    found = re.search(
        rf"\b{re.escape(function)}\s*\(\s*(?:const\s+)?struct\s+(\w+)\s*\*[^;{{]*\)\s*\{{", code
    )
    return found[1] if found else ""


@dataclass(frozen=True, slots=True)
class MapHint:
    """What the text says of one map beyond what libbcc tells; see MapSpec.

    ``counters``: a perf event array of counters, to which the program does not send events.
    """

    histogram: bool = False
    inner: str = ""
    pinned: str = ""
    counters: bool = False


def map_hints(code: str) -> dict[str, MapHint]:
    """The hints by map name.  Raises CompileError for a pin whose path is no plain string."""
    # Of a histogram that is linear, the text never takes a logarithm.
    log2 = bool(_LOG2.search(code))
    hints = {name: MapHint(histogram=log2) for name in _HISTOGRAM.findall(code)}
    hints |= {name: MapHint(counters=True) for name in _PERF_ARRAY.findall(code)}
    for macro, arguments in _calls(code, r"BPF_(?:F_)?TABLE|BPF_(?:ARRAY|HASH)_OF_MAPS"):
        if "TABLE" in macro and len(arguments) >= 4:
            kind, _, rest = _plain(arguments[0]).partition("$")
            if kind == "histogram":
                hints[arguments[3]] = MapHint(histogram=log2)
            elif rest:
                hints[arguments[3]] = MapHint(inner=rest)
        elif "OF_MAPS" in macro:
            quoted = [_plain(each) for each in arguments[1:] if _STRING.fullmatch(each)]
            hints[arguments[0]] = MapHint(inner=quoted[0] if quoted else "")
    for macro, arguments in _calls(code, "|".join(_PINNED)):
        name, path = _PINNED[macro]
        if len(arguments) <= path:
            continue
        if not _plain(arguments[path]) or _STRING.sub("", arguments[path]).strip():
            raise CompileError(
                f"pin map {arguments[name]}",
                f"its path, {arguments[path]}, is no string in double quotes",
                'write the path out: "/sys/fs/bpf/NAME"',
            )
        hints[arguments[name]] = MapHint(pinned=_plain(arguments[path]))
    return hints


def _plain(text: str) -> str:
    return "".join(_STRING.findall(text))


def _calls(code: str, names: str) -> Iterator[tuple[str, list[str]]]:
    """(name, arguments) of each use of the macros called so, but not of their definitions."""
    for match in re.finditer(rf"(?<!define )\b({names})\s*\(", code):
        yield match[1], _arguments(code, match.end())


def _arguments(code: str, start: int) -> list[str]:
    """The arguments of a call, from behind its opening bracket to the closing one."""
    found, depth, begin = [], 0, start
    for match in re.compile(r'"(?:\\.|[^"\\\n])*"|[(){}\[\],]').finditer(code, start):
        each = match[0]
        if each in ("(", "{", "["):
            depth += 1
        elif each in (")", "}", "]"):
            depth -= 1
        if depth < 0 or (each == "," and not depth):
            found.append(" ".join(code[begin : match.start()].split()))
            begin = match.end()
        if depth < 0:
            break
    return found


# map.METHOD(...): which argument is the record, and which its size.
_SUBMITS = {
    "perf_submit": (1, 2),
    "perf_submit_skb": (2, 3),
    "ringbuf_output": (0, 1),
    "ringbuf_submit": (0, None),
}
_TYPE = r"(?:struct\s+\w+|union\s+\w+|(?:unsigned\s+|signed\s+)?(?:long\s+long|long\s+int|\w+))"
_NO_TYPES = frozenset(["return", "else", "sizeof", "goto", "case", "typeof"])


def record_types(code: str) -> dict[str, str]:
    """The C type of the records of each ring or perf buffer, as far as the text shows it.

    A record's type is that of the sizeof, or that of the variable that is handed over.
    """
    found: dict[str, str] = {}
    methods = "|".join(_SUBMITS)
    for match in re.finditer(rf"\b(\w+)\s*(?:\.|->)\s*({methods})\s*\(", code):
        name, method = match[1], match[2]
        record, size = _SUBMITS[method]
        arguments = _arguments(code, match.end())
        candidates = [arguments[i] for i in (size, record) if i is not None and i < len(arguments)]
        for text in candidates:
            type_ = _type_of(text, code[: match.start()])
            if type_ is not None:
                found.setdefault(name, type_)
                break
    return found


def _type_of(text: str, before: str) -> str | None:
    """The type that ``sizeof(...)`` or an expression names, by the last declaration before it."""
    sizeof = re.fullmatch(r"sizeof\s*\(?\s*(.+?)\s*\)?", text)
    text = (sizeof[1] if sizeof else text).strip()
    text = re.sub(r"^\(\s*void\s*\*\s*\)", "", text).strip()
    if re.fullmatch(r"(struct|union)\s+\w+", text):
        return text
    variable = re.fullmatch(r"[&*]?\s*\(?\s*(\w+)\s*\)?", text)
    if variable is None:
        return None
    declared = re.findall(
        rf"(?:^|[;{{}}(,]|\bconst\b)\s*({_TYPE})\s*(?:\*\s*|\s)\**{variable[1]}\s*(?=[;=,)\[])",
        before,
    )
    declared = [" ".join(each.split()) for each in declared if each not in _NO_TYPES]
    if declared:
        return str(declared[-1])
    # sizeof(some_type_t), not of a variable
    return variable[1] if sizeof and re.search(rf"\b{variable[1]}\s*;", before) else None
