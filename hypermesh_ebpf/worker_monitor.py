"""The worker's part in a bundled monitor: choose the rung, build the image, load, attach.

The request is ``{"monitor": name, "options": {...}, "rung": name or null, "use_cache": bool,
"sampled": bool}``; the answer is what :func:`hypermesh_ebpf.worker.unpack_monitor` reads.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

from hypermesh_ebpf import log, monitors
from hypermesh_ebpf.attach import attach
from hypermesh_ebpf.attach_type import EbpfAttachType
from hypermesh_ebpf.bpf.libbpf import BPF_ANY, check, libbpf
from hypermesh_ebpf.bpf.programs import create_map, load_program, read_program_info
from hypermesh_ebpf.errors import (
    AttachError,
    HmebpfError,
    InterfaceBusy,
    InterfaceNotFound,
    LoadError,
    TargetGone,
    Unsupported,
    VerifierError,
)
from hypermesh_ebpf.host.dependencies import find_bcc
from hypermesh_ebpf.host.hooks import probe_hook
from hypermesh_ebpf.host.kernel_btf import function_btf_id
from hypermesh_ebpf.host.ladder import Choice, choose_rung
from hypermesh_ebpf.image.image import Image
from hypermesh_ebpf.image.source import build_image, bundled_directory
from hypermesh_ebpf.monitors.declaration import Hook, Monitor, Options, Rung
from hypermesh_ebpf.side_by_side import call_side_by_side
from hypermesh_ebpf.worker_process import Talk

_BY_BTF_ID = ("fentry", "fexit")
# The user has to settle these; another rung would meet the same.
_FINAL = (InterfaceBusy, InterfaceNotFound, TargetGone)
# What the probes did not foresee: another rung may do.
_REFUSALS = (AttachError, LoadError, Unsupported, VerifierError)


def get_ready(name: str) -> None:
    """What can be done for a monitor before its options are known: ask the kernel, which remembers
    nothing of it, and keep the answers.  What is refused will be refused again, and told."""
    with suppress(HmebpfError):
        choose_rung(monitors.load(name))
        find_bcc()


def serve(talk: Talk, request: dict[str, Any]) -> None:
    """The first rung of the monitor's ladder that loads and attaches.  Raises any HmebpfError."""
    monitor = monitors.load(request["monitor"])
    options, use_cache = request["options"], request["use_cache"]
    start = 0
    reasons: list[str] = []
    if request["rung"] is not None:  # this one and no other
        start = [rung.name for rung in monitor.rungs].index(request["rung"])
        monitor = replace(monitor, rungs=monitor.rungs[: start + 1])
    while True:
        try:
            choice = choose_rung(monitor, start)
        except Unsupported as error:
            error.cause = "; ".join([*reasons, error.cause or ""])
            raise
        try:
            with _Load(talk, monitor, choice.rung, options) as load:
                load.run(use_cache, sampled=request["sampled"])
                load.hand_over(_degraded(choice, reasons))
            return
        except _REFUSALS as error:
            if isinstance(error, _FINAL) or choice.index + 1 >= len(monitor.rungs):
                raise
            reasons.append(f"{choice.rung.name}: {error}")
            talk.note(f"{error}; trying the next way")
            start = choice.index + 1


def _degraded(choice: Choice, failed: list[str]) -> dict[str, Any] | None:
    """What a rung below the first means for the user; None on the first."""
    if choice.index == 0:
        return None
    reasons = [*failed, choice.reason] if choice.reason else failed
    return {
        "rung": choice.index + 1,
        "hook": choice.rung.name,
        "lost": list(choice.rung.lost),
        "reason": "; ".join(reasons) or None,
    }


@dataclass(slots=True)
class _Target:
    """What is being made for one target; closed here after the parent has copies.

    ``at_hooks`` has for each hook the place of its program among ``programs``: one program serves
    all hooks that want the same, since verifying it once more would cost up to 30 ms.
    """

    name: str
    maps: list[int] = field(default_factory=list)
    programs: list[dict[str, Any]] = field(default_factory=list)
    program_fds: list[int] = field(default_factory=list)
    at_hooks: list[int] = field(default_factory=list)
    attachments: list[int] = field(default_factory=list)
    ifindex: int | None = None


