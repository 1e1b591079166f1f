"""The command line: click and nothing else; what a command does is imported when it runs."""

from __future__ import annotations

import errno
import sys

import click

from hypermesh_ebpf import __version__, monitors
from hypermesh_ebpf.errors import HmebpfError, OutputError, UsageError, describe_errno

# name: (module in this package and its function if that is called otherwise, what --help says)
_COMMANDS = {
    "load": ("programs.load", "Load compiled eBPF programs of your own, and show what they count."),
    "run": ("programs.run", "Compile C at run time, and show what it counts."),
    "check-system": ("check_system", "What this machine can do, and how to mend what it cannot."),
    "list": ("list", "The programs, maps, links and attachments of this host."),
    "show": ("show", "Everything about one program, map, link or pinned set."),
    "top": ("top", "Which programs of this host take how much CPU, live."),
    "dump": ("dump", "What is in a map, typed."),
    "pin": ("pins.pin", "Keep a program that runs when its process ends."),
    "unpin": ("pins.unpin", "Remove the pins of a set."),
    "detach": ("pins.detach", "Take programs off: a link, a pinned set, an attach point."),
    "unload": ("pins.unload", "Detach and unpin everything of a pinned set."),
    "cleanup": ("cleanup", "Remove attached programs whose owner is gone."),
    "headers": ("headers", "Kernel headers for any BCC program, made of the kernel's own types."),
    "cache": ("cache", "Show or clear the compiled programs and headers kept on disk."),
}


class _Commands(click.Group):
    """Finds commands by name, so that only the one that runs is imported."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return monitors.names() + list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in _COMMANDS:
            from importlib import import_module

            name, _help = _COMMANDS[cmd_name]
            module, _, function = name.partition(".")
            found = import_module(f"{__name__}.{module}")
            command: click.Command = getattr(found, function or module)
            return command
        if cmd_name in monitors.names():
            from hypermesh_ebpf.cli.monitor import make_command

            return make_command(monitors.load(cmd_name))
        return None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list of commands, without making them: that would import every declaration."""
        with formatter.section("Monitors"):
            formatter.write_dl([(name, monitors.summary(name)) for name in monitors.names()])
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_module, text) in _COMMANDS.items()])


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="hmebpf")
def hmebpf() -> None:
    """See what the Linux kernel sees: packets, process executions, socket calls.

    Needs root or CAP_BPF, CAP_PERFMON and CAP_NET_ADMIN; `hmebpf check-system` tells what this
    machine can do and how to mend what it cannot.
    """


def main() -> int:
    """Run the command line; its exit status.  Errors become two lines, never a traceback."""
    try:
        status = hmebpf.main(sys.argv[1:] or ["--help"], prog_name="hmebpf", standalone_mode=False)
    except click.exceptions.Abort:
        return 0  # Ctrl-C before anything was attached
    except click.ClickException as error:
        return _explain(_usage_error(error))
    except HmebpfError as error:
        return _explain(error)
    except OSError as error:  # click could not write, or something that should have its own error
        return _explain(_unforeseen(error))
    return status if isinstance(status, int) else 0  # click returns what ctx.exit() was given


def _unforeseen(error: OSError) -> HmebpfError:
    """An error that nobody mapped; for a full disk or a reader that left it is the output's."""
    if error.errno in (errno.EPIPE, errno.ENOSPC, errno.EBADF) and error.filename is None:
        from hypermesh_ebpf.output.writer import silence

        silence(sys.stdout)
        return OutputError("write the output", describe_errno(error.errno), "write it elsewhere")
    return HmebpfError("hmebpf", str(error), "-vv shows what failed; please report it")


def _usage_error(error: click.ClickException) -> HmebpfError:
    """click's complaint about the command line, in our words' order."""
    context = error.ctx if isinstance(error, click.UsageError) else None
    path = context.command_path if context else "hmebpf"
    return UsageError(path, error.format_message().rstrip("."), f"see `{path} --help`")


def _explain(error: HmebpfError) -> int:
    """Cause and remedy on stderr; the long text under -v, a traceback under -vv."""
    verbose = _verbosity(sys.argv)
    if verbose and error.details:
        click.echo(error.details, err=True)
    if verbose > 1:
        import traceback

        traceback.print_exception(error)
    click.echo(f"{click.style('error:', fg='red', bold=True)} {error}", err=True)
    if error.remedy:
        click.echo(f"{click.style('hint:', fg='cyan')} {error.remedy}", err=True)
    return error.exit_code


def _verbosity(argv: list[str]) -> int:
    """How many -v were given; click has no say any more when an error gets here."""
    count = 0
    for word in argv[1:]:
        if word == "--":
            break
        if word == "--verbose":
            count += 1
        elif word.startswith("-v") and set(word[1:]) == {"v"}:
            count += len(word) - 1
    return count
