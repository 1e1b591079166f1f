"""scripts/vm without a machine: its command line, Debian's packages, its scripts, its verdicts."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts/vm"


@pytest.fixture
def vm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """scripts/vm as a module, with a cache of its own."""
    monkeypatch.setenv("HMEBPF_VM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", os.environ["PATH"] + ":/usr/sbin:/sbin")
    monkeypatch.delenv("HMEBPF_VM_RESULTS", raising=False)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    loader = SourceFileLoader("scripts_vm", str(SCRIPT))
    spec = spec_from_loader("scripts_vm", loader)
    assert spec is not None
    module = module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "scripts_vm", module)  # dataclasses look their module up
    loader.exec_module(module)
    return module


def call(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, SCRIPT, *arguments],
        env={**os.environ, **env},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )


# -- the command line


def test_command_is_taken_word_for_word(vm: Any) -> None:
    words = ["grep", "-v", "--", "a b", "", "--timeout"]
    options = vm.parse_arguments(["6.1", "--timeout", "5", "7.x", "--", *words])
    assert options.kernels == ["6.1", "7"]
    assert options.timeout == 5
    assert options.command == words


def test_kernel_named_twice_boots_once(vm: Any) -> None:
    assert vm.parse_arguments(["7", "5.10", "7.x", "--", "true"]).kernels == ["7", "5.10"]


def test_results_by_variable_or_option(
    vm: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert vm.parse_arguments(["7", "--", "true"]).results is None
    monkeypatch.setenv("HMEBPF_VM_RESULTS", "here")
    assert vm.parse_arguments(["7", "--", "true"]).results == tmp_path / "here"
    given = vm.parse_arguments(["7", "--results", "/there", "--", "true"])
    assert given.results == Path("/there")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["4.19", "--", "true"], "unknown kernel 4.19: there are 5.10, 6.1, 6.12, 7"),
        (["6.1"], "give a kernel and, after --, a command"),
        (["6.1", "--"], "give a kernel and, after --, a command"),
        (["--", "true"], "give a kernel and, after --, a command"),
        (["--fetch", "6.1", "--", "true"], "--fetch and --list run no command"),
        (["6.1", "--env", "A", "--", "true"], "--env takes NAME=VALUE, not A"),
        (["6.1", "--timeout", "0", "--", "true"], "must be above 0"),
        (["6.1", "--parallel", "0", "--", "true"], "must be above 0"),
    ],
)
def test_wrong_usage(arguments: list[str], words: str) -> None:
    done = call(*arguments)
    assert done.returncode == 2
    assert words in done.stderr.splitlines()[-1]


def test_list_tells_what_is_here(tmp_path: Path) -> None:
    make_kernel(tmp_path / "kernels/6.1/6.1.9-1", "6.1.0-9-amd64")
    done = call("--list", HMEBPF_VM_CACHE=str(tmp_path))
    assert done.returncode == 0
    lines = {line.split()[0]: line.split(maxsplit=2)[1:] for line in done.stdout.splitlines()}
    assert lines["6.1"] == ["bookworm", "6.1.0-9-amd64 (Debian 6.1.9-1)"]
    assert lines["7"] == ["trixie-backports", "not downloaded"]


def test_missing_programs_are_named_with_their_packages(
    vm: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "apt-get").symlink_to("/bin/true")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(vm.platform, "machine", lambda: "x86_64")
    with pytest.raises(vm.VmError) as raised:
        vm.prepare(install=False)
    error, hint = str(raised.value).splitlines()
    assert error == "error: missing here: qemu-system-x86 busybox-static kmod util-linux"
    assert hint.startswith("hint: as root: apt-get update && apt-get install ")
    assert hint.endswith(" qemu-system-x86 busybox-static kmod util-linux")


def test_busybox_that_needs_libraries_does_not_do(
    vm: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "busybox").write_bytes(b"\x7fELF\0/lib64/ld-linux-x86-64.so.2\0")
    (tmp_path / "busybox").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "busybox-static" in vm.find_missing()
    (tmp_path / "busybox").write_bytes(b"\x7fELF static")
    assert "busybox-static" not in vm.find_missing()


def test_other_machines_are_refused(vm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vm.platform, "machine", lambda: "aarch64")
    with pytest.raises(vm.VmError, match="needs an x86-64 machine with apt-get"):
        vm.prepare(install=False)


# -- Debian's packages


def targets(*lines: tuple[str, str, str]) -> str:
    return "".join(
        f"{release}\thttp://mirror.example/{path}/\t{origin}\t/etc/apt/sources.list.d/x.sources:1\n"
        for release, path, origin in lines
    )


@pytest.mark.parametrize("origin", ["Debian", "$(ORIGIN)"])
def test_mirrors_of_debian_are_told_from_others(vm: Any, origin: str) -> None:
    text = targets(
        ("stable", "tools/apt", "Somebody" if origin == "Debian" else origin),
        ("bookworm", "debian", origin),
        ("bookworm-updates", "elsewhere/debian", origin),
        ("bookworm-security", "debian-security", origin),
    )
    source = "/etc/apt/sources.list.d/x.sources"
    assert vm.parse_mirrors(text) == {
        "debian": ("http://mirror.example/debian/", source),
        "security": ("http://mirror.example/debian-security/", source),
    }


def test_without_a_mirror_of_debian(vm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vm, "run", lambda *_, **__: targets(("noble", "ubuntu", "Ubuntu")))
    with pytest.raises(vm.VmError) as raised:
        vm.make_apt("bookworm")
    error, hint = str(raised.value).splitlines()
    assert "no mirror of Debian" in error
    assert "/etc/apt/sources.list.d" in hint


@pytest.mark.parametrize(
    "source",
    ["Types: deb\nSigned-By: /keys/a.gpg\nURIs: x\n", "deb [arch=amd64 signed-by=/keys/a.gpg] x\n"],
)
def test_sources_keep_the_key_and_add_security_updates(
    vm: Any, tmp_path: Path, source: str
) -> None:
    file = tmp_path / "debian.sources"
    file.write_text(source)
    mirrors = {"debian": ("http://m/debian/", str(file)), "security": ("http://s/", str(file))}
    options = "[arch=amd64 signed-by=/keys/a.gpg]"
    assert vm.write_sources("bullseye", mirrors).splitlines() == [
        f"deb {options} http://m/debian/ bullseye main",
        f"deb {options} http://s/ bullseye-security main",
    ]
    # Security updates of backports come by the backports themselves.
    assert vm.write_sources("trixie-backports", mirrors).splitlines() == [
        f"deb {options} http://m/debian/ trixie-backports main",
    ]


def test_packages_of_a_kernel_in_one_piece(vm: Any) -> None:
    depends = (
        "linux-image-amd64\n  Depends: linux-image-6.1.0-9-amd64\nlinux-image-6.1.0-9-amd64\n"
        "  Depends: kmod\n  Depends: linux-base\nkmod\nlinux-base\n  Depends: <debconf-2.0>\n"
    )
    assert vm.parse_packages(depends) == ("6.1.0-9-amd64", ["linux-image-6.1.0-9-amd64"])


def test_packages_of_a_kernel_in_four_pieces(vm: Any) -> None:
    kinds = ("base", "binary", "image", "modules")
    depends = "linux-image-amd64\nlinux-base-amd64\nlinux-base\nlinux-modules-amd64\n" + "".join(
        f"linux-{kind}-7.3.4+deb13-amd64\n  Depends: linux-base-7.3.4+deb13-amd64\n"
        for kind in kinds
    )
    release, packages = vm.parse_packages(depends)
    assert release == "7.3.4+deb13-amd64"
    assert packages == [f"linux-{kind}-7.3.4+deb13-amd64" for kind in kinds]


def make_kernel(folder: Path, release: str) -> None:
    """What a kernel's package leaves after unpacking, as far as it is looked at here."""
    modules = folder / "lib/modules" / release
    modules.mkdir(parents=True)
    (modules / "modules.dep").write_text("")
    (folder / "boot").mkdir()
    (folder / "boot" / f"vmlinuz-{release}").write_text(f"image of {release}")


