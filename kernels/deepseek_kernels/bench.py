"""Time the kernels beside what they replace: ``python -m deepseek_kernels.bench``.

Each row gives the median time, TFLOP/s of useful arithmetic, the share of the ceiling (one dense product of the
platform's best size, measured in the same run) and the ratio to ``jax.lax.ragged_dot``. Group sizes are drawn from a
softmax of normal numbers: uneven, as routing is. ``--peer-python``, a Python with torch, adds its grouped product on a
GPU.
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

from deepseek_kernels import cpu, hopper
from deepseek_kernels.grouped_matmul import Implementation, grouped_matmul, row_alignment

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


def uneven_sizes(groups: int, rows: int, block: int, seed: int = 0) -> np.ndarray:
    """Rows per group, padded to whole blocks: a softmax of normal numbers times ``rows``."""
    share = np.exp(np.random.default_rng(seed).normal(size=groups))
    sizes = np.floor(share / share.sum() * rows).astype(np.int64)
    sizes[0] += rows - sizes.sum()
    return (sizes + block - 1) // block * block


def median_seconds(call: Callable[[], object], repeats: int) -> float:
    """Seconds of one call: on a GPU the mean of ten in a row, which hides the time that a launch takes."""
    calls = 1 if jax.default_backend() == "cpu" else 10
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


def bench_shape(
    name: str, shape: tuple[int, int, int, int], dtype: jnp.dtype, top: float, repeats: int, peer_python: str
) -> None:
    """Print forward and forward+backward of one shape, laid out in blocks as DeepSeekMoE does, of ragged_dot and of
    the peer."""
    groups, width, hidden, rows = shape
    work = {"forward": 2 * rows * width * hidden, "forward+backward": 6 * rows * width * hidden}
    baseline: dict[str, float] = {}

    def report(kind: str, who: str, block: int, seconds: float) -> None:
        baseline.setdefault(kind, seconds)
        print(
            f"{name:20} {kind:17} {who:11} block {block:4} {seconds * 1e3:9.3f} ms "
            f"{work[kind] / seconds / 1e12:8.3f} TFLOP/s {work[kind] / seconds / top:6.1%} of dense "
            f"{baseline[kind] / seconds:6.1f}× ragged_dot",
            flush=True,
        )

    keys = jax.random.split(jax.random.key(0), 3)
    w = jax.random.normal(keys[0], (groups, width, hidden), dtype) / width**0.5
    implementations: list[Implementation] = ["ragged_dot", "blocks"]
    if cpu.available() and dtype == jnp.float32:
        implementations.append("c")
    if hopper.usable(dtype, width, hidden):
        implementations.append("hopper")
    for implementation in implementations:
        block = row_alignment(rows, groups, dtype, implementation=implementation)
        sizes = uneven_sizes(groups, rows, block)
        x = jax.random.normal(keys[1], (int(sizes.sum()), width), dtype)
        counts = jnp.asarray(sizes, jnp.int32)

        def product(x, w, counts=counts, block=block, implementation: Implementation = implementation):
            return grouped_matmul(x, w, counts, aligned=block, implementation=implementation)

        def both(x, w, dy, product=product):
            y, pullback = jax.vjp(product, x, w)
            return y, *pullback(dy)

        dy = jax.random.normal(keys[2], (len(x), hidden), dtype)
        for kind, function, operands in (("forward", product, (x, w)), ("forward+backward", both, (x, w, dy))):
            report(
                kind, implementation, block, median_seconds(functools.partial(jax.jit(function), *operands), repeats)
            )
    if peer_python:
        for kind, seconds in peer_seconds(shape, repeats, peer_python).items():
            report(kind, "torch", 1, seconds)


def peer_seconds(shape: tuple[int, int, int, int], repeats: int, peer_python: str) -> dict[str, float]:
    """torch's seconds, forward and forward+backward, in a process of its own."""
    script = Path(__file__).resolve().parents[2] / "scripts" / "peer_grouped_mm.py"
    if not script.exists():
        raise FileNotFoundError(f"{script}: the peer's benchmark is part of the repository, not of the package")
    groups, width, hidden, rows = shape
    job = {"sizes": uneven_sizes(groups, rows, 1).tolist(), "width": width, "hidden": hidden, "repeats": repeats}
    done = subprocess.run([peer_python, str(script), json.dumps(job)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the peer failed: {done.stderr.strip().splitlines()[-1:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--peer-python", default="", help="a Python with torch and CUDA")
    options = parser.parse_args()
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leaves the peer its memory
    platform = "cpu" if jax.default_backend() == "cpu" else "gpu"
    dtype = jnp.dtype(jnp.float32 if platform == "cpu" else jnp.bfloat16)
    if options.peer_python and platform == "cpu":
        parser.error("--peer-python: the peer is measured on a GPU only")
    top = ceiling(dtype, 1024 if platform == "cpu" else 8192, options.repeats)
    print(f"{jax.devices()[0].device_kind}, {dtype.name}; dense {top / 1e12:.3f} TFLOP/s; uneven groups")
    for name, shape in SHAPES[platform]:
        bench_shape(name, shape, dtype, top, options.repeats, options.peer_python)


if __name__ == "__main__":
    main()
