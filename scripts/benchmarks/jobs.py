"""The jobs of the bundled monitors, as command lines of ours and of the peers: exec, net, xdp."""

from __future__ import annotations

from benchmarks.peers import bcc_script, bpftrace, hmebpf

BCC, BPFTRACE = "BCC script", "bpftrace"
JOBS = {"exec": "exec-monitor", "net": "net-monitor", "xdp": "xdp"}
"""Job: our monitor."""
READING = {"hmebpf": r'"type":"sample"', BCC: "reading", BPFTRACE: "reading"}
"""Contender: the pattern of a reading in its output; of ours with -o json."""
FRAME = "events lost"
"""What stands below the rows of a frame of ours that shows a reading."""

_CALLS = "connect accept accept4 sendto sendmsg sendmmsg recvfrom recvmsg recvmmsg close"


def ours(job: str, *arguments: str) -> list[str]:
    """Our monitor."""
    interface = ("--iface", "lo") if job == "xdp" else ()
    return hmebpf(JOBS[job], *interface, *arguments)


def by_bcc(job: str, seconds: float, readings: int = 0) -> list[str]:
    """The BCC script: a reading every so many seconds, so many times (0: until Ctrl-C)."""
    return bcc_script("watch", job, str(seconds), str(readings))


def by_bpftrace(job: str, seconds: float, readings: int = 0) -> list[str]:
    """The same by bpftrace, which has no XDP; one reading, or until Ctrl-C."""
    if job == "exec":
        calls = ["execve", "execveat"]
        enter = "{ @filename[tid] = str(args->filename); @start[tid] = nsecs; }"
        leave = (
            "/@start[tid]/ { @calls[comm, args->ret < 0] = count(); "
            'printf("%s %s %d\\n", comm, @filename[tid], nsecs - @start[tid]); '
            "delete(@filename[tid]); delete(@start[tid]); }"
        )
    else:
        calls = _CALLS.split()
        enter = "{ @start[tid] = nsecs; }"
        leave = (
            "/@start[tid]/ { @calls[pid, comm, probe] = count(); "
            "@bytes[pid, comm, probe] = sum(args->ret > 0 ? args->ret : 0); "
            "@ns[pid, comm, probe] = sum(nsecs - @start[tid]); delete(@start[tid]); }"
        )
    entries = ", ".join(f"tracepoint:syscalls:sys_enter_{call}" for call in calls)
    exits = ", ".join(f"tracepoint:syscalls:sys_exit_{call}" for call in calls)
    every = f"interval:ms:{round(seconds * 1000)}"
    read = 'printf("reading\\n"); print(@calls);' + (" exit();" if readings else "")
    return bpftrace(f"{entries} {enter} {exits} {leave} {every} {{ {read} }}", "-B", "line")
