"""What the accelerators ran while a call was traced, from jax's own profiler; xprof reads the same folder."""

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax

# NCCL's kernels, XLA's own, and copies from another GPU's memory.
_COLLECTIVE = re.compile(
    r"nccl|nvshmem|memcpyp2p|collective|all[-_]?(reduce|gather|to[-_]?all)|reduce[-_]?scatter", re.IGNORECASE
)


class Event(NamedTuple):
    """One run of a kernel, in nanoseconds of its device's clock."""

    name: str
    begin: float
    end: float


class Communication(NamedTuple):
    """Seconds on one device, the mean of all, of one call: with a collective under way, those of them in which no other
    kernel ran, and those with neither between the first kernel and the last."""

    collectives: float
    exposed: float
    idle: float


def traced(call: Callable[[], Any], folder: str) -> list[list[Event]]:
    """Trace ``call`` into ``folder`` -> the events of each device. Of a CPU there are none.

    Compile and warm up before: whatever the call does is in the trace.
    """
    before = set(Path(folder).glob("**/*.xplane.pb"))
    with jax.profiler.trace(folder):
        jax.block_until_ready(call())
    found = set(Path(folder).glob("**/*.xplane.pb")) - before
    return [events for file in found for events in _events(jax.profiler.ProfileData.from_file(str(file)))]


def _events(trace: Any) -> Iterable[list[Event]]:
    for plane in trace.planes:
        if plane.name.startswith("/device:"):
            # Of a GPU, of a TPU.
            lines = [line for line in plane.lines if line.name.startswith(("Stream", "XLA Ops"))]
            if events := [Event(one.name, one.start_ns, one.end_ns) for line in lines for one in line.events]:
                yield events


def communication(devices: list[list[Event]], calls: int = 1) -> Communication | None:
    """Of one of the traced ``calls``; None without devices."""
    if not devices:
        return None
    parts = [_of_device(events) for events in devices]
    return Communication(*(sum(values) / len(parts) / calls / 1e9 for values in zip(*parts, strict=True)))


def _of_device(events: list[Event]) -> Communication:
    collectives = [event for event in events if _COLLECTIVE.search(event.name)]
    compute = [event for event in events if not _COLLECTIVE.search(event.name)]
    busy, computing = _covered(events), _covered(compute)
    return Communication(_covered(collectives), busy - computing, span(events) - busy)


def span(events: list[Event]) -> float:
    """Nanoseconds from the first's begin to the last's end."""
    return max(event.end for event in events) - min(event.begin for event in events)


def _covered(events: list[Event]) -> float:
    """Nanoseconds in which at least one of them is under way."""
    total, until = 0.0, float("-inf")
    for event in sorted(events, key=lambda event: event.begin):
        total += max(0.0, event.end - max(event.begin, until))
        until = max(until, event.end)
    return total
