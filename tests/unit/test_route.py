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
MESSAGE = """
import sys
from hypermesh_ebpf.attach.route import load_link_message
made = load_link_message()
assert not {"pyroute2", "asyncio", "ssl", "unittest"} & set(sys.modules)
message = made()
message["index"] = 1
message["attrs"] = [("IFLA_XDP", {"attrs": [("IFLA_XDP_FD", 5)]})]
message.encode()
import pyroute2.netlink.rtnl.ifinfmsg as whole
assert whole.ifinfmsg is made
"""
WHOLE = """
import pyroute2
from hypermesh_ebpf.attach.route import load_iproute, load_link_message
assert load_iproute() == (pyroute2.IPRoute, pyroute2.NetlinkError)
assert load_link_message().__name__ == "ifinfmsg"
"""
ABSENT = """
import sys
sys.path[:] = [path for path in sys.path if "site-packages" not in path]
from hypermesh_ebpf.attach.route import open_links, open_route
from hypermesh_ebpf.errors import MissingDependency
for opened in (open_route, open_links):
    try:
        with opened("attach xdp to lo"):
            pass
    except MissingDependency as error:
        assert "No module named 'pyroute2'" in error.cause, error.cause
        assert "pip install pyroute2" in error.remedy
    else:
        raise AssertionError("it was there")
"""


@pytest.mark.parametrize(
    "text", [SHARED, MESSAGE, WHOLE, ABSENT], ids=["alone", "message", "whole", "absent"]
)
def test_iproute(text: str) -> None:
    done = subprocess.run([sys.executable, "-c", text], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
