"""The image cache: what is found again, what is not, and what is refused."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from hypermesh_ebpf.bpf.spec import MapSpec, ProgramSpec
from hypermesh_ebpf.host.dependencies import Bcc
from hypermesh_ebpf.image import cache, source
from hypermesh_ebpf.image.cache import CacheUnusable
from hypermesh_ebpf.image.image import Image
from hypermesh_ebpf.image.source import Build, build_image
from tests.running import ROOT, run_cli

KEY = "0" * 64
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to give files away")


def make_image(name: str = "some.c", size: int = 100) -> Image:
    description = ["v", [["a", "unsigned int"], ["b", "char", [4]]], "struct_packed"]
    return Image(
        name,
        "GPL",
        (MapSpec("counts", 2, 4, 8, 16, 0, "int", description),),
        (ProgramSpec("count", bytes(range(256)) * size, ((0, 0), (16, 0))),),
    )


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the cache will be; nothing is there yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/hmebpf"


def entry(folder: Path) -> Path:
    """The only image in the cache."""
    (found,) = folder.glob("*.image")
    return found


# ---- the store ---------------------------------------------------------------------------------


def test_what_was_stored_is_found_again(folder: Path) -> None:
    assert cache.load(KEY) is None
    cache.store(KEY, make_image())
    assert cache.load(KEY) == make_image()
    assert cache.load("1" * 64) is None
    assert folder.stat().st_mode & 0o777 == 0o700
    assert entry(folder).stat().st_mode & 0o777 == 0o600
    assert os.listdir(folder) == [f"{KEY}.image"], "no temporary file is left"


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: b"",
        lambda raw: raw[: len(raw) // 2],
        lambda raw: raw[:-1],
        lambda raw: raw[:100] + bytes([raw[100] ^ 1]) + raw[101:],
        lambda raw: bytes([raw[0] ^ 1]) + raw[1:],
        lambda raw: raw + b"x",
    ],
    ids=["empty", "half", "one byte short", "one bit in it", "one bit in its sum", "longer"],
)
def test_damaged_file_is_as_good_as_none(folder: Path, damage: Any) -> None:
    cache.store(KEY, make_image())
    entry(folder).write_bytes(damage(entry(folder).read_bytes()))
    assert cache.load(KEY) is None
    cache.store(KEY, make_image())  # and is made good
    assert cache.load(KEY) == make_image()


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777])
def test_directory_that_others_may_write_is_refused(folder: Path, mode: int) -> None:
    cache.store(KEY, make_image())
    folder.chmod(mode)
    for use in (lambda: cache.load(KEY), lambda: cache.store(KEY, make_image()), cache.entries):
        with pytest.raises(CacheUnusable, match=f"{folder}: others may write it"):
            use()


@pytest.mark.parametrize("mode", [0o660, 0o606])
def test_file_that_others_may_write_is_refused(folder: Path, mode: int) -> None:
    cache.store(KEY, make_image())
    entry(folder).chmod(mode)
    with pytest.raises(CacheUnusable, match=r"\.image: others may write it"):
        cache.load(KEY)


@needs_root
def test_what_belongs_to_somebody_else_is_refused(folder: Path) -> None:
    cache.store(KEY, make_image())
    os.chown(entry(folder), 65534, -1)
    with pytest.raises(CacheUnusable, match=r"\.image: belongs to uid 65534, not to us"):
        cache.load(KEY)
    os.chown(folder, 65534, -1)
    with pytest.raises(CacheUnusable, match=f"{folder}: belongs to uid 65534"):
        cache.load(KEY)
    with pytest.raises(CacheUnusable, match=f"{folder}: belongs to uid 65534"):
        cache.store(KEY, make_image())


def test_symbolic_link_is_refused(folder: Path, tmp_path: Path) -> None:
    cache.store(KEY, make_image())
    entry(folder).rename(tmp_path / "elsewhere")
    (folder / f"{KEY}.image").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CacheUnusable, match="symbolic link"):
        cache.load(KEY)


def test_place_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    for place in (tmp_path / "file", Path("/proc/self/no_such")):
        monkeypatch.setenv("XDG_CACHE_HOME", str(place))
        with pytest.raises(CacheUnusable, match=f"{place}/hmebpf: "):
            cache.store(KEY, make_image())


def test_user_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/somewhere")
    assert cache.directory() == Path("/somewhere/.cache/hmebpf")
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")
    assert cache.directory() == Path("/somewhere/.cache/hmebpf")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("os.getuid", lambda: 4_000_000_001)  # one that passwd does not know
    for use in (cache.directory, lambda: cache.load(KEY), lambda: cache.store(KEY, make_image())):
        with pytest.raises(CacheUnusable, match="XDG_CACHE_HOME"):
            use()


def test_oldest_go_when_there_are_many(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "_KEEP", 3)
    keys = [f"{number:064}" for number in range(6)]
    for age, key in enumerate(keys):
        cache.store(key, make_image())
        os.utime(folder / f"{key}.image", (1000 + age, 1000 + age))
    cache.store(KEY, make_image("newest.c"))  # the first key again
    assert sorted(path.stem for path in folder.glob("*.image")) == sorted([KEY, *keys[4:]])


WRITER = """
import sys
from hypermesh_ebpf.image import cache
from tests.unit.test_cache import KEY, make_image
for number in range(40):
    cache.store(KEY, make_image(sys.argv[1], 50 + number))
    found = cache.load(KEY)
    assert found is not None and found.name in ("first.c", "second.c", "third.c")
