"""The types of keys, values and events: from BTF or from BCC to a description, from it to values.

A *description* is plain data that survives JSON, so that it can be kept in a file and sent from
the worker to its parent::

    {"kind": "int", "name": "unsigned int", "size": 4, "signed": False}    also "bool", "float"
    {"kind": "enum", "name": "color", "size": 4, "signed": False, "values": {"RED": 1}}
    {"kind": "pointer", "size": 8}            {"kind": "array", "element": {...}, "count": 3}
    {"kind": "struct", "name": "flow", "size": 16, "members": [
        {"name": "packets", "type": {...}, "offset": 0}, {"name": "flag", ..., "bits": 3}]}
    {"kind": "opaque", "size": 8}             what is not known: its bytes

``offset`` is in bits from the start, "union" is like "struct", and a data section (.bss) is a
structure of its variables.  :func:`describe` makes one from BTF
(:mod:`hypermesh_ebpf.bpf.btf_types`); BCC has a notation of its own
(:mod:`hypermesh_ebpf.bpf.bcc_types`).  :func:`parse_type` takes both and gives a :class:`Type`.

What a value is decoded to: int, float and bool; an enum's name, or its number where it has none; a
pointer as "0x..."; ``char`` arrays as text up to the first NUL, or as hexadecimal digits where
that is not printable; other arrays as lists; structures and unions as dictionaries, a union with
all its members, and members of unnamed ones among those around them; opaque bytes as hexadecimal
digits.
"""

from __future__ import annotations

import codecs
import re
import struct
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice, repeat
from operator import itemgetter
from typing import TYPE_CHECKING, Any

from hypermesh_ebpf.bpf.bcc_types import describe_bcc
from hypermesh_ebpf.bpf.strided import take, take_sums

if TYPE_CHECKING:
    from hypermesh_ebpf.bpf.btf import Btf

Description = Mapping[str, Any]
_INTEGERS = {1: "B", 2: "H", 4: "I", 8: "Q"}
_FLOATS = {2: "e", 4: "f", 8: "d"}
_WHITE_SPACE = dict.fromkeys(map(ord, "\t\n"))


def describe(btf: Btf, type_id: int) -> dict[str, Any]:
    """The description of a BTF type; opaque where it makes no sense.  Never follows a pointer."""
    from hypermesh_ebpf.bpf.btf_types import describe_btf

    return describe_btf(btf, type_id) or _opaque(0)


def _opaque(size: int) -> dict[str, Any]:
    return {"kind": "opaque", "size": size}


