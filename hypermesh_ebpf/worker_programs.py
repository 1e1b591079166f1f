"""The worker's part in a user's own programs: make maps and programs of a source, attach, chain.

Requests, beside "do" and "log":

``load``: {"form": "elf", "c" or "bytecode", "name", "path" or null, "settings": {...},
    "attach": {program: attach point as text}, "points": [those that have to be there], "strict":
    whether an unknown program is an error, "flags": [...], "use_cache"}; one descriptor, the
    source's bytes.
``attach``: {"point", "pinnable", "program": {...}}; the descriptor of the program if it is loaded,
    else those of its maps, from which it is loaded now.
``swap``: {"point", "hold": the place that the guard knows, or null}; the descriptors of the old
    program, of the new one, and of the links that hold the place, if links do.

A program is told as {"spec": {...}, "license", "fd": whether it is loaded, "made_for": for which
place or null, "maps": how many descriptors of maps come}.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hypermesh_ebpf import log
from hypermesh_ebpf.attach.hold import Hold
from hypermesh_ebpf.attach_type import EbpfAttachType
from hypermesh_ebpf.bpf.programs import load_program, program_type, read_program_info
from hypermesh_ebpf.bpf.spec import ProgramSpec, pack_program, unpack_program
from hypermesh_ebpf.errors import AttachError, UsageError
from hypermesh_ebpf.host.hooks import require_hook
from hypermesh_ebpf.host.kernel_btf import function_btf_id
from hypermesh_ebpf.image.image import Image, LoadedSource
from hypermesh_ebpf.program_set import parse_partly
from hypermesh_ebpf.worker_process import Talk

_BY_BTF_ID = {"fentry": "", "fexit": "", "lsm": "bpf_lsm_"}
_NEED_TRACEFS = ("kprobe", "kretprobe", "uprobe", "uretprobe", "usdt")


def _load(talk: Talk, request: Mapping[str, Any], descriptors: Sequence[int]) -> None:
    """A source becomes maps and programs."""
    with open(descriptors[0], "rb", closefd=False) as file:
        file.seek(0)
        data = file.read()
    points = {name: EbpfAttachType.parse(text) for name, text in request["attach"].items()}
    for text in request["points"]:
        require_hook(EbpfAttachType.parse(text))
    with ExitStack() as undo:
        loaded = _make(talk, request, data, points, undo)
        maps = [fd for _spec, fd in loaded.maps]
        programs = [
            {
                "spec": pack_program(spec),
                "loaded": fd is not None,
                **(_identify(fd) if fd is not None else {"id": None, "tag": None}),
            }
            for spec, fd in loaded.programs
        ]
        fds = [fd for _spec, fd in loaded.programs if fd is not None]
        answer = {
            "name": loaded.name,
            "license": loaded.license,
            "maps": [asdict(spec) for spec, _fd in loaded.maps],
            "programs": programs,
            "tail_called": loaded.tail_called,
        }
        for note in loaded.notes:
            talk.note(note)
        talk.done(answer, maps + fds)


def _make(
    talk: Talk,
    request: Mapping[str, Any],
    data: bytes,
    points: Mapping[str, EbpfAttachType],
    undo: ExitStack,
) -> LoadedSource:
    """What the source stands for, in the kernel; ``undo`` closes it here."""
    name, form = request["name"], request["form"]
    if form == "bytecode":
        from hypermesh_ebpf.image import bytecode

        return _load_image(bytecode.to_image(data, name), points, undo)
    if form == "c":
        from hypermesh_ebpf.image import clang

        text = data.decode(errors="surrogateescape")
        path = Path(request["path"] or name)
        if not clang.is_libbpf_style(text):
            for variable in request["settings"]:
                raise UsageError(
                    f"set {variable} in {name}",
                    "C for BCC has no global variables that can be set",
                    f"define a macro: `--cflag -D{variable}=VALUE`",
                )
            from hypermesh_ebpf.image.source import build_user_image

            image = build_user_image(
                path,
                text,
                request["flags"],
                request["use_cache"],
                talk.progress,
                talk.note,
                points,
            )
            return _load_image(image, points, undo)
        talk.progress(f"compiling {name}")
        data = clang.compile_object(path, text, request["flags"])
    from hypermesh_ebpf.image import elf

    loaded = elf.load_object(data, name, request["settings"], points, strict=request["strict"])
    for fd in [fd for _spec, fd in (*loaded.maps, *loaded.programs) if fd is not None]:
        undo.callback(os.close, fd)
    return loaded


def _load_image(
    image: Image, points: Mapping[str, EbpfAttachType], undo: ExitStack
) -> LoadedSource:
    """Make an image's maps, and load the programs of which it is known where they will run."""
    from hypermesh_ebpf.bpf.programs import create_maps

    maps = create_maps(image.maps)
    for fd in maps:
        undo.callback(os.close, fd)
    programs: list[tuple[ProgramSpec, int | None]] = []
    for spec in image.programs:
        point = points.get(spec.name)
        if point is None and spec.attach is not None:
            point = EbpfAttachType.parse(spec.attach)  # BCC's names are whole
        kind = point.kind if point else spec.kind
        if kind is None or (kind in _BY_BTF_ID and point is None):
            programs.append((spec, None))
            continue
        fd = _load_for(spec, kind, point, image.license, maps)
        undo.callback(os.close, fd)
        programs.append((spec, fd))
    return LoadedSource(
        image.name, image.license, tuple(zip(image.maps, maps, strict=True)), tuple(programs)
    )


