"""Compiled images on disk, so that clang runs once for each source and kernel.

An entry is named by a hash of all that went into it: the source, every header, the kernel's build,
BCC's version, the compiler's flags.  It holds code for the kernel, so a directory or file that
another user could have written is refused, never read.  A cache that cannot be used costs time, not
the run: its caller goes on without it and says so.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from hypermesh_ebpf.image.image import FORMAT, Image

_SUFFIX = ".image"
_KEEP = 256
_DIGEST = 32


class CacheUnusable(Exception):
    """The cache cannot be read or written; the text says why.  Never fatal."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One cached image: its key, the source's name, bytes on disk, time of its making."""

    key: str
    name: str
    size: int
    time: float


def directory() -> Path:
    """Where images are kept: ``$XDG_CACHE_HOME/hmebpf``, by default ``~/.cache/hmebpf``.

    A relative path does not count (XDG Base Directory Specification).  Raises CacheUnusable where
    the user has no home directory.
    """
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not base.is_absolute():
        try:
            base = Path.home() / ".cache"
        except RuntimeError:
            raise CacheUnusable("neither XDG_CACHE_HOME nor a home directory is known") from None
    return base / "hmebpf"


def make_key(parts: Iterable[str | bytes]) -> str:
    """A key for what was made of these parts on the running kernel."""
    digest = hashlib.sha256()
    kernel = os.uname()
    for part in (str(FORMAT), kernel.machine, kernel.version, _kernel_build(), *parts):
        raw = part.encode() if isinstance(part, str) else part
        digest.update(len(raw).to_bytes(8, "little") + raw)
    return digest.hexdigest()


def _kernel_build() -> bytes:
    """What tells two builds of a kernel apart: its build id (ELF notes), and its release."""
    try:
        notes = Path("/sys/kernel/notes").read_bytes()
    except OSError:
        notes = b""
    return notes + os.uname().release.encode()


def load(key: str) -> Image | None:
    """The image kept under a key; None if there is none or it is damaged.  Raises CacheUnusable."""
    folder = _open_directory(create=False)
    if folder is None:
        return None
    try:
        return _read(folder, key + _SUFFIX)
    finally:
        os.close(folder)


def _read(folder: int, name: str) -> Image | None:
    try:
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CacheUnusable(f"{directory() / name}: {error.strerror}") from error
    with open(fd, "rb") as file:
        _refuse_foreign(os.fstat(fd), directory() / name)
        raw = file.read()
    digest, payload = raw[:_DIGEST], raw[_DIGEST:]
    if hashlib.sha256(payload).digest() != digest:
        return None
    try:
        return Image.from_bytes(payload)
    except (ValueError, KeyError, TypeError):
        return None


def store(key: str, image: Image) -> None:
    """Keep an image; whole or not at all.  Raises CacheUnusable (full disk, read-only, foreign)."""
    folder = _open_directory(create=True)
    if folder is None:
        raise CacheUnusable(f"{directory()}: cannot be made")
    temporary = f".{os.getpid()}-{key}"
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        payload = image.to_bytes()
        with open(os.open(temporary, flags, 0o600, dir_fd=folder), "wb") as file:
            file.write(hashlib.sha256(payload).digest() + payload)
        os.rename(temporary, key + _SUFFIX, src_dir_fd=folder, dst_dir_fd=folder)
        _drop_oldest(folder)
    except OSError as error:
        _unlink(folder, temporary)
        raise CacheUnusable(f"{directory()}: {error.strerror}") from error
    finally:
        os.close(folder)


def entries() -> list[Entry]:
    """What is kept, newest first.  Raises CacheUnusable."""
    folder = _open_directory(create=False)
    if folder is None:
        return []
    try:
        found = []
        for name in os.listdir(folder):
            if not name.endswith(_SUFFIX):
                continue
            try:
                status = os.stat(name, dir_fd=folder, follow_symlinks=False)
            except FileNotFoundError:
                continue  # somebody cleared the cache
            image = _read(folder, name)
            title = image.name if image else "damaged"
            key = name[: -len(_SUFFIX)]
            found.append(Entry(key, title, status.st_size, status.st_mtime))
        return sorted(found, key=lambda entry: -entry.time)
    finally:
        os.close(folder)


def clear() -> int:
    """Remove every entry, and what killed writers left; how many entries there were.

    Raises CacheUnusable.
    """
    folder = _open_directory(create=False)
    if folder is None:
        return 0
    try:
        names = [name for name in os.listdir(folder) if name.endswith(_SUFFIX) or name[0] == "."]
        for name in names:
            with suppress(FileNotFoundError):
                os.unlink(name, dir_fd=folder)
        return sum(name.endswith(_SUFFIX) for name in names)
    except OSError as error:
        raise CacheUnusable(f"{directory()}: {error.strerror}") from error
    finally:
        os.close(folder)


def _open_directory(*, create: bool) -> int | None:
    """The cache's directory, checked; None where it does not exist and is not to be made."""
    path = directory()
    try:
        if create:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CacheUnusable(f"{path}: {error.strerror}") from error
    try:
        _refuse_foreign(os.fstat(fd), path)
    except CacheUnusable:
        os.close(fd)
        raise
    return fd


def _refuse_foreign(status: os.stat_result, path: Path) -> None:
    if status.st_uid != os.geteuid():
        raise CacheUnusable(f"{path}: belongs to uid {status.st_uid}, not to us")
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise CacheUnusable(f"{path}: others may write it")


def _drop_oldest(folder: int) -> None:
    names = [name for name in os.listdir(folder) if name.endswith(_SUFFIX)]
    if len(names) <= _KEEP:
        return
    names.sort(key=lambda name: os.stat(name, dir_fd=folder).st_mtime)
    for name in names[:-_KEEP]:
        _unlink(folder, name)


def _unlink(folder: int, name: str) -> None:
    """Remove a file if that can be done: it may be gone, or the file system read-only."""
    with suppress(OSError):
        os.unlink(name, dir_fd=folder)
