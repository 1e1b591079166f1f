"""A process that holds and attaches programs, for the tests that kill it."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from hypermesh_ebpf import ledger
from tests.netns import Namespace, VethPair, veth_pair, wait_until

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}

# Holds and attaches to each place named (an interface for XDP, "tc:lo,..."), says so, then obeys
# lines: "watch" waits for the guard's death and replaces it, "fork" makes a child that stays,
# "release" ends in order.
OWNER = """
import json, os, select, signal, sys
from hypermesh_ebpf import ledger
from hypermesh_ebpf.attach import attach
from hypermesh_ebpf.attach_type import EbpfAttachType
from hypermesh_ebpf.guard import Guard
from tests.programs import SCHED_CLS, XDP, load_program, program_id

def tell(**what):
    print(json.dumps(what), flush=True)

users_own = os.pipe()
for end in users_own:
    os.set_inheritable(end, True)  # as the shell's `3>file` is
guard = Guard.start()
programs = {}

def hold(wanted):
    guard.hold(wanted, str(ledger.record(wanted)))

for text in sys.argv[1:]:
    kind = text.partition(":")[0] if ":" in text else "xdp"
    if kind not in programs:
        programs[kind] = load_program("hm_guarded", XDP if kind == "xdp" else SCHED_CLS)
    point = EbpfAttachType.parse(text if ":" in text else f"xdp:{text}")
    attach(point, programs[kind], program_id(programs[kind]), hold)
(fd,) = programs.values()
tell(guard=guard.pid, program=program_id(fd))
for line in sys.stdin:
    if line == "watch\\n":
        poll = select.poll()
        poll.register(guard, select.POLLIN)
        tell(waiting=True)
        poll.poll()
        tell(replaced=guard.replace_if_dead(), guard=guard.pid)
    elif line == "fork\\n":
        if os.fork() == 0:
            guard.release()  # not its own
            tell(child=os.getpid())
            while True:
                signal.pause()
    elif line == "release\\n":
        tell(outcomes=[(o.what, o.cause) for o in guard.release()])
"""


class Owner:
    """The owner's process, with what it said of itself."""

    def __init__(self, ns: Namespace, *ifaces: str, **options: Any) -> None:
        self.process = ns.start(sys.executable, "-c", OWNER, *ifaces, env=ENVIRONMENT, **options)
        said = self.read()
        self.pid: int = self.process.pid
        self.guard: int = said["guard"]
        self.program: int = said["program"]

    def read(self) -> dict[str, Any]:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            assert self.process.stderr
            pytest.fail(f"the owner ended: {self.process.stderr.read()}")
        said: dict[str, Any] = json.loads(line)
        return said

    def tell(self, line: str) -> dict[str, Any]:
        assert self.process.stdin
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return self.read()


def attached(ns: Namespace) -> set[int]:
    """The ids of all XDP programs in a namespace, by `ip`."""
    links = json.loads(ns.run("ip", "-j", "-d", "link").stdout)
    return {link["xdp"]["prog"]["id"] for link in links if "prog" in link.get("xdp", {})}


def tc_filters(ns: Namespace, iface: str) -> list[tuple[str, int, int]]:
    """(direction, priority, program id) of every filter on an interface, by `tc`."""
    found = []
    for side in ("ingress", "egress"):
        done = ns.run("tc", "-j", "filter", "show", "dev", iface, side, check=False)
        for each in json.loads(done.stdout or "[]"):
            program = each.get("options", {}).get("prog")
            if program:
                found.append((side, each["pref"], program["id"]))
    return found


def has_clsact(ns: Namespace, iface: str) -> bool:
    return "clsact" in ns.run("tc", "qdisc", "show", "dev", iface).stdout


def entries(ns: Namespace) -> list[ledger.Entry]:
    """The ledger's entries for a namespace: others may run monitors on this machine."""
    return [entry for entry in ledger.entries() if entry.netns == ns.inode]


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


@contextmanager
def free_veth() -> Iterator[VethPair]:
    """A veth pair; at the end nothing may be on its left side, and no entry in the ledger."""
    with veth_pair() as pair:
        yield pair
        wait_until(lambda: not attached(pair.left), "the interfaces are free")
        wait_until(lambda: not entries(pair.left), "the ledger is empty")
