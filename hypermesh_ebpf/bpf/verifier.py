"""The verifier's refusal as an error: the telling end of its log, and what to do about it."""

from __future__ import annotations

import re

from hypermesh_ebpf.errors import VerifierError

_TELLING_LINES = 5
# What the kernel says (kernel/bpf/verifier.c), and what a programmer does about it.
_REMEDIES = (
    (r"R0 !read_ok", "set r0 before exit (`r0 = 0` is the bytes b7 00 00 00 00 00 00 00)"),
    (r"R\d+ !read_ok", "set that register before it is read, or declare less arguments"),
    (
        r"invalid mem access '\w*_or_null'|map_value_or_null",
        "compare the pointer with NULL before using it: the look-up may have found nothing",
    ),
    (
        r"invalid access to packet",
        "compare with data_end before reading: if (data + size > data_end) return ...;",
    ),
    (
        r"invalid (indirect )?(read from|access to) stack|invalid indirect access to stack",
        "zero the structure on the stack, its padding too, before it is read or handed on",
    ),
    (
        r"back-edge from insn|infinite loop detected",
        "give the loop a constant bound, or unroll it (#pragma unroll)",
    ),
    (
        r"BPF program is too large|too complex|sequence of \d+ jumps",
        "split the program: fewer branches and loops, or tail calls",
    ),
    (
        r"GPL.restricted|from non-GPL compatible program",
        'declare the licence: char LICENSE[] SEC("license") = "GPL";',
    ),
    (
        r"unknown func|program of this type cannot use helper|helper access .* not allowed",
        "use a helper that this kernel has for this type of program: see `man 7 bpf-helpers`",
    ),
    (
        r"combined stack size|invalid stack type|stack depth",
        "keep large structures in a per-CPU array map: the stack has 512 bytes",
    ),
    (
        r"unreachable insn|last insn is not an exit or jmp",
        "remove what is never reached, and end the program by exit",
    ),
    (
        r"unbounded memory access|R\d+ (unbounded|min value is negative)",
        "bound the value before it is used as a length or an index: if (n > MAX) return 0;",
    ),
)


def explain_refusal(name: str, number: int | None, said: str) -> VerifierError:
    """The error for program ``name``: ``number`` is the errno, ``said`` the verifier's log.

    The last lines before its statistics are the cause.  Newer kernels (seen on 7.3) explain it once
    more behind them, and end with a suggestion.
    """
    lines = said.splitlines()
    explained = [n for n, line in enumerate(lines) if line.startswith("Verification failed: ")]
    telling = [
        line
        for line in (lines[: explained[-1]] if explained else lines)
        if line and not re.match(r"(processed|verification time|stack depth) ", line)
    ]
    shown = telling[-_TELLING_LINES:]
    cause = "\n  ".join(shown)
    if len(lines) > len(shown):
        omitted = len(lines) - len(shown)
        cause += f"\n  ({omitted} lines of the verifier's log omitted; see them with -v)"
    return VerifierError(
        f"load program {name}: refused by the kernel's verifier",
        cause,
        _find_remedy(telling[-1] if telling else "", said if explained else ""),
        errno=number,
        details=said,
    )


def _find_remedy(last: str, explained: str) -> str:
    """The kernel's own suggestion, or ours for what it said last."""
    suggestion = re.search(r"^Suggestion:\n((?:  .*\n?)+)", explained, re.M)
    if suggestion:
        return " ".join(suggestion[1].split())
    for pattern, remedy in _REMEDIES:
        if re.search(pattern, last):
            return remedy
    return "correct the program at the instruction named last"
