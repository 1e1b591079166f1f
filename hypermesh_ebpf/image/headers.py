"""Headers made from the running kernel's own types, for programs that ask for kernel headers.

:func:`header_tree` is for BCC: a directory for its ``BCC_KERNEL_SOURCE`` in which every program
finds what it includes.  :func:`vmlinux_header` is for clang and libbpf-style programs: the
``vmlinux.h`` whose accesses are relocated when the object is loaded.

Both are made once for each kernel and kept below the cache's directory.  What is kept becomes code
in the kernel, so a directory that another user could have written - or that lies in one - is
refused, and whatever was damaged is made anew.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import re
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from hypermesh_ebpf import __version__
from hypermesh_ebpf.errors import HmebpfError
from hypermesh_ebpf.host.dependencies import find_bcc
from hypermesh_ebpf.host.kernel_btf import btf_path
from hypermesh_ebpf.image import bcc_tree, cache
from hypermesh_ebpf.image.kernel_config import read_configuration
from hypermesh_ebpf.image.kernel_dump import dump_types, join_modules, module_btfs, read_btf

_HERE = Path(__file__).parent
_MANIFEST = "MANIFEST"
_KEEP = 4  # of each sort: two kernels, with and without a module more
_ABANDONED_S = 3600
_RELOCATED = """\
#ifndef __VMLINUX_H__
#define __VMLINUX_H__
#ifndef BPF_NO_PRESERVE_ACCESS_INDEX
#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)
#endif
{types}
#ifndef BPF_NO_PRESERVE_ACCESS_INDEX
#pragma clang attribute pop
#endif
#endif
"""


def header_tree(
    btf: str | None = None,
    *,
    release: str | None = None,
    fresh: bool = False,
    place: Path | None = None,
    report: Callable[[str], None] = lambda text: None,
) -> Path:
    """A directory for ``BCC_KERNEL_SOURCE``: with it any BCC program compiles without headers.

    ``btf`` and ``release`` (``uname -r``) are those of another kernel than the running one;
    ``fresh`` makes the tree anew; ``place`` makes it there instead of in the cache.  Making one
    takes two seconds - ``report`` is told before - and reusing one 20 ms.  Raises MissingBtf,
    MissingDependency, CompileError where BCC cannot use the result, and HmebpfError where it cannot
    be kept.
    """
    path = btf or btf_path()
    release = release or platform.release()
    modules = {file.name: read_btf(str(file)) for file in module_btfs(path)}
    kernel = read_btf(path)

    def make(folder: Path) -> None:
        report(f"making kernel headers for {release} from {path}")
        raw = join_modules(kernel, modules.values()) if modules else kernel
        bcc_tree.make_tree(folder, dump_types(raw, path), release, kernel_version(release))

    if place is not None:
        return place_at(place, make)
    bcc = find_bcc()
    library = os.stat(bcc.library)
    which_bcc = f"{bcc.version} {bcc.library} {library.st_size} {library.st_mtime_ns}"
    configuration = repr(sorted(read_configuration(release).items()))
    parts: list[str | bytes] = ["header tree", __version__, release, which_bcc, configuration]
    parts += [*_own_code(), kernel, *modules, *modules.values()]
    return _keep("tree", cache.make_key(parts), make, fresh)


def kernel_version(release: str) -> tuple[int, int, int]:
    """(major, minor, patch) of a kernel as its own headers would tell.

    Debian's ``uname -r`` has no patch level of the stable series - 6.1.0-56-amd64 is 6.1.192 - but
    its ``uname -v`` has: ``#1 SMP PREEMPT_DYNAMIC Debian 6.1.192-2 (2026-11-02)``.
    """
    build = platform.version() if release == platform.release() else ""
    debian = re.search(r"Debian (\d+\.\d+\.\d+)", build)
    numbers = [int(n) for n in re.findall(r"\d+", debian[1] if debian else release)[:3]]
    major, minor, patch = (*numbers, 0, 0, 0)[:3]
    return major, minor, patch


def vmlinux_header(btf: str | None = None, *, fresh: bool = False) -> Path:
    """``vmlinux.h``: all types of the kernel, their members' offsets corrected at load (CO-RE).

    ``btf`` names another BTF file than this kernel's; ``fresh`` makes it anew.  Its directory holds
    nothing else and can be given to clang with -I.  Raises MissingBtf, MissingDependency, and
    HmebpfError where it cannot be kept.
    """
    path = btf or btf_path()
    raw = read_btf(path)

    def make(folder: Path) -> None:
        (folder / "vmlinux.h").write_text(_RELOCATED.format(types=dump_types(raw, path)))

    key = cache.make_key(["vmlinux.h", __version__, *_own_code(), raw])
    return _keep("vmlinux", key, make, fresh) / "vmlinux.h"


def kept_headers() -> list[Path]:
    """The header trees and vmlinux.h files that are kept; none where nothing ever was.

    Raises HmebpfError for a directory that somebody else could have changed.
    """
    if not (cache.directory() / "headers").is_dir():
        return []
    with _locked_store() as store:
        return sorted(path for path in store.iterdir() if not path.name.startswith("."))


def clear_headers() -> int:
    """Remove all of them; how many they were.  Raises HmebpfError."""
    kept = kept_headers()
    if kept:
        with _locked_store() as store:
            for path in store.iterdir():
                _remove(path)
    return len(kept)


def _own_code() -> Iterator[bytes]:
    """What this code makes of a kernel's types is an ingredient, too."""
    for name in ("headers.py", "kernel_dump.py", "kernel_config.py", "bcc_tree.py"):
        yield (_HERE / name).read_bytes()
    for path in sorted(bcc_tree.SOURCES.iterdir()):
        yield path.read_bytes()


