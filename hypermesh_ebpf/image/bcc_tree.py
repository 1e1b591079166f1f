"""A header tree for BCC made of the kernel's types: what ``BCC_KERNEL_SOURCE`` can point to.

BCC force-includes ``include/linux/kconfig.h`` of that tree, then its own copy of bpf.h and its
helpers.  Here kconfig.h is everything - the kernel's configuration, bpf.h, all types of the BTF,
and the macros that no BTF can carry - and every other header of the kernel is an empty file, so
that any ``#include`` is satisfied.

bpf.h has some six hundred of the kernel's names, and which ones depends on BCC's version.  So the
installed BCC is asked: a text that tries to define each name once more, one on a line, is compiled,
and clang names the lines that clash.
"""

from __future__ import annotations

import json
import mmap
import os
import re
import subprocess
import sys
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from hypermesh_ebpf.errors import CompileError
from hypermesh_ebpf.image.kernel_config import configuration

_HERE = Path(__file__).parent
SOURCES = _HERE / "include_kernel"
_BCCS_BPF_H = "/virtual/include/bcc/bpf.h"
_CENSUS, _TYPES, _PRIVATE, _MACROS = "census.h", "vmlinux.h", "private.h", "macros.h"
_ROUNDS = 8
_SECONDS = 600  # clang in an emulated machine
_EMPTY = "int nothing(void *ctx) { return 0; }\n"
_EVERYTHING = f"#include <hmebpf/{_PRIVATE}>\n{_EMPTY}"
_QUIET = "#pragma once\n#pragma clang system_header\n"  # no warnings about the kernel's own code
_LENIENT = ["-w", "-ferror-limit=0", "-fno-caret-diagnostics"]

_BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from hypermesh_ebpf.image.bcc_tree import answer; answer(json.loads(sys.argv[2]))"
)
_WORD = re.compile(r"[A-Za-z_]\w*")
_HEAD = re.compile(r"(?:typedef )?(struct|union|enum)(?: (\w+))? \{\n")
_ENUMERATOR = re.compile(r"^\t(\w+) = [^\n]*\n", re.M)
_TYPEDEF = re.compile(r"typedef .*?(?:\(\*+(\w+)\)\(.*|\b(\w+)(?:\[\d*\])*);$")
_DEFINE = re.compile(r"#define (\w+)")


@dataclass(frozen=True, slots=True)
class Declaration:
    """One of btf_dump's: its text, the tag of a struct, union or enum, or the typedef's name."""

    text: str
    kind: str
    tag: str
    typedef: str
    enumerators: tuple[str, ...]


def split(types: str) -> list[Declaration]:
    """btf_dump's text as declarations, forward ones included."""
    found: list[Declaration] = []
    lines: list[str] = []
    depth = 0
    for line in types.splitlines(keepends=True):
        if not lines and not line.strip():
            continue
        lines.append(line)
        depth += line.count("{") - line.count("}")
        if depth == 0 and line.endswith(";\n"):
            found.append(_declaration("".join(lines)))
            lines = []
    return found


def _declaration(text: str) -> Declaration:
    head = _HEAD.match(text)
    kind, tag = (head[1], head[2] or "") if head else ("", "")
    last = "typedef " + text.rstrip().rpartition("\n")[2].removeprefix("typedef ")
    name = _TYPEDEF.match(last) if text.startswith("typedef ") else None
    enumerators = tuple(_ENUMERATOR.findall(text)) if kind == "enum" else ()
    return Declaration(text, kind, tag, (name[1] or name[2]) if name else "", enumerators)


def by_tag(declarations: Iterable[Declaration]) -> dict[str, str]:
    """The text of each structure, union and enumeration that has a tag."""
    return {each.tag: each.text for each in declarations if each.tag}


@dataclass(frozen=True, slots=True)
class Taken:
    """The names that BCC's bpf.h has: tags of types, ordinary ones, macros."""

    tags: frozenset[str]
    ordinary: frozenset[str]
    macros: frozenset[str]


def make_tree(root: Path, types: str, release: str, version: tuple[int, int, int]) -> None:
    """Make the tree for a kernel in an empty directory.

    ``types`` is btf_dump's text, ``release`` what uname says, for its configuration, ``version``
    what LINUX_VERSION_CODE shall be.  Raises CompileError where the result does not compile, and
    MissingDependency.
    """
    include = root / "include"
    _make_stand_ins(include)
    declarations = split(types)
    prelude = (SOURCES / "prelude.h").read_text()
    head = prelude + _version(version) + configuration(release, by_tag(declarations))
    taken = _take_census(root, head, declarations)
    (include / "hmebpf" / _MACROS).write_text(macros(declarations))
    files = dict(zip((_TYPES, _PRIVATE), private_apart(declarations), strict=True))
    left = {
        file: [text for text in (without(each, taken) for each in part) if text]
        for file, part in files.items()
    }
    # A type that a function's parameters name first would be that function's own.
    unions = [each for each in files[_PRIVATE] if each.kind in ("struct", "union") and each.tag]
    left[_TYPES] = [f"{each.kind} {each.tag};\n" for each in unions] + left[_TYPES]
    _write_kconfig(include, f'{head}#include "{_BCCS_BPF_H}"\n', _TYPES, _MACROS)
    said = ""
    for _round in range(_ROUNDS):
        for file, kept in left.items():
            (include / "hmebpf" / file).write_text(_types(kept, taken))
        said = compile_with(root, _EVERYTHING, _LENIENT)
        wrong = {file: _wrong_lines(said, file) for file in left}
        if not any(wrong.values()):
            break
        left = {file: _drop(kept, taken, wrong[file]) for file, kept in left.items()}
    if said:
        raise CompileError(
            "compile the header tree made of the kernel's types",
            next((line for line in said.splitlines() if "error: " in line), said.strip()[:500]),
            "BCC and this kernel do not agree; please report it with what -v shows",
            details=said,
        )