"""


def test_several_writers_at_once(folder: Path) -> None:
    """Readers see a whole image of one of them, and nothing else is left."""
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, name], cwd=ROOT, stderr=subprocess.PIPE)
        for name in ("first.c", "second.c", "third.c")
    ]
    for writer in writers:
        _out, said = writer.communicate(timeout=300)
        assert writer.returncode == 0, said.decode()
    assert cache.load(KEY) in [make_image(f"{name}.c", 89) for name in ("first", "second", "third")]
    assert os.listdir(folder) == [f"{KEY}.image"]


# ---- the key -----------------------------------------------------------------------------------


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A C file and a header, and a compiler that makes an image of any text."""
    monkeypatch.setattr(source, "find_bcc", lambda: Bcc("0.26.0", tmp_path, "libbcc.so.0"))

    def compile_(path: Path, text: str, defines: Mapping[str, str | int], needs_btf: bool) -> Image:
        return make_image(path.name)

    monkeypatch.setattr(source, "_compile", compile_)
    folder = tmp_path / "bpf_c"
    folder.mkdir()
    (folder / "count.c").write_text('#include "own.h"\nint f(void *ctx) { return 0; }')
    (folder / "own.h").write_text("#define ZERO 0")
    return folder / "count.c"


def build(path: Path, **defines: str | int) -> Build:
    return build_image(path, defines)


def test_second_build_comes_from_the_cache(project: Path) -> None:
    told: list[str] = []
    first = build_image(project, {"BY": 1}, report=told.append)
    second = build_image(project, {"BY": 1}, report=told.append)
    assert (first.cached, second.cached) == (False, True)
    assert first.image == second.image
    assert told == ["compiling count.c"], "nothing is compiled the second time"
    assert first.note is second.note is None


