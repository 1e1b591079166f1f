"""``hmebpf cache``: the compiled images that are kept on disk."""

from __future__ import annotations

import click

from hypermesh_ebpf.errors import HmebpfError


@click.group(no_args_is_help=False)
def cache() -> None:
    """Show or clear the compiled programs that are kept on disk."""


@cache.command()
def show() -> None:
    """List what is kept."""
    import time

    from hypermesh_ebpf.image import cache as images

    try:
        kept = images.entries()
    except images.CacheUnusable as error:
        raise _unusable(error) from error
    click.echo(f"{images.directory()}: {len(kept)} images, {sum(e.size for e in kept)} bytes")
    for entry in kept:
        made = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(entry.time))
        click.echo(f"{entry.key[:12]}  {made}  {entry.size:>8}  {entry.name}")


@cache.command()
def clear() -> None:
    """Remove all of them; the next run compiles anew."""
    from hypermesh_ebpf.image import cache as images

    try:
        click.echo(f"{images.clear()} images removed from {images.directory()}")
    except images.CacheUnusable as error:
        raise _unusable(error) from error


def _unusable(error: Exception) -> HmebpfError:
    from hypermesh_ebpf.image import cache as images

    try:
        remedy = f"look at it with `ls -ld {images.directory()}`"
    except images.CacheUnusable:
        remedy = "name a directory of yours: `export XDG_CACHE_HOME=DIRECTORY`"
    return HmebpfError("open the image cache", str(error), remedy)