def _write_kconfig(include: Path, head: str, *files: str) -> None:
    text = "".join(f'#include "../hmebpf/{file}"\n' for file in files)
    (include / "linux/kconfig.h").write_text(head + text)


def _make_stand_ins(include: Path) -> None:
    """Every header that Linux 5.10 to 7.3 has on x86-64 and arm64, as an empty file."""
    (include / "hmebpf").mkdir(parents=True)
    (include / "uapi").symlink_to(".")  # uapi/linux/tcp.h is linux/tcp.h here
    for line in _lines("header_names.txt"):
        folder, _, names = line.partition(": ")
        path = include / folder.rstrip("!")
        path.mkdir(parents=True, exist_ok=True)
        brings_all = os.path.relpath(include / "hmebpf" / _PRIVATE, path)
        for name in names.split():
            if folder.endswith("!"):
                (path / f"{name}.h").symlink_to(brings_all)
            else:
                (path / f"{name}.h").touch()
    for name in ("bpf_common.h", "log2.h"):
        (include / "linux" / name).write_text((_HERE / "include/linux" / name).read_text())


def _lines(name: str) -> list[str]:
    """The lines of a list of ours, without its comment."""
    lines = (SOURCES / name).read_text().splitlines()
    return [line for line in lines if not line.startswith("#")]


def _version(version: tuple[int, int, int]) -> str:
    """The kernel's version, and what its processor and its page size decide."""
    major, minor, patch = version
    code = (major << 16) + (minor << 8) + min(patch, 255)
    size = mmap.PAGESIZE
    return (
        "#define KERNEL_VERSION(a, b, c) "
        "(((a) << 16) + ((b) << 8) + ((c) > 255 ? 255 : (c)))\n"
        f"#ifndef LINUX_VERSION_CODE\n#define LINUX_VERSION_CODE {code}\n#endif\n"
        f"#ifndef PAGE_SIZE\n#define PAGE_SIZE {size}\n#endif\n"
        f"#define PAGE_SHIFT {size.bit_length() - 1}\n"
    )


# -- what BCC has of its own


