"""Release strings of many distributions, taken apart."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from hypermesh_ebpf.host.kernel import (
    MINIMUMS,
    boot_id,
    parse_kernel_release,
    read_kernel_release,
)

_DEBIAN = (
    "Linux version 6.1.0-21-amd64 (debian-kernel@lists.debian.org) (gcc-12 (Debian 12.2.0-14) "
    "12.2.0, GNU ld (GNU Binutils for Debian) 2.40) #1 SMP PREEMPT_DYNAMIC Debian 6.1.90-1"
)
_BACKPORT = "Linux version 7.0.2+deb14-amd64 (debian-kernel@lists.debian.org) #1 SMP Debian 7.0.2-1"


@pytest.mark.parametrize(
    ("release", "build", "signature", "version", "distribution", "flavour"),
    [
        (
            "5.10.0-28-amd64",
            "... #1 SMP Debian 5.10.209-2 (2024-01-31)",
            "",
            "5.10.209",
            "Debian",
            "-28-amd64",
        ),
        ("6.1.0-21-amd64", _DEBIAN, "", "6.1.90", "Debian", "-21-amd64"),
        ("7.0.2+deb14-amd64", _BACKPORT, "", "7.0.2", "Debian", "+deb14-amd64"),
        (
            "4.18.0-513.el8.x86_64",
            "(mockbuild@x86-vm-09.redhat.com)",
            "",
            "4.18.0",
            "Red Hat",
            "-513.el8.x86_64",
        ),
        ("6.5.6-300.fc39.x86_64", "", "", "6.5.6", "Fedora", "-300.fc39.x86_64"),
        (
            "6.5.0-1016-aws",
            "(buildd@lcy02)",
            "Ubuntu 6.5.0-1016.16~22.04.1-aws 6.5.13",
            "6.5.13",
            "Ubuntu",
            "-1016-aws",
        ),
        (
            "5.15.133.1-microsoft-standard-WSL2",
            "",
            "",
            "5.15.133",
            "WSL",
            ".1-microsoft-standard-WSL2",
        ),
        ("6.18.44-fc-v669", "(root@builder)", "", "6.18.44", "Firecracker", "-fc-v669"),
        ("5.10.0-1160.amzn2.x86_64", "", "", "5.10.0", "Amazon Linux", "-1160.amzn2.x86_64"),
        ("6.6.31+rpt-rpi-v8", "", "", "6.6.31", "Raspberry Pi", "+rpt-rpi-v8"),
        ("6.9.1-arch1-1", "", "", "6.9.1", "Arch", "-arch1-1"),
        ("6.10-rc3", "", "", "6.10.0", None, "-rc3"),
        ("4.4.0", "", "", "4.4.0", None, ""),
        ("nonsense", "", "", "0.0.0", None, "nonsense"),
    ],
)
def test_parses_vendor_strings(
    release: str,
    build: str,
    signature: str,
    version: str,
    distribution: str | None,
    flavour: str,
) -> None:
    found = parse_kernel_release(release, build, "x86_64", signature)
    assert (found.number, found.distribution, found.flavour) == (version, distribution, flavour)


def test_another_kernels_stable_number_does_not_count() -> None:
    found = parse_kernel_release("6.1.5", "built on Debian 5.10.209-2")
    assert found.version == (6, 1, 5)


def test_version_code_is_the_kernels_own() -> None:
    assert parse_kernel_release("4.19.300").code == (4 << 16) + (19 << 8) + 255
    assert parse_kernel_release("5.10.7").code == 0x050A07


def test_minimums_as_documented() -> None:
    assert {minimum.feature: str(minimum) for minimum in MINIMUMS} == {
        "eBPF": "4.4",
        "XDP": "4.8",
        "TC": "4.13",
        "BTF/CO-RE": "5.0",
        "LSM": "5.7",
        "CAP_BPF": "5.8",
        "ring buffer": "5.8",
    }


def test_minimums_are_compared_as_numbers_not_text() -> None:
    reached = {
        release: {m.feature for m in MINIMUMS if parse_kernel_release(release).reaches(m)}
        for release in ("4.3.9", "4.10.0", "5.6.19", "5.10.0")
    }
    assert reached["4.3.9"] == set()
    assert reached["4.10.0"] == {"eBPF", "XDP"}  # 4.10 is past 4.8, though "4.10" < "4.8"
    assert reached["5.6.19"] == {"eBPF", "XDP", "TC", "BTF/CO-RE"}
    assert len(reached["5.10.0"]) == len(MINIMUMS)


def test_running_kernel_is_what_uname_says() -> None:
    uname = subprocess.run(["uname", "-rm"], capture_output=True, text=True, check=True).stdout
    found = read_kernel_release()
    assert [found.release, found.machine] == uname.split()
    assert found.build == Path("/proc/version").read_text().strip()
    assert found.release.startswith(f"{found.version[0]}.{found.version[1]}")


def test_boot_id_is_a_uuid_that_stays() -> None:
    assert len(boot_id()) == 36
    assert boot_id() == boot_id()
