"""scripts/hmebpf and scripts/install, on a copy of the checkout with a private PATH.

The PATH holds the programs that a minimal Debian has, and stand-ins for apt-get, dpkg and id: no
test needs root, the network or a package to be missing here.  pip, venv and the shell are real.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAMS = "cat chmod cmp cp flock grep mkdir mv readlink rm sed tail touch"

APT_GET = """#!/bin/sh
echo "$*" >>"$FAKE/apt-calls"
case " $* " in *" install "*) touch "$FAKE/apt-installs" ;; *) exit 0 ;; esac
echo dlstatus:1:50.0000:Retrieving file 1 of 2 >&5
echo pmstatus:libbpf1:amd64:80.0000:Unpacking libbpf1 >&5
[ ! -e "$FAKE/apt-waits" ] || cat "$FAKE/apt-waits" >/dev/null
if [ -e "$FAKE/apt-says" ]; then
    cat "$FAKE/apt-says" >&2
    exit 100
fi
touch "$FAKE/bcc"
"""
DPKG = """#!/bin/sh
echo "$*" >>"$FAKE/dpkg-calls"
rm "$FAKE/apt-says"
"""
DEPENDENCIES = """
import os
from hypermesh_ebpf.errors import MissingDependency
def find_bcc():
    if not os.path.exists(os.environ["FAKE"] + "/bcc"):
        raise MissingDependency("find BCC", "absent", "Fedora `dnf install python3-bcc`")
"""
CLI = """
import json, os, sys
def main():
    import tiny
    os.fstat(0)
    print(json.dumps({"argv": sys.argv[1:], "cwd": os.getcwd(), "tiny": tiny.VERSION}))
    return 3 if "--fail" in sys.argv else 0
