"""C's types as numpy's, for maps and for records: names of dtypes, and bit fields put together."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from hypermesh_ebpf.bpf.types import Description, size_of

if TYPE_CHECKING:
    from numpy.typing import NDArray


def name_dtype(description: Description) -> str:
    """numpy's name of a type without members."""
    kind, size = description["kind"], size_of(description)
    if kind == "array":  # of char
        return f"S{size}"
    if kind == "bool" and size == 1:
        return "?"
    if kind == "float" and size in (2, 4, 8):
        return f"f{size}"
    if kind in ("int", "enum", "pointer") and size in (1, 2, 4, 8):
        return f"{'i' if description.get('signed') else 'u'}{size}"
    return f"V{size}"


def join_bits(octets: NDArray[Any], first: int, width: int, signed: bool) -> NDArray[Any]:
    """Bit fields out of the bytes that hold them (the last dimension).

    BTF counts bits from the lowest on little-endian machines, else from the top.
    """
    import numpy as np

    size = octets.shape[-1]
    shift = first if sys.byteorder == "little" else 8 * size - first - width
    joined: NDArray[Any] = np.zeros(octets.shape[:-1], "u8")
    for index in range(size):
        place = 8 * (index if sys.byteorder == "little" else size - 1 - index) - shift
        octet = octets[..., index].astype("u8")
        joined |= octet << np.uint64(place) if place >= 0 else octet >> np.uint64(-place)
    if signed:
        unused = np.int64(64 - width)
        joined = joined.view("i8") << unused >> unused
    else:
        joined = joined & np.uint64((1 << width) - 1)
    return joined
