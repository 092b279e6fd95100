"""What a call's time on the accelerator goes to."""

import collections
from collections.abc import Callable
from typing import Any, NamedTuple

from deepseek_jax.cli.device_trace import Event, span, traced


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
    return kernels_of(traced(call, folder))


def kernels_of(devices: list[list[Event]]) -> tuple[list[Kernel], float]:
    """The same of the events of each device."""
    seconds, calls = collections.defaultdict[str, float](float), collections.Counter[str]()
    for event in (event for events in devices for event in events):
        seconds[event.name] += (event.end - event.begin) / 1e9
        calls[event.name] += 1
    longest = max((span(events) / 1e9 for events in devices), default=0.0)
    longest_first = sorted(seconds.items(), key=lambda item: -item[1])
    return [Kernel(name, spent, calls[name]) for name, spent in longest_first], longest
