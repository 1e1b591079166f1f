"""C of the user's own, written for BCC, into an Image: headers, conventions, types of records.

What BCC's compiler makes of a text is :mod:`hypermesh_ebpf.image.bcc`'s; here is what its Python
half does around it, and what it needs in the way of kernel headers.  In the worker process only.
"""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from hypermesh_ebpf.attach_type import EbpfAttachType
from hypermesh_ebpf.bpf.spec import PERF_COUNTERS, MapSpec, ProgramSpec
from hypermesh_ebpf.errors import CompileError, HmebpfError, MissingBtf
from hypermesh_ebpf.host.kernel_btf import btf_path
from hypermesh_ebpf.image import conventions
from hypermesh_ebpf.image.bcc import (
    LD_IMM64,
    RECORDS,
    compile_c,
    compiler_flags,
    instructions,
)
from hypermesh_ebpf.image.conventions import MapHint
from hypermesh_ebpf.image.image import Image
from hypermesh_ebpf.image.kernel_types import KernelTypes
from hypermesh_ebpf.image.user_text import LIGHT_HEADERS, UserSource

Report = Callable[[str], None]

_CALL, _PSEUDO_CALL = 0x85, 1
# What a program may take for granted where BCC's own way would bring the kernel's headers along:
# scalar types that the formats of tracepoints name, and the length of a task's name.
_PRELUDE = """
typedef unsigned short umode_t; typedef unsigned int dev_t; typedef unsigned int gfp_t;
typedef unsigned long ino_t; typedef long off_t; typedef long long loff_t;
typedef unsigned long long sector_t; typedef unsigned int uid_t; typedef unsigned int gid_t;
typedef long long ktime_t; typedef unsigned int fmode_t; typedef unsigned short sa_family_t;
typedef int key_t; typedef int clockid_t; typedef int timer_t; typedef unsigned long aio_context_t;
typedef unsigned long kernel_ulong_t; typedef unsigned long long dma_addr_t;
typedef unsigned char uint8_t; typedef unsigned short uint16_t; typedef unsigned int uint32_t;
typedef unsigned long long uint64_t; typedef signed char int8_t; typedef short int16_t;
typedef int int32_t; typedef long long int64_t;
#define TASK_COMM_LEN 16
"""
# BCC would pin while it compiles; the one who loads the image pins.
_NO_PINS = """
#undef BPF_TABLE_PINNED7
#undef BPF_TABLE_PINNED6
#undef BPF_QUEUESTACK_PINNED
#undef _BPF_XSKMAP
#define BPF_TABLE_PINNED7(kind, key, leaf, name, entries, pinned, flags) \\
  BPF_F_TABLE(kind, key, leaf, name, entries, flags)
#define BPF_TABLE_PINNED6(kind, key, leaf, name, entries, pinned) \\
  BPF_F_TABLE(kind, key, leaf, name, entries, 0)
#define BPF_QUEUESTACK_PINNED(kind, name, leaf, entries, flags, pinned) \\
  BPF_QUEUESTACK(kind, name, leaf, entries, flags)
#define _BPF_XSKMAP(name, entries, pinned) \\
  BPF_XDP_REDIRECT_MAP("xskmap", int, name, entries)
"""
# Registers of the structures behind PT_REGS_PARM1() and its like, on every architecture.
_REGISTERS = "ax bx cx dx si di bp sp ip r8 r9 r10 r11 orig_ax regs pc pstate gpr gprs nip psw"
_TYPE_OF = "hmebpf_type_of_"
_TYPES_FILE = "hmebpf-record-types"
# What clang says of kernel types and macros that the light stand-ins lack.
_LACKING = re.compile(
    r"unknown type name|incomplete|undeclared identifier|no member named|redefinition"
    r"|implicit declaration|expected '\)'|type specifier missing"
)
# What clang says: what to do.
_REMEDIES = (
    (
        r"(?:undeclared identifier|unknown type name) '([A-Z][A-Z0-9_]{2,})'",
        r"where BCC's Python would put something in its place, define it: `--cflag '-D\1=...'`",
    ),
    (r"cannot call non-static helper function", "make the helper `static __always_inline`"),
    (
        r"bpf_table \w+ failed to open|reference to undefined table",
        "an image stands for itself: declare the map in this source, with its type",
    ),
)
# A probe whose arguments are on its line: nothing may stand between those of a macro.
_PROBE_LINE = re.compile(r"\s*TRACEPOINT_PROBE\s*\([^()\n]*\)[^\n\\]*\n")
_PYTHON = re.compile(r"^\s*(from bcc import|import bcc\b|#!.*python)", re.M)