"""


def build_wheel(folder: Path, version: str) -> str:
    """A wheel of one module; returns its line for a lock file."""
    wheel = folder / f"tiny-{version}-py3-none-any.whl"
    info = f"tiny-{version}.dist-info"
    files = {
        "tiny.py": f"VERSION = {version!r}\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: tiny\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = ""
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, text in files.items():
            digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest())
            record += f"{name},sha256={digest.decode().rstrip('=')},{len(text)}\n"
            archive.writestr(zipfile.ZipInfo(name), text)
        archive.writestr(zipfile.ZipInfo(f"{info}/RECORD"), record + f"{info}/RECORD,,\n")
    sha256 = hashlib.sha256(wheel.read_bytes()).hexdigest()
    return f"tiny=={version} \\\n    --hash=sha256:{sha256}\n"


class Checkout:
    """A copy of the project, whose tool prints how it was called, and the machine around it."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "my checkout"
        self.fake = folder / "fake"
        self.bin = folder / "bin"
        self.uid = "0"
        for made in (self.root / "scripts", self.fake, self.bin):
            made.mkdir(parents=True)
        for name in ("hmebpf", "install"):
            shutil.copy(ROOT / "scripts" / name, self.root / "scripts")
        package = self.root / "hypermesh_ebpf"
        for name, text in {
            "__init__.py": "",
            "errors.py": (ROOT / "hypermesh_ebpf/errors.py").read_text(),
            "bpf/libbpf.py": "def libbpf(): pass",
            "host/dependencies.py": DEPENDENCIES,
            "__main__.py": CLI,
        }.items():
            (package / name).parent.mkdir(parents=True, exist_ok=True)
            (package / name).write_text(text)
        for name in PROGRAMS.split():
            (self.bin / name).symlink_to(shutil.which(name) or "/not/there")
        (self.bin / "python3").symlink_to(os.path.realpath(sys.executable))
        self.program("apt-get", APT_GET)
        self.program("dpkg", DPKG)
        self.program("id", "#!/bin/sh\necho $FAKE_UID\n")
        self.pin("1.0")

    def program(self, name: str, text: str) -> None:
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def pin(self, version: str) -> None:
        (self.root / "requirements.lock").write_text(build_wheel(self.fake, version))

    def environment(self, **more: str) -> dict[str, str]:
        return {
            "PATH": str(self.bin),
            "FAKE": str(self.fake),
            "FAKE_UID": self.uid,
            "PIP_CONFIG_FILE": os.devnull,
            "PIP_NO_INDEX": "1",
            "PIP_FIND_LINKS": str(self.fake).replace(" ", "%20"),
            **more,
        }

    def start(self, *arguments: str, script: str = "hmebpf") -> subprocess.Popen[str]:
        return subprocess.Popen(
            [self.root / "scripts" / script, *arguments],
            env=self.environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def call(
        self, *arguments: str, via: Path | None = None, cwd: Path | None = None, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        command: Sequence[str | Path] = [via or self.root / "scripts/hmebpf", *arguments]
        return subprocess.run(
            command,
            cwd=cwd,
            env=self.environment(**environment),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=300,
        )

    def install(self) -> subprocess.CompletedProcess[str]:
        return self.call(via=self.root / "scripts/install")

    def apt_calls(self) -> str:
        calls = self.fake / "apt-calls"
        return calls.read_text() if calls.exists() else ""


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


@pytest.fixture(scope="module")
def first_call(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Checkout, subprocess.CompletedProcess[str]]:
    """A checkout after its first call, not to be changed."""
    checkout = Checkout(tmp_path_factory.mktemp("first"))
    return checkout, checkout.call("xdp", "--iface", "a b", "")


@pytest.fixture
def installed(
    first_call: tuple[Checkout, subprocess.CompletedProcess[str]], tmp_path: Path
) -> Checkout:
    """A copy of an installed checkout, in another place than the one it was installed in."""
    checkout = Checkout(tmp_path)
    shutil.copytree(first_call[0].root / ".venv", checkout.root / ".venv", symlinks=True)
    (checkout.fake / "bcc").touch()
    return checkout


@pytest.fixture
def lacking_bcc(installed: Checkout) -> Checkout:
    """An installed checkout from whose machine BCC was removed."""
    (installed.fake / "bcc").unlink()
    return installed


def assert_error(done: subprocess.CompletedProcess[str], *told: str) -> None:
    """The last two lines are an error and a hint that name all of ``told``; stdout is clean."""
    assert done.returncode == 1, done
    assert done.stdout == ""
    error, hint = done.stderr.splitlines()[-2:]
    assert error.startswith("error: ")
    assert hint.startswith("hint: ")
    for words in told:
        assert words in error + hint


def test_first_call_installs_and_runs(
    first_call: tuple[Checkout, subprocess.CompletedProcess[str]],
) -> None:
    checkout, done = first_call
    assert done.returncode == 0, done.stderr
    # Nothing but the tool's own words on stdout: -o json stays clean.
    assert json.loads(done.stdout)["argv"] == ["xdp", "--iface", "a b", ""]
    assert "installing by apt-get: python3-bpfcc\n" in done.stderr
    assert "90 % Unpacking libbpf1" in done.stderr
    assert f"installing Python packages into {checkout.root}/.venv" in done.stderr
    install = checkout.apt_calls().splitlines()[-1]
    assert install.endswith("install --no-install-recommends python3-bpfcc")


def test_later_calls_need_neither_installer_nor_network(installed: Checkout) -> None:
    for name in ("python3", "apt-get", "flock", "sed", "id", "mkdir"):
        (installed.bin / name).unlink()
    before = {path: path.stat().st_mtime_ns for path in (installed.root / ".venv").rglob("*")}
    done = installed.call("x")
    assert (done.returncode, done.stderr) == (0, "")
    after = {path: path.stat().st_mtime_ns for path in (installed.root / ".venv").rglob("*")}
    assert after == before, "a read-only checkout would not have run"


def test_exit_code_is_the_tools(installed: Checkout) -> None:
    assert installed.call("--fail").returncode == 3


def test_called_by_a_symlink_from_elsewhere(installed: Checkout, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(installed.root / "scripts/hmebpf")
    elsewhere = tmp_path / "else where"
    elsewhere.mkdir()
    (elsewhere / "tiny.py").write_text("raise SystemExit('imported from the working directory')")
    done = installed.call("a  b", via=link, cwd=elsewhere)
    assert json.loads(done.stdout) == {"argv": ["a  b"], "cwd": str(elsewhere), "tiny": "1.0"}


def test_called_with_closed_descriptors(installed: Checkout) -> None:
    # The tool fails if its descriptor 0 is closed; with 1 and 2 closed only its exit code is left.
    for closed in ("<&-", "<&- 2>&-", "<&- >&- 2>&-"):
        command = f'"{installed.root}/scripts/hmebpf" --fail {closed}'
        done = subprocess.run(["/bin/sh", "-c", command], env=installed.environment(), timeout=60)
        assert done.returncode == 3, closed


def test_without_root_nothing_is_installed(checkout: Checkout) -> None:
    checkout.uid = "1000"
    done = checkout.call("xdp")
    assert_error(
        done,
        "installing needs root",
        f"{checkout.root}/scripts/hmebpf --version",
        "apt-get install python3-bpfcc",
        f"pip install {checkout.root}",
    )
    assert checkout.apt_calls() == ""
    assert not (checkout.root / ".venv").exists()


def test_without_root_an_installed_checkout_runs(installed: Checkout) -> None:
    installed.uid = "1000"
    assert installed.call("xdp").returncode == 0


def test_without_apt_get_other_systems_packages_are_named(checkout: Checkout) -> None:
    (checkout.bin / "apt-get").unlink()
    assert_error(checkout.call("xdp"), "no apt-get", "python3-bpfcc", "dnf install python3-bcc")
    assert not (checkout.root / ".venv").exists()


def test_failed_apt_get_is_reported_and_tried_again(lacking_bcc: Checkout) -> None:
    (lacking_bcc.fake / "apt-says").write_text("E: Unable to fetch some archives\n")
    log = lacking_bcc.root / ".venv/install.log"
    assert_error(lacking_bcc.install(), "python3-bpfcc: Unable to fetch some archives", str(log))
    assert "E: Unable to fetch some archives" in log.read_text()
    (lacking_bcc.fake / "apt-says").unlink()
    assert lacking_bcc.install().returncode == 0


def test_package_that_this_release_lacks_is_no_network_trouble(lacking_bcc: Checkout) -> None:
    (lacking_bcc.fake / "apt-says").write_text("E: Unable to locate package python3-bpfcc\n")
    assert_error(lacking_bcc.install(), "Unable to locate package", "older than Debian 12")


def test_apt_get_that_installs_nothing_useful_is_an_error(lacking_bcc: Checkout) -> None:
    lacking_bcc.program("apt-get", "#!/bin/sh\nexit 0\n")
    assert_error(lacking_bcc.install(), "not to be found: python3-bpfcc", "install.log")


def test_interrupted_dpkg_is_settled_first(lacking_bcc: Checkout) -> None:
    words = "E: dpkg was interrupted, you must manually run 'dpkg --configure -a' to correct it.\n"
    (lacking_bcc.fake / "apt-says").write_text(words)
    done = lacking_bcc.install()
    assert done.returncode == 0, done.stderr
    assert "running dpkg --configure -a" in done.stderr
    assert (lacking_bcc.fake / "dpkg-calls").read_text() == "--configure -a\n"


def test_package_of_another_hash_is_refused(installed: Checkout) -> None:
    lock = installed.root / "requirements.lock"
    good = lock.read_text()
    build_wheel(installed.fake, "2.0")
    lock.write_text(f"tiny==2.0 --hash=sha256:{'0' * 64}\n")
    assert_error(installed.call("xdp"), "pip install -r requirements.lock", "install.log")
    lock.write_text(good)
    done = installed.call("xdp")
    assert done.returncode == 0, done.stderr


def test_changed_lock_file_is_installed_at_the_next_call(installed: Checkout) -> None:
    installed.pin("2.0")
    done = installed.call("xdp")
    assert json.loads(done.stdout)["tiny"] == "2.0", done.stderr
    assert installed.call("xdp").stderr == ""


def test_unusable_interpreter_is_refused(checkout: Checkout) -> None:
    checkout.program("python2", "#!/bin/sh\nexit 1\n")
    assert_error(checkout.call("xdp", HMEBPF_PYTHON="python2"), "HMEBPF_PYTHON is python2", "3.10")


def test_interpreter_by_another_name_is_no_new_installation(installed: Checkout) -> None:
    for _ in range(2):
        done = installed.call("xdp", HMEBPF_PYTHON=str(installed.bin / "python3"))
        assert (done.returncode, done.stderr) == (0, "")


def test_removed_interpreter_is_replaced(installed: Checkout) -> None:
    python = installed.root / ".venv/bin/python"
    python.unlink()
    python.symlink_to("/usr/bin/python3.9-that-was-upgraded-away")
    done = installed.call("xdp")
    assert done.returncode == 0, done.stderr


def test_old_python3_gives_way_to_a_newer_one(installed: Checkout) -> None:
    (installed.bin / "python3").rename(installed.bin / "python3.10")
    installed.program("python3", "#!/bin/sh\nexit 1\n")
    done = installed.install()  # finds the interpreter that the environment was made with
    assert (done.returncode, done.stderr) == (0, "")


def test_killed_half_way_the_next_call_starts_over(checkout: Checkout) -> None:
    first = checkout.start("xdp")
    await_file(checkout.root / ".venv/bin/python", first)
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    assert not (checkout.root / ".venv/requirements.lock").exists()
    done = checkout.call("xdp")
    assert done.returncode == 0, done.stderr
    assert "installing Python packages" in done.stderr


def test_interrupted_it_says_so_and_the_next_call_starts_over(lacking_bcc: Checkout) -> None:
    os.mkfifo(lacking_bcc.fake / "apt-waits")
    first = lacking_bcc.start(script="install")
    await_file(lacking_bcc.fake / "apt-installs", first)
    os.killpg(first.pid, signal.SIGTERM)  # as Ctrl-C does: to all processes of the call
    _, err = first.communicate()
    assert first.returncode != 0
    assert "interrupted; call again" in err
    (lacking_bcc.fake / "apt-waits").unlink()
    done = lacking_bcc.install()
    assert done.returncode == 0, done.stderr


def test_two_first_calls_share_one_installation(checkout: Checkout) -> None:
    os.mkfifo(checkout.fake / "apt-waits")
    first = checkout.start("one")
    await_file(checkout.fake / "apt-installs", first)
    second = checkout.start("two")
    assert second.stderr is not None
    assert "waiting for it" in second.stderr.readline()
    (checkout.fake / "apt-waits").write_text("")  # lets apt-get go on
    for process, argument in ((first, "one"), (second, "two")):
        out, err = process.communicate(timeout=300)
        assert json.loads(out)["argv"] == [argument], err
    assert checkout.apt_calls().count(" install ") == 1


def await_file(path: Path, process: subprocess.Popen[str]) -> None:
    """Wait until a process has made a file; fail when it ends without."""
    while not path.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