# -- what is kept


def _keep(sort: str, key: str, make: Callable[[Path], None], fresh: bool) -> Path:
    """The kept directory ``SORT-KEY``, whole; made by ``make`` in an empty one if need be.

    Whoever comes while another makes it waits for him.  Raises HmebpfError.
    """
    with _locked_store() as store:
        kept = store / f"{sort}-{key[:32]}"
        if not fresh and _is_whole(kept):
            with suppress(OSError):
                os.utime(kept)  # what is used is not the oldest
            return kept
        _drop_old(store, sort)
        work = store / f".{os.getpid()}-{sort}"
        try:
            work.mkdir(mode=0o700)
            make(work)
            _write_manifest(work)
            if os.path.lexists(kept):
                _remove(kept)
            work.rename(kept)
        except OSError as error:
            raise _unusable(f"{error.filename or store}: {error.strerror}") from error
        finally:
            shutil.rmtree(work, ignore_errors=True)
        return kept


def place_at(folder: Path, make: Callable[[Path], None]) -> Path:
    """A directory of the caller's choice, made whole or not at all.

    It must not exist or be empty.  Raises HmebpfError.
    """
    work = folder.absolute().with_name(f".{os.getpid()}-{folder.name}")
    try:
        work.mkdir(mode=0o755)
        make(work)
        work.rename(folder)
    except OSError as error:
        raise HmebpfError(
            f"write the kernel headers to {folder}",
            error.strerror,
            "name a directory that does not exist yet, where you may write",
            errno=error.errno,
        ) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return folder


@contextmanager
def _locked_store() -> Iterator[Path]:
    """The directory in which all is kept, checked, and locked against other processes."""
    try:
        store = cache.directory() / "headers"
        store.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        store.mkdir(mode=0o700, exist_ok=True)
        store = store.resolve()
        _refuse_foreign(store)
        descriptor = os.open(store, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except cache.CacheUnusable as error:
        raise _unusable(str(error)) from error
    except OSError as error:
        raise _unusable(f"{error.filename}: {error.strerror}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield store
    finally:
        os.close(descriptor)


def _refuse_foreign(store: Path) -> None:
    """Refuse a directory that others could have changed, or put another in the place of.

    The compiler opens files by their path, so every directory above counts.  In one with the sticky
    bit, such as /tmp, nobody can rename what is ours.
    """
    for folder in (store, *store.parents):
        status = folder.lstat()
        owners = {os.geteuid()} if folder in (store, store.parent) else {os.geteuid(), 0}
        if status.st_uid not in owners:
            raise cache.CacheUnusable(f"{folder}: belongs to uid {status.st_uid}, not to us")
        shared = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        if shared and (folder == store or not status.st_mode & stat.S_ISVTX):
            raise cache.CacheUnusable(f"{folder}: others may write it")


def _unusable(cause: str) -> HmebpfError:
    return HmebpfError(
        "keep the kernel headers",
        cause,
        "name a directory of yours with `export XDG_CACHE_HOME=DIRECTORY`, or have them written "
        "with `hmebpf headers -o DIRECTORY`",
    )


def _digests(folder: Path) -> Iterator[str]:
    """A line for each file: the digest of what is in it, and its path.  Stand-ins are empty."""
    nothing = hashlib.sha256().hexdigest()
    for root, folders, files in os.walk(folder):
        folders.sort()
        for name in sorted(files):
            path = os.path.join(root, name)
            status = os.lstat(path)
            digest = nothing
            if stat.S_ISLNK(status.st_mode):
                digest = f"-> {os.readlink(path)}"
            elif status.st_size:
                digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
            yield f"{digest} {os.path.relpath(path, folder)}\n"


def _write_manifest(folder: Path) -> None:
    text = "".join(_digests(folder))
    (folder / _MANIFEST).write_text(text)


def _is_whole(folder: Path) -> bool:
    """Whether everything is there as it was made."""
    try:
        status = folder.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
            return False
        wanted = (folder / _MANIFEST).read_text()
        found = (line for line in _digests(folder) if not line.endswith(f" {_MANIFEST}\n"))
        return "".join(found) == wanted
    except (OSError, ValueError):
        return False


def _drop_old(store: Path, sort: str) -> None:
    """Remove what has not been used for the longest time, and what killed processes left."""
    kept = sorted(store.glob(f"{sort}-*"), key=lambda path: path.lstat().st_mtime)
    abandoned = time.time() - _ABANDONED_S
    left = [path for path in store.glob(".*") if path.lstat().st_mtime < abandoned]
    for path in (*kept[: 1 - _KEEP], *left):
        _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