@dataclass(frozen=True, slots=True)
class Type:
    """A type that bytes can be decoded to.

    ``layout`` is the struct module's format of one value, ``build`` makes the value of what that
    unpacks.  ``columns`` has a character for each of these items: "+" for a number, "=" for what
    cannot be added, "?" for bytes with numbers in them.  ``plain`` are the names of a structure's
    members where each is the item itself.
    """

    description: Description
    size: int
    layout: str
    columns: str
    build: Callable[[Iterator[Any]], Any]
    plain: tuple[str, ...] = ()
    _struct: struct.Struct = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_struct", struct.Struct("=" + self.layout))

    def decode(self, raw: bytes | memoryview) -> Any:
        """The value at the start of ``raw``; all of it as hexadecimal digits if it is short.

        So are bytes whose type and size are not known.
        """
        if len(raw) < self.size or (not self.size and self.description["kind"] == "opaque"):
            return bytes(raw).hex()
        return self.build(iter(self._struct.unpack_from(raw)))

    def decode_all(self, raw: bytes | memoryview, stride: int = 0) -> Iterator[Any]:
        """Every value in ``raw``, one each ``stride`` bytes (0: without gaps)."""
        return self._build_all(self._unpack(raw, stride))

    def _build_all(self, rows: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
        """The values of what was unpacked of each; numbers and structures of numbers fast."""
        if self.build is next:
            return map(itemgetter(0), rows)
        if self.plain:
            return map(dict, map(zip, repeat(self.plain), rows))
        return map(self.build, map(iter, rows))

    def decode_sums(self, raw: bytes | memoryview, stride: int, copies: int) -> Iterator[Any]:
        """Per-CPU values: each is ``copies`` in a row, added member by member.

        See :func:`add_values` for what cannot be added.
        """
        if "?" in self.columns or not self.columns:
            groups = zip(*[self.decode_all(raw, stride)] * copies, strict=True)
            return map(add_values, groups)
        if len(self.columns) < len(raw) // (stride * copies):  # more rows than items: by item
            sums = self._add_items(raw, stride, copies)
            if sums is not None:
                return self._build_all(zip(*sums, strict=True))
        return map(self._add_rows, zip(*[self._unpack(raw, stride)] * copies, strict=True))

    def _add_items(
        self, raw: bytes | memoryview, stride: int, copies: int
    ) -> list[list[Any]] | None:
        """Each item of all values, added; None where one that cannot be added differs."""
        sums = []
        for kind, (code, offset) in zip(self.columns, _items(self.layout), strict=True):
            if kind == "+":
                sums.append(take_sums(raw, code, offset, stride, copies))
                continue
            whole = copies * stride
            first = take(raw, code, offset, whole)
            for at in range(stride, whole, stride):
                if take(raw, code, offset + at, whole) != first:
                    return None
            sums.append(first)
        return sums

    def _add_rows(self, values: tuple[tuple[Any, ...], ...]) -> Any:
        """All CPUs' items of one value as that value."""
        if (total := self._add(values)) is not None:
            return self.build(iter(total))
        return add_values([self.build(iter(each)) for each in values])

    def _add(self, values: tuple[tuple[Any, ...], ...]) -> list[Any] | None:
        """Several CPUs' items as one's; None where one that cannot be added differs."""
        if "=" not in self.columns:
            return list(map(sum, zip(*values, strict=True)))
        total = []
        for kind, column in zip(self.columns, zip(*values, strict=True), strict=True):
            if kind == "=" and column.count(column[0]) < len(column):
                return None
            total.append(sum(column) if kind == "+" else column[0])
        return total

    def _unpack(self, raw: bytes | memoryview, stride: int) -> Iterator[tuple[Any, ...]]:
        gap = max(stride - self.size, 0)
        if not self.size + gap:
            return iter(())
        return struct.iter_unpack(f"={self.layout}{gap}x", raw)

    def find_integer(self, member: str) -> tuple[str, int]:
        """(struct-module code, byte offset) of an integer: the member, or ("") the type itself.

        Raises KeyError for what is no integer of 1, 2, 4 or 8 bytes.
        """
        description, offset = self.description, 0
        if member:
            found = {each["name"]: each for each in description["members"]}[member]
            description, offset = found["type"], found["offset"] // 8
        code = _INTEGERS[description["size"]]
        return code.lower() if description["signed"] else code, offset

    @property
    def is_numbers(self) -> bool:
        """True for a number, and for a structure of nothing but numbers."""
        return (bool(self.plain) or self.build is next) and set(self.columns) == {"+"}

    @property
    def members(self) -> tuple[str, ...]:
        """The names of a structure's or union's members; empty for everything else."""
        return tuple(member["name"] for member in self.description.get("members", ()))


def _items(layout: str) -> Iterator[tuple[str, int]]:
    """(format, byte offset) of each item that the struct module finds by this format."""
    at = 0
    for count, code in re.findall(r"(\d*)(\D)", layout):
        number, width = int(count or 1), struct.calcsize("=" + code)
        if code == "s":
            yield f"{number}s", at
        elif code != "x":
            for index in range(number):
                yield code, at + index * width
        at += number * width


def parse_type(description: Any, size: int | None = None) -> Type:
    """The type that a description stands for: :func:`describe`'s or BCC's.

    ``size`` is how many bytes a value really has: where the description is None, makes no sense
    or has another size, the type is opaque bytes of it.
    """
    found = describe_bcc(description, size) if isinstance(description, (str, list, tuple)) else None
    if isinstance(description, Mapping):
        found = dict(description)
    try:
        if found is not None and size in (None, size_of(found)):
            return _compile(found)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError, struct.error):
        pass  # no description of ours, or one that was changed
    return _compile(_opaque(size or 0))


