"""Absorbed MLA's attention in decoding on NVIDIA Hopper, in Pallas' Mosaic GPU: bfloat16, any lengths, split over keys.

The query tokens and heads of a row of the batch are rows of one matrix, 64 of which are a tile. The blocks of keys of
all rows lie end to end and are dealt out evenly, so that a core gets the end of one row, some whole ones, the start of
another; each part's softmax is normalised by itself, and a second kernel weighs the parts of a row by their sums.

In a core four warp groups work on one ring of blocks: one streams them in, one turns them into softmax weights, two
multiply those with the values, half of the width each, and hold the sums. So scores of a block are computed beside the
products of the one before.
"""

import functools
import math
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from deepseek_kernels.hopper import CORES
from deepseek_kernels.target import Target
from deepseek_kernels.visible import Visible

ROWS = 64  # of a tile of queries: what one product of a warp group takes
_KEYS = 64  # of a block
_SLOTS = 2  # blocks in shared memory at once
_LEAST = 1  # blocks of a core
_UNROLL = 0
_UNSAFE = False
_REGISTERS = 0, 0
_AHEAD = 0
_SEMANTICS = plgpu.LoweringSemantics.Lane
_LOWEST = -1e30  # in place of -inf: the exponential of a difference of two is never NaN


def refuses(
    target: Target, dtype: Any, *, by_column: bool, queries: int, keys: int, key_width: int, value_width: int
) -> str:
    """Why the kernels cannot run; "" where they can."""
    if (target.platform, target.chip) != ("cuda", "9.0"):
        return f"it needs cuda of capability 9.0, not {target.platform} {target.chip}".rstrip()
    if dtype != jnp.bfloat16:
        return f"it needs bfloat16, not {dtype.name}"
    if not by_column:
        return "it needs keys whose positions are their columns, and no segments"
    if keys % 8 or not keys:
        return f"it needs a cache of a multiple of 8 columns, not {keys}"
    if value_width % 128 or value_width > 512 or key_width - value_width != 64:
        return f"it needs values of 128, 256, 384 or 512 numbers and 64 more of a key, not {value_width} of {key_width}"
    return ""


