"""Absorbed MLA's attention in decoding on NVIDIA Hopper, in Pallas' Mosaic GPU: any lengths, split over keys, a cache
of rows or of pages, in bfloat16 or FP8.

The query tokens and heads of a row of the batch are rows of one matrix, 64 of which are a tile. The blocks of keys of
all rows lie end to end and are dealt out evenly, so that a core gets the end of one row, some whole ones, the start of
another; each part's softmax is normalised by itself, and a second kernel weighs the parts of a row by their sums.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from deepseek_kernels import hopper_sizes
from deepseek_kernels.cached import FP8Entries
from deepseek_kernels.decode_hopper_fp8 import FP8Core
from deepseek_kernels.decode_hopper_parts import KEYS, LOWEST, PARAMS, ROWS, Core, inverse, parts
from deepseek_kernels.hopper_sizes import CORES
from deepseek_kernels.target import Target
from deepseek_kernels.visible import Visible

_SHARED = 8  # parts of a row from which on the warp groups of the second kernel share them


def refuses(
    target: Target,
    dtype: Any,
    *,
    by_column: bool,
    queries: int,
    keys: int,
    key_width: int,
    value_width: int,
    page: int = 0,
    fp8: bool = False,
    **_: Any,
) -> str:
    """Why the kernels cannot run; "" where they can. page: tokens of one, 0 where rows lie whole."""
    if why := hopper_sizes.refuses(target, dtype):
        return why
    if not by_column:
        return "it needs keys whose positions are their columns, and no segments"
    if keys % 8 or not keys:
        return f"it needs a cache of a multiple of 8 columns, not {keys}"
    if page % KEYS:
        return f"it needs pages of a multiple of {KEYS} tokens, not {page}"
    if value_width not in (128, 256, 512)[fp8:] or key_width - value_width != 64:
        widths = "256 or 512 numbers in FP8" if fp8 else "128, 256 or 512 numbers"
        return f"it needs values of {widths} and 64 more of a key, not {value_width} of {key_width}"
    return ""


@functools.partial(jax.jit, static_argnames=("scale", "values", "cores"))  # lowered once for all layers
def attend(
    q_BSHW: Float[Array, "B S H W"],
    cache: Float[Array, "L P N W"] | FP8Entries,
    layer: Any,
    visible: Visible,
    scale: float,
    *,
    values: int,
    cores: int,
) -> Float[Array, "B S H C"]:
    """``out[s] = Σ_t softmax_t(q[s]·entry[t] · scale) entry[t, :C]`` over layer ``layer`` of the cache: pages, or
    rows, of which each is one page; zeros for a query that sees no key. Scores, softmax and sums are float32; weights
    are rounded to bfloat16 for their product, over FP8 to float16.

    values: C. cores: of the target, 0 for an H100's.
    """
    (B, S, H, W), (layers, pages, size, _) = q_BSHW.shape, cache.shape
    table_BJ = jnp.arange(B)[:, None] if visible.pages_BJ is None else jnp.clip(visible.pages_BJ, 0, pages - 1)
    T = size * table_BJ.shape[1]
    cores, rows = cores or CORES, _padded(S * H)
    tiles = pl.cdiv(rows, ROWS)
    limit_BS = visible.limits(B, S, T)
    assert T < 2**24, T
    kind = FP8Core if isinstance(cache, FP8Entries) else Core
    q, factor_BR = kind.queries(_pad(q_BSHW.reshape(B, S * H, W), rows), values)
    limit_BR = jnp.repeat(limit_BS.astype(jnp.float32), H, axis=1)  # exact, below 2²⁴
    factor_BR = jnp.broadcast_to(factor_BR * (scale * math.log2(math.e)), (B, rows))
    whole = [_pad(x, tiles * ROWS) for x in (limit_BR, factor_BR)]
    plan = _plan(jnp.max(limit_BS, axis=1), max(1, cores // tiles))
    number = jnp.asarray(layer, jnp.int32).reshape(1)
    arrays = [leaf.reshape(layers * pages, *leaf.shape[2:]) for leaf in jax.tree.leaves(cache)]
    operands = plan.core_C5, plan.blocks_B, table_BJ.astype(jnp.int32), number, jnp.stack(whole, axis=1), q, arrays
    sums, logs = parts(kind, *operands, values, pages)
    out_BRC = _combine(plan.parts_B2, logs, sums, (B, rows, values), q_BSHW.dtype)
    return out_BRC[:, : S * H].reshape(B, S, H, values)


def _padded(rows: int) -> int:
    """Rows of a row's queries: whole groups of 8, which a copy takes, and whole tiles where there are several."""
    unit = 8 if rows <= ROWS else ROWS
    return pl.cdiv(rows, unit) * unit


def _pad(x, rows):
    return jnp.pad(x, [(0, 0), (0, rows - x.shape[1])] + [(0, 0)] * (x.ndim - 2))


