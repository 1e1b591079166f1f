"""Whole names of programs, maps and types: the kernel itself keeps 15 characters of each."""

from __future__ import annotations

from functools import lru_cache

from hypermesh_ebpf.bpf import info
from hypermesh_ebpf.bpf.btf import DATASEC, Btf
from hypermesh_ebpf.bpf.info import MapInfo, ProgramInfo
from hypermesh_ebpf.errors import MissingBtf

_SHORT_NAME = 15  # BPF_OBJ_NAME_LEN without its end


def name_program(fd: int, about: ProgramInfo) -> str:
    """A program's whole name: the kernel keeps 15 characters, its BTF the function's name."""
    if len(about.name) < _SHORT_NAME or not about.btf_id:
        return about.name
    try:
        type_id = info.read_first_function(fd)
        name = Btf.from_id(about.btf_id).type(type_id).name if type_id else ""
    except (OSError, MissingBtf):
        return about.name
    return name if name.startswith(about.name) else about.name


def name_map(about: MapInfo) -> str:
    """A map's whole name: libbpf leaves the declarations of maps in a program's BTF."""
    if len(about.name) < _SHORT_NAME or not about.btf_id:
        return about.name
    try:
        names = _declared_maps(about.btf_id)
    except (OSError, MissingBtf):
        return about.name
    matches = [name for name in names if name.startswith(about.name)]
    return matches[0] if len(matches) == 1 else about.name


@lru_cache(maxsize=32)
def _declared_maps(btf_id: int) -> tuple[str, ...]:
    types = Btf.from_id(btf_id)
    section = types.find(".maps", (DATASEC,))
    if section is None:
        return ()
    return tuple(member.name for member in types.variables(types.type(section)))


def resolve_btf(object_id: int, type_id: int) -> str | None:
    """The name of a type in a BTF object of the kernel, None where it cannot be had."""
    try:
        return Btf.from_id(object_id).type(type_id).name or None
    except (OSError, MissingBtf):
        return None
