"""What ``bench RECIPE`` prints of every kind of work."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from rich.console import Console

from deepseek_jax.cli.device_trace import communication, traced
from deepseek_jax.cli.longest_kernels import kernels_of
from deepseek_kernels.bench import ceiling, median_seconds

PEAKS = {"NVIDIA H100": 989e12, "NVIDIA H200": 989e12}  # dense bfloat16 FLOP/s by the data sheet


class Measured(NamedTuple):
    """What to print, by name, and a call that does the work once more, for a profile."""

    facts: dict[str, str]
    call: Callable[[], Any]


def rates(tokens: int, seconds: float, flops: float, dtype: str) -> dict[str, str]:
    """flops: of the model's arithmetic, a second, on one device."""
    device = jax.devices()[0]
    top = ceiling(jnp.dtype(dtype), 1024 if device.platform == "cpu" else 8192, 5)
    peak = PEAKS.get(device.device_kind.removesuffix(" 80GB HBM3"))
    share = f"{flops / top:.0%} of a dense product's {top / 1e12:.3g} in this run"
    mfu = f"; MFU {flops / peak:.1%} of {peak / 1e12:.0f}" if peak else ""
    return {
        "tokens a second": f"{tokens / seconds:,.0f}",
        "time": f"{1e3 * seconds:.2f} ms",
        "model's arithmetic": f"{flops / 1e12:.3g} TFLOP/s a device, {share}{mfu}",
    }


def bandwidth(size: float, seconds: float) -> str:
    """size: of what must be read, bytes on one device: its time by the copy's bandwidth bounds the work."""
    copy = copied_a_second()
    return (
        f"{size / 1e9:.3g} GB a device, {size / seconds / 1e9:,.0f} GB/s: {size / seconds / copy:.0%} of copying, "
        f"{copy / 1e9:,.0f} in this run, by which they take {1e3 * size / copy:.2f} ms"
    )


def copied_a_second() -> float:
    """Bytes that are read and written."""
    x = jnp.ones(1 << (25 if jax.devices()[0].platform == "cpu" else 30), jnp.bfloat16)
    add = jax.jit(lambda x: x + 1)
    return 2 * x.nbytes / median_seconds(lambda: add(x), 5)


def peak_memory(compiled: Any) -> str:
    """Arguments, results and temporary arrays of the program: what it needs, whatever else this process holds."""
    found = compiled.memory_analysis()
    if found is None:
        return "unknown"
    size = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    return f"{(size + found.temp_size_in_bytes) / 2**30:.1f} GiB a device"


def print_profile(console: Console, call: Callable[[], Any], folder: str) -> None:
    """The twenty longest kernels of one more call, and how long the devices had none to run; of several devices also
    how long they waited for collectives."""
    devices = traced(call, folder)
    kernels, span = kernels_of(devices)
    total, calls = sum(kernel.seconds for kernel in kernels), sum(kernel.calls for kernel in kernels)
    if not kernels:
        console.print(f"{folder}: the trace has no kernels of an accelerator")
        return
    console.print(
        f"{1e3 * total:.1f} ms of {calls} calls of {len(kernels)} kernels, in {1e3 * span:.1f} ms from the first to "
        f"the last (the trace: {folder})"
    )
    if len(devices) > 1 and (found := communication(devices)):
        console.print(
            f"{1e3 * found.collectives:.1f} ms a device with a collective under way, {1e3 * found.exposed:.1f} ms of "
            f"them exposed: no other kernel ran; {1e3 * found.idle:.1f} ms with neither"
        )
    for kernel in kernels[:20]:
        share = kernel.seconds / total
        console.print(f"{1e3 * kernel.seconds:9.2f} ms {share:6.1%} ×{kernel.calls:<5} {kernel.name[:90]}")
