"""How long it takes to load programs that are compiled already, and to attach them."""

from __future__ import annotations

import ctypes as ct
import os
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

from benchmarks.measure import OURS, Result, Settings, say, seconds, take_turns
from benchmarks.peers import ROOT, bcc_script, environment
from benchmarks.places import control_group, network
from hypermesh_ebpf import monitors
from hypermesh_ebpf.attach_type import EbpfAttachType
from hypermesh_ebpf.bpf.libbpf import check, libbpf
from hypermesh_ebpf.bpf.programs import close_all, create_map, load_program
from hypermesh_ebpf.host.ladder import choose_rung
from hypermesh_ebpf.image.source import build_image, bundled_directory
from hypermesh_ebpf.loader import Loader
from hypermesh_ebpf.opening import complete_options
from hypermesh_ebpf.program_set import Source
from hypermesh_ebpf.side_by_side import call_side_by_side

TITLE = "Load and attach"

BCC, BPFTOOL = "BCC", "bpftool"
_LIMIT = 0.005
_SETTLED_SECONDS = 0.05
"""Until the worker has closed its copies: whoever closes the last one waits for the kernel."""
_PASS = {"xdp": 2, "cgroup": 1}
_COUNTER = """
BPF_PERCPU_ARRAY(packets, u64, 256);
int count(struct xdp_md *ctx) {
    void *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
    u32 protocol = data + 24 <= end ? *(u8 *)(data + 23) : 0;
    u64 *count = packets.lookup(&protocol);
    if (count)
        *count += 1;
    return XDP_PASS;
}
"""
_LIBC_PLACE = "/lib/x86_64-linux-gnu/libc.so.6:getpgid"


def run(settings: Settings) -> Iterator[Result]:
    """Cached images, objects, bytecode; then each kind of hook."""
    subprocess.run([sys.executable, ROOT / "scripts/build-objects"], check=True)
    with Bcc() as bcc, Loader() as loader:
        with tempfile.TemporaryDirectory() as scratch:
            before = os.environ.get("XDG_CACHE_HOME")
            os.environ["XDG_CACHE_HOME"] = scratch
            try:
                yield _load_counter(settings, bcc, Path(scratch))
                for name in monitors.names():
                    yield _load_image(name, settings)
            finally:
                del os.environ["XDG_CACHE_HOME"]
                if before is not None:
                    os.environ["XDG_CACHE_HOME"] = before
        yield _load_object("ELF object without CO-RE", "tailcalls", settings, loader, _LIMIT)
        yield _load_object("ELF object with CO-RE", "core", settings, loader, None)
        yield _load_bytecode(settings, loader)
    with network() as _, control_group() as group, Bcc() as bcc, Loader() as loader:
        for kind, target in _places(group).items():
            yield from _attach(kind, target, settings, loader, bcc)


