"""Time the kernels beside what they replace: ``python -m deepseek_kernels.bench``.

Each row gives the median time, TFLOP/s of useful arithmetic, the share of the ceiling (one dense product of the
platform's best size, measured in the same run) and the ratio to the first row of its kind: ``jax.lax.ragged_dot`` for
grouped products, the definition for attention, blockwise where that does not fit. Group sizes are drawn from a softmax
of normal numbers: uneven, as routing is. ``--peer-python``, a Python with torch, adds its grouped product and its cuDNN
attention on a GPU.
"""

import argparse
import functools
import json
import os
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_kernels import hopper
from deepseek_kernels.attention import mla_attention
from deepseek_kernels.grouped_matmul import grouped_matmul
from deepseek_kernels.registry import TABLE, Choice, choose
from deepseek_kernels.target import Target
from deepseek_kernels.tune import tune
from deepseek_kernels.visible import Visible

# name: groups, D, F, rows; and the dtype. What the demo does on a CPU, what V2-Lite and V3 do on an accelerator.
SHAPES = {
    "cpu": (
        ("demo, gate and up", (16, 128, 192, 2048)),
        ("demo, down", (16, 96, 128, 2048)),
        ("fine", (64, 256, 256, 4096)),
    ),
    "gpu": (
        ("V2-Lite", (64, 2048, 1408, 32768)),
        ("V3 on 32 devices", (8, 7168, 2048, 16384)),
        ("V3, gate and up", (32, 7168, 4096, 16384)),
    ),
}

# name: batch, tokens, heads, N, R and V of causal MLA.
ATTENTION = {
    "cpu": (("demo, attention", (16, 256, 4, 32, 16, 32)),),
    "gpu": (
        ("V2-Lite, 4k", (4, 4096, 16, 128, 64, 128)),
        ("V2-Lite, 8k", (2, 8192, 16, 128, 64, 128)),
        ("V2-Lite, 32k", (1, 32768, 16, 128, 64, 128)),
        ("V3's heads, 4k", (4, 4096, 128, 128, 64, 128)),
    ),
}


class Report:
    """Prints one row after another, with ratios to the first of each kind."""

    def __init__(self, name: str, work: dict[str, float], top: float):
        self.name, self.work, self.top = name, work, top
        self.baseline: dict[str, tuple[str, float]] = {}

    def __call__(self, kind: str, who: str, seconds: float, detail: str = "") -> None:
        first, its = self.baseline.setdefault(kind, (who, seconds))
        rate = self.work[kind] / seconds
        print(
            f"{self.name:20} {kind:17} {who:11} {detail:10} {seconds * 1e3:9.3f} ms {rate / 1e12:8.3f} TFLOP/s "
            f"{rate / self.top:6.1%} of dense {its / seconds:6.1f}× {first}",
            flush=True,
        )


def can_run(operation: str, target: Target, dtype: jnp.dtype, **facts: object) -> dict[str, Choice]:
    """What can run an operation here, by name."""
    found = {}
    for row in TABLE[operation]:
        if not row.refuses(target, dtype, **facts):
            found[row.name] = choose(operation, target, dtype, implementation=row.name, **facts)
    return found


def uneven_sizes(groups: int, rows: int, block: int, seed: int = 0) -> np.ndarray:
    """Rows per group, padded to whole blocks: a softmax of normal numbers times ``rows``."""
    share = np.exp(np.random.default_rng(seed).normal(size=groups))
    sizes = np.floor(share / share.sum() * rows).astype(np.int64)
    sizes[0] += rows - sizes.sum()
    return (sizes + block - 1) // block * block


def median_seconds(call: Callable[[], object], repeats: int) -> float:
    """Seconds of one call: on a GPU the mean of ten in a row, which hides the time that a launch takes."""
    calls = 1 if Target.here().platform == "cpu" else 10
    jax.block_until_ready(call())
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready([call() for _ in range(calls)])
        seconds.append((time.perf_counter() - began) / calls)
    return statistics.median(seconds)


def ceiling(dtype: jnp.dtype, size: int, repeats: int) -> float:
    """FLOP/s of one dense square product."""
    x = jax.random.normal(jax.random.key(0), (size, size), dtype)
    product = jax.jit(jnp.matmul)
    return 2 * size**3 / median_seconds(lambda: product(x, x), repeats)


def both(function: Callable[..., jax.Array], dout: jax.Array, *inputs: jax.Array) -> tuple[jax.Array, ...]:
    """Forward and backward."""
    out, pullback = jax.vjp(function, *inputs)
    return out, *pullback(dout)


