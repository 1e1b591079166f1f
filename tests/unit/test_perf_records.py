"""Samples of one length are taken out of a perf buffer at once; others are left to be walked."""

from __future__ import annotations

import struct

import pytest

from hypermesh_ebpf.bpf.perf_buffer import _take_alike

HEADER = struct.Struct("=IHHQI")
LOST, SAMPLE = 2, 9


def sample(time: int, payload: bytes, size: int | None = None) -> bytes:
    length = HEADER.size + len(payload)
    assert not length % 8
    return HEADER.pack(SAMPLE, 0, length, time, len(payload) if size is None else size) + payload


def test_every_sample_with_its_time() -> None:
    raw = b"".join(sample(n, struct.pack("=III", n, 2 * n, 3 * n)) for n in range(1000))
    wanted = [(n, struct.pack("=III", n, 2 * n, 3 * n)) for n in range(1000)]
    assert _take_alike(raw) == wanted
    assert _take_alike(b"") == []


def test_what_the_kernel_says_is_the_programs() -> None:
    """The rest of a record is no part of it."""
    raw = sample(1, b"abcdefghijkl", 8) + sample(2, b"abcdefghijkl", 12)
    assert _take_alike(raw) == [(1, b"abcdefgh"), (2, b"abcdefghijkl")]


@pytest.mark.parametrize(
    "other",
    [
        struct.pack("=IHHQQ", LOST, 0, 24, 7, 5),  # as long as a sample
        struct.pack("=IHHQQQ", LOST, 0, 32, 7, 5, 1),
        sample(3, b"longer, by 16 bytes!"),
    ],
    ids=["as long", "longer", "another length"],
)
def test_anything_else_among_them_is_left_to_be_walked(other: bytes) -> None:
    some = sample(1, b"abcd") * 6
    assert _take_alike(some) is not None
    for raw in (other + some, some + other, some + other + some):
        assert _take_alike(raw) is None
