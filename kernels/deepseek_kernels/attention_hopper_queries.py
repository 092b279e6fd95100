"""attention_hopper.py's kernel for the queries' gradient: 128 queries of a head by blocks of 64 keys.

Two warp groups have 64 queries each, a third streams. Weights are computed again from the saved sums; the gradient
stays in registers, so it is added up in a fixed order.
"""

import functools
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
    down,
    free,
    hide,
    launch,
    numbers,
    share,
    times,
)

_SLOTS = 3  # blocks of 64 in shared memory at once: 120 KiB, beside 80 of the tile


def queries_gradient(operands: Operands, ids_BP: Ids, plan: Plan, scale: float) -> Float[Array, "B S H K"]:
    """The gradient in q."""
    (B, S, H, K), R, V = operands.q_BSHK.shape, operands.pe_BTR.shape[-1], operands.dout_BSHV.shape[-1]
    T, dtype, extra = operands.kv_BTHW.shape[1], operands.q_BSHK.dtype, ids_BP is not None
    scratch = (
        *(plgpu.SMEM((2, HALF, width), dtype, transforms=TILED) for width in (K, V)),
        *(plgpu.SMEM((_SLOTS, HALF, width), dtype, transforms=TILED) for width in (K - R, R, V)),
        plgpu.SMEM((2, 2, HALF), jnp.float32),
        plgpu.SMEM((2, HALF), jnp.int32),
        plgpu.SMEM((_SLOTS, HALF), jnp.int32),
        plgpu.Barrier(num_arrivals=8 + 2 * extra),
        plgpu.Barrier(num_arrivals=3 + extra, num_barriers=_SLOTS),
        plgpu.Barrier(num_arrivals=2, num_barriers=_SLOTS),
    )

    def body(here, *refs):
        tile = _Tile(_Refs._make(refs), here, extra, plan.places_BI is not None, scale)
        share(tile.stream, tile.compute)

    out, tiles = jax.ShapeDtypeStruct((B, S, H, K), dtype), (B, H, pl.cdiv(S, BLOCK))
    kernel = launch("attention_of_queries", body, out, scratch, tiles, T * (K + V) * 2, forwards=False)
    return kernel(*numbers(plan.of_queries, plan, ids_BP), *operands)