def bench_grouped(
    name: str, shape: tuple[int, int, int, int], dtype: jnp.dtype, top: float, repeats: int, peer_python: str
) -> None:
    """Print forward and forward+backward of one shape, laid out in blocks as DeepSeekMoE does, and of the peer."""
    groups, width, hidden, rows = shape
    report = Report(name, {"forward": 2 * rows * width * hidden, "forward+backward": 6 * rows * width * hidden}, top)
    keys = jax.random.split(jax.random.key(0), 3)
    w = jax.random.normal(keys[0], (groups, width, hidden), dtype) / width**0.5
    choices = can_run("grouped_matmul", Target.here(), dtype, rows=rows, groups=groups, widths=(width, hidden))
    del choices["reference"]
    for who in sorted(choices, key=lambda who: who != "ragged_dot"):
        block = choices[who].rows
        sizes = uneven_sizes(groups, rows, block)
        x = jax.random.normal(keys[1], (int(sizes.sum()), width), dtype)
        dy = jax.random.normal(keys[2], (len(x), hidden), dtype)
        product = functools.partial(
            grouped_matmul, group_sizes_E=jnp.asarray(sizes, jnp.int32), aligned=block, implementation=who
        )
        time_both(report, who, lambda x, w, product=product: product(x, w), dy, (x, w), repeats, f"block {block:4}")
    if peer_python:
        job = {"sizes": uneven_sizes(groups, rows, 1).tolist(), "width": width, "hidden": hidden}
        for kind, seconds in peer_seconds(job, repeats, peer_python).items():
            report(kind, "torch", seconds)


def bench_attention(
    name: str, shape: tuple[int, ...], dtype: jnp.dtype, top: float, repeats: int, peer_python: str
) -> None:
    """Print causal MLA, forward and forward+backward; the triangle alone counts as work."""
    B, S, H, N, R, V = shape
    work = B * H * S**2 * (N + R + V)
    report = Report(name, {"forward": work, "forward+backward": 3.5 * work}, top)
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = (B, S, H, N + R), (B, S, H, N + V), (B, S, R), (B, S, H, V)
    *inputs, dout = (jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True))
    facts = {"in_row_order": True, "queries": S, "keys": S, "key_width": N + R, "value_width": V}
    for who in reversed(can_run("mla_attention", Target.here(), dtype, **facts)):
        if who == "reference" and B * H * S**2 > 2**32:
            continue
        attention = functools.partial(mla_attention, visible=Visible(), scale=(N + R) ** -0.5, implementation=who)
        time_both(report, who, attention, dout, inputs, repeats)
    if peer_python:
        for kind, seconds in peer_seconds({"attention": (B, S, H, N + R, V)}, repeats, peer_python).items():
            report(kind, "torch", seconds)


def time_both(report, who, function, dout, inputs, repeats: int, detail: str = "") -> None:
    forward = functools.partial(jax.jit(function), *inputs)
    report("forward", who, median_seconds(forward, repeats), detail)
    backward = functools.partial(jax.jit(functools.partial(both, function)), dout, *inputs)
    report("forward+backward", who, median_seconds(backward, repeats), detail)


def peer_seconds(job: dict[str, object], repeats: int, peer_python: str) -> dict[str, float]:
    """torch's seconds, forward and forward+backward, in a process of its own."""
    script = Path(__file__).resolve().parents[2] / "scripts" / "peer_kernels.py"
    if not script.exists():
        raise FileNotFoundError(f"{script}: the peer's benchmark is part of the repository, not of the package")
    done = subprocess.run(
        [peer_python, str(script), json.dumps({**job, "repeats": repeats})], capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"the peer failed: {done.stderr.strip().splitlines()[-1:]}")
    return json.loads(done.stdout.strip().split("\n")[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--tune", action="store_true", help="time other sizes of the Hopper kernels instead")
    parser.add_argument("--only", choices=("grouped", "attention"), help="one operation, not both")
    parser.add_argument("--peer-python", default="", help="a Python with torch and CUDA")
    options = parser.parse_args()
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leaves the peer its memory
    platform = "cpu" if Target.here().platform == "cpu" else "gpu"
    dtype = jnp.dtype(jnp.float32 if platform == "cpu" else jnp.bfloat16)
    if options.peer_python and platform == "cpu":
        parser.error("--peer-python: the peer is measured on a GPU only")
    if options.tune:
        if why := hopper.refuses(Target.here(), dtype):
            parser.error(f"--tune: {why}")
        return tune(functools.partial(median_seconds, repeats=options.repeats))
    top = ceiling(dtype, 1024 if platform == "cpu" else 8192, options.repeats)
    print(f"{jax.devices()[0].device_kind}, {dtype.name}; dense {top / 1e12:.3f} TFLOP/s; uneven groups")
    for name, shape in SHAPES[platform] if options.only != "attention" else ():
        bench_grouped(name, shape, dtype, top, options.repeats, options.peer_python)
    for name, shape in ATTENTION[platform] if options.only != "grouped" else ():
        bench_attention(name, shape, dtype, top, options.repeats, options.peer_python)


if __name__ == "__main__":
    main()
