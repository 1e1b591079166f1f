"""A bundled monitor's programs loaded by the test itself, with macros of its choice."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any

from hypermesh_ebpf.attach import attach
from hypermesh_ebpf.attach_type import EbpfAttachType
from hypermesh_ebpf.bpf.libbpf import BPF_ANY, check, libbpf
from hypermesh_ebpf.bpf.maps import RINGBUF, Map
from hypermesh_ebpf.bpf.programs import close_all, close_attachments, create_map, load_program
from hypermesh_ebpf.host.filesystems import enter_private_mounts
from hypermesh_ebpf.image.source import build_image, bundled_directory
from hypermesh_ebpf.monitors.declaration import Hook, Monitor, Rung
from hypermesh_ebpf.opening import complete_options


@contextmanager
def load_rung(
    monitor: Monitor,
    rung: Rung,
    defines: Mapping[str, int],
    wanted: Callable[[Hook], bool] = lambda hook: True,
    **given: Any,
) -> Iterator[dict[str, Map]]:
    """The readable maps, by name, of a rung whose ``wanted`` hooks are attached."""
    options = complete_options(monitor, given)
    image = build_image(
        bundled_directory() / monitor.source,
        {**monitor.defines(options), **rung.defines, **defines},
        needs_btf=rung.needs_btf,
        use_cache=False,
    ).image
    with ExitStack() as undo:
        fds = [create_map(spec) for spec in image.maps]
        undo.callback(close_all, fds)
        for spec, fd in zip(image.maps, fds, strict=True):
            if spec.name == "settings":
                settings = monitor.settings(options)
                check(libbpf().bpf_map_update_elem(fd, bytes(4), settings, BPF_ANY))
        attachments: list[int] = []
        undo.callback(close_attachments, attachments)
        for hook in filter(wanted, rung.hooks):
            program = image.program(hook.program)
            fd = load_program(program, hook.kind, image.license, fds)
            undo.callback(os.close, fd)
            with ThreadPoolExecutor(1) as pool:
                attachments += pool.submit(_attach, hook, fd).result()
        specs = zip(image.maps, fds, strict=True)
        yield {spec.name: Map(spec, fd) for spec, fd in specs if spec.type != RINGBUF}


def _attach(hook: Hook, fd: int) -> tuple[int, ...]:
    """For a thread of its own, which gets mounts of its own where tracefs is not mounted."""
    enter_private_mounts()
    point = EbpfAttachType.make(hook.kind, hook.target)
    return tuple(attach(point, fd, 0, lambda hold: None).descriptors)
