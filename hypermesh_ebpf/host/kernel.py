"""Which kernel runs here, and what the documented minimums say of it.

A version is a hint: distributions backport (RHEL's 4.18 has most of 5.14's BPF).  Probes decide.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from functools import lru_cache


@dataclass(frozen=True, slots=True)
class Minimum:
    """A feature and the first release that has it, as the project documents it."""

    feature: str
    version: tuple[int, int]
    what: str

    def __str__(self) -> str:
        return f"{self.version[0]}.{self.version[1]}"


MINIMUMS = (
    Minimum("eBPF", (4, 4), "bpf(2) with maps and programs"),
    Minimum("XDP", (4, 8), "packet programs before the network stack"),
    Minimum("TC", (4, 13), "packet programs in traffic control"),
    Minimum("BTF/CO-RE", (5, 0), "the kernel describes its own types"),
    Minimum("LSM", (5, 7), "programs on security hooks"),
    Minimum("CAP_BPF", (5, 8), "BPF without CAP_SYS_ADMIN"),
    Minimum("ring buffer", (5, 8), "event streams in order, shared by all CPUs"),
)

# What a release string betrays of who built it; the first match counts.
_DISTRIBUTIONS = (
    (r"microsoft-standard", "WSL"),
    (r"\.el\d+|\.el\d+_\d+", "Red Hat"),
    (r"\.fc\d+", "Fedora"),
    (r"\.amzn\d+|amzn", "Amazon Linux"),
    (r"-fc-|firecracker", "Firecracker"),
    (r"-pve$", "Proxmox"),
    (r"-rpi|\+rpt", "Raspberry Pi"),
    (r"-arch\d", "Arch"),
    (r"-(lts|virt)$", "Alpine"),
    (r"cos\b|\+$", "Container-Optimized OS"),
)
_BUILDERS = (
    (r"[Dd]ebian", "Debian"),
    (r"[Uu]buntu|buildd@", "Ubuntu"),
    (r"redhat\.com", "Red Hat"),
    (r"fedoraproject", "Fedora"),
    (r"opensuse|suse\.de", "SUSE"),
    (r"amazon\.com|amzn", "Amazon Linux"),
    (r"archlinux", "Arch"),
    (r"alpine", "Alpine"),
)


@dataclass(frozen=True, slots=True)
class KernelRelease:
    """A kernel's release, taken apart.

    ``release`` is ``uname -r``; ``version`` the upstream (major, minor, patch) that it was built
    from, which Debian and Ubuntu tell elsewhere than in ``release``; ``flavour`` what follows the
    numbers ("-28-amd64"); ``distribution`` who built it, None when the strings do not say;
    ``build`` is /proc/version.
    """

    release: str
    version: tuple[int, int, int]
    flavour: str
    distribution: str | None
    build: str
    machine: str

    @property
    def code(self) -> int:
        """The number KERNEL_VERSION() makes of it, as kprobe programs needed before Linux 5.0."""
        major, minor, patch = self.version
        return (major << 16) + (minor << 8) + min(patch, 255)

    @property
    def number(self) -> str:
        """The upstream version as "6.1.90"."""
        return ".".join(map(str, self.version))

    def reaches(self, minimum: Minimum) -> bool:
        """True if the version is at least ``minimum``'s.  A hint, never a verdict."""
        return self.version[:2] >= minimum.version


def parse_kernel_release(
    release: str, build: str = "", machine: str = "", signature: str = ""
) -> KernelRelease:
    """Take apart ``uname -r``, /proc/version and (Ubuntu's) /proc/version_signature.

    Debian's "6.1.0-21-amd64" names an ABI, its build string "Debian 6.1.90-1" the stable release;
    Ubuntu's signature "Ubuntu 6.5.0-1016.16-aws 6.5.13" ends with it.  A number found there counts
    only if it continues the release's own major and minor.
    """
    match = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?(.*)$", release, re.DOTALL)
    if match:
        version = (int(match[1]), int(match[2]), int(match[3] or 0))
        flavour = match[4]
    else:
        version, flavour = (0, 0, 0), release
    for pattern, text in (
        (r"\bDebian (\d+)\.(\d+)\.(\d+)", build),
        (r"\bUbuntu \S+ (\d+)\.(\d+)\.(\d+)\s*$", signature),
    ):
        # More than one: Debian's compiler names itself "gcc-12 (Debian 12.2.0-14)", too.
        for major, minor, patch in re.findall(pattern, text):
            if (int(major), int(minor)) == version[:2]:
                version = (version[0], version[1], int(patch))
    named = [name for pattern, name in _DISTRIBUTIONS if re.search(pattern, flavour)]
    named += [name for pattern, name in _BUILDERS if re.search(pattern, build)]
    return KernelRelease(
        release, version, flavour, named[0] if named else None, build.strip(), machine
    )


@lru_cache(maxsize=1)
def read_kernel_release() -> KernelRelease:
    """The running kernel's release."""
    uname = os.uname()
    texts = []
    for path in ("/proc/version", "/proc/version_signature"):
        try:
            with open(path, errors="replace") as file:
                texts.append(file.read())
        except OSError:  # only Ubuntu has the second; a container may hide either
            texts.append("")
    return parse_kernel_release(uname.release, texts[0], uname.machine, texts[1])


def boot_id() -> str:
    """The kernel's random name for this boot: what was written under another one is stale."""
    with open("/proc/sys/kernel/random/boot_id") as file:
        return file.read().strip()
