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


def longest_kernels(call: Callable[[], Any], folder: str) -> list[Kernel]:
    """Trace ``call`` into ``folder`` and return its kernels, of all devices, the longest first; none on a CPU.

    Compile and warm up before: whatever the call does is in the trace.
    """
    before = _traces(folder)
    with jax.profiler.trace(folder):
        jax.block_until_ready(call())
    seconds, calls = collections.Counter[str](), collections.Counter[str]()
    for file in _traces(folder) - before:
        trace = jax.profiler.ProfileData.from_file(str(file))
        for plane in trace.planes:
            if not plane.name.startswith("/device:"):
                continue
            for line in plane.lines:
                if not line.name.startswith(("Stream", "XLA Ops")):  # of a GPU, of a TPU
                    continue
                for event in line.events:
                    seconds[event.name] += event.duration_ns / 1e9
                    calls[event.name] += 1
    return [Kernel(name, spent, calls[name]) for name, spent in seconds.most_common()]


def _traces(folder: str) -> set[Path]:
    return set(Path(folder).glob("**/*.xplane.pb"))
