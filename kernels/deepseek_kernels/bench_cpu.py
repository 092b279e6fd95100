"""Time the C kernels beside XLA's own path, what runs without a compiler: ``python -m deepseek_kernels.bench_cpu``.

Each row gives the medians of both and the median of their ratios, taken in turns. scripts/without_avx512.c says how a
processor without AVX-512 is emulated: ``--xla_cpu_max_isa`` leaves XLA's dense products on AVX-512.
"""

import argparse
import functools
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_kernels import cpu
from deepseek_kernels.attention import gqa_attention, mla_attention
from deepseek_kernels.bench import uneven_sizes
from deepseek_kernels.grouped_matmul import grouped_matmul
from deepseek_kernels.product import weight_gradient
from deepseek_kernels.registry import choose
from deepseek_kernels.routed_experts import routed_experts
from deepseek_kernels.target import Target
from deepseek_kernels.visible import Visible

# name, the C path, XLA's path, their operands; gradients are of those in float32.
Case = tuple[str, Callable[..., jax.Array], Callable[..., jax.Array], list[jax.Array]]


def draw(*shapes: tuple[int, ...]) -> list[jax.Array]:
    return [jnp.asarray(np.random.default_rng(i).standard_normal(s), jnp.float32) for i, s in enumerate(shapes)]


def cases() -> Iterator[Case]:
    """The demo's shapes in training and decoding, and larger ones."""
    for tokens, top, experts, width, hidden in ((1024, 2, 16, 128, 96), (64, 2, 16, 128, 96), (1024, 6, 64, 256, 128)):
        facts = {"rows": tokens * top, "groups": experts, "widths": (width, 2 * hidden)}
        block = choose("grouped_matmul", Target("cpu"), jnp.float32, implementation="blocks", **facts).rows
        sizes = jnp.asarray(uneven_sizes(experts, tokens * top, block), jnp.int32)  # as XLA's path lays them out
        rows = int(sizes.sum())
        product = lambda sizes, x, w, block=block, **how: grouped_matmul(x, w, sizes, aligned=block, **how)  # noqa: E731
        yield (
            f"grouped products, {rows} × {width} × {2 * hidden} in {experts}",
            functools.partial(product, implementation="c"),
            functools.partial(product, implementation="blocks"),
            [sizes, *draw((rows, width), (experts, width, 2 * hidden))],
        )
        chosen = jnp.asarray(np.random.default_rng(0).integers(0, experts, (tokens, top)), jnp.int32)
        run = lambda chosen, x, g, wi, wo, **how: routed_experts(x, g, chosen, wi, wo, **how)  # noqa: E731
        yield (
            f"routed experts, {tokens} tokens, {top} of {experts}, {width} × {hidden}",
            functools.partial(run, implementation="fused"),
            functools.partial(run, implementation="sorted", grouped="blocks"),
            [chosen, *draw((tokens, width), (tokens, top), (experts, width, 2, hidden), (experts, hidden, width))],
        )
    for batch, size, heads, nope, rope in ((8, 128, 4, 32, 16), (8, 128, 1, 32, 16), (1, 1024, 4, 128, 64)):
        attention = functools.partial(mla_attention, visible=Visible(), scale=(nope + rope) ** -0.5)
        yield (
            f"MLA, {batch} × {size}, {heads} heads of {nope} + {rope}",
            functools.partial(attention, implementation="c"),
            functools.partial(attention, implementation="blockwise"),
            draw((batch, size, heads, nope + rope), (batch, size, heads, 2 * nope), (batch, size, rope)),
        )
    for batch, size, heads, groups, width in ((8, 128, 4, 2, 32), (1, 1024, 14, 2, 64)):
        attention = functools.partial(gqa_attention, visible=Visible(), scale=width**-0.5)
        yield (
            f"GQA, {batch} × {size}, {heads} heads on {groups} of {width}",
            functools.partial(attention, implementation="c"),
            functools.partial(attention, implementation="blockwise"),
            draw((batch, size, heads, width), (batch, size, groups, width), (batch, size, groups, width)),
        )


def both_passes(function: Callable[..., jax.Array], *operands: jax.Array) -> tuple[jax.Array, ...]:
    fixed = [operand for operand in operands if operand.dtype != jnp.float32]
    out, pullback = jax.vjp(functools.partial(function, *fixed), *operands[len(fixed) :])
    return out, *pullback(out)


def ready(function: Callable[..., object], *operands: jax.Array) -> Callable[[], object]:
    compiled: Callable[..., object] = jax.jit(function)
    return lambda: compiled(*operands)


def seconds(call: Callable[[], object], calls: int) -> float:
    """Of one call, the mean of some in a row."""
    began = time.perf_counter()
    for _ in range(calls):
        jax.block_until_ready(call())
    return (time.perf_counter() - began) / calls


def compare(name: str, c: Callable[[], object], xla: Callable[[], object], rounds: int) -> None:
    """Print one row: both in turns, some 20 ms a turn."""
    for call in (c, xla):
        jax.block_until_ready(call())
    calls = max(1, int(0.02 / seconds(c, 3)))
    pairs = [(seconds(c, calls), seconds(xla, calls)) for _ in range(rounds)]
    ours, theirs = (statistics.median(side) * 1e3 for side in zip(*pairs, strict=True))
    ratio = statistics.median(x / c for c, x in pairs)
    print(f"{name:62} {ours:9.3f} ms {theirs:9.3f} ms {ratio:6.2f}×", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    if not cpu.available():
        raise SystemExit(1)
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    vectors = f"{cpu.lanes()} lanes{', AMX' if cpu.tiles() else ''}"
    print(f"{model or platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; {vectors}")
    print(f"{'':62} {'C':>12} {'XLA':>12} XLA / C")
    for name, c, xla, operands in cases():
        for kind, wrap in (("forward", lambda f: f), ("both passes", lambda f: functools.partial(both_passes, f))):
            compare(f"{name}: {kind}", ready(wrap(c), *operands), ready(wrap(xla), *operands), rounds)
    for rows, width, hidden in ((1024, 128, 384), (1024, 128, 512)):
        x, dy = draw((8, rows // 8, width), (8, rows // 8, hidden))
        c, xla = (ready(functools.partial(weight_gradient, implementation=name), x, dy) for name in ("c", "dot"))
        compare(f"weight gradient, {rows} × {width} × {hidden}", c, xla, rounds)


if __name__ == "__main__":
    main()
