"""A BTF type as a description of :mod:`hypermesh_ebpf.bpf.types`.

Typedefs and qualifiers are seen through, the members of unnamed structures and unions belong to
what is around them, a pointer is not followed, and functions and structures that are only declared
are opaque.  Bit fields are in the member, or - before Linux 4.20 - in the integer's type.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hypermesh_ebpf.bpf import btf as kinds
from hypermesh_ebpf.bpf.btf import Btf, BtfMember
from hypermesh_ebpf.errors import MissingBtf

_POINTER = 8
_SIGNED, _BOOL = 1, 4  # BTF_INT_*
_DEEPEST = 32  # structures in structures: what goes deeper runs in a circle
_MOST = 100_000  # types within a type: a hostile object's few can stand for billions


def describe_btf(btf: Btf, type_id: int) -> dict[str, Any] | None:
    """The description of a type; None where there is none of that id, or where it has no end."""
    try:
        return _Describer(btf).describe(type_id, 0)
    except MissingBtf:
        return None


class _Describer:
    """One description in the making, with a limit to its size."""

    def __init__(self, btf: Btf) -> None:
        self._btf, self._left = btf, _MOST

    def describe(self, type_id: int, depth: int) -> dict[str, Any]:
        self._left -= 1
        if depth > _DEEPEST or self._left < 0:
            raise MissingBtf(f"describe type {type_id}", "there is no end to its members", None)
        btf = self._btf
        this = btf.type(btf.resolve(type_id))
        if this.kind == kinds.INT:
            encoding, _offset, _bits = btf.integer(this)
            kind = "bool" if encoding & _BOOL else "int"
            signed = bool(encoding & _SIGNED)
            return {"kind": kind, "name": this.name, "size": this.size, "signed": signed}
        if this.kind in (kinds.ENUM, kinds.ENUM64):
            values = btf.enumerators(this)
            # The flag tells the sign since Linux 6.0; without it a negative value does.
            signed = this.kind_flag or any(value < 0 for value in values.values())
            shared = {"kind": "enum", "name": this.name, "size": this.size, "signed": signed}
            return {**shared, "values": values}
        if this.kind == kinds.FLOAT:
            return {"kind": "float", "name": this.name, "size": this.size}
        if this.kind == kinds.PTR:
            return {"kind": "pointer", "size": _POINTER}
        if this.kind == kinds.ARRAY:
            element, count = btf.array(this)
            return {"kind": "array", "element": self.describe(element, depth + 1), "count": count}
        if this.kind in (kinds.STRUCT, kinds.UNION, kinds.DATASEC):
            kind = "union" if this.kind == kinds.UNION else "struct"
            section = this.kind == kinds.DATASEC
            own = btf.variables(this) if section else btf.members(this)
            members = [found for member in own for found in self._describe_member(member, depth)]
            return {"kind": kind, "name": this.name, "size": this.size, "members": members}
        return {
            "kind": "opaque",
            "size": 0,
        }  # a function, or a structure whose members are not told

    def _describe_member(self, member: BtfMember, depth: int) -> Iterator[dict[str, Any]]:
        """The member, or those of an unnamed structure or union; nothing for unnamed padding."""
        type_ = self.describe(member.type, depth + 1)
        if not member.name:
            for inner in type_.get("members", ()):
                yield {**inner, "offset": member.bit_offset + inner["offset"]}
            return
        offset, bits = member.bit_offset, member.bit_size
        this = self._btf.type(self._btf.resolve(member.type))
        if this.kind == kinds.INT and not bits:  # the encoding before Linux 4.20's kind_flag
            _encoding, shift, width = self._btf.integer(this)
            if shift or (width < 8 * this.size and type_["kind"] == "int"):
                offset, bits = offset + shift, width
        found = {"name": member.name, "type": type_, "offset": offset}
        yield {**found, "bits": bits} if bits else found
