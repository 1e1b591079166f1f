"""From the command to the first reading, and from Ctrl-C to the prompt."""

from __future__ import annotations

import resource
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from benchmarks.jobs import BCC, BPFTRACE, FRAME, JOBS, READING, by_bcc, by_bpftrace, ours
from benchmarks.measure import OURS, Result, Settings, say, take_turns
from benchmarks.peers import HMEBPF, environment, hmebpf
from benchmarks.process import running, time_to, time_whole
from hypermesh_ebpf import cli, monitors

TITLE = "Start and exit"

_CLICK = "bare click app"
_SOON = 0.001
"""Seconds from attached to the first reading, the same for all: an interval would hide the rest."""
_NOTE = "process start to the first reading in the output, which is taken 1 ms after the attach"


def run(settings: Settings) -> Iterator[Result]:
    """--help; cold, warm, warm on a terminal; exit."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        yield _compare_help(settings, folder)
        yield _compare_cold("exec", settings, folder)
        yield _compare_cold("xdp", settings, folder)
        env = environment(folder / "warm")
        for job in JOBS:
            yield from _compare_warm(job, settings, env)
        for job in JOBS:
            yield _compare_table(job, settings, env)
        for job in JOBS:
            yield _compare_exit(job, settings, env)


def _compare_help(settings: Settings, folder: Path) -> Result:
    say("start: --help")
    command, env = _write_click_app(folder / "app"), environment()
    contenders = {
        OURS: partial(time_whole, hmebpf("--help"), env),
        _CLICK: partial(time_whole, command, env),
    }
    rounds = take_turns(settings.rounds * 3, contenders, warm_up=2)
    return Result("hmebpf --help", "s", rounds, _CLICK, 1.2)


def _write_click_app(folder: Path) -> list[str]:
    """A click app that lists what ours lists and can do none of it, compiled as ours is."""
    commands = {name: monitors.summary(name) for name in monitors.names()}
    commands |= {name: text for name, (_module, text) in cli._COMMANDS.items()}
    folder.mkdir()
    (folder / "bare.py").write_text(
        "import click\n\n\n@click.group()\ndef main():\n"
        f"    {cli.hmebpf.help!r}\n\n\n"
        f"for name, text in {commands!r}.items():\n"
        "    main.add_command(click.Command(name, help=text))\n"
    )
    (folder / "app").write_text("from bare import main\n\nmain()\n")
    return [HMEBPF[0], str(folder / "app"), "--help"]


def _compare_cold(job: str, settings: Settings, folder: Path) -> Result:
    """Nothing in our cache.  BCC and bpftrace have none: they compile at each start."""
    say(f"start: {job}, cold")
    cache = folder / "cold"

    def start_cold() -> float:
        shutil.rmtree(cache, ignore_errors=True)
        return time_to(_once(job), READING[OURS], env=environment(cache))

    rounds = take_turns(settings.rounds, {OURS: start_cold, **_peers(job, environment())})
    return Result(f"cold start, {JOBS[job]}", "s", rounds, BCC, 1.2, note=_NOTE)


def _compare_warm(job: str, settings: Settings, env: Mapping[str, str]) -> Iterator[Result]:
    """The time, and what all processes together worked for it, which a busy machine blurs less."""
    say(f"start: {job}, warm")
    contenders = {OURS: partial(time_to, _once(job), READING[OURS], env=env), **_peers(job, env)}
    cpu: dict[str, list[float]] = {name: [] for name in contenders}

    def weigh(name: str) -> float:
        before = _children_cpu()
        took = contenders[name]()
        cpu[name].append(_children_cpu() - before)
        return took

    rounds = take_turns(settings.rounds, {name: partial(weigh, name) for name in contenders})
    counted = {name: figures[-settings.rounds :] for name, figures in cpu.items()}
    budget = None if job == "xdp" else 0.45  # that of tracepoint monitors
    yield Result(f"warm start, {JOBS[job]}", "s", rounds, BCC, budget, note=_NOTE)
    note = "of all its processes, to the end of a run with one reading"
    yield Result(f"CPU of a warm start, {JOBS[job]}", "s", counted, BCC, note=note)


def _children_cpu() -> float:
    """CPU seconds of all processes that ended and were waited for, with theirs."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _once(job: str) -> list[str]:
    return ours(job, "-d", str(_SOON), "-o", "json")


def _peers(job: str, env: Mapping[str, str]) -> dict[str, Callable[[], float]]:
    peers = {BCC: partial(time_to, by_bcc(job, _SOON, 1), READING[BCC], env=env)}
    if job != "xdp":
        command = by_bpftrace(job, _SOON, 1)
        peers[BPFTRACE] = partial(time_to, command, READING[BPFTRACE], env=env)
    return peers


def _compare_table(job: str, settings: Settings, env: Mapping[str, str]) -> Result:
    say(f"start: {job}, table")
    command = ours(job, "-d", str(_SOON))
    contenders = {
        OURS: partial(time_to, command, FRAME, env=env, terminal=True),
        BCC: _peers(job, env)[BCC],
    }
    rounds = take_turns(settings.rounds, contenders)
    note = "the same to the first table with a reading, on a terminal; BCC's into a pipe"
    return Result(f"warm start, {JOBS[job]}, table", "s", rounds, BCC, note=note)


def _compare_exit(job: str, settings: Settings, env: Mapping[str, str]) -> Result:
    say(f"start: {job}, exit")
    commands = {OURS: ours(job, "-i", "0.05", "-o", "json"), BCC: by_bcc(job, 0.05)}
    if job != "xdp":
        commands[BPFTRACE] = by_bpftrace(job, 0.05)
    contenders = {
        name: partial(_time_exit, command, READING[name], env) for name, command in commands.items()
    }
    rounds = take_turns(settings.rounds, contenders)
    note = "SIGINT, while it monitors, to the end of the process"
    if job != "xdp":
        note += "; the kernel ends tracepoints one by one, 40 ms each"
    limit = None if job == "net" else 0.3  # that of one hook; net-monitor has twenty
    return Result(f"Ctrl-C to exit, {JOBS[job]}", "s", rounds, BCC, limit=limit, note=note)


def _time_exit(command: Sequence[str], until: str, env: Mapping[str, str]) -> float:
    with running(command, until, env=env) as run:
        return run.interrupt()