def _take_census(root: Path, head: str, declarations: list[Declaration]) -> Taken:
    """Ask the installed BCC which of the kernel's names its bpf.h defines, too."""
    tags = sorted({each.tag for each in declarations if each.tag})
    ordinary = sorted(
        {each.typedef for each in declarations if each.typedef}
        | {name for each in declarations for name in each.enumerators}
    )
    words = sorted(set(_WORD.findall("".join(each.text for each in declarations))))
    lines = []
    for word in words:
        lines += [f"#ifdef {word}", "#error", "#endif"]
    first_tag = len(lines)
    for tag in tags:  # a macro of that name would make another line of it
        lines.append(f"struct {tag} {{ int probed; }};")
    first_ordinary = len(lines)
    for name in ordinary:
        lines += [f"#ifndef {name}", f"typedef struct {{ int probed; }} {name};", "#endif"]
    include = root / "include"
    census = include / "hmebpf" / _CENSUS
    census.write_text("\n".join(lines) + "\n")
    _write_kconfig(include, f'{head}#include "{_BCCS_BPF_H}"\n', _CENSUS)
    said = compile_with(root, _EMPTY, _LENIENT)
    census.unlink()
    hit = {line - 1 for line in _wrong_lines(said, _CENSUS)}
    return Taken(
        frozenset(tags[line - first_tag] for line in hit if first_tag <= line < first_ordinary),
        frozenset(ordinary[(line - first_ordinary) // 3] for line in hit if line >= first_ordinary),
        frozenset(words[line // 3] for line in hit if line < first_tag),
    )


def _wrong_lines(said: str, file: str) -> set[int]:
    """The lines of a file that clang had an error in."""
    found = re.findall(rf"hmebpf/{re.escape(file)}:(\d+):\d+: (?:fatal )?error: ", said)
    return {int(line) for line in found}


def compile_with(root: Path, text: str, flags: list[str]) -> str:
    """What BCC's clang says of a text that finds its headers in ``root``; nothing if it is good.

    In a process of its own: libbcc brings 100 MB of LLVM, and can crash.
    """
    argv = [sys.executable, "-I", "-S", "-c", _BOOT, json.dumps(sys.path), json.dumps(flags)]
    try:
        done = subprocess.run(
            argv,
            input=text,
            env={**os.environ, "BCC_KERNEL_SOURCE": str(root)},
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return f"clang did not end within {_SECONDS} s"
    return "" if done.returncode == 0 else done.stderr or f"exit status {done.returncode}"


def answer(flags: list[str]) -> None:
    """The other end of :func:`compile_with`: the text is on standard input."""
    from hypermesh_ebpf.libbcc import compile_module

    made = compile_module(sys.stdin.buffer.read(), [flag.encode() for flag in flags])
    os._exit(0 if made else 1)


# -- the types and macros that are left

_BY_VALUE = re.compile(r"\b(?:struct|union) (\w+) (?=\w)")
_ENUM = re.compile(r"\benum (\w+)\b")


def private_apart(
    declarations: Collection[Declaration],
) -> tuple[list[Declaration], list[Declaration]]:
    """The types that headers define, with what they are made of; and the kernel's private ones.

    A program that needs a private type - ``struct nameidata`` is one of fs/namei.c's own - brings a
    definition of its own, because no header has it.  A second one would clash.
    """
    known = {name for line in _lines("type_names.txt") for name in line.split()}
    tags: set[str] = set()  # of what is part of a public type
    words: set[str] = set()
    private: list[Declaration] = []
    public: dict[Declaration, None] = {}
    left = [*declarations]
    while True:
        private = []
        for each in reversed(left):  # what a type is made of comes before it, most of the time
            first = each.enumerators[:1] if not (each.tag or each.typedef) else ()
            wanted = each.tag in tags or each.typedef in words
            if each.kind and not wanted and known.isdisjoint((each.tag, each.typedef, *first)):
                private.append(each)
                continue
            public[each] = None
            tags.update(_BY_VALUE.findall(each.text))
            tags.update(_ENUM.findall(each.text))
            words.update(_WORD.findall(each.text))
        if len(private) == len(left):
            break
        left = private[::-1]
    return [each for each in declarations if each in public], private[::-1]


def without(declaration: Declaration, taken: Taken) -> str:
    """A declaration without what BCC has; empty if nothing is left of it."""
    if declaration.kind in ("struct", "union") and declaration.tag in taken.tags:
        return ""
    if declaration.typedef in taken.ordinary:
        return ""
    if declaration.kind != "enum":
        return declaration.text
    names = {*declaration.enumerators} & (taken.ordinary | taken.macros)
    text = _ENUMERATOR.sub(lambda line: "" if line[1] in names else line[0], declaration.text)
    left = len(names) < len(declaration.enumerators)
    if declaration.tag in taken.tags:
        return text.replace(f"enum {declaration.tag} {{", "enum {", 1) if left else ""
    if not left:  # C knows no empty enumeration, but the kernel's structures name its type
        name = declaration.tag or declaration.typedef
        return text.replace("{\n", f"{{\n\thmebpf_{name} = 0,\n", 1) if name else ""
    return text


def _types(kept: Iterable[str], taken: Taken) -> str:
    """vmlinux.h: the declarations, with BCC's macros out of the way of members of that name."""
    hide = "".join(f'#pragma push_macro("{name}")\n#undef {name}\n' for name in taken.macros)
    show = "".join(f'#pragma pop_macro("{name}")\n' for name in taken.macros)
    return f"{_QUIET}{hide}{''.join(kept)}{show}"


def _drop(kept: Iterable[str], taken: Taken, wrong: Collection[int]) -> list[str]:
    """The declarations without those that have an error in one of their lines."""
    good, line = [], 1 + _QUIET.count("\n") + 2 * len(taken.macros)
    for text in kept:
        end = line + text.count("\n")
        if not any(line <= number < end for number in wrong):
            good.append(text)
        line = end
    return good


# Constants that are the size of an array in a structure.
_SIZED_BY = (
    ("DNAME_INLINE_LEN", "dentry", "d_iname"),
    ("DNAME_INLINE_LEN", "shortname_store", "string"),  # since 6.14
    ("DISK_NAME_LEN", "gendisk", "disk_name"),
)


def macros(declarations: Iterable[Declaration]) -> str:
    """Constants and functions; where the kernel has an enumerator, that is the constant."""
    declarations = [*declarations]
    known = {name for each in declarations for name in each.enumerators}
    flags = sorted(name for name in known if name.startswith("__REQ_"))
    derived = "".join(f"#define {name[2:]} (1ULL << {name})\n" for name in flags)
    texts = by_tag(declarations)
    for name, tag, member in _SIZED_BY:
        if size := re.search(rf"\b{member}\[(\d+)\];", texts.get(tag, "")):
            derived += f"#define {name} {size[1]}\n"
    constants = "".join(_unknown_only((SOURCES / "constants.h").read_text(), known))
    return constants + derived + (SOURCES / "functions.h").read_text()


def _unknown_only(text: str, known: Collection[str]) -> Iterator[str]:
    for line in text.splitlines(keepends=True):
        name = _DEFINE.match(line)
        if not (name and name[1] in known):
            yield line
