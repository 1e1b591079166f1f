"""The command line of ``scripts/bench``: choose sections, run them, print the table, write JSON."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from benchmarks import SECTIONS
from benchmarks.machine import describe_machine
from benchmarks.measure import Growth, Result, Settings, say
from benchmarks.table import as_dict, draw_table
from hypermesh_ebpf.host.filesystems import enter_private_mounts


def main(argv: Sequence[str]) -> int:
    """Run the sections; 1 if a budget was not met."""
    parser = argparse.ArgumentParser(prog="scripts/bench", allow_abbrev=False)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=", ".join(SECTIONS))
    parser.add_argument("--rounds", type=int, default=5, help="of each contender; 5")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    parser.add_argument("--list", action="store_true", help="tell what the sections are")
    options = parser.parse_args(argv)
    if options.list:
        for name, text in SECTIONS.items():
            print(f"{name:10}{text}")
        return 0
    for unknown in set(options.sections) - set(SECTIONS):
        parser.error(f"unknown section {unknown}: there are {', '.join(SECTIONS)}")
    if options.rounds < 1:
        parser.error("--rounds must be above 0")
    if os.geteuid():
        parser.error("run it as root: it loads programs into the kernel")

    # Contenders are interrupted; who was started in the background would have them ignore it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    enter_private_mounts()  # the peers want tracefs at its usual place
    machine = describe_machine()
    print(*(f"{name}: {value}" for name, value in machine.items()), sep="\n")
    found: dict[str, list[Result | Growth]] = {}
    for name in [each for each in SECTIONS if each in (options.sections or SECTIONS)]:
        say(f"section {name}: {SECTIONS[name]}")
        module = import_module(f"benchmarks.{name}")
        found[name] = list(module.run(Settings(options.rounds)))
        print(f"\n{module.TITLE}")
        print(draw_table(found[name]), flush=True)
        if options.json:  # after each section: a later one may be interrupted
            figures = {name: [as_dict(each) for each in results] for name, results in found.items()}
            text = json.dumps({"machine": machine, "sections": figures}, indent=1)
            options.json.write_text(text + "\n")
    missed = [each.what for results in found.values() for each in results if each.met is False]
    if missed:
        print("\nover budget: " + "; ".join(missed), file=sys.stderr)
    return 1 if missed else 0
