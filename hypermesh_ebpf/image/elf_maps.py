"""The maps of an open ELF object: their types, the variables in them, what they are to be.

libbpf makes them; this is what it has to be told before, and what it knows of them afterwards.
"""

from __future__ import annotations

import ctypes as ct
import os
from collections.abc import Iterator, Mapping
from typing import Any

from hypermesh_ebpf.bpf.btf import STRUCT, TYPEDEF, UNION, Btf
from hypermesh_ebpf.bpf.libbpf import check, libbpf
from hypermesh_ebpf.bpf.spec import MapSpec
from hypermesh_ebpf.bpf.types import describe
from hypermesh_ebpf.errors import LoadError, UsageError, describe_errno
from hypermesh_ebpf.image.settings import split_path, unknown_variable, write_setting

# BPF_MAP_TYPE_* (include/uapi/linux/bpf.h)
_PROG_ARRAY, _PERF_EVENT_ARRAY, _STRUCT_OPS, _RINGBUF = 3, 4, 26, 27
_EVENT_BUFFERS = (_PERF_EVENT_ARRAY, _RINGBUF)
_SEARCHED = 4096  # entries of a program array that are looked at


class ObjectMaps:
    """The maps of an object, by libbpf's ``handles``, whose types are in ``btf``.

    ``notes`` are what the user should hear of.
    """

    def __init__(self, name: str, handles: list[int], btf: Btf | None) -> None:
        self._lib, self._name, self._maps, self._btf = libbpf(), name, handles, btf
        # The types that the object gave them; loading or resizing a map drops some of them.
        self._types = {item: self._map_types(item) for item in handles}
        self.notes: list[str] = []

    def _map_name(self, item: int) -> str:
        """The map's name; of an internal one, the section's: ".bss", not "xdp_coun.bss"."""
        name: str = self._lib.bpf_map__name(item).decode(errors="replace")
        if not self._lib.bpf_map__is_internal(item):
            return name
        value = self._lib.bpf_map__btf_value_type_id(item)
        section = describe(self._btf, value).get("name") if self._btf and value else None
        return section or name[max(name.find("."), 0) :]

    def _map_types(self, item: int) -> tuple[str, int, int]:
        return (
            self._map_name(item),
            self._lib.bpf_map__btf_key_type_id(item),
            self._lib.bpf_map__btf_value_type_id(item),
        )

    def prepare(self, reuse: Mapping[str, int]) -> None:
        """Buffers of events get the sizes that the kernel wants, and given maps are taken."""
        lib = self._lib
        unknown = set(reuse) - {name for name, _key, _value in self._types.values()}
        if unknown:
            raise UsageError(
                f"use a map for {sorted(unknown)[0]}",
                f"{self._name} has no map of that name",
                "maps: " + ", ".join(name for name, _key, _value in self._types.values()),
            )
        for item in self._maps:
            name, type_ = self._types[item][0], lib.bpf_map__type(item)
            if type_ in _EVENT_BUFFERS:
                # Their records' type may be declared as the value's, which the kernel refuses.
                size = 0 if type_ == _RINGBUF else 4
                if lib.bpf_map__value_size(item) != size:
                    check(lib.bpf_map__set_value_size(item, size))
                if lib.bpf_map__key_size(item) != size:
                    check(lib.bpf_map__set_key_size(item, size))
            if type_ == _STRUCT_OPS:
                self.notes.append(f"map {name} is loaded; struct_ops cannot be attached by hmebpf")
            if name in reuse:
                self._reuse(item, name, reuse[name])
            pin = self._pin_path(item)
            if pin:
                found = "is taken from" if os.path.exists(pin) else "is pinned, and stays, at"
                self.notes.append(f"map {name} {found} {pin}, as its source asks")

    def _pin_path(self, item: int) -> str:
        """Where the source wants a map to be found and kept; "" for nowhere."""
        return os.fsdecode(self._lib.bpf_map__pin_path(item) or b"")

    def _reuse(self, item: int, name: str, fd: int) -> None:
        try:
            check(self._lib.bpf_map__reuse_fd(item, fd))
        except OSError as error:
            raise LoadError(
                f"use the given map for {name}",
                describe_errno(error.errno or 0),
                "give a map of the same type and sizes",
                errno=error.errno,
            ) from error

    def set_variables(self, settings: Mapping[str, str]) -> None:
        """Write the settings into the initial values of the object's data sections."""
        if not settings:
            return
        variables = dict(self._variables())
        for path, text in settings.items():
            name, _steps = split_path(path)
            if name not in variables:
                raise unknown_variable(path, sorted(variables))
            value, type_ = variables[name]
            write_setting(value, type_, path, text)

    def _variables(self) -> Iterator[tuple[str, tuple[memoryview, dict[str, Any]]]]:
        """The name, bytes and type of each global variable that the object itself defines."""
        for item in self._maps:
            section, _key, value = self._types[item]
            if not (self._btf and value and self._lib.bpf_map__is_internal(item)):
                continue
            size = ct.c_size_t()
            start = self._lib.bpf_map__initial_value(item, ct.byref(size))
            if not start or section == ".kconfig":
                continue
            raw = memoryview((ct.c_char * size.value).from_address(start)).cast("B")
            for member in describe(self._btf, value).get("members", ()):
                yield member["name"], (raw[member["offset"] // 8 :], member["type"])

    def made(self) -> list[tuple[MapSpec, int]]:
        """The maps that are in the kernel now, with libbpf's descriptors of them."""
        lib = self._lib
        found = ((item, lib.bpf_map__fd(item)) for item in self._maps)
        return [(self._map_spec(item), fd) for item, fd in found if fd >= 0]

    def _map_spec(self, item: int) -> MapSpec:
        lib, (name, key, value) = self._lib, self._types[item]
        type_ = lib.bpf_map__type(item)
        if type_ in _EVENT_BUFFERS and not value:
            value = self._event_type(name)
        return MapSpec(
            name,
            type_,
            lib.bpf_map__key_size(item),
            lib.bpf_map__value_size(item),
            lib.bpf_map__max_entries(item),
            lib.bpf_map__map_flags(item),
            describe(self._btf, key) if self._btf and key else None,
            describe(self._btf, value) if self._btf and value else None,
            pinned=self._pin_path(item),
        )

    def _event_type(self, name: str) -> int:
        """The type that a buffer's records have, going by its name; 0 where none is to be found.

        For a buffer named ``events``: ``struct events``, ``event``, ``events_t``, ``event_t``,
        then the customary names.
        """
        if self._btf is None:
            return 0
        bases = [name, name.removesuffix("s"), "event", "data", "record"]
        for base in [*bases, *(f"{base}_t" for base in bases)]:
            found = self._btf.find(base, (STRUCT, UNION, TYPEDEF))
            if found and describe(self._btf, found)["kind"] in ("struct", "union"):
                return found
        return 0


def read_program_arrays(maps: list[tuple[MapSpec, int]]) -> set[int]:
    """The ids of the programs in the program arrays among these maps."""
    found, value = set(), ct.c_uint32()
    for spec, fd in maps:
        for index in range(min(spec.max_entries, _SEARCHED)) if spec.type == _PROG_ARRAY else ():
            key = ct.c_uint32(index)
            if libbpf().bpf_map_lookup_elem(fd, ct.byref(key), ct.byref(value)) == 0:
                found.add(value.value)
    return found
