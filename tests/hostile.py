"""Damaged objects, and a child process that tries to load them: run as a program, it tells of each.

    python -m tests.hostile FOLDER SEED FIRST COUNT

For each it prints its number as it begins, and then "loaded" or the name of the error's class.
"""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path

from hypermesh_ebpf.errors import HmebpfError

# The header and the section table are where a change does most.
_HEADER = 64


def mutate(data: bytes, source: random.Random) -> bytes:
    """The object with some damage: changed bytes and words, a lost end, parts moved about."""
    raw = bytearray(data)
    for _ in range(source.choice((1, 1, 2, 4, 16))):
        way = source.randrange(6)
        at = source.randrange(len(raw))
        if way == 0:
            raw[at] = source.randrange(256)
        elif way == 1:
            raw[at] ^= 1 << source.randrange(8)
        elif way == 2:
            word = source.choice((0, 1, 0x7FFFFFFF, 0xFFFFFFFF, 0x80000000, len(raw)))
            raw[at : at + 4] = word.to_bytes(4, sys.byteorder)
        elif way == 3:
            table = int.from_bytes(data[40:48], sys.byteorder)
            place = min(table + source.randrange(max(len(data) - table, 1)), len(raw) - 1)
            raw[place] = source.randrange(256)
        elif way == 4:
            other, length = source.randrange(len(raw)), source.randrange(1, 64)
            raw[at : at + length] = raw[other : other + length]
        elif source.randrange(4) == 0:
            del raw[max(at, _HEADER) :]
        if len(raw) < _HEADER:
            break
    return bytes(raw)


def cases(folder: Path, seed: int, first: int, count: int) -> list[tuple[int, bytes]]:
    """The same damaged objects for the same seed, whatever part of them is asked for."""
    objects = [path.read_bytes() for path in sorted(folder.glob("*.o"))]
    made = []
    for number in range(first, first + count):
        source = random.Random(f"{seed}/{number}")
        made.append((number, mutate(source.choice(objects), source)))
    return made


def main() -> None:
    from hypermesh_ebpf.image import elf

    folder, seed, first, count = Path(sys.argv[1]), *(int(word) for word in sys.argv[2:5])
    elf.SECONDS = 60
    for number, data in cases(folder, seed, first, count):
        print(number, end=" ", flush=True)
        try:
            loaded = elf.load_object(data, "hostile.o", {}, {})
        except HmebpfError as error:
            assert error.cause and error.remedy, error
            print(type(error).__name__, flush=True)
        else:
            for fd in [fd for _spec, fd in (*loaded.maps, *loaded.programs) if fd is not None]:
                os.close(fd)
            print("loaded", flush=True)


if __name__ == "__main__":
    main()
