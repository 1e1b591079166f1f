"""libbpf's C functions, by ctypes: found once, with prototypes, and silent.

libbpf 1.0 or newer is needed (its ABI is stable since; Debian 12 and Ubuntu 24.04 have it).
Functions return a negative errno, or -1 with errno set; :func:`check` turns both into OSError.
"""

from __future__ import annotations

import ctypes as ct
import errno
import os
import re
from functools import lru_cache

from hypermesh_ebpf import log
from hypermesh_ebpf.errors import MissingDependency

INSTALL_LIBBPF = (
    "install libbpf 1.0 or newer: Debian/Ubuntu `apt install libbpf1`, "
    "Fedora `dnf install libbpf`, Arch `pacman -S libbpf`, Alpine `apk add libbpf`"
)

BPF_ANY = 0


class MapCreateOpts(ct.Structure):
    """struct bpf_map_create_opts of libbpf 1.0 (later members are zero for an older size)."""

    _fields_ = [
        ("sz", ct.c_size_t),
        ("btf_fd", ct.c_uint32),
        ("btf_key_type_id", ct.c_uint32),
        ("btf_value_type_id", ct.c_uint32),
        ("btf_vmlinux_value_type_id", ct.c_uint32),
        ("inner_map_fd", ct.c_uint32),
        ("map_flags", ct.c_uint32),
        ("map_extra", ct.c_uint64),
        ("numa_node", ct.c_uint32),
        ("map_ifindex", ct.c_uint32),
    ]


class ProgLoadOpts(ct.Structure):
    """struct bpf_prog_load_opts of libbpf 1.0."""

    _fields_ = [
        ("sz", ct.c_size_t),
        ("attempts", ct.c_int),
        ("expected_attach_type", ct.c_int),
        ("prog_btf_fd", ct.c_uint32),
        ("prog_flags", ct.c_uint32),
        ("prog_ifindex", ct.c_uint32),
        ("kern_version", ct.c_uint32),
        ("attach_btf_id", ct.c_uint32),
        ("attach_prog_fd", ct.c_uint32),
        ("attach_btf_obj_fd", ct.c_uint32),
        ("fd_array", ct.c_void_p),
        ("func_info", ct.c_void_p),
        ("func_info_cnt", ct.c_uint32),
        ("func_info_rec_size", ct.c_uint32),
        ("line_info", ct.c_void_p),
        ("line_info_cnt", ct.c_uint32),
        ("line_info_rec_size", ct.c_uint32),
        ("log_level", ct.c_uint32),
        ("log_size", ct.c_uint32),
        ("log_buf", ct.c_void_p),
    ]


_INT, _U32, _U64, _SIZE, _STR, _PTR = (
    ct.c_int,
    ct.c_uint32,
    ct.c_uint64,
    ct.c_size_t,
    ct.c_char_p,
    ct.c_void_p,
)

