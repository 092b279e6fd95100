"""The forward kernel of attention_hopper.py: 128 queries of a head by blocks of 128 keys, the diagonal's first.

Two warp groups have 64 queries each, a third streams. While a block's weights are multiplied with its values, the
scores of the next block are computed and turned into weights.
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
    Plan,
    down,
    every_row,
    free,
    hide,
    launch,
    numbers,
    product,
    share,
    times,
)

_LOWEST = -1e30  # in place of -inf: the exponential of a difference of two is never NaN
_SLOTS = 2  # blocks in shared memory at once: 160 KiB, beside 48 of queries


class _Refs(NamedTuple):
    """What the kernel reads and writes, then what it keeps in shared memory. staged: where the queries were."""

    plan: Any
    places: Any
    ids_of_q: Any
    ids_of_k: Any
    q: Any
    kv: Any
    pe: Any
    out: Any
    logs: Any
    q_there: Any
    staged: Any
    nope: Any
    rope: Any
    values: Any
    numbers: Any
    q_ids: Any
    k_ids: Any
    q_full: Any
    k_full: Any
    k_free: Any
    v_full: Any
    v_free: Any


def forward(
    q_BSHK: Float[Array, "B S H K"],
    kv_BTHW: Float[Array, "B T H W"],
    pe_BTR: Float[Array, "B T R"],
    ids_BP: Ids,
    plan: Plan,
    scale: float,
) -> tuple[Float[Array, "B S H V"], Float[Array, "B H P"]]:
    """The result and ``log2 Σ exp`` of each query. P: whole blocks. ids_BP: of queries' and keys' segments."""
    (B, S, H, K), R, dtype = q_BSHK.shape, pe_BTR.shape[-1], q_BSHK.dtype
    N, blocks, extra = K - R, pl.cdiv(S, BLOCK), ids_BP is not None
    T, V = kv_BTHW.shape[1], kv_BTHW.shape[-1] - N
    scratch = (
        # As large for a group, so that the result of one is not written over the other's queries.
        plgpu.RefUnion(
            *(plgpu.SMEM((2, HALF * K // width, width), dtype, transforms=TILED) for width in (K, V)),
        ),
        *(plgpu.SMEM((_SLOTS, BLOCK, width), dtype, transforms=TILED) for width in (N, R, V)),
        plgpu.SMEM((2, HALF), jnp.float32),
        plgpu.SMEM((2, HALF), jnp.int32),
        plgpu.SMEM((_SLOTS, BLOCK), jnp.int32),
        plgpu.Barrier(num_arrivals=2 + 2 * extra),
        plgpu.Barrier(num_arrivals=2 + extra, num_barriers=_SLOTS),
        plgpu.Barrier(num_arrivals=2, num_barriers=_SLOTS),
        plgpu.Barrier(num_arrivals=1, num_barriers=_SLOTS),
        plgpu.Barrier(num_arrivals=2, num_barriers=_SLOTS),
    )

    def body(here, *refs):
        (q_there, staged), rest = refs[9], refs[10:]
        refs = _Refs._make([*refs[:9], q_there, staged, *rest])
        tile = _Tile(refs, here, extra, plan.places_BI is not None, scale * math.log2(math.e))
        share(tile.stream, tile.compute)

    out = jax.ShapeDtypeStruct((B, S, H, V), dtype), jax.ShapeDtypeStruct((B, H, blocks * BLOCK), jnp.float32)
    kernel = launch("attention_forward", body, out, scratch, (B, H, blocks), T * (K + V) * 2, forwards=False)
    return kernel(*numbers(plan.of_queries, plan, ids_BP), q_BSHK, kv_BTHW, pe_BTR)


class _Tile(NamedTuple):
    """128 queries of a head. here: row, head, number. factor: of scores, to base 2."""

    refs: _Refs
    here: tuple
    segments: bool
    placed: bool
    factor: float

    @property
    def place(self):
        """The block of keys at whose diagonal the queries stand."""
        b, _, i = self.here
        return self.refs.places[b, i] if self.placed else i

    @property
    def keys(self):
        """(the first block of keys below the diagonal, how many blocks, how many of them hide any)"""
        (b, _, i), place = self.here, self.place
        if not self.segments:
            return 0, 1 + place, 1
        first, pure = (self.refs.plan[b, i, side] for side in range(2))
        return first, 1 + place - first, 1 + pure - first

    def number(self, t):
        """Of the block that comes t-th: the diagonal's, then those below it upwards."""
        return jnp.where(t == 0, self.place, self.keys[0] + t - 1)

    @property
    def mine(self):
        """(this warp group, its queries)"""
        group = jax.lax.axis_index("warpgroup")
        return group, pl.ds(self.here[2] * BLOCK + group * HALF, HALF)

    def stream(self) -> None:
        refs, (b, h, i) = self.refs, self.here
        for group in range(2):
            rows = pl.ds(i * BLOCK + group * HALF, HALF)
            plgpu.copy_gmem_to_smem(refs.q.at[b, rows, h], refs.q_there.at[group], refs.q_full)
            if self.segments:
                plgpu.copy_gmem_to_smem(refs.ids_of_q.at[b, rows], refs.q_ids.at[group], refs.q_full)

        def block(t, _):
            slot = jax.lax.rem(t, _SLOTS)
            keys, width = pl.ds(self.number(t) * BLOCK, BLOCK), refs.nope.shape[-1]
            kv, k_full, v_full = refs.kv.at[b, keys, h], refs.k_full.at[slot], refs.v_full.at[slot]
            pl.when(t >= _SLOTS)(lambda: plgpu.barrier_wait(refs.k_free.at[slot]))
            plgpu.copy_gmem_to_smem(kv.at[:, :width], refs.nope.at[slot], k_full)
            plgpu.copy_gmem_to_smem(refs.pe.at[b, keys], refs.rope.at[slot], k_full)
            if self.segments:
                plgpu.copy_gmem_to_smem(refs.ids_of_k.at[b, keys], refs.k_ids.at[slot], k_full)
            pl.when(t >= _SLOTS)(lambda: plgpu.barrier_wait(refs.v_free.at[slot]))
            plgpu.copy_gmem_to_smem(kv.at[:, width:], refs.values.at[slot], v_full)

        jax.lax.fori_loop(0, self.keys[1], block, None)

    def compute(self) -> None:
        refs, count = self.refs, self.keys[1]
        plgpu.barrier_wait(refs.q_full)
        plgpu.barrier_wait(refs.k_full.at[0])
        scores = self.hide(product(functools.partial(self.score, 0), BLOCK), 0)
        free(refs.k_free, jnp.int32(0), count, _SLOTS)
        weights, top, total, _ = self.softmax(scores, every_row(_LOWEST), every_row(0))
        zeros = plgpu.layout_cast(jnp.zeros((HALF, refs.values.shape[-1]), jnp.float32), plgpu.Layout.WGMMA)
        sums, weights, top, total = jax.lax.fori_loop(1, count, self.block, (zeros, weights, top, total))
        slot = jax.lax.rem(count - 1, _SLOTS)
        plgpu.barrier_wait(refs.v_full.at[slot])
        sums = _accumulate(sums, weights, refs.values.at[slot])
        inverse = jnp.where(total > 0, 1 / total, 0.0)  # nothing is seen: zeros, and weights of 0 in the backward pass
        logs = jnp.where(total > 0, top + jnp.log(total) * math.log2(math.e), jnp.inf)
        self.store(sums * down(inverse, sums.shape[1]), logs)

    def block(self, t, state):
        """Scores of block t into weights, while those of the block before it are multiplied with its values."""
        refs, slot, before = self.refs, jax.lax.rem(t, _SLOTS), jax.lax.rem(t - 1, _SLOTS)
        sums, weights, top, total = state
        plgpu.barrier_wait(refs.k_full.at[slot])
        plgpu.barrier_wait(refs.v_full.at[before])

        def meanwhile(scores):
            if self.segments:
                hidden = functools.partial(self.hide, t=t)
                scores = jax.lax.cond(t < self.keys[2], hidden, lambda scores: scores, scores)
            free(refs.k_free, t, self.keys[1], _SLOTS)
            return self.softmax(scores, top, total)

        score = functools.partial(self.score, slot)
        sums, (weights, top, total, shrink) = _overlapped(sums, weights, refs.values.at[before], score, meanwhile)
        free(refs.v_free, t - 1, self.keys[1], _SLOTS)
        return sums * down(shrink, sums.shape[1]), weights, top, total

    def score(self, slot, acc) -> None:
        refs, mine, width = self.refs, self.refs.q_there.at[self.mine[0]], self.refs.nope.shape[-1]
        plgpu.wgmma(acc, mine.at[:, :width], refs.nope.at[slot].transpose((1, 0)))
        plgpu.wgmma(acc, mine.at[:, width:], refs.rope.at[slot].transpose((1, 0)))

    def hide(self, scores, t):
        refs, group, ids = self.refs, self.mine[0], None
        if self.segments:
            k_ids = plgpu.layout_cast(refs.k_ids[jax.lax.rem(t, _SLOTS)], OF_COLUMNS)
            ids = plgpu.layout_cast(refs.q_ids[group], OF_ROWS), k_ids
        return hide(scores, (self.number(t) - self.place) * BLOCK - group * HALF, ids)

    def softmax(self, scores, top, total):
        higher = jnp.maximum(top, jnp.max(scores, axis=1) * self.factor)
        shrink, p = jnp.exp2(top - higher), jnp.exp2(scores * self.factor - down(higher, BLOCK))
        return p.astype(self.refs.q.dtype), higher, total * shrink + jnp.sum(p, axis=1), shrink

    def store(self, out, logs) -> None:
        refs, (b, h, _), (group, rows) = self.refs, self.here, self.mine
        refs.staged[group, :HALF], refs.numbers[group] = out.astype(refs.staged.dtype), logs
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(refs.staged.at[group, :HALF], refs.out.at[b, rows, h])
        plgpu.copy_smem_to_gmem(refs.numbers.at[group], refs.logs.at[b, h, rows])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _accumulate(sums, weights, values):
    """``sums + weights @ values``"""
    return product(lambda acc: times(acc, weights, values), sums)


def _overlapped(sums, weights, values, score, meanwhile):
    """``sums + weights @ values``, and what ``meanwhile`` makes of the scores while that product runs."""

    def body(acc, scores):
        acc[...] = sums
        score(scores)
        times(acc, weights, values)
        result = meanwhile(plgpu.wgmma_accumulator_load(scores, wait_n=1))
        return acc[...], result

    return pl.run_scoped(body, plgpu.WGMMAAccumulatorRef(sums.shape), plgpu.WGMMAAccumulatorRef((HALF, BLOCK)))
