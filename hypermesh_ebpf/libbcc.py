"""libbcc's C functions, by ctypes, and what they write to descriptor 2.

For the worker process alone: libbcc brings 100 MB of LLVM.  Importing the distribution's bcc
package would cost 70 ms more and register handlers that switch perf events off at exit.
"""

from __future__ import annotations

import ctypes as ct
import importlib
import os
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from typing import Any

from hypermesh_ebpf.host.dependencies import find_bcc
from hypermesh_ebpf.side_by_side import call_apart

_KALLSYMS = os.path.join(os.path.dirname(__file__), "image/kallsyms")
_TRACEPOINT_PROGRAM, _PROBE_READ_KERNEL = 5, 113  # enum bpf_prog_type, bpf_func_id
_BY_INDEX = [ct.c_void_p, ct.c_size_t]
# What libbcc exports and bcc/libbcc.py does not declare: (result, arguments).
_PROTOTYPES: dict[str, tuple[Any, list[Any]]] = {
    "bpf_num_functions": (ct.c_size_t, [ct.c_void_p]),
    "bpf_num_tables": (ct.c_size_t, [ct.c_void_p]),
    "bpf_table_name": (ct.c_char_p, _BY_INDEX),
    "bpf_table_fd_id": (ct.c_int, _BY_INDEX),
    "bpf_table_type_id": (ct.c_int, _BY_INDEX),
    "bpf_table_flags_id": (ct.c_int, _BY_INDEX),
    "bpf_table_max_entries_id": (ct.c_size_t, _BY_INDEX),
    "bpf_table_key_size_id": (ct.c_size_t, _BY_INDEX),
    "bpf_table_leaf_size_id": (ct.c_size_t, _BY_INDEX),
    "bpf_table_key_desc_id": (ct.c_char_p, _BY_INDEX),
    "bpf_table_leaf_desc_id": (ct.c_char_p, _BY_INDEX),
}


@lru_cache(maxsize=1)
def libbcc() -> Any:
    """libbcc with the prototypes that the distribution's own bcc package declares.

    Only ``bcc/libbcc.py`` is run, through a stub package, not ``bcc/__init__.py``.
    Raises MissingDependency.
    """
    found = find_bcc()
    stub = types.ModuleType("bcc")
    stub.__path__ = [str(found.package_dir)]
    sys.modules["bcc"] = stub
    lib = importlib.import_module("bcc.libbcc").lib
    for name, (result, arguments) in _PROTOTYPES.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    return lib


def compile_module(text: bytes, flags: Sequence[bytes]) -> Any:
    """A module of libbcc's out of C, for bpf_module_destroy(); None where it does not compile.

    What clang says goes to descriptor 2.  Raises MissingDependency.
    """
    lib = libbcc()
    arguments = (ct.c_char_p * len(flags))(*flags)

    def create() -> Any:
        with _short_kallsyms():
            return lib.bpf_module_create_c_from_string(text, 0, arguments, len(flags), True, None)

    return call_apart(create)


@contextmanager
def _short_kallsyms() -> Iterator[None]:
    """Meanwhile /proc/kallsyms has four lines, for this thread, where it may do that.

    BCC asks at each compilation whether the kernel has bpf_probe_read_kernel(), and reads all of
    the symbols for it (check_bpf_probe_read_kernel() in src/cc/frontends/clang/
    b_frontend_action.cc): some 200,000 lines and three quarters of the time that a small program
    takes.  The four are helpers of Linux 5.5; before they are told, the kernel is asked.
    """
    from hypermesh_ebpf.bpf.libbpf import libbpf
    from hypermesh_ebpf.host import filesystems

    with ExitStack() as undo:
        if libbpf().libbpf_probe_bpf_helper(_TRACEPOINT_PROGRAM, _PROBE_READ_KERNEL, None) == 1:
            try:
                undo.enter_context(filesystems.stand_in(_KALLSYMS, "/proc/kallsyms"))
            except OSError:  # without CAP_SYS_ADMIN it takes longer
                undo.pop_all()
        yield


def capture_stderr(call: Callable[[], Any]) -> tuple[Any, str]:
    """The result of a C call, and what it wrote to descriptor 2 meanwhile.

    In the worker that is a memory file, and the words are taken out of it again; should the call
    end the process, as LLVM does in some cases, they stay there for the parent to read.
    """
    if not os.readlink("/proc/self/fd/2").startswith("/memfd:"):
        return _capture_aside(call)
    begin = os.lseek(2, 0, os.SEEK_END)
    result = call()
    said = os.pread(2, os.lseek(2, 0, os.SEEK_CUR) - begin, begin)
    os.ftruncate(2, begin)
    os.lseek(2, begin, os.SEEK_SET)
    return result, said.decode(errors="replace")


def _capture_aside(call: Callable[[], Any]) -> tuple[Any, str]:
    saved, sink = os.dup(2), os.memfd_create("stderr")
    os.dup2(sink, 2)
    try:
        result = call()
    finally:
        os.dup2(saved, 2)
        os.close(saved)
    with open(sink, "rb") as file:
        file.seek(0)
        return result, file.read().decode(errors="replace")
