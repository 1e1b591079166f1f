"""``hmebpf headers``: kernel headers for BCC programs, made of the running kernel's types."""

from __future__ import annotations

import click

from hypermesh_ebpf.errors import UsageError


@click.command()
@click.option("--fresh", is_flag=True, help="Make them anew, even if they are kept.")
@click.option("-o", "--output", "place", metavar="DIRECTORY", help="Write them there; keep none.")
@click.option("--btf", metavar="FILE", help="Another kernel's BTF; needs --release.")
@click.option("--release", metavar="RELEASE", help="That kernel's `uname -r`.")
@click.option("--vmlinux", is_flag=True, help="A vmlinux.h for clang (CO-RE) instead.")
@click.option("-v", "--verbose", count=True, help="Say more where something fails.")
def headers(
    fresh: bool,
    place: str | None,
    btf: str | None,
    release: str | None,
    vmlinux: bool,
    verbose: int,
) -> None:
    """Make or reuse headers of the running kernel, and print where they are.

    \b
    Any BCC program compiles with them, without an installed header package:
        BCC_KERNEL_SOURCE=$(hmebpf headers) execsnoop-bpfcc
    """
    from pathlib import Path

    from hypermesh_ebpf.image.headers import header_tree, vmlinux_header

    if (btf is None) != (release is None):
        raise UsageError("hmebpf headers", "--btf and --release belong together", "give both")
    if vmlinux and (place or release):
        raise UsageError(
            "hmebpf headers", "--vmlinux goes with --fresh alone", "see `hmebpf headers --help`"
        )
    if vmlinux:
        click.echo(vmlinux_header(fresh=fresh))
        return
    click.echo(
        header_tree(
            btf,
            release=release,
            fresh=fresh,
            place=Path(place).absolute() if place else None,
            report=lambda text: click.echo(text, err=True),
        )
    )
