"""What ``scripts/bench`` measures: one module for each section, found by its name.

A section has TITLE and ``run(settings)``, which yields a :class:`~benchmarks.measure.Result` for
each line of the table.
"""

SECTIONS = {
    "start": "help, cold and warm start, exit",
    "memory": "resident while monitoring, and peak",
    "image": "image load, attach",
    "maps": "one map read; hashes of 100 to 1,000,000 entries",
    "rings": "ring buffers: drained, read while they are filled",
    "kernel": "what the programs cost in the kernel",
    "refresh": "the tool's own CPU at each refresh",
    "storm": "events taken without loss",
    "overhead": "what --max-overhead costs and saves",
    "growth": "how cost grows: maps, rates, interfaces, monitors, programs",
}
"""Section: what is in it, in the order of the table."""
