"""``hmebpf pin``, ``unpin``, ``detach``, ``unload``: what outlives the command that loaded it."""

from __future__ import annotations

from collections.abc import Iterable

import click

_VERBOSE = click.option("-v", "--verbose", count=True, help="Say more; -vv for tracebacks.")


def _tell(lines: Iterable[str]) -> None:
    for line in lines:
        click.echo(line, err=line.startswith("note: "))


@click.command()
@click.argument("object_", metavar="ID|NAME|PIN")
@click.argument("name", metavar="SETNAME")
@_VERBOSE
def pin(object_: str, name: str, verbose: int) -> None:
    """Keep a program, with its maps and links, when the process that loaded it ends.

    It becomes a set below /sys/fs/bpf/hmebpf, which `hmebpf show SETNAME` and `hmebpf dump
    SETNAME` find again, and `hmebpf unload SETNAME` ends.
    """
    from hypermesh_ebpf import detaching, log
    from hypermesh_ebpf.host.objects import require_objects
    from hypermesh_ebpf.host.pins import check_name
    from hypermesh_ebpf.host.selection import find_object

    log.configure(verbose)
    check_name(name)
    objects = require_objects()
    _tell(detaching.pin_object(objects, find_object(objects, object_), name))


@click.command()
@click.argument("name")
@_VERBOSE
def unpin(name: str, verbose: int) -> None:
    """Remove the pins of a set; what a process still holds goes on until that ends."""
    from hypermesh_ebpf import detaching, log
    from hypermesh_ebpf.host.objects import require_objects

    log.configure(verbose)
    _tell(detaching.unpin_set(require_objects(), name))


@click.command()
@click.argument("name")
@_VERBOSE
def unload(name: str, verbose: int) -> None:
    """Detach everything of a pinned set, and remove its pins."""
    from hypermesh_ebpf import detaching, log
    from hypermesh_ebpf.host.objects import require_objects

    log.configure(verbose)
    _tell(detaching.unload_set(require_objects(), name))


@click.command()
@click.argument("what", metavar="LINK|SETNAME|POINT")
@click.option("--force", is_flag=True, help="Take off what is not hmebpf's, too.")
@_VERBOSE
def detach(what: str, force: bool, verbose: int) -> None:
    """Take programs off: a link (link:3), a pinned set, or an attach point as `hmebpf list`
    writes it (xdp:eth0, tc:eth0,direction=egress).

    Maps stay. What is not ours is left alone without --force.
    """
    from hypermesh_ebpf import detaching, log
    from hypermesh_ebpf.attach_type import EbpfAttachType
    from hypermesh_ebpf.host.objects import Link, require_objects
    from hypermesh_ebpf.host.pins import list_sets
    from hypermesh_ebpf.host.selection import find_object

    log.configure(verbose)
    point = None
    kind, colon, _rest = what.partition(":")
    if colon and kind != "link":
        point = EbpfAttachType.parse(what)
    objects = require_objects()
    if point is not None:
        _tell(detaching.detach_point(objects, point, force=force))
    elif what in list_sets():
        _tell(detaching.detach_set(objects, what))
    else:
        link = find_object(objects, what, ("link",))
        assert isinstance(link, Link)
        _tell(detaching.detach_link(objects, link, force=force))