def size_of(description: Description) -> int:
    """How many bytes a value of that description has."""
    if description["kind"] == "array":
        return int(description["count"]) * size_of(description["element"])
    return int(description["size"])


def _compile(description: Description) -> Type:
    return _COMPILERS[description["kind"]](description)


def _scalar(description: Description, code: str, column: str) -> Type:
    return Type(description, description["size"], code, column, next)


def _converted(
    description: Description, layout: str, convert: Callable[[Any], Any], column: str
) -> Type:
    """A type of one unpacked item that is made into something else."""
    return Type(description, size_of(description), layout, column, lambda it: convert(next(it)))


def _compile_int(description: Description) -> Type:
    size, signed = description["size"], bool(description["signed"])
    if code := _INTEGERS.get(size):
        return _scalar(description, code.lower() if signed else code, "+")
    return _converted(description, f"{size}s", lambda raw: _read_integer(raw, signed), "?")


def _compile_bool(description: Description) -> Type:
    if description["size"] == 1:
        return _scalar(description, "?", "=")
    return _converted(description, f"{description['size']}s", any, "=")


def _compile_float(description: Description) -> Type:
    if code := _FLOATS.get(description["size"]):
        return _scalar(description, code, "+")
    return _compile(_opaque(description["size"]))


def _compile_enum(description: Description) -> Type:
    code = _INTEGERS[description["size"]]
    code = code.lower() if description["signed"] else code
    wrap = struct.Struct("=" + code)
    names: dict[int, str] = {}
    for name, value in description["values"].items():
        # Enumerators of 32 bits are told as signed, whatever the type is.
        number = value & (1 << 8 * wrap.size) - 1
        (number,) = wrap.unpack(number.to_bytes(wrap.size, sys.byteorder))
        names.setdefault(number, name)
    return _converted(description, code, lambda number: names.get(number, number), "=")


def _compile_array(description: Description) -> Type:
    count, element = description["count"], _compile(description["element"])
    size = count * element.size
    if is_text(description):
        return _converted(description, f"{size}s", read_text, "=")
    if element.build is next and len(element.layout) == 1:
        layout = f"{count}{element.layout}"
        columns = element.columns * count
        return Type(description, size, layout, columns, lambda it: list(islice(it, count)))
    return _converted(description, f"{size}s", lambda raw: list(element.decode_all(raw)), "?")


def is_text(description: Description) -> bool:
    """True for an array of ``char``, as strings in C are."""
    element = description.get("element", {})
    return (element.get("kind"), element.get("name"), element.get("size")) == ("int", "char", 1)


def read_text(raw: bytes) -> str:
    """Text up to the first NUL, hexadecimal digits of all bytes where it cannot be printed.

    A character cut in two at the end is left out: the kernel cuts names wherever they end.
    """
    try:
        text, _used = codecs.utf_8_decode(raw.split(b"\0", 1)[0], "strict", False)
    except UnicodeDecodeError:
        return raw.hex()
    return text if text.translate(_WHITE_SPACE).isprintable() else raw.hex()


def _compile_pointer(description: Description) -> Type:
    return _converted(description, _INTEGERS[description["size"]], hex, "=")


def _compile_opaque(description: Description) -> Type:
    if not description["size"]:
        return Type(description, 0, "", "", lambda it: "")
    return _converted(description, f"{description['size']}s", bytes.hex, "=")


def _compile_struct(description: Description) -> Type:
    """Members that follow each other are unpacked at once; overlaps and bit fields singly."""
    size, members = description["size"], description["members"]
    names = [member["name"] for member in members]
    types = [_compile(member["type"]) for member in members]
    layout, columns, end = "", "", 0
    for member, type_ in zip(members, types, strict=True):
        at, odd = divmod(member["offset"], 8)
        if odd or at < end or "bits" in member:
            return _converted(description, f"{size}s", _member_reader(members, types), "?")
        layout += f"{at - end}x" * (at > end) + type_.layout
        end = at + type_.size
        columns += type_.columns
    if end > size:
        raise ValueError(f"members end at {end} of {size} bytes")
    layout += f"{size - end}x" * (size > end)
    builds = [(name, type_.build) for name, type_ in zip(names, types, strict=True)]

    def build(items: Iterator[Any]) -> dict[str, Any]:
        return {name: build(items) for name, build in builds}

    def build_at_once(items: Iterator[Any]) -> dict[str, Any]:
        return dict(zip(names, items, strict=False))

    if types and all(type_.build is next for type_ in types):
        return Type(description, size, layout, columns, build_at_once, tuple(names))
    return Type(description, size, layout, columns, build)


