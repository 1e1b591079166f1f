"""``hmebpf load`` and ``hmebpf run``: a user's own programs, attached and shown live."""

from __future__ import annotations

import re
import sys
from typing import TYPE_CHECKING, Any

import click

from hypermesh_ebpf.cli.options import COMMON, read_run_options
from hypermesh_ebpf.errors import UsageError

if TYPE_CHECKING:
    from hypermesh_ebpf.attach_type import EbpfAttachType

_LOAD_HELP = """Load compiled programs, attach them, show their maps and events.

FILE is an ELF object (.o), or raw bytecode, which needs --attach. What an object's sections say
decides where its programs run; --attach says it where they do not, or otherwise:

\b
  hmebpf load count.o --attach xdp:eth0
  hmebpf load tools.o --attach trace_open=kprobe:do_sys_openat2 --set target_pid=42
  hmebpf load count.o --attach xdp:eth0 --pin

Several files with programs for one interface run one after another, in this order.
"""
_RUN_HELP = """Compile C at run time, attach its programs, show their maps and events.

FILE is C as BCC takes it (BPF_HASH, TRACEPOINT_PROBE, kprobe__FUNCTION, ...), or as libbpf does
(SEC, needs clang). Kernel headers are not needed: kernel types come from the kernel's BTF.

\b
  hmebpf run opens.c
  hmebpf run count.c --attach count=xdp:lo
"""
_ATTACH_HELP = "Where to attach, KIND:TARGET[,OPTION=VALUE...]; PROGRAM= before it names one."
_PIN_HELP = "Keep it attached after the command ends, under this set's name, and show nothing."
_OWN = (
    click.Argument(["files"], nargs=-1, required=True, metavar="FILE..."),
    click.Option(["--attach"], multiple=True, metavar="[PROGRAM=]POINT", help=_ATTACH_HELP),
    click.Option(
        ["--set", "settings"],
        multiple=True,
        metavar="VAR=VALUE",
        help="Set a global variable of the object before it is loaded.",
    ),
    click.Option(["--no-events"], is_flag=True, help="Leave ring and perf buffers alone."),
    click.Option(["--pin"], is_flag=True, help=_PIN_HELP),
    click.Option(["--name"], help="The set's name for --pin, and on screen (default: the file's)."),
)
_FLAGS = click.Option(
    ["--cflag", "flags"], multiple=True, metavar="FLAG", help="An argument for the C compiler."
)


def _run(**given: Any) -> None:
    from hypermesh_ebpf.program_session import Wanted, open_programs, pin
    from hypermesh_ebpf.run import report, run_programs

    run = read_run_options(given, events=not given["no_events"])
    wanted = Wanted(
        files=given["files"],
        attach=tuple(_parse_attach(text) for text in given["attach"]),
        settings=dict(_parse_setting(text) for text in given["settings"]),
        flags=given.get("flags", ()),
        name=given["name"],
        use_cache=run.use_cache,
        events=not given["no_events"],
    )

    def tell(kind: str, text: str) -> None:
        report(run, kind, text)

    if given["pin"]:
        if run.max_overhead is not None:
            raise UsageError(
                f"--pin with --max-overhead {given['max_overhead']:g}",
                "what is pinned stays when the command has ended, and nobody watches over it",
                "leave one of the two out; `hmebpf top` shows what pinned programs cost",
            )
        for line in pin(wanted, tell):
            click.echo(line)
        return
    run_programs(lambda: open_programs(wanted, tell), run, sys.stdout)


def _parse_attach(text: str) -> tuple[str | None, EbpfAttachType]:
    """("count", xdp:lo) of "count=xdp:lo", (None, xdp:lo) of "xdp:lo"."""
    from hypermesh_ebpf.attach_type import EbpfAttachType

    match = re.match(r"([^:=,/]+)=", text)
    program = match[1] if match else None
    return program, EbpfAttachType.parse(text[match.end() :] if match else text)


def _parse_setting(text: str) -> tuple[str, str]:
    name, has_value, value = text.partition("=")
    if not name or not has_value:
        raise UsageError(f"--set {text}", "it gives no value", "--set VARIABLE=VALUE")
    return name, value


load = click.Command("load", callback=_run, params=[*_OWN, *COMMON], help=_LOAD_HELP)
run = click.Command("run", callback=_run, params=[*_OWN, _FLAGS, *COMMON], help=_RUN_HELP)
