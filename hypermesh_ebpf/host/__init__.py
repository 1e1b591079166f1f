"""What this machine can do: read-only probes, each with its reason and a remedy.

Nothing here changes the system.  A probe asks the kernel itself (loads a two-instruction program,
opens and closes an event); a version number never overrules a probe.
"""
