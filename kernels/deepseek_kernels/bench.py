"""Time the kernels beside what they replace: ``python -m deepseek_kernels.bench``.

Each row gives the median time, TFLOP/s of useful arithmetic, the share of the ceiling (one dense product of the
platform's best size, measured in the same run) and the ratio to ``jax.lax.ragged_dot``. Group sizes are drawn from a
softmax of normal numbers: uneven, as routing is.
"""

import argparse
import functools
import statistics
import time
from collections.abc import Callable

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


def median_seconds(call: Callable[[], jax.Array], repeats: int) -> float:
    jax.block_until_ready(call())
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(call())
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def ceiling(dtype: jnp.dtype, size: int, repeats: int) -> float:
    """FLOP/s of one dense square product."""
    x = jax.random.normal(jax.random.key(0), (size, size), dtype)
    product = jax.jit(jnp.matmul)
    return 2 * size**3 / median_seconds(lambda: product(x, x), repeats)


def bench_shape(name: str, shape: tuple[int, int, int, int], dtype: jnp.dtype, top: float, repeats: int) -> None:
    """Print forward and forward+backward of one shape, laid out in blocks as DeepSeekMoE does, and of ragged_dot."""
    groups, width, hidden, rows = shape
    flops = 2 * rows * width * hidden
    keys = jax.random.split(jax.random.key(0), 2)
    w = jax.random.normal(keys[0], (groups, width, hidden), dtype) / width**0.5
    baseline = {}
    implementations: tuple[Implementation, ...] = ("ragged_dot", "blocks")
    if cpu.available() and dtype == jnp.float32:
        implementations += ("c",)
    if hopper.usable(dtype, width, hidden):
        implementations += ("hopper",)
    for implementation in implementations:
        block = row_alignment(rows, groups, dtype, implementation=implementation)
        sizes = uneven_sizes(groups, rows, block)
        x = jax.random.normal(keys[1], (int(sizes.sum()), width), dtype)
        counts = jnp.asarray(sizes, jnp.int32)

        def product(x, w, counts=counts, block=block, implementation: Implementation = implementation):
            return grouped_matmul(x, w, counts, aligned=block, implementation=implementation)

        gradient = jax.grad(lambda x, w: jnp.sum(product(x, w).astype(jnp.float32) ** 2), argnums=(0, 1))
        for kind, function, work in (("forward", product, flops), ("forward+backward", gradient, 3 * flops)):
            seconds = median_seconds(functools.partial(jax.jit(function), x, w), repeats)
            baseline.setdefault(kind, seconds)
            print(
                f"{name:20} {kind:17} {implementation:11} block {block:4} {seconds * 1e3:9.3f} ms "
                f"{work / seconds / 1e12:8.3f} TFLOP/s {work / seconds / top:6.1%} of dense "
                f"{baseline[kind] / seconds:6.1f}× ragged_dot",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=10)
    repeats = parser.parse_args().repeats
    platform = "cpu" if jax.default_backend() == "cpu" else "gpu"
    dtype = jnp.dtype(jnp.float32 if platform == "cpu" else jnp.bfloat16)
    top = ceiling(dtype, 1024 if platform == "cpu" else 8192, repeats)
    print(f"{jax.devices()[0].device_kind}, {dtype.name}; dense {top / 1e12:.3f} TFLOP/s; uneven groups")
    for name, shape in SHAPES[platform]:
        bench_shape(name, shape, dtype, top, repeats)


if __name__ == "__main__":
    main()
