"""attention_hopper.py's kernel for the gradient of keys and values: 128 keys of a head by blocks of 64 queries.

Two warp groups have 64 keys each, the rows of all products, a third streams. Scores and ``v doutᵀ`` are computed once
more than in one kernel for all gradients; but nothing is added up in memory.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jaxtyping import Array, Float

from deepseek_kernels.attention_hopper_tiles import (
    BLOCK,
    HALF,
    OF_COLUMNS,
    OF_ROWS,
    TILED,
    Ids,
    Operands,
    Plan,
    across,
    free,
    hide,
    launch,
    numbers,
    product,
    share,
    times,
)

_SLOTS = 3  # blocks of 64 in shared memory at once: 120 KiB, beside 80 of the tile


def keys_gradient(
    operands: Operands, ids_BP: Ids, plan: Plan, scale: float
) -> tuple[Float[Array, "B T H W"], Float[Array, "B T H R"]]:
    """The gradient in kv, and what each head adds to that in pe."""
    (B, T, H, W), R, (_, S, _, V) = operands.kv_BTHW.shape, operands.pe_BTR.shape[-1], operands.dout_BSHV.shape
    dtype, extra, K, blocks = operands.q_BSHK.dtype, ids_BP is not None, W - V + R, pl.cdiv(T, BLOCK)
    scratch = (
        *(plgpu.SMEM((2, HALF, width), dtype, transforms=TILED) for width in (K - R, R, V)),
        *(plgpu.SMEM((_SLOTS, HALF, width), dtype, transforms=TILED) for width in (K, V)),
        plgpu.SMEM((_SLOTS, 2, HALF), jnp.float32),
        plgpu.SMEM((2, HALF), jnp.int32),
        plgpu.SMEM((_SLOTS, HALF), jnp.int32),
        plgpu.Barrier(num_arrivals=6 + 2 * extra),
        plgpu.Barrier(num_arrivals=4 + extra, num_barriers=_SLOTS),
        plgpu.Barrier(num_arrivals=2, num_barriers=_SLOTS),
    )

    def body(here, *refs):
        tile = _Tile(_Refs._make(refs), here, extra, plan.places_BI is not None, scale, blocks)
        share(tile.stream, tile.compute)

    out = jax.ShapeDtypeStruct((B, T, H, W), dtype), jax.ShapeDtypeStruct((B, T, H, R), dtype)
    kernel = launch("attention_of_keys", body, out, scratch, (B, H, blocks), S * (K + V) * 2, forwards=True)
    return kernel(*numbers(plan.of_keys, plan, ids_BP), *operands)


class _Refs(NamedTuple):
    """What the kernel reads and writes, then what it keeps in shared memory: its keys and values, blocks of queries.

    numbers: of each query ``logs`` and ``along``."""

    plan: Any
    places: Any
    ids_of_q: Any
    ids_of_k: Any
    q: Any
    kv: Any
    pe: Any
    dout: Any
    logs: Any
    along: Any
    dkv: Any
    dpe: Any
    nope: Any
    rope: Any
    values: Any
    q_there: Any
    dout_there: Any
    numbers: Any
    k_ids: Any
    q_ids: Any
    there: Any
    full: Any
    free: Any


class _Tile(NamedTuple):
    """128 keys of a head, the rows of all products. here: row, head, number. blocks: of 128 in a row of the batch."""

    refs: _Refs
    here: tuple
    segments: bool
    placed: bool
    scale: float
    blocks: int

    @property
    def first(self):
        """The first block of 128 queries that sees any of the keys: the diagonal's, unless another device has that."""
        b, _, j = self.here
        return self.refs.plan[b, j, 0] if self.placed else j

    @property
    def queries(self):
        """(the end of the blocks of 64 queries, how many blocks, how many of them hide any)"""
        b, _, j = self.here
        if not (self.segments or self.placed):
            return 2 * self.blocks, 2 * (self.blocks - j), 2
        pure, until = (self.refs.plan[b, j, side + self.placed] for side in range(2))
        return 2 * until, 2 * (until - self.first), 2 * (1 + until - pure)

    def number(self, t):
        """Of the block that comes t-th: the first two, then the others from the last on."""
        return jnp.where(t < 2, 2 * self.first + t, self.queries[0] + 1 - t)

    def place(self, number):
        """Of a block of queries, in blocks of 64 keys."""
        if not self.placed:
            return number
        return 2 * self.refs.places[self.here[0], number // 2] + jax.lax.rem(number, 2)

    def stream(self) -> None:
        refs, (b, h, j) = self.refs, self.here
        width = refs.nope.shape[-1]
        for group in range(2):
            rows = pl.ds(j * BLOCK + group * HALF, HALF)
            kv = refs.kv.at[b, rows, h]
            plgpu.copy_gmem_to_smem(kv.at[:, :width], refs.nope.at[group], refs.there)
            plgpu.copy_gmem_to_smem(refs.pe.at[b, rows], refs.rope.at[group], refs.there)
            plgpu.copy_gmem_to_smem(kv.at[:, width:], refs.values.at[group], refs.there)
            if self.segments:
                plgpu.copy_gmem_to_smem(refs.ids_of_k.at[b, rows], refs.k_ids.at[group], refs.there)

        def block(t, _):
            slot = jax.lax.rem(t, _SLOTS)
            rows, full = pl.ds(self.number(t) * HALF, HALF), refs.full.at[slot]
            pl.when(t >= _SLOTS)(lambda: plgpu.barrier_wait(refs.free.at[slot]))
            plgpu.copy_gmem_to_smem(refs.q.at[b, rows, h], refs.q_there.at[slot], full)
            plgpu.copy_gmem_to_smem(refs.dout.at[b, rows, h], refs.dout_there.at[slot], full)
            plgpu.copy_gmem_to_smem(refs.logs.at[b, h, rows], refs.numbers.at[slot, 0], full)
            plgpu.copy_gmem_to_smem(refs.along.at[b, h, rows], refs.numbers.at[slot, 1], full)
            if self.segments:
                plgpu.copy_gmem_to_smem(refs.ids_of_q.at[b, rows], refs.q_ids.at[slot], full)

        jax.lax.fori_loop(0, self.queries[1], block, None)

    def compute(self) -> None:
        refs, group = self.refs, jax.lax.axis_index("warpgroup")
        plgpu.barrier_wait(refs.there)

        def sums(dk, dv):
            jax.lax.fori_loop(0, self.queries[1], lambda t, _: self.block(dk, dv, t), None)
            return dk[...], dv[...]

        widths = refs.q_there.shape[-1], refs.values.shape[-1]
        dk, dv = pl.run_scoped(sums, *(plgpu.WGMMAAccumulatorRef((HALF, width)) for width in widths))
        dk, width, (b, h, j) = dk * self.scale, refs.nope.shape[-1], self.here
        rows = pl.ds(j * BLOCK + group * HALF, HALF)
        dkv, dpe = refs.dkv.at[b, rows, h], refs.dpe.at[b, rows, h]
        places = (refs.nope, dkv.at[:, :width]), (refs.rope, dpe), (refs.values, dkv.at[:, width:])
        for value, (place, _) in zip((dk[:, :width], dk[:, width:], dv), places, strict=True):
            place[group] = value.astype(place.dtype)
        plgpu.commit_smem()
        for place, target in places:
            plgpu.copy_smem_to_gmem(place.at[group], target)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def block(self, dk, dv, t) -> None:
        refs, group, slot = self.refs, jax.lax.axis_index("warpgroup"), jax.lax.rem(t, _SLOTS)
        q, dout, width = refs.q_there.at[slot], refs.dout_there.at[slot], refs.nope.shape[-1]
        plgpu.barrier_wait(refs.full.at[slot])

        def score(acc):
            plgpu.wgmma(acc, refs.nope.at[group], q.at[:, :width].transpose((1, 0)))
            plgpu.wgmma(acc, refs.rope.at[group], q.at[:, width:].transpose((1, 0)))

        factor = self.scale * math.log2(math.e)
        scores = product(score, HALF)
        free(refs.free, t - 1, self.queries[1], _SLOTS)
        logs = plgpu.layout_cast(refs.numbers[slot, 0], OF_COLUMNS)
        scores = jax.lax.cond(t < self.queries[2], lambda x: self.hide(x, t, slot), lambda x: x, scores)
        weights = jax.lax.optimization_barrier(jnp.exp2(scores * factor - across(logs)).astype(refs.q.dtype))
        times(dv, weights, dout)
        dweights = product(lambda acc: plgpu.wgmma(acc, refs.values.at[group], dout.transpose((1, 0))), HALF)
        along = plgpu.layout_cast(refs.numbers[slot, 1], OF_COLUMNS)
        dweights -= across(along)
        # From the rounded weights: there are no registers for both.
        times(dk, (weights.astype(jnp.float32) * dweights).astype(weights.dtype), q)

    def hide(self, scores, t, slot):
        group, ids = jax.lax.axis_index("warpgroup"), None
        if self.segments:
            q_ids = plgpu.layout_cast(self.refs.q_ids[slot], OF_COLUMNS)
            ids = plgpu.layout_cast(self.refs.k_ids[group], OF_ROWS), q_ids
        return hide(scores, (self.place(self.number(t)) - 2 * self.here[2] - group) * HALF, ids, keys_down=True)
