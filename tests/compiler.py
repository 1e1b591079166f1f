"""C that BCC compiles in a process of its own, loaded here and run without being attached."""

from __future__ import annotations

import ctypes as ct
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from hypermesh_ebpf.bpf.libbpf import check
from hypermesh_ebpf.bpf.maps import Map
from hypermesh_ebpf.bpf.programs import create_map, load_program
from hypermesh_ebpf.bpf.spec import MapSpec
from hypermesh_ebpf.errors import from_dict
from hypermesh_ebpf.image.image import Image

ROOT = Path(__file__).parents[1]
_PATIENCE = 300.0  # an emulated machine takes its time

# The C comes on stdin, and kernel types are declared for it if a path of BTF is given.
_COMPILER = """
import json, sys
from hypermesh_ebpf.bpf.libbpf import libbpf
from hypermesh_ebpf.errors import HmebpfError
from hypermesh_ebpf.image import bcc, kernel_types
from hypermesh_ebpf.image.source import bundled_directory
text = sys.stdin.read()
try:
    if len(sys.argv) > 1:
        with kernel_types.KernelTypes(sys.argv[1]) as types:
            text = types.declare(text) + '#line 1 "test.c"\\n' + text
    image = bcc.compile_c("test.c", text, bcc.compiler_flags(bundled_directory(), {}))
except HmebpfError as error:
    print(json.dumps(error.as_dict()))
else:
    print(image.to_bytes().decode())
"""


def compile_text(text: str, btf: str | None = None) -> Image:
    """The image of one C text.  Raises what compiling it raised."""
    done = subprocess.run(
        [sys.executable, "-c", _COMPILER, *([btf] if btf else [])],
        input=text,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=_PATIENCE,
        check=True,
    )
    said = json.loads(done.stdout)
    if "class" in said:
        raise from_dict(said)
    return Image.from_bytes(done.stdout.encode())


_USER_COMPILER = """
import json, os, sys
from pathlib import Path
from hypermesh_ebpf.attach_type import EbpfAttachType
from hypermesh_ebpf.errors import HmebpfError
from hypermesh_ebpf.image.source import build_user_image
path, use_cache, attach, *flags = sys.argv[1:]
points = {name: EbpfAttachType.parse(text) for name, text in json.loads(attach).items()}
told = []
try:
    text = Path(path).read_text(errors="surrogateescape")
    told_to = (told.append, told.append)
    image = build_user_image(Path(path), text, flags, use_cache == "1", *told_to, points)
except HmebpfError as error:
    print(json.dumps(error.as_dict()))
else:
    print(json.dumps({"told": told, "image": image.to_bytes().decode()}))
sys.stdout.flush()
os._exit(0)
"""


def build_user_file(
    path: Path,
    *flags: str,
    use_cache: bool = False,
    attach: dict[str, str] | None = None,
    env: dict[str, str] | None = None,
) -> tuple[Image, list[str]]:
    """The image of a user's file for BCC, and what was told meanwhile.  Raises what it raised."""
    arguments = [str(path), str(int(use_cache)), json.dumps(attach or {}), *flags]
    done = subprocess.run(
        [sys.executable, "-c", _USER_COMPILER, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), **(env or {})},
        timeout=_PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    if "class" in said:
        raise from_dict(said)
    return Image.from_bytes(said["image"].encode()), said["told"]


def copy_project(folder: Path) -> Path:
    """A copy of what runs, to be broken: started with this as the working directory, it is used."""
    for name in ("hypermesh_ebpf", "bpf_c"):
        leave_out = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, folder / "project" / name, ignore=leave_out)
    return folder / "project"


class _TestRunOptions(ct.Structure):
    """struct bpf_test_run_opts of libbpf 1.0."""

    _fields_ = [
        ("sz", ct.c_size_t),
        ("data_in", ct.c_void_p),
        ("data_out", ct.c_void_p),
        ("data_size_in", ct.c_uint32),
        ("data_size_out", ct.c_uint32),
        ("ctx_in", ct.c_void_p),
        ("ctx_out", ct.c_void_p),
        ("ctx_size_in", ct.c_uint32),
        ("ctx_size_out", ct.c_uint32),
        ("retval", ct.c_uint32),
        ("repeat", ct.c_int),
        ("duration", ct.c_uint32),
        ("flags", ct.c_uint32),
        ("cpu", ct.c_uint32),
        ("batch_size", ct.c_uint32),
    ]


_LIBBPF = ct.CDLL("libbpf.so.1", use_errno=True)


def run_program(fd: int, packet: bytes = b"", repeat: int = 1) -> int:
    """Run an XDP program on a packet (filled up to 64 bytes) by BPF_PROG_TEST_RUN; its result."""
    result, _nanoseconds = run_timed(fd, packet.ljust(64, b"\0"), repeat)
    return result


def run_timed(fd: int, packet: bytes, repeat: int) -> tuple[int, int]:
    """The same on a packet as it is; the result, and the nanoseconds that one run took."""
    data = ct.create_string_buffer(packet, len(packet))
    options = _TestRunOptions(sz=ct.sizeof(_TestRunOptions), repeat=repeat)
    options.data_in, options.data_size_in = ct.addressof(data), len(data)
    check(_LIBBPF.bpf_prog_test_run_opts(fd, ct.byref(options)))
    return int(options.retval), int(options.duration)


def run_in_this_task(fd: int) -> None:
    """Run a raw tracepoint program here and now (Linux 5.10), without arguments."""
    options = _TestRunOptions(sz=ct.sizeof(_TestRunOptions))
    check(_LIBBPF.bpf_prog_test_run_opts(fd, ct.byref(options)))


@dataclass(frozen=True, slots=True)
class Programs:
    """An image in the kernel: descriptors of its programs, and its maps, by name."""

    programs: dict[str, int]
    maps: dict[str, Map]


@contextmanager
def loaded(image: Image, kind: str = "xdp") -> Iterator[Programs]:
    """Make the maps and load the programs; closed at the end."""
    with ExitStack() as stack:
        descriptors = [create_map(spec) for spec in image.maps]
        for fd in descriptors:
            stack.callback(os.close, fd)
        programs = {}
        for program in image.programs:
            fd = load_program(program, kind, image.license, descriptors)
            stack.callback(os.close, fd)
            programs[program.name] = fd
        maps = {spec.name: Map(spec, fd) for spec, fd in zip(image.maps, descriptors, strict=True)}
        yield Programs(programs, maps)


@contextmanager
def new_map(spec: MapSpec) -> Iterator[Map]:
    """A map made for a test; closed at the end."""
    fd = create_map(spec)
    try:
        yield Map(spec, fd)
    finally:
        os.close(fd)


def map_id(fd: int) -> int:
    """The kernel's id of a map, from fdinfo."""
    for line in Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines():
        if line.startswith("map_id:"):
            return int(line.split()[1])
    raise AssertionError(f"descriptor {fd} is no map")
