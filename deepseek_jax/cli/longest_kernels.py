"""What a call's time on the accelerator goes to, from jax's own profiler; xprof reads the same folder."""

import collections
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax


class Kernel(NamedTuple):
    """All calls of one kernel: seconds in all, and how many."""

    name: str
    seconds: float
    calls: int


def longest_kernels(call: Callable[[], Any], folder: str) -> tuple[list[Kernel], float]:
    """Trace ``call`` into ``folder`` -> (its kernels, of all devices, the longest first; the seconds from the first's
    start to the last's end on the device where that is longest). On a CPU there are none.

    Compile and warm up before: whatever the call does is in the trace.
    """
    before = _traces(folder)
    with jax.profiler.trace(folder):
        jax.block_until_ready(call())
    seconds, calls, span = collections.Counter[str](), collections.Counter[str](), 0.0
    for file in _traces(folder) - before:
        trace = jax.profiler.ProfileData.from_file(str(file))
        for plane in trace.planes:
            if not plane.name.startswith("/device:"):
                continue
            # Of a GPU, of a TPU.
            lines = [line for line in plane.lines if line.name.startswith(("Stream", "XLA Ops"))]
            events = [event for line in lines for event in line.events]
            for event in events:
                seconds[event.name] += event.duration_ns / 1e9
                calls[event.name] += 1
            if events:
                first, last = min(event.start_ns for event in events), max(event.end_ns for event in events)
                span = max(span, (last - first) / 1e9)
    return [Kernel(name, spent, calls[name]) for name, spent in seconds.most_common()], span


def _traces(folder: str) -> set[Path]:
    return set(Path(folder).glob("**/*.xplane.pb"))