class _Plan(NamedTuple):
    """core_C5: of each core its first row, block of that row, number of blocks and of rows, and that row's blocks.
    blocks_B: of each row, one at least. parts_B2: of each row's parts the first and the number.

    Part p of core c and row b is ``p = b + c``: from one part to the next either grows by one."""

    core_C5: jax.Array
    blocks_B: jax.Array
    parts_B2: jax.Array


def _plan(limit_B: Int[Array, "B"], cores: int) -> _Plan:
    B = len(limit_B)
    blocks_B = jnp.maximum(-(-limit_B // KEYS), 1)
    ends_B = jnp.sum(jnp.where(jnp.arange(B)[:, None] <= jnp.arange(B), blocks_B[:, None], 0), axis=0)
    starts_B, every = ends_B - blocks_B, ends_B[-1]
    share = -(-every // cores)
    start_C = jnp.minimum(jnp.arange(cores, dtype=jnp.int32) * share, every)
    count_C = jnp.minimum(every - start_C, share)
    row_of = lambda block_C: jnp.sum(ends_B <= block_C[:, None], axis=1)  # noqa: E731
    row_C = jnp.minimum(row_of(start_C), B - 1)
    rows_C = jnp.where(count_C > 0, row_of(start_C + count_C - 1) - row_C + 1, 0)
    core_B = starts_B // share
    first_C = jnp.where(count_C > 0, start_C - starts_B[row_C], 0)
    core_C5 = jnp.stack([row_C, first_C, count_C, rows_C, blocks_B[row_C]], axis=1)
    parts_B2 = jnp.stack([core_B + jnp.arange(B), (ends_B - 1) // share - core_B + 1], axis=1)
    return _Plan(*(x.astype(jnp.int32) for x in (core_C5, blocks_B, parts_B2)))


def _combine(parts_B2, logs, sums, shape, dtype):
    """Σ_p w_p · sums_p of each row's parts p, with weights in proportion to what each was divided by.

    Each of four warp groups takes a row or, where a row may have many parts, a share of the parts of one.
    """
    B, rows, values = shape
    most = pl.cdiv(logs.shape[1], B)  # parts of a row, were all rows as long
    shared = most >= _SHARED
    at_once = min(8, pl.cdiv(most, 4)) if shared else 2
    layout = plgpu.Layout.WG_STRIDED((values,), vec_size=values // 128)

    def kernel(parts, logs, sums, out):
        place, warpgroup = jax.lax.axis_index("block"), jax.lax.axis_index("warpgroup")
        item = place if shared else place * 4 + warpgroup
        b, row = item // rows, jax.lax.rem(item, rows)
        tile, row_in_tile = row // ROWS, jax.lax.rem(row, ROWS)
        first, count = parts[b, 0], parts[b, 1]
        skip, stride = (warpgroup, 4) if shared else (0, 1)

        def step(i, state):
            places = [(i * at_once + k) * stride + skip for k in range(at_once)]
            at = [(tile, first + jnp.minimum(place, count - 1), row_in_tile) for place in places]
            log = [jnp.where(place < count, logs[where], -jnp.inf) for place, where in zip(places, at, strict=True)]
            return add(state, log, [plgpu.layout_cast(sums[where], layout) for where in at])

        zeros = plgpu.layout_cast(jnp.zeros((values,), jnp.float32), layout)
        state = jnp.float32(LOWEST), jnp.float32(0), zeros
        state = jax.lax.fori_loop(0, pl.cdiv(count, jnp.int32(at_once * stride)), step, state)
        if shared:
            share = plgpu.SMEM((4, values), jnp.float32), plgpu.SMEM((8,), jnp.float32), plgpu.Barrier(num_arrivals=4)
            body = functools.partial(put_together, out.at[b, row], warpgroup, *state)
            pl.run_scoped(body, *share, collective_axes="warpgroup")
        else:
            out[b, row] = (state[2] * inverse(state[1])).astype(dtype)

    def add(state, log, parts):
        top, total, acc = state
        higher = functools.reduce(jnp.maximum, log, top)
        shrink = jnp.exp2(top - higher)
        total, acc = total * shrink, acc * shrink
        for log_k, part in zip(log, parts, strict=True):
            weight = jnp.exp2(log_k - higher)
            total, acc = total + weight, acc + part * weight
        return higher, total, acc

    def put_together(out, warpgroup, top, total, acc, accs, scalars, there):
        accs[warpgroup], scalars[warpgroup], scalars[warpgroup + 4] = acc, top, total
        plgpu.barrier_arrive(there)
        plgpu.barrier_wait(there)

        @pl.when(warpgroup == 0)
        def _():
            tops = [scalars[g] for g in range(4)]
            weights = [jnp.exp2(top - functools.reduce(jnp.maximum, tops)) for top in tops]
            total = sum(weight * scalars[g + 4] for g, weight in enumerate(weights))
            acc = sum(plgpu.layout_cast(accs[g], layout) * weight for g, weight in enumerate(weights))
            out[...] = (acc * inverse(total)).astype(dtype)

    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct(shape, dtype),
        grid=(B * rows // (1 if shared else 4),),
        grid_names=("block",),
        num_threads=4,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(**PARAMS),
    )(parts_B2, logs, sums)
