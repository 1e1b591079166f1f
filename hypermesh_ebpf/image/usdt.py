"""Reading the arguments of static probes (USDT): the C that BCC makes for it of a file's notes.

``bpf_usdt_readarg(1, ctx, &x)`` in function f becomes a call of ``_bpf_readarg_f_1``, which looks
where the compiler of the traced program left its first argument: in a register, or in memory.
For the worker process alone.
"""

from __future__ import annotations

import ctypes as ct
import os
from collections.abc import Mapping

from hypermesh_ebpf.attach_type import EbpfAttachType
from hypermesh_ebpf.errors import CompileError
from hypermesh_ebpf.host.executables import find_file, find_static_probes
from hypermesh_ebpf.libbcc import capture_stderr, libbcc

_NAME_PROCESS = "name a process that runs the file: `,pid=PID` behind the probe"


def write_readers(points: Mapping[str, EbpfAttachType]) -> str:
    """C for the programs (by function) that are attached to static probes; "" if none is.

    Raises AttachError for a probe that the file has not, CompileError where BCC cannot tell its
    arguments.
    """
    text = ""
    for function, point in points.items():
        if point.kind == "usdt":
            text += _write(function, point)
    return text


def _write(function: str, point: EbpfAttachType) -> str:
    name, provider, probe = point.target.rsplit(":", 2)
    pid = point.option("pid")
    file = find_file(name, pid)
    probes = find_static_probes(file, provider, probe)
    path = os.fsencode(file)
    lib = libbcc()
    what = f"read the arguments of {point} in {function}"
    context = lib.bcc_usdt_new_frompid(pid, path) if pid else lib.bcc_usdt_new_frompath(path)
    if not context:
        raise CompileError(what, "BCC finds no static probes in the file", "see `readelf -n FILE`")
    try:
        arguments = (context, provider.encode(), probe.encode(), function.encode())
        if lib.bcc_usdt_enable_fully_specified_probe(*arguments):
            raise CompileError(
                what,
                "BCC tells the arguments of a probe with a semaphore for one process only"
                if any(each.semaphore for each in probes) and not pid
                else "BCC cannot read its notes",
                _NAME_PROCESS,
            )
        contexts = (ct.c_void_p * 1)(context)
        made, said = capture_stderr(lambda: lib.bcc_usdt_genargs(contexts, 1))
        if made is None:
            raise CompileError(
                what,
                said.strip()
                or "the probe is at several places of a library, each another one in every process",
                _NAME_PROCESS,
            )
        return str(made.decode())
    finally:
        lib.bcc_usdt_close(context)
