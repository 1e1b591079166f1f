"""BCC and libbpf are found, and their absence explained."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hypermesh_ebpf.errors import MissingDependency
from hypermesh_ebpf.host import dependencies
from hypermesh_ebpf.host.dependencies import find_bcc, find_library, libbpf_version


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    find_bcc.cache_clear()
    yield
    find_bcc.cache_clear()


@pytest.fixture
def places(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The only place where packages are looked for."""
    monkeypatch.setattr(dependencies, "_package_places", lambda: [tmp_path])
    return tmp_path


def make_package(directory: Path, *files: str) -> Path:
    package = directory / "bcc"
    package.mkdir()
    for name in ("__init__.py", *files):
        (package / name).write_text("")
    return package


def test_absent_bcc_names_every_distributions_package(places: Path) -> None:
    with pytest.raises(MissingDependency) as caught:
        find_bcc()
    for words in (
        "apt install python3-bpfcc",
        "dnf install python3-bcc",
        "pacman -S python-bcc",
        "py3-bcc",
    ):
        assert words in (caught.value.remedy or "")
    assert "not installed" in str(caught.value)


def test_the_other_bcc_of_pypi_is_not_taken(places: Path) -> None:
    package = make_package(places, "lattice.py")
    with pytest.raises(MissingDependency) as caught:
        find_bcc()
    assert "crystal-lattice" in str(caught.value)
    assert str(package) in str(caught.value)


def test_package_without_its_library(places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_package(places, "libbcc.py", "table.py")
    monkeypatch.setattr(dependencies, "find_library", lambda name: None)
    with pytest.raises(MissingDependency, match=r"libbcc\.so\.0 is not"):
        find_bcc()


def test_version_from_the_package_else_the_library(
    places: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = make_package(places, "libbcc.py", "table.py")
    library = places / "libbcc.so.0"
    (places / "libbcc.so.0.31.0").write_text("")
    library.symlink_to("libbcc.so.0.31.0")
    monkeypatch.setattr(dependencies, "find_library", lambda name: str(library))
    assert find_bcc().version == "0.31.0"
    (package / "version.py").write_text("__version__ = '0.29.1'\n")
    find_bcc.cache_clear()
    found = find_bcc()
    assert (found.version, found.package_dir, found.library) == ("0.29.1", package, str(library))


def test_real_bcc_is_what_its_own_interpreter_says() -> None:
    code = "import bcc; print(bcc.__version__); print(bcc.__file__)"
    answer = subprocess.run(["/usr/bin/python3", "-c", code], capture_output=True, text=True)
    if answer.returncode:
        pytest.skip("the system's Python has no bcc")
    version, file = answer.stdout.split()
    found = find_bcc()
    assert (found.version, found.package_dir) == (version, Path(file).parent.resolve())
    assert "bcc" not in sys.modules


def test_find_library_agrees_with_the_loader() -> None:
    listing = subprocess.run(["/sbin/ldconfig", "-p"], capture_output=True, text=True).stdout
    assert "libbpf.so.1 " in listing, "the test machine has libbpf"
    found = find_library("libbpf.so.1")
    assert found is not None
    assert Path(found).resolve().name in {
        Path(line.split("=> ")[1]).resolve().name
        for line in listing.splitlines()
        if "libbpf.so.1 " in line
    }
    assert find_library("libhmebpf-none.so.7") is None


def test_libbpf_version_is_one_at_least() -> None:
    assert int(libbpf_version().split(".")[0]) >= 1
