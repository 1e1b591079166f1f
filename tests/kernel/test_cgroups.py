"""Control groups by id, against the directories of the mounted hierarchy."""

from __future__ import annotations

import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from hypermesh_ebpf import open_monitor
from hypermesh_ebpf.host import cgroups
from hypermesh_ebpf.host.cgroups import CgroupPaths, find_container
from hypermesh_ebpf.host.filesystems import CGROUP2, find_mount


@pytest.fixture
def group() -> Iterator[Path]:
    """A fresh control group named like a container's."""
    root = find_mount(CGROUP2.magic)
    if root is None:
        pytest.skip("no cgroup2 hierarchy is mounted")
    path = Path(root) / f"hmebpf-{uuid.uuid4().hex}{uuid.uuid4().hex}.scope"
    path.mkdir()
    try:
        yield path
    finally:
        path.rmdir()


def test_path_by_id(group: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    number = group.stat().st_ino
    assert CgroupPaths().find(number) == f"/{group.name}"
    assert CgroupPaths().find(2**60 + 1) is None

    def refuse(root: str, cgroup_id: int) -> None:
        raise PermissionError

    monkeypatch.setattr(cgroups, "_open_by_id", refuse)
    assert CgroupPaths().find(number) == f"/{group.name}", "the walk finds the same"


def test_exec_in_a_group_names_it_and_its_container(group: Path) -> None:
    code = (
        "import os, sys; open(sys.argv[1] + '/cgroup.procs', 'w').write('0'); "
        "os.execv('/bin/true', ['hmcgroup'])"
    )
    with open_monitor("exec-monitor", comm="true") as session:
        subprocess.run([sys.executable, "-S", "-c", code, group], check=True)
        (event,) = [e.fields for e in session.events() if e.fields["args"] == ["hmcgroup"]]
    assert event["cgroup"] == f"/{group.name}"
    assert event["container"] == group.name.split("-")[1][:12]


def test_only_whole_ids_name_a_container() -> None:
    long = "0123456789abcdef" * 4
    assert find_container(f"/docker/{long}") == "0123456789ab"
    assert find_container(f"/system.slice/docker-{long}.scope/init") == "0123456789ab"
    assert find_container(f"/a/{long}0") is None
    assert find_container("/user.slice") is None
    assert find_container(None) is None
