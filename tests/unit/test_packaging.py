"""The wheel, the lock files, and what importing the package costs."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import hypermesh_ebpf
from hypermesh_ebpf import errors

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's wheel, built by its own backend without the network."""
    pytest.importorskip("hatchling", reason="the build backend is not installed: scripts/test does")
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True, timeout=120)
    (built,) = folder.glob("*.whl")
    return built


def names_in(folder: str, pattern: str) -> set[str]:
    return {str(path.relative_to(ROOT / folder)) for path in (ROOT / folder).rglob(pattern)}


def test_wheel_carries_all_that_the_tool_needs(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        files = set(archive.namelist())
    expected = {f"hypermesh_ebpf/{name}" for name in names_in("hypermesh_ebpf", "*.py")}
    expected |= {f"hypermesh_ebpf/bpf_c/{name}" for name in names_in("bpf_c", "*.[ch]")}
    include = names_in("hypermesh_ebpf/image/include", "*.h")
    expected |= {f"hypermesh_ebpf/image/include/{name}" for name in include}
    assert expected | {"hypermesh_ebpf/py.typed", "hypermesh_ebpf/image/kallsyms"} <= files
    assert any(name.startswith("hypermesh_ebpf/bpf_c/") for name in files)
    assert any(name.startswith("hypermesh_ebpf/image/include/") for name in files)
    assert not [name for name in files if not name.startswith("hypermesh_ebpf")]
    assert not [name for name in files if "__pycache__" in name]


def test_wheel_declares_licence_and_no_package_called_bcc(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("/METADATA")]
        metadata = archive.read(name).decode()
        (licence,) = [name for name in archive.namelist() if name.endswith("/LICENSE")]
        assert "GNU GENERAL PUBLIC LICENSE" in archive.read(licence).decode()
    assert f"Version: {hypermesh_ebpf.__version__}\n" in metadata
    assert "License-Expression: MIT AND GPL-2.0-only\n" in metadata
    required = re.findall(r"^Requires-Dist: ([\w-]+)[^;\n]*$", metadata, re.MULTILINE)
    assert sorted(required) == [
        "click",
        "numpy",
        "pyroute2",
        "rich",
    ]  # PyPI's bcc is something else


def test_installed_wheel_gives_a_working_command(wheel: Path, tmp_path: Path) -> None:
    """In an environment of its own, which borrows only the dependencies from this one."""
    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", environment], check=True, timeout=300)
    python = environment / "bin/python"
    install = ["-m", "pip", "install", "--quiet", "--no-deps", "--no-index", str(wheel)]
    subprocess.run([python, *install], check=True, timeout=300)
    (site,) = environment.glob("lib/python3.*/site-packages")
    borrowed = {
        Path(importlib.import_module(name).__path__[0]).parent for name in ("click", "rich")
    }
    (site / "borrowed.pth").write_text("".join(f"{folder}\n" for folder in borrowed))
    done = subprocess.run(
        [environment / "bin/hmebpf", "--version"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert hypermesh_ebpf.__version__ in done.stdout


def pins(name: str) -> dict[str, str]:
    return dict(re.findall(r"^([\w-]+)==(\S+)", (ROOT / name).read_text(), re.MULTILINE))


def test_lock_files_agree_and_pin_every_requirement() -> None:
    tool, dev = pins("requirements.lock"), pins("requirements-dev.lock")
    assert tool.items() <= dev.items()
    project = (ROOT / "pyproject.toml").read_text()
    for key, locked in (("dependencies", tool), ("dev", dev)):
        (requirements,) = re.findall(rf"^{key} = (\[.*\])$", project, re.MULTILINE)
        for requirement in ast.literal_eval(requirements):
            assert re.match(r"[\w-]+", requirement)[0] in locked  # type: ignore[index]


def test_lock_files_name_no_index() -> None:
    for name in ("requirements.lock", "requirements-dev.lock"):
        assert "://" not in (ROOT / name).read_text()


def loaded_after(statement: str) -> set[str]:
    """The modules that a fresh interpreter has after a statement, beyond those it starts with."""
    script = f"import sys; old = set(sys.modules); {statement}; print(*set(sys.modules) - old)"
    run = [sys.executable, "-c", script]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    return set(done.stdout.split())


def test_importing_the_package_imports_nothing_else() -> None:
    assert loaded_after("import hypermesh_ebpf") <= {"hypermesh_ebpf", "__future__"}


def test_an_error_class_is_had_without_heavy_modules() -> None:
    heavy = {"bcc", "click", "numpy", "pyroute2", "rich"}
    assert not heavy & loaded_after("from hypermesh_ebpf import InterfaceBusy")


def test_every_public_name_comes_from_its_module() -> None:
    for name in hypermesh_ebpf._HOME:
        home = importlib.import_module(hypermesh_ebpf._HOME[name])
        assert getattr(hypermesh_ebpf, name) is getattr(home, name)
        assert name in dir(hypermesh_ebpf)


def test_every_error_is_public_and_type_checkers_know_every_name() -> None:
    assert set(errors.all_errors()) <= set(hypermesh_ebpf._HOME)
    tree = ast.parse(Path(hypermesh_ebpf.__file__).read_text())
    (typed,) = [node for node in tree.body if isinstance(node, ast.If)]
    imported = {
        alias.name: node.module
        for node in typed.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert imported == hypermesh_ebpf._HOME


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'open_monitors'"):
        hypermesh_ebpf.open_monitors  # noqa: B018