def _member_reader(
    members: Sequence[Mapping[str, Any]], types: Sequence[Type]
) -> Callable[[bytes], dict[str, Any]]:
    readers = [
        (member["name"], _bit_reader(member) if "bits" in member else _slice_reader(member, type_))
        for member, type_ in zip(members, types, strict=True)
    ]
    return lambda raw: {name: read(raw) for name, read in readers}


def _slice_reader(member: Mapping[str, Any], type_: Type) -> Callable[[bytes], Any]:
    at = member["offset"] // 8
    return lambda raw: type_.decode(raw[at : at + type_.size])


def _bit_reader(member: Mapping[str, Any]) -> Callable[[bytes], Any]:
    """A bit field: BTF counts bits from the lowest on little-endian machines, else from the top."""
    description, bits = member["type"], member["bits"]
    first, end = member["offset"] // 8, -(-(member["offset"] + bits) // 8)
    before, behind = member["offset"] - 8 * first, 8 * end - member["offset"] - bits
    shift = before if sys.byteorder == "little" else behind
    size = description["size"]
    finish = _compile(description)
    signed = description.get("signed", False)
    if bits > 8 * size:
        raise ValueError(f"a bit field of {bits} bits in {size} bytes")

    def read(raw: bytes) -> Any:
        number = int.from_bytes(raw[first:end], sys.byteorder) >> shift & (1 << bits) - 1
        if signed and number >> (bits - 1):
            number -= 1 << bits
        return finish.decode(number.to_bytes(size, sys.byteorder, signed=signed))

    return read


_COMPILERS: dict[str, Callable[[Description], Type]] = {
    "int": _compile_int,
    "bool": _compile_bool,
    "float": _compile_float,
    "enum": _compile_enum,
    "array": _compile_array,
    "pointer": _compile_pointer,
    "opaque": _compile_opaque,
    "struct": _compile_struct,
    "union": _compile_struct,
}


def _read_integer(raw: bytes, signed: bool) -> int:
    return int.from_bytes(raw, sys.byteorder, signed=signed)


def is_number(value: Any) -> bool:
    """True for what can be added: an integer or float, and no bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def add_values(values: Sequence[Any]) -> Any:
    """Several CPUs' values as one: numbers added, within structures and arrays, too.

    What is no number stays if it is the same on all CPUs; else it is the list of all.
    """
    first = values[0]
    if all(map(is_number, values)):
        return sum(values)
    if all(isinstance(value, dict) for value in values):
        return {name: add_values([value[name] for value in values]) for name in first}
    if all(isinstance(value, list) for value in values):
        return [add_values(group) for group in zip(*values, strict=True)]
    return first if all(value == first for value in values) else list(values)


def flatten(name: str, value: Any, *, arrays: bool = False) -> dict[str, Any]:
    """A value as columns: {"name.member": leaf}; a name alone for what has no members.

    Arrays of structures become "name.0.member"; arrays of plain values are one leaf, a list,
    unless ``arrays``: then "name.0".  With an empty ``name`` the members' own are used.
    """
    if isinstance(value, dict):
        parts = value.items()
    elif isinstance(value, list) and (arrays or any(isinstance(v, (dict, list)) for v in value)):
        parts = {str(index): inner for index, inner in enumerate(value)}.items()
    else:
        return {name: value}
    found: dict[str, Any] = {}
    for part, inner in parts:
        found.update(flatten(f"{name}.{part}" if name else part, inner, arrays=arrays))
    return found