def attend(
    q_BSHW: Float[Array, "B S H W"],
    entry_LBTW: Float[Array, "L B T W"],
    layer: Any,
    visible: Visible,
    scale: float,
    *,
    values: int,
    cores: int,
) -> Float[Array, "B S H C"]:
    """``out[s] = Σ_t softmax_t(q[s]·entry[t] · scale) entry[t, :C]`` over layer ``layer`` of the cache; zeros for a
    query that sees no key. Scores, softmax and sums are float32; weights are rounded to bfloat16 for their product.

    values: C. cores: of the target, 0 for an H100's.
    """
    (B, S, H, W), (L, _, T, _) = q_BSHW.shape, entry_LBTW.shape
    rows = _padded(S * H)
    tiles = pl.cdiv(rows, ROWS)
    limit_BS = _limits(visible, B, S, T)
    # In float32, exact here, to lie beside what else is kept of a query.
    limit_BR = _pad(jnp.repeat(limit_BS.astype(jnp.float32), H, axis=1), tiles * ROWS)
    q_BRW = _pad(q_BSHW.reshape(B, S * H, W), rows)
    plan = _plan(jnp.max(limit_BS, axis=1), max(1, (cores or CORES) // tiles))
    number = jnp.asarray(layer, jnp.int32).reshape(1)
    sums, logs = _parts(plan, number, limit_BR, q_BRW, entry_LBTW.reshape(L * B, T, W), scale, values)
    out_BRC = _combine(plan[2], logs, sums, (B, rows, values), q_BSHW.dtype)
    return out_BRC[:, : S * H].reshape(B, S, H, values)


def _padded(rows: int) -> int:
    """Rows of a row's queries: whole groups of 8, which a copy takes, and whole tiles where there are several."""
    unit = 8 if rows <= ROWS else ROWS
    return pl.cdiv(rows, unit) * unit


def _pad(x, rows):
    return jnp.pad(x, [(0, 0), (0, rows - x.shape[1])] + [(0, 0)] * (x.ndim - 2))


def _limits(visible: Visible, batch: int, queries: int, keys: int) -> Int[Array, "B S"]:
    """How many keys, from the first on, each query sees."""
    limit = jnp.full((1, 1), keys, jnp.int32)
    if visible.lengths_B is not None:
        limit = jnp.minimum(limit, visible.lengths_B[:, None])
    if visible.causal:
        order = jnp.arange(queries, dtype=jnp.int32)[None]
        limit = jnp.minimum(limit, 1 + (order if visible.q_positions_BS is None else visible.q_positions_BS))
    return jnp.broadcast_to(jnp.maximum(limit, 0), (batch, queries)).astype(jnp.int32)


def _plan(limit_B: Int[Array, "B"], cores: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What every core computes: (C 4) its first row, block of that row, blocks and rows; (B) blocks of each row; (B 2)
    of each row's parts the first and the number. Part p of core c and row b is ``p = b + c``: either grows by one."""
    B = len(limit_B)
    blocks_B = jnp.maximum(-(-limit_B // _KEYS), 1)
    ends_B = jnp.sum(jnp.where(jnp.arange(B)[:, None] <= jnp.arange(B), blocks_B[:, None], 0), axis=0)
    share = jnp.maximum(-(-ends_B[-1] // cores), _LEAST)
    start_C = jnp.minimum(jnp.arange(cores, dtype=jnp.int32) * share, ends_B[-1])
    count_C = jnp.minimum(ends_B[-1] - start_C, share)
    row_of = lambda block_C: jnp.sum(ends_B <= block_C[:, None], axis=1)  # noqa: E731
    row_C = jnp.minimum(row_of(start_C), B - 1)
    rows_C = jnp.where(count_C > 0, row_of(start_C + count_C - 1) - row_C + 1, 0)
    first_C = start_C - (ends_B - blocks_B)[row_C]
    core_B = (ends_B - blocks_B) // share
    parts_B2 = jnp.stack([core_B + jnp.arange(B), (ends_B - 1) // share - core_B + 1], axis=1)
    plan_C4 = jnp.stack([row_C, first_C, count_C, rows_C], axis=1)
    return plan_C4.astype(jnp.int32), blocks_B.astype(jnp.int32), parts_B2.astype(jnp.int32)


def _parts(plan, layer, limit_BR, q_BRW, entry_NTW, scale, values):
    """The parts of all rows: (sums, normalised, and logarithms to base 2 of what they were divided by)."""
    plan_C4, blocks_B, _ = plan
    (B, rows, width), cores, tiles = q_BRW.shape, len(plan_C4), pl.cdiv(q_BRW.shape[1], ROWS)
    half, rest, tile_rows = values // 2, width - values, min(rows, ROWS)
    columns = _KEYS * half // (2 * ROWS)  # float32 columns of all rows that fit where a block's half was
    stage_swizzle = min(128, 4 * columns)
    factor = scale * math.log2(math.e)
    bf16, of_rows = q_BRW.dtype, plgpu.Layout.WGMMA.reduce(1)

    def kernel(plan, blocks, layer, limits, q, entry, sums, logs, scratch):
        q_smem, (ring, stage), rope, weights, stats, full, q_full, p_full, p_free = scratch
        core, tile, warpgroup = (jax.lax.axis_index(name) for name in ("core", "tile", "warpgroup"))
        row_0, first_0, count, segments = (plan[core, i] for i in range(4))

        def each_segment(body, carry):
            """body(row, its first block, where its blocks end, blocks of this core before, carry) -> carry"""

            def step(_, state):
                row, first, before, carry = state
                stop = jnp.minimum(first + count - before, blocks[row])
                carry = body(row, first, stop, before, carry)
                return row + 1, jnp.int32(0), before + stop - first, carry

            return jax.lax.fori_loop(0, segments, step, (row_0, first_0, jnp.int32(0), carry))

        def weigh():
            """Blocks of keys into softmax weights, one block ahead of what is multiplied."""
            set_registers(_REGISTERS[0])

            def segment(row, first, stop, before, carry):
                source = q.at[row, pl.ds(tile * ROWS, tile_rows)]
                plgpu.copy_gmem_to_smem(source, q_smem.at[:tile_rows], q_full)
                plgpu.copy_gmem_to_smem(limits.at[row, pl.ds(tile * ROWS, ROWS)], stats.at[3], q_full)
                plgpu.barrier_wait(q_full)
                limit = plgpu.layout_cast(stats[3], of_rows).astype(jnp.int32)
                shape = ROWS, _KEYS

                def block(j, state):
                    top, total = state
                    place = before + j - first
                    slot = jax.lax.rem(place, _SLOTS)
                    plgpu.barrier_wait(full.at[slot])

                    def product(scores):
                        for i in range(2):
                            q_half = q_smem.at[:, i * half : (i + 1) * half]
                            plgpu.wgmma(scores, q_half, ring.at[slot, i].transpose((1, 0)))
                        plgpu.wgmma(scores, q_smem.at[:, values:], rope.at[slot].transpose((1, 0)))
                        return scores[...]

                    scores = pl.run_scoped(product, plgpu.ACC(shape))
                    column = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA)
                    seen = column + j * _KEYS < jax.lax.broadcast_in_dim(limit, shape, [0])
                    scores = jnp.where(seen, scores, -jnp.inf)
                    higher = jnp.maximum(top, jnp.max(scores, axis=1) * factor)
                    shrink = jnp.exp2(top - higher)
                    p = jnp.exp2(scores * factor - jax.lax.broadcast_in_dim(higher, shape, [0]))
                    total = total * shrink + jnp.sum(p, axis=1)
                    pl.when(place > 0)(lambda: plgpu.barrier_wait(p_free))
                    weights[...] = p.astype(bf16)
                    stats[0] = shrink
                    stats[1] = total
                    plgpu.commit_smem()
                    plgpu.barrier_arrive(p_full)
                    return higher, total

                lowest = plgpu.layout_cast(jnp.full((ROWS,), _LOWEST, jnp.float32), of_rows)
                zeros = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), of_rows)
                top, total = jax.lax.fori_loop(first, stop, block, (lowest, zeros))
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                stats[2] = top + jnp.log(total) * math.log2(math.e)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(stats.at[2], logs.at[tile, row + core])
                return carry

            each_segment(segment, ())
            pl.when(count > 0)(lambda: plgpu.barrier_wait(p_free))  # nothing is left pending
            plgpu.wait_smem_to_gmem(0)

        def multiply():
            """Weights by values, half of the width; what a block leaves free is filled at once."""
            set_registers(_REGISTERS[1])
            mine, shape = warpgroup - 1, (ROWS, half)

            def fetch(slot, ahead):
                row, j, stop = ahead
                keys = entry.at[layer[0] * B + row, pl.ds(j * _KEYS, _KEYS)]
                plgpu.copy_gmem_to_smem(keys.at[:, pl.ds(mine * half, half)], ring.at[slot, mine], full.at[slot])

                @pl.when(mine == 0)
                def _():
                    plgpu.copy_gmem_to_smem(keys.at[:, values:], rope.at[slot], full.at[slot])

                if _AHEAD:

                    @pl.when(j + _AHEAD < stop)
                    def _():
                        later = entry.at[layer[0] * B + row, pl.ds((j + _AHEAD) * _KEYS, _KEYS)]
                        plgpu.async_prefetch(later.at[:, pl.ds(mine * half, half)])
                        pl.when(mine == 0)(lambda: plgpu.async_prefetch(later.at[:, values:]))

                following = jnp.minimum(row + 1, B - 1)
                same = j + 1 < stop
                stop = jax.lax.cond(same, lambda: stop, lambda: blocks[following])
                return jnp.where(same, row, following), jnp.where(same, j + 1, 0), stop

            def refill(place, ahead):
                slot = jax.lax.rem(place, _SLOTS)
                return jax.lax.cond(place < count, functools.partial(fetch, slot), lambda ahead: ahead, ahead)

            def segment(row, first, stop, before, ahead):
                def block(j, state):
                    acc, _, ahead = state
                    place = before + j - first
                    slot = jax.lax.rem(place, _SLOTS)
                    plgpu.barrier_wait(full.at[slot])
                    plgpu.barrier_wait(p_full)
                    shrink = plgpu.layout_cast(stats[0], of_rows)
                    total = plgpu.layout_cast(stats[1], of_rows)
                    acc = acc * jax.lax.broadcast_in_dim(shrink, shape, [0])
                    acc = _accumulate(acc, weights, ring.at[slot, mine])
                    plgpu.barrier_arrive(p_free)
                    return acc, total, jax.lax.cond(j + 1 < stop, refill_after, lambda _, ahead: ahead, place, ahead)

                def refill_after(place, ahead):
                    plgpu.commit_smem()  # all four warps have read what is written over now
                    return refill(place + _SLOTS, ahead)

                zeros = plgpu.layout_cast(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA)
                one = plgpu.layout_cast(jnp.ones((ROWS,), jnp.float32), of_rows)
                acc, total, ahead = jax.lax.fori_loop(first, stop, block, (zeros, one, ahead))
                inverse = jnp.where(total > 0, 1 / total, 0.0)
                acc = acc * jax.lax.broadcast_in_dim(inverse, shape, [0])
                place = before + stop - 1 - first
                slot = jax.lax.rem(place, _SLOTS)
                target = sums.at[tile, row + core, :, pl.ds(mine * half, half)]
                for start in range(0, half, columns):  # through where the last block was
                    stage[slot, mine] = acc[:, start : start + columns]
                    plgpu.commit_smem()
                    part = stage.at[slot, mine, :tile_rows]
                    plgpu.copy_smem_to_gmem(part, target.at[:, start : start + columns])
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                return refill(place + _SLOTS, ahead)

            ahead = row_0, first_0, blocks[row_0]
            for place in range(_SLOTS):
                ahead = refill(jnp.int32(place), ahead)
            each_segment(segment, ahead)
            plgpu.wait_smem_to_gmem(0)

        jax.lax.cond(warpgroup > 0, multiply, weigh)

    def set_registers(number):
        if number:
            plgpu.set_max_registers(number, action="increase" if number > 168 else "decrease")

    def entry_point(*refs):
        swizzled = lambda bits, swizzle: (  # noqa: E731
            plgpu.TilingTransform((8, 8 * swizzle // bits)),
            plgpu.SwizzleTransform(swizzle),
        )
        wide = swizzled(16, min(128, 2 * _KEYS))  # the same for both sides of a product
        scratch = [
            plgpu.SMEM((ROWS, width), bf16, transforms=wide),
            plgpu.RefUnion(
                plgpu.SMEM((_SLOTS, 2, _KEYS, half), bf16, transforms=wide),
                plgpu.SMEM((_SLOTS, 2, ROWS, columns), jnp.float32, transforms=swizzled(32, stage_swizzle)),
            ),
            plgpu.SMEM((_SLOTS, _KEYS, rest), bf16, transforms=wide),
            plgpu.SMEM((ROWS, _KEYS), bf16, transforms=wide),
            plgpu.SMEM((4, ROWS), jnp.float32),  # of each query: the factor of older sums, the sum, its log, the limit
            plgpu.Barrier(num_arrivals=3, num_barriers=_SLOTS),
            plgpu.Barrier(num_arrivals=2),
            plgpu.Barrier(num_arrivals=1),
            plgpu.Barrier(num_arrivals=2),
        ]
        pl.run_scoped(lambda *s: kernel(*refs, s), *scratch, collective_axes="warpgroup")

    slots = cores + B - 1
    return plgpu.kernel(
        entry_point,
        out_type=(
            jax.ShapeDtypeStruct((tiles, slots, tile_rows, values), jnp.float32),
            jax.ShapeDtypeStruct((tiles, slots, ROWS), jnp.float32),
        ),
        grid=(tiles, cores),
        grid_names=("tile", "core"),
        num_threads=3,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=_SEMANTICS, reduction_scratch_bytes=0, unsafe_no_auto_barriers=_UNSAFE
        ),
    )(plan_C4, blocks_B, layer, limit_BR, q_BRW, entry_NTW)


def _accumulate(sums, a, b):
    """``sums + a @ b``. A function of its own, since Mosaic GPU's interpreter has no ``run_state``."""
    return pl.run_state(lambda acc: plgpu.wgmma(acc, a, b))(plgpu.ACC.init(sums))


def _combine(parts_B2, logs, sums, shape, dtype):
    """Σ_p w_p · sums_p of each row's parts p, with weights in proportion to what each was divided by."""
    B, rows, values = shape
    at_once = _UNROLL or max(2, min(16, logs.shape[1] // B))

    def kernel(parts, logs, sums, out):
        item = jax.lax.axis_index("block") * 4 + jax.lax.axis_index("warpgroup")
        b, row = item // rows, jax.lax.rem(item, rows)
        tile, row_in_tile = row // ROWS, jax.lax.rem(row, ROWS)
        first, count = parts[b, 0], parts[b, 1]
        layout = plgpu.Layout.WG_STRIDED((values,), vec_size=4)

        def step(i, state):
            top, total, acc = state
            places = [i * at_once + k for k in range(at_once)]
            parts = [first + jnp.minimum(place, count - 1) for place in places]
            log = [
                jnp.where(place < count, logs[tile, part, row_in_tile], _LOWEST)
                for place, part in zip(places, parts, strict=True)
            ]
            loaded = [plgpu.layout_cast(sums[tile, part, row_in_tile], layout) for part in parts]
            higher = functools.reduce(jnp.maximum, log, top)
            shrink = jnp.exp2(top - higher)
            total, acc = total * shrink, acc * shrink
            for log_k, part in zip(log, loaded, strict=True):
                weight = jnp.exp2(log_k - higher)
                total, acc = total + weight, acc + part * weight
            return higher, total, acc

        zeros = plgpu.layout_cast(jnp.zeros((values,), jnp.float32), layout)
        state = jnp.float32(_LOWEST), jnp.float32(0), zeros
        _, total, acc = jax.lax.fori_loop(0, pl.cdiv(count, jnp.int32(at_once)), step, state)
        out[b, row] = (acc * jnp.where(total > 0, 1 / total, 0.0)).astype(dtype)

    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct(shape, dtype),
        grid=(B * rows // 4,),
        grid_names=("block",),
        num_threads=4,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(lowering_semantics=_SEMANTICS),
    )(parts_B2, logs, sums)