# name: (result, arguments)
_PROTOTYPES: dict[str, tuple[type | None, list[type]]] = {
    "bpf_map_create": (_INT, [_INT, _STR, _U32, _U32, _U32, _PTR]),
    "bpf_map_lookup_elem": (_INT, [_INT, _PTR, _PTR]),
    "bpf_map_update_elem": (_INT, [_INT, _PTR, _PTR, _U64]),
    "bpf_map_delete_elem": (_INT, [_INT, _PTR]),
    "bpf_map_get_next_key": (_INT, [_INT, _PTR, _PTR]),
    "bpf_map_lookup_batch": (_INT, [_INT, _PTR, _PTR, _PTR, _PTR, _PTR, _PTR]),
    "bpf_prog_load": (_INT, [_INT, _STR, _STR, _PTR, _SIZE, _PTR]),
    "bpf_btf_load": (_INT, [_PTR, _SIZE, _PTR]),
    "bpf_obj_get_info_by_fd": (_INT, [_INT, _PTR, _PTR]),
    "bpf_prog_get_fd_by_id": (_INT, [_U32]),
    "bpf_prog_get_next_id": (_INT, [_U32, _PTR]),
    "bpf_map_get_fd_by_id": (_INT, [_U32]),
    "bpf_link_get_fd_by_id": (_INT, [_U32]),
    "bpf_btf_get_fd_by_id": (_INT, [_U32]),
    "bpf_map_get_next_id": (_INT, [_U32, _PTR]),
    "bpf_link_get_next_id": (_INT, [_U32, _PTR]),
    "bpf_prog_detach2": (_INT, [_INT, _INT, _INT]),
    "bpf_link_detach": (_INT, [_INT]),
    "bpf_task_fd_query": (_INT, [_INT, _INT, _U32, _PTR, _PTR, _PTR, _PTR, _PTR, _PTR]),
    "bpf_prog_query": (_INT, [_INT, _INT, _U32, _PTR, _PTR, _PTR]),
    "bpf_obj_get": (_INT, [_STR]),
    "bpf_obj_pin": (_INT, [_INT, _STR]),
    "bpf_raw_tracepoint_open": (_INT, [_STR, _INT]),
    "bpf_link_create": (_INT, [_INT, _INT, _INT, _PTR]),
    "bpf_link_update": (_INT, [_INT, _INT, _PTR]),
    "bpf_enable_stats": (_INT, [_INT]),
    "libbpf_num_possible_cpus": (_INT, []),
    "libbpf_bpf_map_type_str": (_STR, [_INT]),
    "libbpf_bpf_prog_type_str": (_STR, [_INT]),
    "libbpf_probe_bpf_prog_type": (_INT, [_INT, _PTR]),
    "libbpf_probe_bpf_map_type": (_INT, [_INT, _PTR]),
    "libbpf_probe_bpf_helper": (_INT, [_INT, _INT, _PTR]),
    "libbpf_find_vmlinux_btf_id": (_INT, [_STR, _INT]),
    "libbpf_version_string": (_STR, []),
    "libbpf_set_print": (_PTR, [_PTR]),
    "btf__parse": (_PTR, [_STR, _PTR]),
    "btf__new": (_PTR, [_STR, _U32]),
    "btf__load_from_kernel_by_id_split": (_PTR, [_U32, _PTR]),
    "btf__free": (None, [_PTR]),
    "btf__type_cnt": (_U32, [_PTR]),
    "btf__type_by_id": (_PTR, [_PTR, _U32]),
    "btf__str_by_offset": (_STR, [_PTR, _U32]),
    "btf__find_by_name_kind": (_INT, [_PTR, _STR, _U32]),
    "btf_dump__new": (_PTR, [_PTR, _PTR, _PTR, _PTR]),
    "btf_dump__dump_type": (_INT, [_PTR, _U32]),
    "btf_dump__free": (None, [_PTR]),
    "libbpf_strerror": (_INT, [_INT, _PTR, _SIZE]),
    "btf__raw_data": (_PTR, [_PTR, _PTR]),
    "bpf_object__open_mem": (_PTR, [_STR, _SIZE, _PTR]),
    "bpf_object__load": (_INT, [_PTR]),
    "bpf_object__close": (None, [_PTR]),
    "bpf_object__btf": (_PTR, [_PTR]),
    "bpf_object__next_program": (_PTR, [_PTR, _PTR]),
    "bpf_object__next_map": (_PTR, [_PTR, _PTR]),
    "bpf_program__name": (_STR, [_PTR]),
    "bpf_program__section_name": (_STR, [_PTR]),
    "bpf_program__type": (_INT, [_PTR]),
    "bpf_program__set_type": (_INT, [_PTR, _INT]),
    "bpf_program__expected_attach_type": (_INT, [_PTR]),
    "bpf_program__set_expected_attach_type": (_INT, [_PTR, _INT]),
    "bpf_program__set_attach_target": (_INT, [_PTR, _INT, _STR]),
    "bpf_program__autoload": (ct.c_bool, [_PTR]),
    "bpf_program__set_autoload": (_INT, [_PTR, ct.c_bool]),
    "bpf_program__fd": (_INT, [_PTR]),
    "bpf_program__insns": (_PTR, [_PTR]),
    "bpf_program__insn_cnt": (_SIZE, [_PTR]),
    "bpf_map__name": (_STR, [_PTR]),
    "bpf_map__type": (_INT, [_PTR]),
    "bpf_map__fd": (_INT, [_PTR]),
    "bpf_map__reuse_fd": (_INT, [_PTR, _INT]),
    "bpf_map__key_size": (_U32, [_PTR]),
    "bpf_map__set_key_size": (_INT, [_PTR, _U32]),
    "bpf_map__value_size": (_U32, [_PTR]),
    "bpf_map__set_value_size": (_INT, [_PTR, _U32]),
    "bpf_map__max_entries": (_U32, [_PTR]),
    "bpf_map__map_flags": (_U32, [_PTR]),
    "bpf_map__btf_key_type_id": (_U32, [_PTR]),
    "bpf_map__btf_value_type_id": (_U32, [_PTR]),
    "bpf_map__is_internal": (ct.c_bool, [_PTR]),
    "bpf_map__initial_value": (_PTR, [_PTR, _PTR]),
    "bpf_map__pin_path": (_STR, [_PTR]),
    "bpf_map__set_pin_path": (_INT, [_PTR, _STR]),
    "ring_buffer__new": (_PTR, [_INT, _PTR, _PTR, _PTR]),
    "ring_buffer__consume": (_INT, [_PTR]),
    "ring_buffer__free": (None, [_PTR]),
    "perf_buffer__new_raw": (_PTR, [_INT, _SIZE, _STR, _PTR, _PTR, _PTR]),
    "perf_buffer__consume": (_INT, [_PTR]),
    "perf_buffer__epoll_fd": (_INT, [_PTR]),
    "perf_buffer__free": (None, [_PTR]),
}


@lru_cache(maxsize=1)
def libbpf() -> ct.CDLL:
    """The loaded library.  Raises MissingDependency where it is absent or older than 1.0."""
    try:
        lib = ct.CDLL("libbpf.so.1", use_errno=True)
    except OSError as error:
        raise MissingDependency("load libbpf.so.1", str(error), INSTALL_LIBBPF) from error
    for name, (result, arguments) in _PROTOTYPES.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
        if log.listens("debug") and re.match(r"bpf_(?!.*__(?!load$))", name):
            setattr(lib, name, log.timed(name, function))
    lib.libbpf_set_print(None)  # its warnings would land in the middle of our table
    return lib


def check(result: int) -> int:
    """The result of a libbpf call, or OSError with the errno that it reported."""
    if result >= 0:
        return result
    number = ct.get_errno() or -result or errno.EINVAL
    raise OSError(number, os.strerror(number))


@lru_cache(maxsize=1)
def possible_cpus() -> int:
    """How many CPUs the kernel may ever have: the number of values in a per-CPU entry."""
    return check(libbpf().libbpf_num_possible_cpus())
