"""Time decoding's kernels beside what they replace: ``python -m deepseek_kernels.bench_decode``.

A call is timed among others on different layers of one stack, in one program, so that nothing is left in a cache of the
chip; gaps between kernels count, and a stack's layer is copied out for what cannot read it. Beside the time: the bytes
of keys, or of matrices that have rows, by second and as a share of copying; FLOP/s, as a share of one dense product.
"""

import argparse
import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_kernels.attention import mla_decode
from deepseek_kernels.bench import can_run, ceiling, median_seconds, uneven_sizes
from deepseek_kernels.cached import quantise_entries
from deepseek_kernels.grouped_matmul import grouped_matmul
from deepseek_kernels.target import Target
from deepseek_kernels.visible import Visible
from deepseek_kernels.weights import InStack

C, R = 512, 64
ATTENTION = [  # rows, columns, heads, query tokens
    *[(1, 4096, heads, 1) for heads in (16, 128)],
    *[(64, columns, heads, tokens) for columns in (512, 4096) for heads, tokens in ((16, 1), (16, 4), (128, 1))],
    *[(64, 32768, heads, 1) for heads in (16, 128)],
]
EXPERTS = [(64, 2048, 2816, rows) for rows in (6, 48, 384, 512)] + [(64, 1408, 2048, 384)]  # groups, D, F, rows
_STACK = 8 << 30  # bytes of layers, at most
_CALLS = 16


def bench_attention(
    shape: tuple[int, int, int, int], uneven: bool, report: Callable[..., None], *, page: int = 0, fp8: bool = False
) -> None:
    """page: tokens of one, in random order, 0 for rows that lie whole."""
    rows, columns, heads, tokens = shape
    token = C + C // 128 * 2 + R * 2 if fp8 else (C + R) * 2
    layers = max(1, min(_CALLS, _STACK // (rows * columns * (C + R) * 2)))
    lengths = np.random.default_rng(0).integers(tokens, columns + 1, rows) if uneven else np.full(rows, columns)
    lengths_B = jnp.asarray(lengths, jnp.int32)
    visible = Visible(q_positions_BS=lengths_B[:, None] - tokens + jnp.arange(tokens), lengths_B=lengths_B)
    make = functools.partial(jax.random.normal, jax.random.key(0), dtype=jnp.bfloat16)
    cut = (rows * columns // page, page) if page else (rows, columns)
    if page:
        table = np.random.default_rng(0).permutation(cut[0]).reshape(rows, -1)
        visible = dataclasses.replace(visible, pages_BJ=jnp.asarray(table, jnp.int32))

    def layer(key):
        entries = jax.random.normal(key, (*cut, C + R), jnp.bfloat16)
        return quantise_entries(entries, C) if fp8 else entries

    stack = jax.jit(lambda keys: jax.lax.map(layer, keys))(_keys(layers))
    q = make((_CALLS, rows, tokens, heads, C + R))
    facts = {"by_column": True, "queries": tokens, "keys": columns, "key_width": C + R, "value_width": C}
    facts |= {"page": page, "fp8": fp8}
    keys = int(lengths.sum())
    for who in can_run("mla_decode", Target.here(), jnp.dtype(jnp.bfloat16), **facts):
        if (who == "reference" and keys * heads * tokens > 1 << 25) or (who != "hopper" and (page or fp8)):
            continue
        attend = functools.partial(mla_decode, visible=visible, scale=0.07, values=C, implementation=who)
        seconds = _timed(lambda i, q, stack, attend=attend: attend(q[i], InStack(stack, i % layers)), q, stack)
        kind = f"{' uneven' if uneven else ''}{' FP8' if fp8 else ''}{f' pages of {page}' if page else ''}"
        name = f"{rows} × {columns}{kind}, {heads} heads, {tokens} tokens"
        report(name, who, seconds, keys * token, 2 * keys * heads * tokens * (2 * C + R))


def bench_experts(shape: tuple[int, int, int, int], report: Callable[..., None]) -> None:
    groups, width, hidden, rows = shape
    layers = max(1, min(_CALLS, _STACK // (groups * width * hidden * 2)))
    choices = can_run(
        "grouped_matmul", Target.here(), jnp.dtype(jnp.bfloat16), rows=rows, groups=groups, widths=(width, hidden)
    )
    stack = jax.lax.map(lambda key: jax.random.normal(key, (groups, width, hidden), jnp.bfloat16), _keys(layers))
    for who, choice in choices.items():
        if who in ("reference", "ragged_dot"):
            continue
        sizes, block = uneven_sizes(groups, rows, 1), choice.rows
        padded = -(-sizes // block) * block
        x = jnp.ones((_CALLS, (rows + min(groups, rows) * (block - 1)) // block * block, width), jnp.bfloat16)
        product = functools.partial(
            grouped_matmul, group_sizes_E=jnp.asarray(padded, jnp.int32), aligned=block, implementation=who
        )
        seconds = _timed(lambda i, x, stack, product=product: product(x[i], InStack(stack, i % layers)), x, stack)
        name = f"{rows} rows, {groups} × {width} × {hidden}"
        report(name, who, seconds, int((sizes > 0).sum()) * width * hidden * 2, 2 * rows * width * hidden)


def _keys(number: int) -> jax.Array:
    return jax.random.split(jax.random.key(1), number)


def _timed(call: Callable[..., jax.Array], *operands: jax.Array) -> float:
    run = jax.jit(lambda *operands: [call(i, *operands) for i in range(_CALLS)])
    return median_seconds(lambda: run(*operands), 5) / _CALLS


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    dense = ceiling(jnp.dtype(jnp.bfloat16), 8192, 5)
    x = jnp.ones(1 << 30, jnp.bfloat16)
    add = jax.jit(lambda x: x + 1)
    copied = 2 * x.nbytes / median_seconds(lambda: add(x), 5)
    print(f"{jax.devices()[0].device_kind}; dense {dense / 1e12:.0f} TFLOP/s, copy {copied / 1e9:.0f} GB/s")

    def report(name: str, who: str, seconds: float, size: float, work: float) -> None:
        print(
            f"{name:48} {who:10} {seconds * 1e6:9.1f} µs {size / seconds / 1e9:6.0f} GB/s "
            f"{size / seconds / copied:5.0%} of copying {work / seconds / 1e12:6.1f} TFLOP/s "
            f"{work / seconds / dense:5.0%} of dense",
            flush=True,
        )

    for shape in ATTENTION:
        bench_attention(shape, False, report)
    for heads in (16, 128):
        bench_attention((64, 32768, heads, 1), True, report)
    for shape in ((64, columns, heads, 1) for columns in (512, 4096, 32768) for heads in (16, 128)):
        bench_attention(shape, False, report, page=64)
        bench_attention(shape, False, report, page=64, fp8=True)
    for shape in EXPERTS:
        bench_experts(shape, report)


if __name__ == "__main__":
    main()