def compile_user(
    name: str,
    text: str,
    cflags: Sequence[str] = (),
    directory: Path | None = None,
    report: Report = lambda text: None,
    attach: Mapping[str, EbpfAttachType] = {},
) -> Image:
    """Compile C of the user's own, written for BCC, into an Image.

    ``name`` is what messages call it, ``directory`` where its ``#include "..."`` are looked for,
    by default that of ``name``, which may be a path; ``cflags`` are further arguments for clang.
    The programs' kinds and attach points follow BCC's naming conventions, see
    :mod:`hypermesh_ebpf.image.conventions`.

    A text that includes kernel headers is compiled with all of the kernel's types
    (:mod:`hypermesh_ebpf.image.headers`).  Others get the types that they name, in a third of the
    time, and all of them only if clang misses something.  ``report`` is told before these are made,
    which takes seconds, once for each kernel.

    ``attach`` tells, by function, where programs will be attached, as far as it is known: BCC needs
    to know the static probes (USDT) whose arguments a text reads.

    Raises CompileError, MissingBtf, Unsupported for a kind of program that cannot be attached.
    """
    if _PYTHON.search(text):
        raise CompileError(
            f"compile {name}",
            "this is Python, not C",
            "take the C out of it, the string given to BPF(text=...), and put it into a file",
        )
    source = UserSource.read(name, text, cflags, directory, attach)
    if conventions.tracepoints(source.code):
        from hypermesh_ebpf.host.filesystems import enter_private_mounts

        enter_private_mounts()  # libbcc reads the formats from there
    hints = conventions.map_hints(source.code)
    image = _compile_either_way(source, report)
    code = conventions.strip_comments(text)
    modules = _module_names()
    for program in image.programs:
        _refuse_relocations(name, program, code)
    return replace(
        image,
        maps=tuple(_with_hints(spec, hints.get(spec.name, MapHint())) for spec in image.maps),
        programs=tuple(
            replace(program, kind=kind, attach=attach)
            for program in image.programs
            for kind, attach in [conventions.attach_point(program.name, code, modules)]
        ),
    )


def _compile_either_way(source: UserSource, report: Report) -> Image:
    try:
        return _compile_light_or_full(source, report)
    except CompileError as error:
        for pattern, remedy in _REMEDIES:
            found = re.search(pattern, error.cause or "")
            if found:
                error.remedy = found.expand(remedy)
                break
        raise


def _compile_light_or_full(source: UserSource, report: Report) -> Image:
    if source.needs_kernel_headers:
        return _compile_with_records(source, _kernel_tree(report))
    try:
        return _compile_with_records(source, None)
    except CompileError as error:
        if not _LACKING.search(error.details or error.cause or ""):
            raise
        try:
            return _compile_with_records(source, _kernel_tree(report))
        except HmebpfError:
            raise error from None  # of the two, the one about the user's own text


def _compile_with_records(source: UserSource, tree: Path | None) -> Image:
    """Compile with one table more for each ring, in which BCC describes its records' type.

    ``tree`` are all of the kernel's headers, None for the light stand-ins.
    """
    types = conventions.record_types(source.code)
    ending = f'\n#line 1 "{_TYPES_FILE}"\n' + "".join(
        f'BPF_TABLE("hash", u32, {type_}, {_TYPE_OF}{ring}, 1);\n' for ring, type_ in types.items()
    )
    try:
        image = _compile_unit(source, tree, ending if types else "")
    except CompileError as error:
        # Of a type that is not known outside of its function, or no type: do without.
        if not types or _TYPES_FILE not in (error.details or ""):
            raise
        image = _compile_unit(source, tree, "")
    described = {
        spec.name[len(_TYPE_OF) :]: spec.value_desc
        for spec in image.maps
        if spec.name.startswith(_TYPE_OF)
    }
    kept = [index for index, spec in enumerate(image.maps) if not spec.name.startswith(_TYPE_OF)]
    maps = [image.maps[index] for index in kept]
    programs = [
        replace(each, map_refs=tuple((at, kept.index(index)) for at, index in each.map_refs))
        for each in image.programs
    ]
    return replace(
        image,
        maps=tuple(
            replace(spec, key_desc=None, value_desc=described.get(spec.name, spec.value_desc))
            if spec.type in RECORDS
            else spec
            for spec in maps
        ),
        programs=tuple(programs),
    )


