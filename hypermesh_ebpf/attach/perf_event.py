"""Perf events: samples of software and hardware counters, on every CPU or of one process.

perf_event_open(2).  One descriptor for each CPU; CPUs that come online later are not sampled.
"""

from __future__ import annotations

import ctypes as ct
import errno
import os

from hypermesh_ebpf.attach import links, tracing
from hypermesh_ebpf.errors import AttachError, HmebpfError, HookUnsupported, describe_errno
from hypermesh_ebpf.host import perf_events, security, trials
from hypermesh_ebpf.libbcc import libbcc

TRACEPOINT = 2  # PERF_TYPE_TRACEPOINT
_PIN_REMEDY = "attach it without --pin; or boot Linux 5.15 or newer"
_RATE = "kernel.perf_event_max_sample_rate"


def attach(
    prog_fd: int,
    target: str,
    *,
    frequency: int | None = None,
    period: int | None = None,
    pid: int | None = None,
    cpu: int | None = None,
    pinnable: bool = False,
) -> tuple[int, ...]:
    """Let a program run on samples of an event; a descriptor for each CPU (for a process: one).

    Raises UsageError for an unknown event, HookUnsupported where the machine cannot count it,
    AttachError, MissingPrivilege.
    """
    event = perf_events.find_perf_event(target)
    if frequency is None and period is None:
        frequency, period = event.frequency, event.period
    what = f"attach perf_event to {event.name}"
    cpus = [cpu] if cpu is not None else [-1] if pid is not None else perf_events.online_cpus()
    made: list[int] = []
    try:
        for each in cpus:
            made.append(
                _open_link(what, prog_fd, event, frequency or 0, period or 0, pid, each)
                if pinnable
                else _attach(what, prog_fd, event, frequency or 0, period or 0, pid, each)
            )
    except HmebpfError as error:
        for fd in made:
            os.close(fd)
        raise _explain(error, event, frequency or 0, pid, cpu) from error
    return tuple(made)


def _attach(
    what: str,
    prog_fd: int,
    event: perf_events.PerfEvent,
    frequency: int,
    period: int,
    pid: int | None,
    cpu: int,
) -> int:
    attach_event = libbcc().bpf_attach_perf_event
    every = ct.c_uint64(period), ct.c_uint64(frequency)  # bcc declares no types for this one
    process = -1 if pid is None else pid
    return tracing.call(
        what,
        lambda: attach_event(
            prog_fd, event.type, ct.c_uint32(event.config), *every, process, cpu, -1
        ),
    )


def _open_link(
    what: str,
    prog_fd: int,
    event: perf_events.PerfEvent,
    frequency: int,
    period: int,
    pid: int | None,
    cpu: int,
) -> int:
    try:
        fd = trials.open_perf_event(
            event.type,
            event.config,
            frequency or period,
            is_frequency=bool(frequency),
            pid=-1 if pid is None else pid,
            cpu=cpu,
        )
    except OSError as error:
        raise tracing.refusal(what, error.errno or 0) from error
    return _link(what, prog_fd, fd)


def attach_probe(
    what: str,
    prog_fd: int,
    event_type: int,
    config: int,
    config1: int = 0,
    config2: int = 0,
    *,
    pid: int | None = None,
    link: bool,
) -> int:
    """Attach to the event of a tracepoint, kprobe or uprobe without libbcc: by a link or not.

    Raises HookUnsupported where links are not known (before Linux 5.15), AttachError,
    MissingPrivilege.
    """
    try:
        if pid is None:
            fd = trials.open_perf_event(event_type, config, 1, config1, config2)
        else:
            fd = trials.open_perf_event(event_type, config, 1, config1, config2, pid=pid, cpu=-1)
    except OSError as error:
        raise tracing.refusal(what, error.errno or 0) from error
    if link:
        return _link(what, prog_fd, fd)
    try:
        trials.set_program(fd, prog_fd)
        links.enable_perf_event(fd)
    except OSError as error:
        os.close(fd)
        raise tracing.refusal(what, error.errno or 0) from error
    return fd


def _link(what: str, prog_fd: int, event_fd: int) -> int:
    try:
        return links.link_perf_event(event_fd, prog_fd)
    except OSError as error:
        if links.is_unknown(error):
            raise HookUnsupported(
                what,
                f"{describe_errno(error.errno or 0)}: this kernel has no links to perf events "
                "(Linux 5.15), and nothing else can be pinned",
                _PIN_REMEDY,
                errno=error.errno,
            ) from error
        raise tracing.refusal(what, error.errno or 0) from error


def _explain(
    error: HmebpfError,
    event: perf_events.PerfEvent,
    frequency: int,
    pid: int | None,
    cpu: int | None,
) -> HmebpfError:
    """The error, in terms of what the user asked for."""
    number, what = error.errno, error.what
    if number in (errno.ENOENT, errno.ENODEV, errno.EOPNOTSUPP) and event.type != 1:
        return HookUnsupported(
            what,
            f"{error.cause}: this machine has no such hardware counter (virtual machines often "
            "have none)",
            "sample cpu-clock instead",
            errno=number,
        )
    limit = security.read_sysctl(_RATE)
    if number == errno.EINVAL and limit is not None and frequency > int(limit):
        return AttachError(
            what,
            f"{error.cause}: {frequency} samples a second are more than {_RATE} allows ({limit})",
            f"ask for fewer, or `sudo sysctl {_RATE}={frequency}`",
            errno=number,
        )
    if number == errno.ESRCH:
        return AttachError(what, f"{error.cause}: pid {pid}", "look: `ps -e`", errno=number)
    if number in (errno.EINVAL, errno.ENODEV) and cpu is not None:
        online = ", ".join(map(str, perf_events.online_cpus()))
        return AttachError(
            what, f"{error.cause}: CPU {cpu}", f"CPUs online: {online}", errno=number
        )
    return error
