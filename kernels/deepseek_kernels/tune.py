"""Other sizes for the Hopper kernels, timed: ``python -m deepseek_kernels.bench --tune``. The best are in the table."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_kernels import hopper, hopper_few, hopper_fp8, hopper_gate, hopper_quantise
from deepseek_kernels.block_fp8 import FP8
from deepseek_kernels.hopper_sizes import HOPPER, Sizes

CANDIDATES = {
    "grouped": [Sizes(stages, 256, band) for stages, band in ((3, 8), (4, 4), (4, 8), (4, 16))],
    "grouped_narrow": [Sizes(stages, 128, band) for stages, band in ((5, 8), (6, 4), (6, 8), (6, 16))],
    "few": [Sizes(stages) for stages in (4, 7, 0)],
    "fp8": [Sizes(stages, band=band) for stages, band in ((4, 8), (0, 4), (0, 8), (0, 16))],
    "quantise": [Sizes(stages) for stages in (2, 3, 4)],
    "gate": [Sizes(stages) for stages in (2, 3, 4)],
}


def _cases() -> Iterator[tuple[str, Callable[..., Any], tuple]]:
    """Kernel, what it computes and its operands, at the widths of V2-Lite and, in FP8, of V3."""
    key = jax.random.key(0)
    normal = lambda *shape: jax.random.normal(key, shape, jnp.bfloat16)  # noqa: E731
    groups = lambda tiles, each: jnp.asarray(np.arange(tiles) // each, jnp.int32)  # noqa: E731
    yield "grouped", hopper.grouped_product, (normal(32768, 2048), normal(64, 2048, 2816), groups(256, 4))
    yield "grouped_narrow", hopper.grouped_product, (normal(32768, 2048), normal(64, 2048, 1408), groups(256, 4))
    yield "few", hopper_few.grouped_product, (normal(1024, 2048), normal(64, 2048, 2816), jnp.append(groups(64, 1), 64))
    x, w = normal(16384, 7168).astype(FP8), normal(8, 4096, 7168).astype(FP8)
    yield "fp8", hopper_fp8.many, (x, jnp.ones((56, 16384)), w, jnp.ones((8, 32, 56)), groups(128, 16))
    yield "quantise", hopper_quantise.quantise_rows, (normal(16384, 7168),)
    yield "gate", hopper_gate.gate_backward, (normal(32768, 2, 1408), jnp.ones(32768), normal(32768, 1408))


def tune(seconds: Callable[[Callable[[], object]], float]) -> None:
    """Print each candidate's time, its share of the table's and the best."""
    for kernel, run, operands in _cases():
        options = {} if kernel in ("gate", "quantise") else {"cores": 0}
        times = {}
        for sizes in CANDIDATES[kernel]:
            times[sizes] = seconds(
                functools.partial(jax.jit(functools.partial(run, sizes=sizes, **options)), *operands)
            )
        for sizes, spent in times.items():
            mark = "  in the table" * (sizes == HOPPER[kernel]) + "  best" * (spent == min(times.values()))
            print(f"{kernel:8} {spent * 1e6:9.1f} µs  {sizes}{mark}", flush=True)
