"""Absorbed MLA's attention in decoding on TPUs, in Pallas' Mosaic: bfloat16, any lengths, the cache where it lies.

A row's query tokens and heads are the rows of one matrix; its keys come in blocks, as many as its longest query sees.
The blocks of all rows of the batch lie end to end and are dealt out evenly to the cores that share a device (two of a
v5p, one of others), which sum them up with the running maximum of an online softmax; a row that two cores share is put
together from the two sums after the kernel.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.tpu as pltpu
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from deepseek_kernels import tpu
from deepseek_kernels.target import Target
from deepseek_kernels.visible import Visible

_ROWS = 512  # of a tile of queries, at most
_UNIT = 16  # rows of bfloat16 that lie together
_SCORES = 1 << 18  # of a block, at most: 1 MiB in float32, some four times at once
_LOWEST = float(jnp.finfo(jnp.float32).min)


def refuses(
    target: Target, dtype: Any, *, by_column: bool, queries: int, keys: int, key_width: int, value_width: int
) -> str:
    """Why the kernel cannot run; "" where it can."""
    if why := tpu.refuses(target, dtype):
        return why
    if not by_column:
        return "it needs keys whose positions are their columns, and no segments"
    if not keys or value_width % tpu.LANES:
        return f"it needs keys, and values that are a multiple of {tpu.LANES} wide, not {keys} and {value_width}"
    return ""


@functools.partial(jax.jit, static_argnames=("scale", "values", "chip"))  # lowered once for all layers
def attend(
    q_BSHW: Float[Array, "B S H W"],
    entry_LBTW: Float[Array, "L B T W"],
    layer: Any,
    visible: Visible,
    scale: float,
    *,
    values: int,
    chip: str,
) -> Float[Array, "B S H C"]:
    """``out[s] = Σ_t softmax_t(q[s]·entry[t] · scale) entry[t, :C]`` over layer ``layer`` of the cache; zeros for a
    query that sees no key. Scores, softmax and sums are float32; weights are rounded to bfloat16 for their product.

    values: C.
    """
    (B, S, H, W), T = q_BSHW.shape, entry_LBTW.shape[2]
    tiles = pl.cdiv(S * H, _ROWS)
    rows = pl.cdiv(S * H, _UNIT * tiles) * _UNIT
    fitting = max(tpu.LANES, _SCORES // rows // tpu.LANES * tpu.LANES)
    keys = min(tpu.CHIPS[chip].keys, fitting, pl.cdiv(T, tpu.LANES) * tpu.LANES)
    limit_BS = visible.limits(B, S, T)
    fit = lambda x: jnp.pad(x, [(0, 0), (0, rows * tiles - S * H), (0, 0)])  # noqa: E731
    limit_BR1 = fit(jnp.repeat(limit_BS, H, axis=1)[..., None])
    plan = _plan(jnp.max(limit_BS, axis=1), keys, pl.cdiv(T, keys), tpu.CHIPS[chip].cores)
    q_BRW, number = fit(q_BSHW.reshape(B, S * H, W)), jnp.asarray(layer, jnp.int32).reshape(1)
    sums, logs = _parts(plan, number, limit_BR1, q_BRW, entry_LBTW, scale, values, rows, keys)
    out_BRC = _combine(plan, sums, logs).astype(q_BSHW.dtype)
    return out_BRC[:, : S * H].reshape(B, S, H, values)


class _Plan(NamedTuple):
    """row_N: of the batch, that block n is of, over the blocks of all rows end to end, the last one's repeated.
    start_B: each row's first block. share: blocks of a core, and how many there are in all. parts_B2: the first of each
    row's parts, and their number.

    Part p of core c and row b is ``p = b + c``: from one part to the next either grows by one."""

    row_N: jax.Array
    start_B: jax.Array
    share: jax.Array
    parts_B2: jax.Array
    cores: int


def _plan(limit_B: Int[Array, "B"], keys: int, most: int, cores: int) -> _Plan:
    B = len(limit_B)
    blocks_B = jnp.maximum(-(-limit_B // keys), 1)  # one where nothing is seen, to write its zeros
    end_B = jnp.cumsum(blocks_B)
    start_B, every = end_B - blocks_B, end_B[-1]
    share = -(-every // cores)
    row_N = jnp.sum(jnp.arange(B * most + cores)[:, None] >= end_B, axis=1)
    core_B = start_B // share
    parts_B2 = jnp.stack([core_B + jnp.arange(B), (end_B - 1) // share - core_B + 1], axis=1)
    row_N, start_B, share, parts_B2 = (
        x.astype(jnp.int32) for x in (jnp.minimum(row_N, B - 1), start_B, jnp.stack([share, every]), parts_B2)
    )
    return _Plan(row_N, start_B, share, parts_B2, cores)


def _parts(plan, number, limit_BR1, q_BRW, entry_LBTW, scale, values, rows, keys):
    """Of each part ``Σ p v / Σ p`` (P R C) and ``log Σ p`` (P R 1)."""
    (B, R, W), T = q_BRW.shape, entry_LBTW.shape[2]
    parts, last = B + plan.cores - 1, pl.cdiv(T, keys) - 1

    def place(core, step, row_N, share):
        """Which block of all, and its row."""
        block = jnp.minimum(core * share[0] + step, share[1] - 1)
        return block, row_N[block]

    def kernel(row_N, start_B, share, number, limit, q, entry, out, log, top, total, acc):
        core, step = pl.program_id(0), pl.program_id(2)
        block, row = place(core, step, row_N, share)
        there = core * share[0] + step < share[1]

        @pl.when((step == 0) | (row_N[jnp.maximum(block - 1, 0)] != row))
        def _():
            top[...] = jnp.full_like(top, _LOWEST)
            total[...], acc[...] = jnp.zeros_like(total), jnp.zeros_like(acc)

        @pl.when(there)
        def _():
            first, k = (block - start_B[row]) * keys, entry[...]
            scores = jax.lax.dot_general(q[...], k, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
            column = first + jax.lax.broadcasted_iota(jnp.int32, (rows, keys), 1)
            seen = column < limit[...]
            scores = jnp.where(seen, scores * scale, _LOWEST)
            higher = jnp.maximum(top[...], jnp.max(scores, axis=1, keepdims=True))
            p, shrink = jnp.where(seen, jnp.exp(scores - higher), 0), jnp.exp(top[...] - higher)
            v = k[:, :values]
            if T % keys:  # what sticks out of the cache is anything, NaN too
                v = jnp.where(first + jax.lax.broadcasted_iota(jnp.int32, v.shape, 0) < T, v, 0)
            weighted = jax.lax.dot_general(
                p.astype(v.dtype), v, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32
            )
            top[...], total[...] = higher, total[...] * shrink + jnp.sum(p, axis=1, keepdims=True)
            acc[...] = acc[...] * shrink + weighted

        following = jnp.minimum(block + 1, share[1] - 1)

        @pl.when(there & ((step == share[0] - 1) | (block == share[1] - 1) | (row_N[following] != row)))
        def _():
            sums = jnp.where(total[...] > 0, total[...], 1)
            out[...] = (acc[...] / sums).astype(out.dtype)
            log[...] = jnp.where(total[...] > 0, top[...] + jnp.log(sums), _LOWEST)

    def of_row(core, tile, step, row_N, start_B, share, number):
        return place(core, step, row_N, share)[1], tile, 0

    def of_cache(core, tile, step, row_N, start_B, share, number):
        block, row = place(core, step, row_N, share)
        return number[0], row, jnp.clip(block - start_B[row], 0, last), 0

    def of_part(core, tile, step, row_N, start_B, share, number):
        return place(core, step, row_N, share)[1] + core, tile, 0

    queries = lambda width, where: pl.BlockSpec((None, rows, width), where)  # noqa: E731
    seen = B * T  # were all rows whole
    return pl.pallas_call(
        kernel,
        out_shape=[
            # Rounded once, where nothing is put together.
            jax.ShapeDtypeStruct((parts, R, values), q_BRW.dtype if plan.cores == 1 else jnp.float32),
            jax.ShapeDtypeStruct((parts, R, 1), jnp.float32),
        ],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(plan.cores, R // rows, plan.share[0]),
            in_specs=[queries(1, of_row), queries(W, of_row), pl.BlockSpec((None, None, keys, W), of_cache)],
            out_specs=[queries(values, of_part), queries(1, of_part)],
            scratch_shapes=[pltpu.VMEM((rows, width), jnp.float32) for width in (1, 1, values)],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=2 * seen * R * (W + values), bytes_accessed=2 * seen * W, transcendentals=seen * R
        ),
        name="mla_decode",
    )(plan.row_N, plan.start_B, plan.share, number, limit_BR1, q_BRW, entry_LBTW)


def _combine(plan, sums, logs):
    """Σ_p w_p · sums_p of each row's parts p, with weights in proportion to what each was divided by."""
    if plan.cores == 1:
        return sums
    first_B, count_B = plan.parts_B2[:, 0], plan.parts_B2[:, 1]
    place = jnp.arange(plan.cores)[:, None]
    there = (place < count_B)[..., None, None]
    at = jnp.where(place < count_B, first_B + place, first_B)
    sums, logs = jnp.where(there, sums[at], 0), jnp.where(there, logs[at], _LOWEST)
    return jnp.sum(jax.nn.softmax(logs, axis=0) * sums, axis=0)
