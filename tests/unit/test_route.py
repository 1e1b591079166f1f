"""pyroute2's class is imported without the rest of it, and without breaking the rest."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.compiler import ROOT

SHARED = """
import sys
from hypermesh_ebpf.attach.route import load_iproute
made, refusal = load_iproute()
assert (made, refusal) == load_iproute()
assert "pyroute2" not in sys.modules and "pyroute2.ndb" not in sys.modules
import pyroute2
assert pyroute2.IPRoute is made and pyroute2.NetlinkError is refusal
"""
WHOLE = """
import pyroute2
from hypermesh_ebpf.attach.route import load_iproute
assert load_iproute() == (pyroute2.IPRoute, pyroute2.NetlinkError)
"""
ABSENT = """
import sys
sys.path[:] = [path for path in sys.path if "site-packages" not in path]
from hypermesh_ebpf.attach.route import open_route
from hypermesh_ebpf.errors import MissingDependency
try:
    with open_route("attach xdp to lo"):
        pass
except MissingDependency as error:
    assert "No module named 'pyroute2'" in error.cause, error.cause
    assert "pip install pyroute2" in error.remedy
else:
    raise AssertionError("it was there")
"""


@pytest.mark.parametrize("text", [SHARED, WHOLE, ABSENT], ids=["alone", "whole", "absent"])
def test_iproute(text: str) -> None:
    done = subprocess.run([sys.executable, "-c", text], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
