"""The names of a program's functions, as the kernel wants them: BTF and function records.

With them ``bpftool prog dump``, perf and kallsyms show each function under its name, and the
verifier allows in functions what it otherwise allows in a program's main part only: tail calls,
LD_ABS and callbacks (check_abnormal_return() and check_ld_imm() in kernel/bpf/verifier.c).
Format: Documentation/bpf/btf.rst.  Function records are known since Linux 5.0.
"""

from __future__ import annotations

import ctypes as ct
import re
import struct
from collections.abc import Sequence

from hypermesh_ebpf.bpf.libbpf import check, libbpf

_MAGIC, _HEADER = 0xEB9F, struct.Struct("=HBBIIIII")
_INT, _FUNC, _FUNC_PROTO = 1, 12, 13  # BTF_KIND_*
_SIGNED_32_BITS = 1 << 24 | 32
_STATIC = 0  # BTF_FUNC_STATIC: verified where it is called, with what it is called with
_INT_ID, _PROTO_ID, _FIRST_ID = 1, 2, 3


def load_function_info(functions: Sequence[tuple[int, str]]) -> tuple[int, bytes]:
    """Load BTF for (number of the first instruction, name) of each function, in order.

    Gives its descriptor, which the caller closes, and the records for bpf(BPF_PROG_LOAD): eight
    bytes each, instruction and type.  Raises OSError.
    """
    raw = encode_btf([name for _start, name in functions])
    records = b"".join(
        struct.pack("=II", start, _FIRST_ID + number) for number, (start, _) in enumerate(functions)
    )
    return check(libbpf().bpf_btf_load(ct.c_char_p(raw), len(raw), None)), records


def encode_btf(names: Sequence[str]) -> bytes:
    """BTF with ``int name(void)`` for every name; the first has type id 3."""
    strings = bytearray(b"\0")

    def keep(text: str) -> int:
        strings.extend(text.encode() + b"\0")
        return len(strings) - len(text.encode()) - 1

    types = struct.pack("=IIII", keep("int"), _INT << 24, 4, _SIGNED_32_BITS)
    # The arguments are left out: for static functions the verifier looks at the calls themselves.
    types += struct.pack("=III", 0, _FUNC_PROTO << 24, _INT_ID)
    for name in names:
        types += struct.pack("=III", keep(identifier(name)), _FUNC << 24 | _STATIC, _PROTO_ID)
    header = _HEADER.pack(_MAGIC, 1, 0, _HEADER.size, 0, len(types), len(types), len(strings))
    return header + types + bytes(strings)


def identifier(name: str) -> str:
    """The name as C and the kernel allow it, and no longer than symbols are (KSYM_NAME_LEN)."""
    plain = re.sub(r"[^A-Za-z0-9_]", "_", name)[:100]
    return plain if re.match(r"[A-Za-z_]", plain) else f"_{plain}"