class _Load:
    """One rung on its way into the kernel; whatever was made is undone if it does not get there."""

    def __init__(self, talk: Talk, monitor: Monitor, rung: Rung, options: Options) -> None:
        self._talk, self._monitor, self._rung = talk, monitor, rung
        self._options = options
        self._image: Image | None = None
        self._targets: list[_Target] = []
        self._hooks: dict[str, None] = {}
        self._attached_at = 0.0

    def __enter__(self) -> _Load:
        return self

    def __exit__(self, *exc: object) -> None:
        for target in self._targets:
            loaded = [fd for fd in target.program_fds if fd >= 0]
            for fd in target.attachments + loaded + target.maps:
                os.close(fd)

    def run(self, use_cache: bool, *, sampled: bool) -> None:
        """Build, load and attach for every target; ``sampled``: programs that can pass over events,
        for which all others need not pay."""
        path = bundled_directory() / self._monitor.source
        defines = {**self._monitor.defines(self._options), **self._rung.defines}
        if sampled:
            defines["SAMPLED"] = 1
        build = build_image(
            path,
            defines,
            needs_btf=self._rung.needs_btf,
            use_cache=use_cache,
            report=self._talk.progress,
        )
        if build.note:
            self._talk.note(build.note)
        self._image = build.image
        hooks = list(self._hooks_here())
        for name in self._monitor.targets(self._options):
            target = _Target(name)
            self._targets.append(target)
            self._load(target, build.image, hooks)
        # Attach only when everything is loaded: the hooks of all targets start as close as can be.
        for target in self._targets:
            self._attach(target, hooks)
        self._attached_at = time.monotonic()

    def hand_over(self, degraded: dict[str, Any] | None) -> None:
        """Give the parent everything."""
        assert self._image is not None
        specs = [asdict(spec) for spec in self._image.maps]
        message = {
            "hooks": list(self._hooks),
            "degraded": degraded,
            "attached_at": self._attached_at,
            "targets": [
                {
                    "name": target.name,
                    "maps": specs,
                    "programs": target.programs,
                    "attachments": len(target.attachments),
                    "ifindex": target.ifindex,
                }
                for target in self._targets
            ],
        }
        descriptors = [fd for t in self._targets for fd in t.maps + t.program_fds + t.attachments]
        self._talk.done(message, descriptors)

    def _hooks_here(self) -> Iterator[tuple[Hook, str]]:
        """The rung's hooks with their targets resolved, without optional ones that lack theirs."""
        for hook in self._rung.hooks:
            found = probe_hook(hook.kind, hook.target)
            if found.available:
                yield hook, found.target or hook.target
            elif not hook.optional:
                raise AttachError(
                    f"attach {hook.kind} to {hook.target}", found.reason, found.remedy
                )

    def _load(self, target: _Target, image: Image, hooks: list[tuple[Hook, str]]) -> None:
        for spec in image.maps:
            target.maps.append(create_map(spec))
        settings = self._monitor.settings(self._options)
        if settings is not None:
            names = [spec.name for spec in image.maps]
            key = bytes(4)
            fd = target.maps[names.index("settings")]
            check(libbpf().bpf_map_update_elem(fd, key, settings, BPF_ANY))
        wanted: dict[tuple[str, str, int], None] = {}
        for hook, resolved in hooks:
            btf_id = function_btf_id(resolved) or 0 if hook.kind in _BY_BTF_ID else 0
            wanted[hook.program, hook.kind, btf_id] = None
            target.at_hooks.append(list(wanted).index((hook.program, hook.kind, btf_id)))
        target.program_fds += [-1] * len(wanted)
        # The verifier takes its milliseconds on each CPU by itself.
        loads = [partial(self._load_program, target, image, n, *w) for n, w in enumerate(wanted)]
        call_side_by_side(loads, os.cpu_count() or 1)
        for (name, kind, _btf_id), fd in zip(wanted, target.program_fds, strict=True):
            info = read_program_info(fd)
            target.programs.append({"name": name, "kind": kind, "id": info.id, "tag": info.tag})

    def _load_program(
        self, target: _Target, image: Image, number: int, name: str, kind: str, btf_id: int
    ) -> None:
        program = image.program(name)
        fd = load_program(program, kind, image.license, target.maps, btf_id)
        target.program_fds[number] = fd

    def _attach(self, target: _Target, hooks: list[tuple[Hook, str]]) -> None:
        for (hook, resolved), place in zip(hooks, target.at_hooks, strict=True):
            fd, program = target.program_fds[place], target.programs[place]
            made = attach(
                self._point(hook, resolved, target.name),
                fd,
                program["id"],
                lambda hold: self._talk.hold(asdict(hold), hold.prog_fd),
            )
            log.info("attached program %d (%s) to %s", program["id"], program["name"], made.hook)
            target.attachments += made.descriptors
            self._hooks[made.hook] = None
            if made.ifindex is not None:
                target.ifindex = made.ifindex
            if made.note:
                self._talk.note(made.note)

    def _point(self, hook: Hook, resolved: str, target: str) -> EbpfAttachType:
        """Where a hook is: the interface of an XDP program comes from the user."""
        if hook.kind != "xdp":
            return EbpfAttachType.make(hook.kind, resolved)
        mode, replace_ = self._options["mode"], self._options["replace"]
        return EbpfAttachType.xdp(target, mode=mode, replace=replace_)
