"""``hmebpf cache``: the compiled images and kernel headers that are kept on disk."""

from __future__ import annotations

import click

from hypermesh_ebpf.errors import HmebpfError


@click.group(no_args_is_help=False)
def cache() -> None:
    """Show or clear the compiled programs and kernel headers that are kept on disk."""


@cache.command()
def show() -> None:
    """List what is kept."""
    import time

    from hypermesh_ebpf.image import cache as images
    from hypermesh_ebpf.image.headers import kept_headers

    try:
        kept = images.entries()
    except images.CacheUnusable as error:
        raise _unusable(error) from error
    click.echo(f"{images.directory()}: {len(kept)} images, {sum(e.size for e in kept)} bytes")
    for entry in kept:
        made = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(entry.time))
        click.echo(f"{entry.key[:12]}  {made}  {entry.size:>8}  {entry.name}")
    for path in kept_headers():
        click.echo(f"kernel headers: {path}")


@cache.command()
def clear() -> None:
    """Remove all of them, and the kernel headers; the next run makes them anew."""
    from hypermesh_ebpf.image import cache as images
    from hypermesh_ebpf.image.headers import clear_headers

    try:
        click.echo(f"{images.clear()} images removed from {images.directory()}")
        if headers := clear_headers():
            click.echo(f"{headers} sets of kernel headers removed")
    except images.CacheUnusable as error:
        raise _unusable(error) from error


def _unusable(error: Exception) -> HmebpfError:
    from hypermesh_ebpf.image import cache as images

    try:
        remedy = f"look at it with `ls -ld {images.directory()}`"
    except images.CacheUnusable:
        remedy = "name a directory of yours: `export XDG_CACHE_HOME=DIRECTORY`"
    return HmebpfError("open the image cache", str(error), remedy)