def test_whatever_goes_into_an_image_makes_another(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(project)
    assert build(project).cached
    assert not build(project, BY=1).cached, "a macro"
    assert not build(project, BY=2).cached, "its value"
    project.write_text(project.read_text() + " ")
    assert not build(project).cached, "the source"
    assert build(project).cached
    (project.parent / "own.h").write_text("#define ZERO 1")
    assert not build(project).cached, "a header"
    monkeypatch.setattr(source, "find_bcc", lambda: Bcc("0.31.0", tmp_path, "libbcc.so.0"))
    assert not build(project).cached, "BCC's version"
    monkeypatch.setattr(source, "__version__", "99")
    assert not build(project).cached, "the version of what writes kernel types"
    btf = tmp_path / "btf"
    btf.write_bytes(b"one kernel's types")
    monkeypatch.setenv("HMEBPF_BTF", str(btf))
    assert not build(project).cached, "another BTF file"
    assert build(project).cached
    btf.write_bytes(b"another kernel's types")
    assert not build(project).cached, "other BTF in the same file"
    sysname, node, release, _version, machine = os.uname()
    another = os.uname_result((sysname, node, release, "#2 SMP another build", machine))
    monkeypatch.setattr(os, "uname", lambda: another)
    assert not build(project).cached, "the kernel's build"


def test_cache_that_is_not_wanted_is_neither_read_nor_written(project: Path, folder: Path) -> None:
    assert not build_image(project, {}, use_cache=False).cached
    assert not folder.exists()
    build(project)
    assert not build_image(project, {}, use_cache=False).cached


def test_unusable_cache_is_noted_and_costs_only_time(project: Path, folder: Path) -> None:
    build(project)
    folder.chmod(0o777)
    refused = build(project)
    assert not refused.cached
    assert refused.image == make_image("count.c")
    assert refused.note == f"image cache not used: {folder}: others may write it"


def test_image_that_cannot_be_kept_is_noted(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/self/no_such")
    made = build(project)
    assert made.image == make_image("count.c")
    assert made.note is not None
    assert made.note.startswith("image not cached: /proc/self/no_such/hmebpf: ")


# ---- the command -------------------------------------------------------------------------------


def test_show_and_clear(folder: Path) -> None:
    empty = run_cli("cache", "show")
    assert (empty.returncode, empty.stdout) == (0, f"{folder}: 0 images, 0 bytes\n")
    cache.store(KEY, make_image("old.c"))
    os.utime(entry(folder), (1_000_000_000, 1_000_000_000))
    cache.store("a" * 64, make_image("new.c", 200))
    cache.store("b" * 64, make_image("broken.c"))
    (folder / f"{'b' * 64}.image").write_bytes(b"?")
    os.utime(folder / f"{'b' * 64}.image", (2, 2))
    (folder / ".99999-left").write_bytes(b"by a killed writer")
    first, *rows = run_cli("cache", "show").stdout.splitlines()
    sizes = [path.stat().st_size for path in folder.glob("*.image")]
    assert first == f"{folder}: 3 images, {sum(sizes)} bytes"
    assert [row.split()[0] for row in rows] == ["a" * 12, "0" * 12, "b" * 12], "newest first"
    assert [row.split()[-1] for row in rows] == ["new.c", "old.c", "damaged"]
    stamp = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(1_000_000_000))
    assert stamp in rows[1]
    cleared = run_cli("cache", "clear")
    assert cleared.stdout == f"3 images removed from {folder}\n"
    assert os.listdir(folder) == []
    assert run_cli("cache", "clear").stdout == f"0 images removed from {folder}\n"


def test_show_of_a_cache_that_is_refused(folder: Path) -> None:
    cache.store(KEY, make_image())
    folder.chmod(0o777)
    for command in ("show", "clear"):
        done = run_cli("cache", command)
        assert done.returncode == 1
        assert done.stderr.splitlines() == [
            f"error: open the image cache: {folder}: others may write it",
            f"hint: look at it with `ls -ld {folder}`",
        ]
        assert entry(folder).exists()


def test_show_without_a_home() -> None:
    code = "import os; os.getuid = lambda: 4_000_000_001; from hypermesh_ebpf.cli import main; "
    argv = [sys.executable, "-c", f"{code} raise SystemExit(main())", "cache", "show"]
    env = {k: v for k, v in os.environ.items() if k not in ("HOME", "XDG_CACHE_HOME")}
    done = subprocess.run(argv, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert "error: open the image cache: neither XDG_CACHE_HOME nor a home" in done.stderr
    assert "hint: " in done.stderr and "XDG_CACHE_HOME=" in done.stderr