def _load_for(
    spec: ProgramSpec,
    kind: str,
    point: EbpfAttachType | None,
    license: str,
    maps: Sequence[int],
) -> int:
    """Load one program for the place where it will run; asks first whether there is one."""
    btf_id = 0
    if point is not None:
        target = require_hook(point)
        if kind in _BY_BTF_ID:
            btf_id = function_btf_id(_BY_BTF_ID[kind] + target) or 0
    return load_program(spec, point or kind, license, maps, btf_id)


def _identify(fd: int) -> dict[str, Any]:
    info = read_program_info(fd)
    return {"id": info.id, "tag": info.tag}


def _take(
    program: Mapping[str, Any], point: EbpfAttachType, descriptors: Iterator[int], undo: ExitStack
) -> int:
    """The descriptor of a program that a message tells; loaded now if it was not, for there."""
    spec = unpack_program(program["spec"])
    fd = next(descriptors) if program["fd"] else None
    maps = [next(descriptors) for _ in range(program["maps"])]
    if fd is None or not _is_made_for(spec, program["made_for"], point):
        fd = _load_for(spec, point.kind, point, program["license"], maps)
        undo.callback(os.close, fd)
    return fd


def _is_made_for(spec: ProgramSpec, made_for: str | None, point: EbpfAttachType) -> bool:
    """Whether the loaded program can be attached there, or another has to be loaded from it."""
    if made_for is not None and point.kind in _BY_BTF_ID:
        return made_for == str(point)
    own = parse_partly(made_for) or spec.kind
    return own is not None and program_type(own) == program_type(point)


def _attach(talk: Talk, request: Mapping[str, Any], descriptors: Sequence[int]) -> None:
    """One program is attached at one place."""
    from hypermesh_ebpf import attach

    point = EbpfAttachType.parse(request["point"])
    require_hook(point)
    if point.kind in _NEED_TRACEFS:
        from hypermesh_ebpf.host.filesystems import enter_private_mounts

        enter_private_mounts()
    with ExitStack() as undo:
        fd = _take(request["program"], point, iter(descriptors), undo)
        known = _identify(fd)
        try:
            made = attach.attach(
                point,
                fd,
                known["id"],
                lambda hold: talk.hold(asdict(hold), fd),
                pinnable=request["pinnable"],
            )
        except AttachError as error:  # options of the point here, where a monitor has flags
            if error.remedy:
                place = f"{point.kind}:{point.target}"
                remedy = error.remedy.replace("--replace", f"`{place},replace`")
                error.remedy = remedy.replace("--mode generic", f"`{place},mode=generic`")
            raise
        for each in made.descriptors:
            undo.callback(os.close, each)
        log.info("attached program %d to %s (%s)", known["id"], point, made.hook)
        _answer(talk, known, made, [fd, *made.descriptors])


def _answer(talk: Talk, known: Mapping[str, Any], made: Any, descriptors: list[int]) -> None:
    if made.note:
        talk.note(made.note)
    answer = {**known, "hook": made.hook, "held": made.held, "ifindex": made.ifindex}
    talk.done(answer, descriptors)


def _swap(talk: Talk, request: Mapping[str, Any], descriptors: Sequence[int]) -> None:
    """Another program takes the place of one of ours, in one step."""
    from hypermesh_ebpf.attach import swap

    old_fd, new_fd, *links = descriptors
    held = Hold.from_dict(request["hold"], old_fd) if request["hold"] else None
    swap.replace(EbpfAttachType.parse(request["point"]), old_fd, new_fd, held, links)
    talk.done({}, [])


SERVERS: dict[str, Callable[[Talk, Mapping[str, Any], Sequence[int]], None]] = {
    "load": _load,
    "attach": _attach,
    "swap": _swap,
}
