"""From a bundled C file to an Image: the cache first, the compiler else."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hypermesh_ebpf import __version__
from hypermesh_ebpf.bpf.libbpf import possible_cpus
from hypermesh_ebpf.errors import Unsupported
from hypermesh_ebpf.host.dependencies import find_bcc
from hypermesh_ebpf.host.filesystems import read_tracefs
from hypermesh_ebpf.host.kernel_btf import btf_path
from hypermesh_ebpf.image import cache
from hypermesh_ebpf.image.image import Image

if TYPE_CHECKING:
    from hypermesh_ebpf.attach_type import EbpfAttachType
    from hypermesh_ebpf.image.user_text import UserSource

_PACKAGE = Path(__file__).parent.parent


def bundled_directory() -> Path:
    """Where the bundled C files are: in the installed package, or beside it in a checkout."""
    installed = _PACKAGE / "bpf_c"
    return installed if installed.is_dir() else _PACKAGE.parent / "bpf_c"


@dataclass(frozen=True, slots=True)
class Build:
    """What was made, and whether clang had to run; ``note`` says why the cache was of no use."""

    image: Image
    cached: bool
    note: str | None = None


def build_image(
    path: Path,
    defines: Mapping[str, str | int],
    *,
    needs_btf: bool = False,
    use_cache: bool = True,
    report: Callable[[str], None] = lambda text: None,
) -> Build:
    """The image of one C file with these macros, from the cache or compiled now.

    ``report`` is told before the compiler starts.  Raises CompileError, MissingBtf,
    MissingDependency.
    """
    text = path.read_text()
    return _build(
        _key(path, text, defines),
        lambda: _compile(path, text, defines, needs_btf),
        use_cache,
        lambda: report(f"compiling {path.name}"),
    )


def build_user_image(
    path: Path,
    text: str,
    cflags: Sequence[str] = (),
    use_cache: bool = True,
    report: Callable[[str], None] = lambda text: None,
    note: Callable[[str], None] = lambda text: None,
    attach: Mapping[str, EbpfAttachType] = {},
) -> Image:
    """The image of C of the user's own, written for BCC: from the cache, or compiled now.

    ``path`` is what messages call it, and its ``#include "..."`` are looked for beside it;
    ``report`` is told before the compiler starts, ``note`` why the cache was of no use; ``attach``
    tells by function where programs will be attached.  See
    :func:`hypermesh_ebpf.image.user_source.compile_user` for the errors.
    """

    def make() -> Image:
        from hypermesh_ebpf.image.user_source import compile_user

        return compile_user(path.name, text, cflags, path.parent, report, attach)

    from hypermesh_ebpf.image.user_text import UserSource  # not for the bundled monitors

    build = _build(
        _user_key(UserSource.read(path.name, text, cflags, path.parent, attach)),
        make,
        use_cache,
        lambda: report(f"compiling {path.name}"),
    )
    if build.note:
        note(build.note)
    return build.image


def _build(
    key: str, make: Callable[[], Image], use_cache: bool, report: Callable[[], None]
) -> Build:
    note = None
    if use_cache:
        try:
            image = cache.load(key)
        except cache.CacheUnusable as error:
            image, note = None, f"image cache not used: {error}"
        if image:
            return Build(image, cached=True)
    report()
    image = make()
    if use_cache and note is None:
        try:
            cache.store(key, image)
        except cache.CacheUnusable as error:
            note = f"image not cached: {error}"
    return Build(image, cached=False, note=note)


def _compile(path: Path, text: str, defines: Mapping[str, str | int], needs_btf: bool) -> Image:
    # Imported here: a run from the cache needs neither libbcc nor the kernel's types.
    from hypermesh_ebpf.image import bcc
    from hypermesh_ebpf.image.kernel_types import KernelTypes

    types = ""
    if needs_btf:
        with KernelTypes(btf_path()) as kernel:
            headers = "".join(header.read_text() for header in path.parent.glob("*.h"))
            types = kernel.declare(text, headers)
    unit = f'{types}#line 1 "{path.name}"\n{text}'
    return bcc.compile_c(path.name, unit, bcc.compiler_flags(path.parent, defines))


def _btf_state() -> str:
    """What tells two BTF files apart; the kernel's own is told by the kernel's build."""
    path = btf_path()
    if path.startswith("/sys/"):
        return path
    try:
        status = os.stat(path)
    except OSError:
        return path
    return f"{path} {status.st_size} {status.st_mtime_ns}"


def _key(path: Path, text: str, defines: Mapping[str, str | int]) -> str:
    headers = sorted(path.parent.glob("*.h")) + sorted((_PACKAGE / "image/include").rglob("*.h"))
    # What this code makes of a source is an ingredient, too.
    own = ("image/kernel_types.py", "image/bcc.py", "image/kallsyms", "libbcc.py")
    headers += [_PACKAGE / name for name in own]
    macros = "\n".join(f"{name}={value}" for name, value in sorted(defines.items()))
    found = find_bcc()
    parts = [__version__, text, macros, found.version, _btf_state()]
    return cache.make_key(parts + [header.read_text() for header in headers])


def _user_key(source: UserSource) -> str:
    """Everything that the image of a user's text is made of."""
    from hypermesh_ebpf.image import conventions

    parts: list[str | bytes] = [__version__, source.name, find_bcc().version, _btf_state()]
    parts += [
        *source.flags,
        source.readers,
        *source.headers,
        *source.headers.values(),
        *source.kernel_headers,
    ]
    parts.append(source.text.encode(errors="surrogateescape"))
    parts += [_read_format(*each) for each in conventions.tracepoints(source.code)]
    parts.append(str(possible_cpus()))  # the size of a perf buffer's map
    return cache.make_key([*parts, *_own_ingredients()])


def _own_ingredients() -> Iterator[str]:
    """What this code makes of a source is an ingredient, too; told by its files' times, which is
    quicker than reading half a megabyte."""
    for folder in (
        _PACKAGE / "image",
        _PACKAGE / "image/include",
        _PACKAGE / "image/include_kernel",
    ):
        for path in sorted(folder.rglob("*.h") if folder.name != "image" else folder.glob("*.py")):
            status = path.stat()
            yield f"{path} {status.st_size} {status.st_mtime_ns}"
    for name in ("image/kallsyms", "libbcc.py"):
        yield (_PACKAGE / name).read_text()


def _read_format(category: str, name: str) -> str:
    """The layout of a tracepoint's arguments, "" where it cannot be read: BCC will say so."""
    try:
        return read_tracefs(f"events/{category}/{name}/format")
    except (OSError, Unsupported):
        return ""
