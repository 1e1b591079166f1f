"""From a bundled C file to an Image: the cache first, the compiler else."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from hypermesh_ebpf import __version__
from hypermesh_ebpf.host.dependencies import find_bcc
from hypermesh_ebpf.host.kernel_btf import btf_path
from hypermesh_ebpf.image import cache
from hypermesh_ebpf.image.image import Image

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
    key, note = _key(path, text, defines), None
    if use_cache:
        try:
            image = cache.load(key)
        except cache.CacheUnusable as error:
            image, note = None, f"image cache not used: {error}"
        if image:
            return Build(image, cached=True)
    report(f"compiling {path.name}")
    image = _compile(path, text, defines, needs_btf)
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
    headers += [_PACKAGE / "image/kernel_types.py", _PACKAGE / "image/bcc.py"]
    macros = "\n".join(f"{name}={value}" for name, value in sorted(defines.items()))
    found = find_bcc()
    parts = [__version__, text, macros, found.version, _btf_state()]
    return cache.make_key(parts + [header.read_text() for header in headers])
