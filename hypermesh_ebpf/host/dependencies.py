"""BCC and libbpf: where they are and which versions.  Neither is on PyPI.

The package that PyPI calls ``bcc`` is a crystal-lattice library; the real one comes from the
distribution, as Python files over ctypes that any interpreter can use.
"""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass
from functools import lru_cache
from glob import glob
from pathlib import Path

from hypermesh_ebpf.bpf.libbpf import libbpf
from hypermesh_ebpf.errors import MissingDependency

INSTALL_BCC = (
    "install BCC: Debian/Ubuntu `apt install python3-bpfcc`, Fedora `dnf install python3-bcc`, "
    "Arch `pacman -S python-bcc`, Alpine `apk add bcc-tools py3-bcc`"
)
_LIBBCC = "libbcc.so.0"


@dataclass(frozen=True, slots=True)
class Bcc:
    """A usable BCC: its version, its Python package's directory, its C library's file."""

    version: str
    package_dir: Path
    library: str


def _package_places() -> list[Path]:
    """Where a distribution or a user may have put the package, sys.path first."""
    places = [Path(entry or ".") for entry in sys.path]
    places += [Path("/usr/lib/python3/dist-packages")]
    for pattern in (
        "/usr/lib/python3*/dist-packages",
        "/usr/lib/python3*/site-packages",
        "/usr/lib64/python3*/site-packages",
        "/usr/local/lib/python3*/dist-packages",
        "/usr/local/lib/python3*/site-packages",
    ):
        places += [Path(found) for found in sorted(glob(pattern), reverse=True)]
    return places


def _is_bcc(package: Path) -> bool:
    """True for the BPF Compiler Collection, not the crystal-lattice package of the same name."""
    return (package / "libbcc.py").is_file() and (package / "table.py").is_file()


def find_library(name: str) -> str | None:
    """The file of a shared library such as "libbcc.so.0", without loading it; None if absent."""
    # Not sysconfig: that reads the whole record of how this interpreter was built, 5 ms.
    triplet = getattr(sys.implementation, "_multiarch", f"{os.uname().machine}-linux-gnu")
    places = [*filter(None, os.environ.get("LD_LIBRARY_PATH", "").split(":"))]
    for root in ("/usr/lib", "/lib", "/usr/local/lib"):
        places += [f"{root}/{triplet}", f"{root}64", root]
    for place in places:
        if os.path.exists(f"{place}/{name}"):
            return f"{place}/{name}"
    import subprocess

    try:  # somewhere else that the loader knows of; musl has no such cache
        listing = subprocess.run(
            ["/sbin/ldconfig", "-p"], capture_output=True, text=True, timeout=10, check=False
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None
    match = re.search(rf"\s{re.escape(name)} .*=> (\S+)", listing)
    return match[1] if match else None


def _version_of(package: Path, library: str) -> str:
    """From the package's version.py, else from the library's file name (libbcc.so.0.26.0)."""
    try:
        match = re.search(r"__version__\s*=\s*['\"]([^'\"]+)", (package / "version.py").read_text())
        if match:
            return match[1]
    except OSError:
        pass
    match = re.search(r"\.so\.(\d[\d.]*)$", os.path.realpath(library))
    return match[1] if match else "unknown"


@lru_cache(maxsize=1)
def find_bcc() -> Bcc:
    """The installed BCC, not loaded (that costs 70 MB).

    Raises MissingDependency with the packages to install, naming what was found instead.
    """
    imposter = None
    for place in _package_places():
        package = place / "bcc"
        if _is_bcc(package):
            library = find_library(_LIBBCC)
            if library is None:
                raise MissingDependency(
                    "find BCC", f"{package} is there, but its library {_LIBBCC} is not", INSTALL_BCC
                )
            return Bcc(_version_of(package, library), package.resolve(), library)
        if imposter is None and (package / "__init__.py").is_file():
            imposter = package
    cause = "its Python package bcc is not installed"
    if imposter is not None:
        cause = (
            f"{imposter} is PyPI's package bcc, a crystal-lattice library, "
            "not the BPF Compiler Collection"
        )
    raise MissingDependency("find BCC", cause, INSTALL_BCC)


def libbpf_version() -> str:
    """The version of libbpf, such as "1.1".  Raises MissingDependency."""
    text: bytes = libbpf().libbpf_version_string()
    return text.decode().lstrip("v")