def _keep_lines(text: str, name: str) -> str:
    """The text with its line numbers restated behind each TRACEPOINT_PROBE: BCC puts the structure
    of the tracepoint's arguments, some dozen lines, in front of it."""
    lines = []
    for number, line in enumerate(text.splitlines(keepends=True), 1):
        lines.append(line)
        if _PROBE_LINE.match(line):
            lines.append(f'#line {number + 1} "{name}"\n')
    return "".join(lines)


def _compile_unit(source: UserSource, tree: Path | None, ending: str) -> Image:
    start = f'#line 1 "{source.name}"\n'
    text = _keep_lines(source.text, source.name)
    if tree is not None:
        flags = ["-Wno-unused-value", *source.flags]
        unit = _NO_PINS + source.readers + start + text + ending
        return compile_c(source.name, unit, flags, kernel_source=tree, by_btf=True)
    types = _PRELUDE + _declare_types(source)
    flags = [*compiler_flags(LIGHT_HEADERS, {}), *source.flags]
    unit = _NO_PINS + types + source.readers + start + text + ending
    return compile_c(source.name, unit, flags, by_btf=True)


def _declare_types(source: UserSource) -> str:
    """Those kernel structures that the text names, where this kernel's BTF knows them."""
    try:
        with KernelTypes(btf_path()) as kernel:
            registers = f"struct pt_regs; struct user_pt_regs; {_REGISTERS}"
            named = source.code + (registers if "pt_regs" in source.code else "")
            named += source.readers
            return kernel.declare(named, "".join(source.headers.values()), lenient=True)
    except MissingBtf:
        return ""  # what is missing, clang will say


def _kernel_tree(report: Report) -> Path:
    """All of the kernel's headers: made from its BTF, else those that the distribution installed.

    Raises MissingBtf.
    """
    from hypermesh_ebpf.image.headers import header_tree

    try:
        return header_tree(report=report)
    except MissingBtf:
        installed = Path("/lib/modules", platform.release(), "build")
        if installed.is_dir():
            return installed
        raise


def _module_names() -> frozenset[str]:
    """The kernel modules that have BTF of their own."""
    try:
        return frozenset(os.listdir("/sys/kernel/btf"))
    except OSError:
        return frozenset()


def _with_hints(spec: MapSpec, hint: MapHint) -> MapSpec:
    if hint.counters:
        spec = replace(spec, value_desc=PERF_COUNTERS)
    return replace(spec, histogram=hint.histogram, inner=hint.inner, pinned=hint.pinned)


def _refuse_relocations(name: str, program: ProgramSpec, code: str) -> None:
    """BCC leaves what it cannot relocate as it is, and the verifier's words for it help nobody.

    clang never loads a constant of 32 bits by an instruction for 64: that is the address of a
    global variable.  A call of -1 is one of a function in another section.
    """
    for _at, opcode, registers, immediate, high in instructions(program.instructions):
        if opcode == LD_IMM64 and not registers >> 4 and not high and immediate >= 0:
            raise CompileError(
                f"compile {name}: {program.name}",
                "it uses a global variable, which BCC cannot give it",
                "keep the value in a BPF_ARRAY, or write the program for libbpf (SEC(...))",
            )
        if opcode == _CALL and registers >> 4 == _PSEUDO_CALL and immediate == -1:
            if "bpf_usdt_readarg" in code:
                raise CompileError(
                    f"compile {name}: {program.name}",
                    "it reads a static probe's arguments (bpf_usdt_readarg), and where they are "
                    "depends on the probe",
                    f"name it: --attach {program.name}=usdt:FILE:PROVIDER:NAME",
                )
            raise CompileError(
                f"compile {name}: {program.name}",
                "it calls a function that is not inlined, which BCC cannot link",
                "make the function `static __always_inline`, or write the program for libbpf",
            )
