"""File systems found by magic; what is said where they cannot be opened."""

from __future__ import annotations

import errno
import json
import os
import subprocess
from pathlib import Path

import pytest

from hypermesh_ebpf.errors import MissingPrivilege
from hypermesh_ebpf.host import filesystems
from hypermesh_ebpf.host.filesystems import (
    BPFFS,
    TRACEFS,
    find_mount,
    magic_of,
    open_detached,
    read_mounts,
)


def test_magic_is_what_stat_says() -> None:
    for path in ("/", "/proc", "/sys", "/dev"):
        answer = subprocess.run(["stat", "-f", "-c", "%t", path], capture_output=True, text=True)
        assert magic_of(path) == int(answer.stdout, 16), path
    assert magic_of("/no/such/path") is None


def test_mounts_are_those_of_findmnt() -> None:
    answer = subprocess.run(
        ["findmnt", "--list", "--json", "-o", "TARGET,FSTYPE"], capture_output=True, text=True
    )
    expected = [(m["target"], m["fstype"]) for m in json.loads(answer.stdout)["filesystems"]]
    assert sorted((m.point, m.fstype) for m in read_mounts()) == sorted(expected)


def test_without_privileges_the_error_says_how_to_get_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(number: int, *arguments: object) -> int:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(filesystems, "_syscall", refuse)
    with pytest.raises(MissingPrivilege) as caught:
        open_detached(TRACEFS)
    assert "needs CAP_SYS_ADMIN" in str(caught.value)
    assert "sudo mount" in (caught.value.remedy or "")


def test_mounted_but_closed_to_us(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*arguments: object) -> int:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(filesystems, "find_mount", lambda magic: str(tmp_path))
    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(MissingPrivilege) as caught:
        filesystems.open_filesystem(TRACEFS)
    assert str(tmp_path) in str(caught.value)
    assert "mount -o remount" in (caught.value.remedy or "")


def test_bpffs_is_found_where_stat_finds_it() -> None:
    answer = subprocess.run(
        ["findmnt", "-n", "-t", "bpf", "-o", "TARGET"], capture_output=True, text=True
    )
    found = find_mount(BPFFS.magic)
    assert found in answer.stdout.split() if answer.stdout else found is None