class Bcc:
    """scripts/hooks.py, running: the peer that loads and attaches on request."""

    def __enter__(self) -> Bcc:
        self._process = subprocess.Popen(
            bcc_script("hooks"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment(),
        )
        return self

    def __exit__(self, *exc: object) -> None:
        self._process.communicate()

    def ask(self, *words: str) -> list[float]:
        """The seconds that it took."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(" ".join(words) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the BCC script failed at {' '.join(words)}")
        return [float(word) for word in answer.split()]


def _load_image(name: str, settings: Settings) -> Result:
    """A bundled monitor's maps and programs, in a process that has loaded one before."""
    say(f"image: {name}")
    monitor = monitors.load(name)
    options = complete_options(monitor, {"iface": ("lo",)} if name == "xdp" else {})
    rung = choose_rung(monitor).rung
    defines = {**monitor.defines(options), **rung.defines}
    path = bundled_directory() / monitor.source
    kinds = {hook.program: hook.kind for hook in rung.hooks}
    made: list[int] = []
    followed = 0

    def load() -> None:
        image = build_image(path, defines, needs_btf=rung.needs_btf).image
        maps = [create_map(spec) for spec in image.maps]
        made.extend(maps)

        def load_one(program: str, kind: str) -> None:
            made.append(load_program(image.program(program), kind, image.license, maps))

        loads = [partial(load_one, program, kind) for program, kind in kinds.items()]
        call_side_by_side(loads, os.cpu_count() or 1)

    def measure() -> float:
        nonlocal followed
        took = seconds(load)
        followed = sum(map(_count_followed, made[-len(kinds) :]))
        close_all(made)
        made.clear()
        return took

    rounds = take_turns(settings.rounds * 3, {OURS: measure}, warm_up=2)
    note = f"programs: {len(kinds)}; instructions that the kernel's verifier followed: {followed:,}"
    return Result(f"cached image, {name}", "s", rounds, limit=_LIMIT, note=note)


def _count_followed(prog_fd: int) -> int:
    """bpf_prog_info.verified_insns, since Linux 5.16."""
    raw, length = ct.create_string_buffer(256), ct.c_uint32(256)
    check(libbpf().bpf_obj_get_info_by_fd(prog_fd, raw, ct.byref(length)))
    return int(struct.unpack_from("=I", raw.raw, 216)[0])


def _load_counter(settings: Settings, bcc: Bcc, folder: Path) -> Result:
    """The packet counter of scripts/hooks.py, by both."""
    say("image: packet counter")
    path = folder / "counter.c"
    path.write_text(_COUNTER)
    made: list[int] = []

    def load() -> None:
        image = build_image(path, {}).image
        maps = [create_map(spec) for spec in image.maps]
        made.extend([*maps, load_program(image.programs[0], "xdp", image.license, maps)])

    def measure() -> float:
        took = seconds(load)
        close_all(made)
        made.clear()
        return took

    contenders = {OURS: measure, BCC: lambda: bcc.ask("load")[0]}
    rounds = take_turns(settings.rounds * 3, contenders, warm_up=2)
    note = "one map, one program; BCC compiles it each time"
    return Result("cached image, packet counter", "s", rounds, BCC, limit=_LIMIT, note=note)


def _load_object(
    what: str, name: str, settings: Settings, loader: Loader, limit: float | None
) -> Result:
    say(f"image: {what}")
    path = ROOT / f"build/tests/{name}.o"
    source = Source.read(path)

    def measure() -> float:
        made = []
        took = seconds(lambda: made.append(loader.load(source)))
        loader.unload(made[0])
        return took

    contenders = {OURS: measure, BPFTOOL: partial(_load_by_bpftool, path)}
    rounds = take_turns(settings.rounds * 3, contenders, warm_up=2)
    note = "by a worker that runs; bpftool: the whole process, which also pins it"
    if limit is None:
        note += "; libbpf reads the kernel's types each time"
    return Result(f"load {what}", "s", rounds, BPFTOOL, limit=limit, note=note)


def _load_by_bpftool(path: Path) -> float:
    """In the mount namespace of this process, which has a BPF file system of its own."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["mount", "-t", "bpf", "none", folder], check=True)
        try:
            command = ["bpftool", "prog", "loadall", str(path), f"{folder}/pins"]
            return seconds(lambda: subprocess.run(command, check=True, capture_output=True))
        finally:
            subprocess.run(["umount", folder], check=True)


def _load_bytecode(settings: Settings, loader: Loader) -> Result:
    say("image: bytecode")
    source = Source.of(_empty("raw_tracepoint"))
    point = EbpfAttachType.raw_tracepoint("sched_process_exit")

    def measure() -> float:
        made = []

        def load() -> None:
            made.append(loader.load(source))
            loader.attach(made[0].programs[0], point)

        took = seconds(load)
        loader.unload(made[0])
        return took

    rounds = take_turns(settings.rounds * 3, {OURS: measure}, warm_up=2)
    note = "bytecode has its type from its attach point: loaded when attached, to a raw tracepoint"
    return Result("load raw bytecode, attach", "s", rounds, limit=_LIMIT, note=note)


def _empty(kind: str) -> bytes:
    """r0 = what passes everything; exit."""
    return struct.pack("=BBhi", 0xB7, 0, 0, _PASS.get(kind, 0)) + struct.pack(
        "=BBhi", 0x95, 0, 0, 0
    )


def _places(group: Path | None) -> Mapping[str, str]:
    """Kind: where on this machine."""
    places = {
        "xdp": "lo",
        "tc": "lo",
        "tracepoint": "syscalls:sys_enter_acct",
        "raw_tracepoint": "sched_process_exit",
        "uprobe": _LIBC_PLACE,
        "perf_event": "cpu-clock",
    }
    return {**places, "cgroup": str(group)} if group else places


def _attach(
    kind: str, target: str, settings: Settings, loader: Loader, bcc: Bcc
) -> Iterator[Result]:
    say(f"image: attach {kind}")
    text = {"xdp": "xdp:lo,mode=generic", "perf_event": f"perf_event:{target},frequency=99"}
    point = EbpfAttachType.parse(text.get(kind, f"{kind}:{target}"))
    (program,) = loader.load(Source.of(_empty(kind))).programs
    off: dict[str, list[float]] = {}

    def attach_ours() -> float:
        took = seconds(lambda: loader.attach(program, point))
        time.sleep(_SETTLED_SECONDS)
        off.setdefault(OURS, []).append(seconds(lambda: loader.detach(program)))
        return took

    def attach_by_bcc() -> float:
        on, away = bcc.ask(kind, target)
        off.setdefault(BCC, []).append(away)
        return on

    contenders = {OURS: attach_ours}
    if kind != "tc":
        contenders[BCC] = attach_by_bcc
    rounds = take_turns(settings.rounds, contenders, warm_up=1)
    against = BCC if BCC in rounds else None
    yield Result(f"attach {kind}", "s", rounds, against)
    counted = {name: figures[-settings.rounds :] for name, figures in off.items()}
    yield Result(f"detach {kind}", "s", counted, against)
