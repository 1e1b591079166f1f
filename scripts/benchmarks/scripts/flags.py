"""What BCC's own headers need to be told where there are no kernel headers."""

import mmap
import platform
import re

_major, _minor, _patch = (int(each) for each in re.findall(r"\d+", platform.release())[:3])
FLAGS = [
    f"-DLINUX_VERSION_CODE={(_major << 16) + (_minor << 8) + min(_patch, 255)}",
    f"-DPAGE_SIZE={mmap.PAGESIZE}",
]