class _Refs(NamedTuple):
    """What the kernel reads and writes, then what it keeps in shared memory: its queries, blocks of keys.

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
    dq: Any
    q_there: Any
    dout_there: Any
    nope: Any
    rope: Any
    values: Any
    numbers: Any
    q_ids: Any
    k_ids: Any
    there: Any
    full: Any
    free: Any


class _Tile(NamedTuple):
    """128 queries of a head. here: row, head, number."""

    refs: _Refs
    here: tuple
    segments: bool
    placed: bool
    scale: float

    @property
    def place(self):
        """The block of 128 keys at whose diagonal the queries stand."""
        b, _, i = self.here
        return self.refs.places[b, i] if self.placed else i

    @property
    def keys(self):
        """(the first block of 64 keys below the diagonal, how many blocks, how many of them hide any)"""
        (b, _, i), place = self.here, self.place
        if not self.segments:
            return 0, 2 * (1 + place), 2
        first, pure = (self.refs.plan[b, i, side] for side in range(2))
        return 2 * first, 2 * (1 + place - first), 2 * (1 + pure - first)

    def number(self, t):
        """Of the block that comes t-th: the diagonal's two, then those below it upwards."""
        return jnp.where(t < 2, 2 * self.place + t, self.keys[0] + t - 2)

    def stream(self) -> None:
        refs, (b, h, i) = self.refs, self.here
        for group in range(2):
            rows = pl.ds(i * BLOCK + group * HALF, HALF)
            plgpu.copy_gmem_to_smem(refs.q.at[b, rows, h], refs.q_there.at[group], refs.there)
            plgpu.copy_gmem_to_smem(refs.dout.at[b, rows, h], refs.dout_there.at[group], refs.there)
            plgpu.copy_gmem_to_smem(refs.logs.at[b, h, rows], refs.numbers.at[group, 0], refs.there)
            plgpu.copy_gmem_to_smem(refs.along.at[b, h, rows], refs.numbers.at[group, 1], refs.there)
            if self.segments:
                plgpu.copy_gmem_to_smem(refs.ids_of_q.at[b, rows], refs.q_ids.at[group], refs.there)

        def block(t, _):
            slot = jax.lax.rem(t, _SLOTS)
            keys, width, full = pl.ds(self.number(t) * HALF, HALF), refs.nope.shape[-1], refs.full.at[slot]
            kv = refs.kv.at[b, keys, h]
            pl.when(t >= _SLOTS)(lambda: plgpu.barrier_wait(refs.free.at[slot]))
            plgpu.copy_gmem_to_smem(kv.at[:, :width], refs.nope.at[slot], full)
            plgpu.copy_gmem_to_smem(refs.pe.at[b, keys], refs.rope.at[slot], full)
            plgpu.copy_gmem_to_smem(kv.at[:, width:], refs.values.at[slot], full)
            if self.segments:
                plgpu.copy_gmem_to_smem(refs.ids_of_k.at[b, keys], refs.k_ids.at[slot], full)

        jax.lax.fori_loop(0, self.keys[1], block, None)

    def compute(self) -> None:
        refs, group = self.refs, jax.lax.axis_index("warpgroup")
        plgpu.barrier_wait(refs.there)
        logs, along = (plgpu.layout_cast(refs.numbers[group, which], OF_ROWS) for which in range(2))

        def sums(of_nope, of_rope):
            block = functools.partial(self.block, of_nope, of_rope, logs, along)
            jax.lax.fori_loop(0, self.keys[1], lambda t, _: block(t), None)
            return of_nope[...], of_rope[...]

        widths = refs.nope.shape[-1], refs.rope.shape[-1]
        parts = pl.run_scoped(sums, *(plgpu.WGMMAAccumulatorRef((HALF, width)) for width in widths))
        dq, start = refs.q_there.at[group], 0
        for part, width in zip(parts, widths, strict=True):
            dq[:, start : start + width] = (part * self.scale).astype(refs.q.dtype)
            start += width
        plgpu.commit_smem()
        b, h, i = self.here
        plgpu.copy_smem_to_gmem(dq, refs.dq.at[b, pl.ds(i * BLOCK + group * HALF, HALF), h])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def block(self, of_nope, of_rope, logs, along, t) -> None:
        refs, group, slot = self.refs, jax.lax.axis_index("warpgroup"), jax.lax.rem(t, _SLOTS)
        plgpu.barrier_wait(refs.full.at[slot])

        def gradient(scores, dweights):
            q, width = refs.q_there.at[group], refs.nope.shape[-1]
            plgpu.wgmma(scores, q.at[:, :width], refs.nope.at[slot].transpose((1, 0)))
            plgpu.wgmma(scores, q.at[:, width:], refs.rope.at[slot].transpose((1, 0)))
            plgpu.wgmma(dweights, refs.dout_there.at[group], refs.values.at[slot].transpose((1, 0)))
            scores = plgpu.wgmma_accumulator_load(scores, wait_n=1)
            free(refs.free, t - 1, self.keys[1], _SLOTS)
            scores = jax.lax.cond(t < self.keys[2], lambda x: self.hide(x, t, slot), lambda x: x, scores)
            p = jnp.exp2(scores * (self.scale * math.log2(math.e)) - down(logs, HALF))
            return (p * (dweights[...] - down(along, HALF))).astype(refs.q.dtype)

        gradient = pl.run_scoped(gradient, *[plgpu.WGMMAAccumulatorRef((HALF, HALF))] * 2)
        times(of_nope, gradient, refs.nope.at[slot])
        times(of_rope, gradient, refs.rope.at[slot])

    def hide(self, scores, t, slot):
        group, ids = jax.lax.axis_index("warpgroup"), None
        if self.segments:
            k_ids = plgpu.layout_cast(self.refs.k_ids[slot], OF_COLUMNS)
            ids = plgpu.layout_cast(self.refs.q_ids[group], OF_ROWS), k_ids
        return hide(scores, (self.number(t) - 2 * self.place - group) * HALF, ids)
