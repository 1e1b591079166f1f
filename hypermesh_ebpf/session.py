"""A session: image loaded, hooks attached, maps readable; closing it leaves the system as it was.

Everything that has to be undone is on one ExitStack: the guard (which takes XDP programs off), the
descriptors (closing the last copy detaches and frees), the ring buffers' mappings.
"""

from __future__ import annotations

import os
import struct
import time
from contextlib import ExitStack
from typing import Any

from hypermesh_ebpf.attach.hold import Hold
from hypermesh_ebpf.bpf import maps as bpf_maps
from hypermesh_ebpf.bpf.maps import Map
from hypermesh_ebpf.bpf.ring import RingBuffer
from hypermesh_ebpf.metrics.rates import Rates
from hypermesh_ebpf.metrics.sample import Event, Loss, Sample, Start
from hypermesh_ebpf.monitors.declaration import Monitor, Options
from hypermesh_ebpf.watching import count_missed, require_attached
from hypermesh_ebpf.worker import Loaded, LoadedTarget

# A caller who reads samples alone does not make the process grow.
_MOST_PENDING = 100_000


class Session:
    """A monitor that runs, made by :class:`~hypermesh_ebpf.opening.Opening`; for one thread."""

    def __init__(
        self, monitor: Monitor, options: Options, loaded: Loaded, guard: Any | None
    ) -> None:
        self.monitor, self.options = monitor, options
        self._loaded, self._guard = loaded, guard
        self._stack = ExitStack()
        maps = {target.name: _open_maps(target) for target in loaded.targets}
        self._collector = monitor.collector(options, maps)
        self._sampling = [own["sampling"] for own in maps.values() if "sampling" in own]
        self.rings = [ring for target in loaded.targets for ring in self._open_rings(target)]
        self._rates = Rates()
        self._pending: list[Event] = []
        self._attached = self._read_at = loaded.attached_at
        names = [target.name for target in loaded.targets]
        self.target: str | list[str] = names[0] if len(names) == 1 else names
        self.start = Start(
            time=time.time(),
            monitor=monitor.name,
            target=self.target,
            hooks=loaded.hooks,
            degraded=loaded.degraded,
            prog_ids=tuple(p.id for target in loaded.targets for p in target.programs),
        )

    def _open_rings(self, target: LoadedTarget) -> list[RingBuffer]:
        rings = []
        for spec, fd in target.maps:
            if spec.type == bpf_maps.RINGBUF:
                ring = RingBuffer(fd, spec.max_entries)
                self._stack.callback(ring.close)
                rings.append(ring)
        return rings

    @property
    def guard(self) -> Any | None:
        """The guard that detaches if this process dies; None where the kernel does so itself."""
        return self._guard

    def events(self) -> list[Event]:
        """What happened since the last call, oldest first.

        All of it for who calls this after each :meth:`read`; else the last 100,000 and what came
        since.
        """
        self._drain()
        found, self._pending = self._pending, []
        return found

    def _drain(self) -> None:
        """Take what is in the ring buffers, for a caller of events()."""
        decode, name = self._collector.decode, self.monitor.name
        for ring in self.rings:
            for record in ring.read():
                fields = decode(record)
                if fields is not None:
                    moment = fields.pop("time")
                    self._pending.append(Event(moment, name, fields))

    def read(self) -> Sample:
        """A reading of everything counted since attach, with rates since the last reading.

        Raises MapError; TargetGone when an interface that was watched is no longer there.
        """
        self._check_targets()
        del self._pending[:-_MOST_PENDING]  # not what comes now: that may be more in a storm
        self._drain()
        reading = self._collector.collect()
        now = time.monotonic()
        totals, rows = self._rates.apply(
            reading.totals,
            reading.rows,
            self.monitor.key(self.options),
            self.monitor.counters,
            now - self._read_at,
        )
        self._read_at = now
        return Sample(
            time=time.time(),
            monitor=self.monitor.name,
            target=self.target,
            elapsed_s=round(now - self._attached, 3),
            totals=totals,
            rows=rows,
            loss=Loss(reading.events_lost, reading.map_full, self._missed()),
            histograms=reading.histograms,
        )

    def run_time_ns(self) -> int:
        """For how long its programs have run, all together; counted while statistics are on."""
        from hypermesh_ebpf.bpf.info import read_run_statistics

        programs = [program for target in self._loaded.targets for program in target.programs]
        return sum(read_run_statistics(program.fd)[1] for program in programs)

    def sample_one_in(self, number: int) -> bool:
        """Take one event in ``number``, a power of two, from now on; it counts for the others.

        False if it was not opened for that.  Raises MapError.
        """
        for each in self._sampling:
            seeds = struct.iter_unpack("=Q", os.urandom(8 * each.reader.copies))
            each.write(0, b"".join(struct.pack("=QQ", seed, number - 1) for (seed,) in seeds))
        return bool(self._sampling)

    def close(self) -> None:
        """Detach, and free everything.  Raises DetachError if something of ours stays attached."""
        self._stack.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _missed(self) -> int | None:
        programs = [program for target in self._loaded.targets for program in target.programs]
        return count_missed([(program.kind, program.fd) for program in programs])

    def _check_targets(self) -> None:
        for target in self._loaded.targets:
            if target.ifindex is not None:
                (program,) = target.programs
                require_attached(Hold(target.ifindex, target.name, program.id, program.fd))


def _open_maps(target: LoadedTarget) -> dict[str, Map]:
    """The target's readable maps by name."""
    return {spec.name: Map(spec, fd) for spec, fd in target.maps if spec.type != bpf_maps.RINGBUF}