class Archive:
    """An archive of Debian packages in a folder, and scripts/vm told to take it for Debian."""

    def __init__(self, vm: Any, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.folder = folder
        self.entries: list[str] = []
        folder.mkdir()
        sources = f"deb [trusted=yes] file:{folder} ./\n"
        monkeypatch.setattr(vm, "parse_mirrors", lambda _: {"debian": ("", "")})
        monkeypatch.setattr(vm, "write_sources", lambda *_: sources)

    def add(self, name: str, version: str, depends: str = "", release: str = "") -> None:
        """A package; with ``release`` it holds that kernel."""
        tree = self.folder / "tree"
        (tree / "DEBIAN").mkdir(parents=True)
        fields = f"Package: {name}\nVersion: {version}\nArchitecture: amd64\nMaintainer: nobody\n"
        fields += "Description: none\n" + (f"Depends: {depends}\n" if depends else "")
        (tree / "DEBIAN/control").write_text(fields)
        if release:
            make_kernel(tree, release)
        package = self.folder / f"{name}_{version}_amd64.deb"
        subprocess.run(["dpkg-deb", "-b", tree, package], check=True, stdout=subprocess.DEVNULL)
        shutil.rmtree(tree)
        data = package.read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        self.entries.append(
            f"{fields}Filename: ./{package.name}\nSize: {len(data)}\nSHA256: {digest}\n"
        )
        (self.folder / "Packages").write_text("\n".join(self.entries))

    def add_kernel(self, release: str, version: str) -> None:
        self.add(f"linux-image-{release}", version, release=release)
        self.add("linux-image-amd64", version, depends=f"linux-image-{release} (= {version})")


@pytest.fixture
def archive(vm: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Archive:
    for program in ("apt-get", "dpkg-deb", "depmod"):
        if not shutil.which(program):
            pytest.skip(f"{program} is not here")
    return Archive(vm, monkeypatch, tmp_path / "archive")


def test_fetches_the_newest_kernel(vm: Any, archive: Archive, tmp_path: Path) -> None:
    archive.add_kernel("6.1.0-10-amd64", "6.1.10-1")
    archive.add_kernel("6.1.0-9-amd64", "6.1.9-1")
    archive.add("linux-image-6.1.0-11-rt-amd64", "6.1.11-1", release="6.1.0-11-rt-amd64")
    kernel = vm.fetch("6.1")
    assert str(kernel) == "6.1.0-10-amd64 (Debian 6.1.10-1)"
    assert kernel.image.read_text() == "image of 6.1.0-10-amd64"
    assert (kernel.modules / "modules.alias").exists()  # depmod was there
    assert vm.find_kernel("6.1") == kernel
    assert not [*(tmp_path / "cache").glob("unpacking*")]


def test_newer_kernel_takes_over_and_the_last_but_one_stays(vm: Any, archive: Archive) -> None:
    for number in (1, 2, 3):
        archive.add_kernel(f"6.1.0-{number}-amd64", f"6.1.{number}-1")
        assert vm.fetch("6.1").folder.name == f"6.1.{number}-1"
    kept = sorted(folder.name for folder in vm.find_kernel("6.1").folder.parent.iterdir())
    assert kept == ["6.1.2-1", "6.1.3-1"]
    assert vm.find_kernel("6.1").folder.name == "6.1.3-1"


def test_interrupted_download_is_no_kernel_and_no_trap(
    vm: Any, archive: Archive, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive.add_kernel("6.1.0-9-amd64", "6.1.9-1")
    run = vm.run

    def killed_at_depmod(*command: Any, **options: Any) -> Any:
        if command[0] == "depmod":
            raise KeyboardInterrupt
        return run(*command, **options)

    monkeypatch.setattr(vm, "run", killed_at_depmod)
    with pytest.raises(KeyboardInterrupt):
        vm.fetch("6.1")
    assert vm.find_kernel("6.1") is None
    monkeypatch.setattr(vm, "run", run)
    left = vm.find_cache() / "unpacking-6.1/tree/boot"  # as after kill -9
    left.mkdir(parents=True)
    (left / "junk").touch()
    assert not (vm.fetch("6.1").folder / "boot/junk").exists()


def test_damaged_package_is_refused(vm: Any, archive: Archive) -> None:
    archive.add_kernel("6.1.0-9-amd64", "6.1.9-1")
    package = archive.folder / "linux-image-6.1.0-9-amd64_6.1.9-1_amd64.deb"
    data = bytearray(package.read_bytes())
    data[-1] ^= 1
    package.write_bytes(data)
    with pytest.raises(vm.VmError, match="apt-get download"):
        vm.fetch("6.1")
    assert vm.find_kernel("6.1") is None


def test_suite_that_moved_on(vm: Any, archive: Archive) -> None:
    archive.add_kernel("8.1.2+deb14-amd64", "8.1.2-1")
    with pytest.raises(vm.VmError, match=r"trixie-backports has 8\.1\.2\+deb14-amd64 now, not 7"):
        vm.fetch("7")


def test_kernel_here_will_do_when_no_newer_can_be_had(
    vm: Any, archive: Archive, capsys: pytest.CaptureFixture[str]
) -> None:
    archive.add_kernel("6.1.0-9-amd64", "6.1.9-1")
    kernel = vm.fetch("6.1")
    (archive.folder / "Packages").unlink()
    assert vm.fetch_or_keep("6.1") == kernel
    assert "6.1: cannot look for a newer one: error: apt-get update" in capsys.readouterr().err
    shutil.rmtree(kernel.folder)
    with pytest.raises(vm.VmError, match="apt-get update"):
        vm.fetch_or_keep("6.1")


# -- the machine's files


def test_command_keeps_its_words_and_gets_its_environment_alone(
    vm: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    make_kernel(tmp_path / "kernel", "6.1.0-9-amd64")
    kernel = vm.Kernel("6.1", tmp_path / "kernel")
    monkeypatch.setenv("HMEBPF_THING", 'it\'s "here"\n$HOME')
    monkeypatch.setenv("CI", "true")
    monkeypatch.setenv("SECRET", "not passed")
    tell = "import json, os, sys; print(json.dumps([sys.argv[1:], dict(os.environ), os.getcwd()]))"
    words = ["a b", "", "*", '"', "it's", "$HOME", "`id`", "\\n", "new\nline", "--", "ä"]
    command = ["--env", "X=1 = one", "--", sys.executable, "-c", tell, *words]
    options = vm.parse_arguments(["6.1", "--results", str(tmp_path / "r s"), *command])
    results = tmp_path / "r s/6.1"
    script = tmp_path / "command"
    script.write_text(vm.write_scripts(kernel, options, results)["command"])
    env = {"LEFTOVER": "of the first process"}
    told = subprocess.run(["sh", script], env=env, capture_output=True, check=True, cwd="/")
    arguments, environment, folder = json.loads(told.stdout)
    assert arguments == words
    assert folder == str(ROOT)
    for name in ("PWD", "LC_CTYPE"):  # the shell's and Python's own
        environment.pop(name, None)
    own = {name: value for name, value in os.environ.items() if name.startswith("HMEBPF_")}
    assert environment == own | {
        "PATH": os.environ["PATH"],
        "HOME": os.environ["HOME"],
        "LANG": "C.UTF-8",
        "CI": "true",
        "X": "1 = one",
        "HMEBPF_VM_KERNEL": "6.1",
        "HMEBPF_VM_RESULTS": str(results),
    }


def test_scripts_are_good_shell(vm: Any, tmp_path: Path) -> None:
    make_kernel(tmp_path / "it's", "6.1.0-9-amd64")
    kernel = vm.Kernel("6.1", tmp_path / "it's")
    options = vm.parse_arguments(["6.1", "--bare", "--", "true"])
    scripts = vm.write_scripts(kernel, options, None)
    for text in scripts.values():
        subprocess.run(["sh", "-n"], input=text, text=True, check=True)
    settings = (
        scripts["main"].removesuffix(vm.MAIN) + 'printf "%s\\n" "$bare" "$modules" "$results"'
    )
    told = subprocess.run(["sh", "-c", settings], capture_output=True, text=True, check=True)
    assert told.stdout.split("\n") == ["1", str(kernel.modules), "", ""]


def test_modules_come_after_what_they_need(vm: Any) -> None:
    text = (
        "kernel/fs/9p/9p.ko.xz: kernel/net/9p/9pnet.ko.xz kernel/fs/netfs/netfs.ko.xz\n"
        "kernel/net/9p/9pnet.ko.xz:\n"
        "kernel/net/9p/9pnet_virtio.ko.xz: kernel/net/9p/9pnet.ko.xz\n"
        "kernel/fs/netfs/netfs.ko.xz:\n"
        "kernel/drivers/net/veth.ko.xz:\n"
    )
    names = [Path(file).name.removesuffix(".ko.xz") for file in vm.order_modules(text)]
    assert names == ["netfs", "9pnet", "9p", "9pnet_virtio"]


def test_initramfs_can_be_unpacked(vm: Any, tmp_path: Path) -> None:
    if not (busybox := shutil.which("busybox")):
        pytest.skip("busybox is not here")
    make_kernel(tmp_path / "kernel", "6.1.0-9-amd64")
    kernel = vm.Kernel("6.1", tmp_path / "kernel")
    modules = kernel.modules
    (modules / "overlay.ko.xz").write_bytes(vm.lzma.compress(b"a module"))
    (modules / "modules.dep").write_text("overlay.ko.xz:\n")
    packed = vm.pack_initramfs(kernel, {"init": "odd", "main": "even"})
    out = tmp_path / "out"
    out.mkdir()
    subprocess.run([busybox, "cpio", "-i"], input=packed, cwd=out, check=True, capture_output=True)
    assert (out / "init").read_text() == "odd"
    assert os.access(out / "init", os.X_OK)
    assert (out / "main").read_text() == "even"
    assert (out / "modules/00").read_bytes() == b"a module"
    assert (out / "bin/busybox").read_bytes() == Path(busybox).read_bytes()
    assert (out / "root").is_dir()


# -- KVM and the verdicts, with a stand-in for QEMU


@pytest.mark.parametrize(
    ("words", "works"), [("Kernel panic - not syncing", True), ("failed to set MSR", False)]
)
def test_kvm_counts_only_if_it_boots_and_is_tried_once(
    vm: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, words: str, works: bool
) -> None:
    make_kernel(tmp_path / "kernel", "6.1.0-9-amd64")
    kernel = vm.Kernel("6.1", tmp_path / "kernel")
    monkeypatch.setattr(vm.os, "access", lambda *_: True)
    monkeypatch.setattr(vm, "qemu", lambda kvm: ["sh", "-c", f"echo {words}"])
    assert vm.kvm_works(kernel) is works
    monkeypatch.setattr(vm, "qemu", lambda kvm: pytest.fail("tried again"))
    assert vm.kvm_works(kernel) is works


def test_kvm_of_an_earlier_boot_is_tried_again(
    vm: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    make_kernel(tmp_path / "kernel", "6.1.0-9-amd64")
    (vm.find_cache() / "kvm").write_text("another-boot works\n")
    monkeypatch.setattr(vm.os, "access", lambda *_: True)
    monkeypatch.setattr(vm, "qemu", lambda kvm: ["false"])
    assert vm.kvm_works(vm.Kernel("6.1", tmp_path / "kernel")) is False


# Takes QEMU's arguments, and writes what its first one says to the ports.
QEMU = """
import re, sys, time
paths = dict(re.findall(r"id=(\\w+),path=(\\S+)", " ".join(sys.argv)))
console = re.search(r"-serial file:(\\S+)", " ".join(sys.argv))[1]
def write(port, text):
    with open(paths.get(port, console), "w") as file:
        file.write(text)
"""


class Machines:
    """scripts/vm with machines that only do what a piece of Python says."""

    def __init__(self, vm: Any, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.vm, self.monkeypatch, self.folder = vm, monkeypatch, folder
        monkeypatch.setattr(vm, "pack_initramfs", lambda *_: b"")

    def boot(self, code: str, *options: str, kernels: Sequence[str] = ("6.1",)) -> int:
        for name in kernels:
            with contextlib.suppress(FileExistsError):
                make_kernel(self.folder / name, f"{name}.0-9-amd64")
        self.monkeypatch.setattr(
            self.vm, "qemu", lambda kvm: [sys.executable, "-c", QEMU + code, "QEMU"]
        )
        given = self.vm.parse_arguments([*kernels, *options, "--", "true"])
        machines = [self.vm.Kernel(name, self.folder / name) for name in kernels]
        status: int = asyncio.run(self.vm.boot_all(machines, given, kvm=False))
        return status


@pytest.fixture
def machines(vm: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Machines:
    return Machines(vm, monkeypatch, tmp_path)


@pytest.mark.parametrize("status", [0, 7, 125, 255])
def test_status_and_output_are_the_commands(
    machines: Machines, capfd: pytest.CaptureFixture[str], status: int
) -> None:
    code = (
        'write("out", "said\\nall"); write("err", "wrong\\n"); write("console", "boot\\n")\n'
        f'write("status", "started\\n"); write("status", "{status}\\n")'
    )
    assert machines.boot(code) == status
    out, err = capfd.readouterr()
    assert out == "said\nall"
    lines = err.splitlines()
    assert lines[0].startswith("6.1: booting 6.1.0-9-amd64")
    assert lines[1] == "wrong"
    assert lines[2].startswith("6.1: done in ") and lines[2].endswith(f" s, exit {status}")
    assert lines[3:] == []


def test_machine_that_dies_shows_its_consoles_end(
    machines: Machines, capfd: pytest.CaptureFixture[str]
) -> None:
    code = 'write("console", "early\\n" * 100 + "Kernel panic\\n"); write("status", "started\\n")'
    assert machines.boot(code) == 125
    _, err = capfd.readouterr()
    assert "6.1: the machine died after" in err
    assert err.endswith("  Kernel panic\n")
    assert err.count("early") == 39


def test_time_limit_kills_the_machine(
    machines: Machines, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    started: list[int] = []
    start = asyncio.create_subprocess_exec

    async def start_and_note(*command: str, **options: Any) -> Any:
        process = await start(*command, **options)
        started.append(process.pid)
        return process

    monkeypatch.setattr(asyncio, "create_subprocess_exec", start_and_note)
    assert machines.boot("time.sleep(600)", "--timeout", "0.5") == 124
    _, err = capfd.readouterr()
    assert err.endswith("6.1: stopped after 0.5 s (--timeout)\n")
    assert [Path(f"/proc/{pid}").exists() for pid in started] == [False]


def test_machine_that_says_nothing_hangs(
    machines: Machines, capfd: pytest.CaptureFixture[str]
) -> None:
    assert machines.boot("time.sleep(600)", "--silence", "0.5") == 125
    _, err = capfd.readouterr()
    assert err.endswith("6.1: hangs: it has said nothing for 0.5 s (--silence)\n")


def test_machine_that_speaks_does_not_hang(machines: Machines) -> None:
    """It speaks for longer than it may be silent, each time within that."""
    code = (
        "port = open(paths['out'], 'w')\n"
        "for _ in range(16):\n"
        "    print('.', file=port, flush=True)\n"
        "    time.sleep(0.25)\n"
        'write("status", "3\\n")'
    )
    assert machines.boot(code, "--silence", "3") == 3


def test_several_machines_give_the_first_status_that_is_not_0(
    machines: Machines, capfd: pytest.CaptureFixture[str]
) -> None:
    code = (
        'kernel = re.search(r"hmebpf.vm=(\\S+)", " ".join(sys.argv))[1]\n'
        'write("out", kernel + "\\nlast of " + kernel)\n'
        'write("status", {"5.10": "0", "6.1": "3", "7": "4"}[kernel] + "\\n")'
    )
    kernels = ("5.10", "6.1", "7")
    assert machines.boot(code, kernels=kernels) == 3
    assert machines.boot(code, kernels=("7", "6.1")) == 4
    capfd.readouterr()
    assert machines.boot(code, "--parallel", "3", kernels=kernels) == 3
    out, _ = capfd.readouterr()
    wanted = [f"{k} | {line}" for k in kernels for line in (k, f"last of {k}")]
    assert sorted(out.splitlines()) == sorted(wanted)


@pytest.mark.parametrize(("arguments", "together"), [([], 1), (["--parallel", "2"], 2)])
def test_one_machine_at_a_time_unless_told(
    vm: Any, monkeypatch: pytest.MonkeyPatch, arguments: list[str], together: int
) -> None:
    running: set[str] = set()
    most = 0

    async def boot(kernel: Any, *rest: object) -> int:
        nonlocal most
        running.add(kernel.series)
        most = max(most, len(running))
        for _ in range(10):
            await asyncio.sleep(0)
        running.remove(kernel.series)
        return 0

    monkeypatch.setattr(vm, "boot", boot)
    kernels = [vm.Kernel(name, Path(name)) for name in vm.SUITES]
    options = vm.parse_arguments([*vm.SUITES, *arguments, "--", "true"])
    assert asyncio.run(vm.boot_all(kernels, options, kvm=False)) == 0
    assert most == together


def test_results_get_a_folder_for_each_kernel(machines: Machines) -> None:
    results = machines.folder / "with, comma"
    code = (
        'share = [a for a in sys.argv if a.startswith("local,id=results,")][0]\n'
        'parts = re.split("(?<!,),(?!,)", share)  # QEMU takes two commas for one\n'
        'path = [p[5:].replace(",,", ",") for p in parts if p.startswith("path=")][0]\n'
        'open(path + "/told", "w").write("yes"); write("status", "0\\n")'
    )
    assert machines.boot(code, "--results", str(results)) == 0
    assert (results / "6.1/told").read_text() == "yes"


def test_root_is_shared_read_only(vm: Any, tmp_path: Path) -> None:
    """Nothing that runs in a machine can change the files of this one."""
    make_kernel(tmp_path / "kernel", "6.1.0-9-amd64")
    kernel = vm.Kernel("6.1", tmp_path / "kernel")
    options = vm.parse_arguments(["6.1", "--", "true"])
    names = ("initramfs", "console", "out", "err", "status")
    descriptors = dict(zip(names, range(5), strict=True))
    command = vm.write_machine(kernel, options, False, None, descriptors)
    shares = [command[i + 1].split(",") for i, word in enumerate(command) if word == "-fsdev"]
    assert [share for share in shares if "readonly=on" not in share] == []
    assert len(shares) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signal_ends_the_machine_and_the_call(tmp_path: Path, number: int) -> None:
    """A whole call, interrupted while a stand-in for QEMU runs."""
    if platform.machine() != "x86_64":
        pytest.skip("scripts/vm boots on x86-64 alone")
    programs = tmp_path / "bin"
    programs.mkdir()
    note = tmp_path / "pid"
    qemu = programs / "qemu-system-x86_64"
    qemu.write_text(f"#!/bin/sh\necho $$ >{note}.new; mv {note}.new {note}; exec sleep 600\n")
    qemu.chmod(0o755)
    for program in ("apt-get", "depmod"):
        (programs / program).symlink_to("/bin/true")
    (programs / "busybox").write_text("static")
    (programs / "busybox").chmod(0o755)
    make_kernel(tmp_path / "cache/kernels/6.1/6.1.9-1", "6.1.0-9-amd64")
    process = subprocess.Popen(
        [sys.executable, SCRIPT, "6.1", "--emulate", "--", "true"],
        env={
            **os.environ,
            "HMEBPF_VM_CACHE": str(tmp_path / "cache"),
            "PATH": f"{programs}:{os.environ['PATH']}",
        },
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not note.exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert err == "6.1: booting 6.1.0-9-amd64 (Debian 6.1.9-1), emulated\n"
    assert not Path(f"/proc/{note.read_text().strip()}").exists()
