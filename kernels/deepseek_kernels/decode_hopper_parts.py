"""The kernel of decode_hopper.py that reads the cache: each core's share of the blocks of keys.

In a core three warp groups share two blocks in shared memory: one turns a block's keys into softmax weights while the
others multiply the weights of the block before with its values, half of the width each, and hold the sums. Who has
read its half of a block last has the next block copied there.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

ROWS = 64  # of a tile of queries: what one product of a warp group takes
KEYS = 64  # of a block; 32, four at once, read long rows 5 % slower and multiply for 128 heads at 0.7 of the speed
LOWEST = -1e30  # in place of -inf: the exponential of a difference of two is never NaN
# Every store to shared memory is followed by a barrier, so that none needs to be added.
PARAMS = {"lowering_semantics": plgpu.LoweringSemantics.Lane, "unsafe_no_auto_barriers": True}
_SLOTS = 2  # blocks in shared memory at once: 144 KiB, beside 72 KiB of queries and 8 KiB of weights
_OF_ROWS = plgpu.Layout.WGMMA.reduce(1)


class _Refs(NamedTuple):
    """What the first kernel reads and writes, then what it keeps in shared memory.

    stats: of each query the factor of older sums, the sum, its logarithm, the number of keys that it sees. stage: where
    half a block was, as float32 columns of all queries. full, q_full: a block, the queries are there; p_full, p_free:
    weights are there, have been multiplied."""

    core: Any
    blocks: Any
    layer: Any
    limits: Any
    q: Any
    entry: Any
    sums: Any
    logs: Any
    queries: Any
    ring: Any
    stage: Any
    rope: Any
    weights: Any
    stats: Any
    full: Any
    q_full: Any
    p_full: Any
    p_free: Any


def parts(
    core_C5: Int[Array, "C 5"],
    blocks_B: Int[Array, "B"],
    layer: Int[Array, "1"],
    limit_BR: Float[Array, "B _"],
    q_BRW: Float[Array, "B R W"],
    entry_NTW: Float[Array, "N T W"],
    scale: float,
    values: int,
) -> tuple[Float[Array, "I P _ V"], Float[Array, "I P _"]]:
    """The parts of all rows, for each tile I of queries: sums, normalised, and logarithms to base 2 of what they were
    divided by. core_C5, blocks_B: the plan. limit_BR: keys that each query of whole tiles sees."""
    (B, rows, width), cores, dtype = q_BRW.shape, len(core_C5), q_BRW.dtype
    half, tiles, tile_rows = values // 2, pl.cdiv(rows, ROWS), min(rows, ROWS)
    columns = KEYS * half // (2 * ROWS)

    def kernel(*refs):
        swizzled = lambda bits: (plgpu.TilingTransform((8, 1024 // bits)), plgpu.SwizzleTransform(128))  # noqa: E731
        ring = plgpu.SMEM((_SLOTS, 2, KEYS, half), dtype, transforms=swizzled(16))
        stage = plgpu.SMEM((_SLOTS, 2, ROWS, columns), jnp.float32, transforms=swizzled(32))
        scratch = (
            plgpu.SMEM((ROWS, width), dtype, transforms=swizzled(16)),
            plgpu.RefUnion(ring, stage),
            plgpu.SMEM((_SLOTS, KEYS, width - values), dtype, transforms=swizzled(16)),
            plgpu.SMEM((ROWS, KEYS), dtype, transforms=swizzled(16)),
            plgpu.SMEM((4, ROWS), jnp.float32),
            plgpu.Barrier(num_arrivals=3, num_barriers=_SLOTS),
            *(plgpu.Barrier(num_arrivals=number) for number in (2, 1, 2)),
        )
        pl.run_scoped(functools.partial(run, refs), *scratch, collective_axes="warpgroup")

    def run(refs, queries, union, *rest):
        core = _Core(
            _Refs._make([*refs, queries, *union, *rest]), B, values, tile_rows, columns, scale * math.log2(math.e)
        )
        jax.lax.cond(jax.lax.axis_index("warpgroup") > 0, core.multiply, core.weigh)

    return plgpu.kernel(
        kernel,
        out_type=(
            jax.ShapeDtypeStruct((tiles, cores + B - 1, tile_rows, values), jnp.float32),
            jax.ShapeDtypeStruct((tiles, cores + B - 1, ROWS), jnp.float32),
        ),
        grid=(tiles, cores),
        grid_names=("tile", "core"),
        num_threads=3,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0, **PARAMS),
    )(core_C5, blocks_B, layer, limit_BR, q_BRW, entry_NTW)


@dataclasses.dataclass(frozen=True)
class _Core:
    """What a core does for a tile of queries. columns: of the stage. factor: of scores, to base 2."""

    refs: _Refs
    batch: int
    values: int
    tile_rows: int
    columns: int
    factor: float

    @property
    def half(self) -> int:
        return self.values // 2

    @property
    def here(self):
        """(tile, core)"""
        return jax.lax.axis_index("tile"), jax.lax.axis_index("core")

    def plan(self, i: int):
        return self.refs.core[self.here[1], i]

    def each_row(self, body: Callable[..., Any], carry: Any) -> Any:
        """``body(row, its first block, where its blocks end, this core's blocks before, carry) -> carry``"""
        count = self.plan(2)

        def step(_, state):
            row, first, blocks, before, carry = state
            stop = jnp.minimum(first + count - before, blocks)
            carry = body(row, first, stop, before, carry)
            following = jnp.minimum(row + 1, self.batch - 1)
            return row + 1, jnp.int32(0), self.refs.blocks[following], before + stop - first, carry

        state = self.plan(0), self.plan(1), self.plan(4), jnp.int32(0), carry
        return jax.lax.fori_loop(0, self.plan(3), step, state)[-1]

    def weigh(self) -> None:
        """Keys into softmax weights, one block ahead of what is multiplied."""
        self.each_row(self.weigh_row, ())
        pl.when(self.plan(2) > 0)(lambda: plgpu.barrier_wait(self.refs.p_free))  # nothing is left pending
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def weigh_row(self, row, first, stop, before, carry):
        refs, (tile, core) = self.refs, self.here
        mine = pl.ds(tile * ROWS, self.tile_rows)
        plgpu.copy_gmem_to_smem(refs.q.at[row, mine], refs.queries.at[: self.tile_rows], refs.q_full)
        plgpu.copy_gmem_to_smem(refs.limits.at[row, pl.ds(tile * ROWS, ROWS)], refs.stats.at[3], refs.q_full)
        plgpu.barrier_wait(refs.q_full)
        limit = plgpu.layout_cast(refs.stats[3], _OF_ROWS).astype(jnp.int32)

        def block(j, state):
            place = before + j - first
            scores = self.scores(jax.lax.rem(place, _SLOTS))
            column = plgpu.broadcasted_iota(jnp.int32, scores.shape, 1, layout=plgpu.Layout.WGMMA)
            scores = jnp.where(column + j * KEYS < _wide(limit, KEYS), scores, -jnp.inf)
            top, total = state
            higher = jnp.maximum(top, jnp.max(scores, axis=1) * self.factor)
            shrink, p = jnp.exp2(top - higher), jnp.exp2(scores * self.factor - _wide(higher, KEYS))
            total = total * shrink + jnp.sum(p, axis=1)
            pl.when(place > 0)(lambda: plgpu.barrier_wait(refs.p_free))
            refs.weights[...], refs.stats[0], refs.stats[1] = p.astype(refs.weights.dtype), shrink, total
            plgpu.commit_smem()
            plgpu.barrier_arrive(refs.p_full)
            return higher, total

        top, total = jax.lax.fori_loop(first, stop, block, (_of_rows(LOWEST), _of_rows(0)))
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        refs.stats[2] = top + jnp.log(total) * math.log2(math.e)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(refs.stats.at[2], refs.logs.at[tile, row + core])
        return carry

    def scores(self, slot):
        """(queries, keys) of the block in a slot, not scaled."""
        refs, half = self.refs, self.half
        plgpu.barrier_wait(refs.full.at[slot])

        def product(acc):
            for i in range(2):
                columns = refs.queries.at[:, i * half : (i + 1) * half]
                plgpu.wgmma(acc, columns, refs.ring.at[slot, i].transpose((1, 0)))
            plgpu.wgmma(acc, refs.queries.at[:, self.values :], refs.rope.at[slot].transpose((1, 0)))
            return acc[...]

        return pl.run_scoped(product, plgpu.WGMMAAccumulatorRef((ROWS, KEYS)))

    def multiply(self) -> None:
        """Weights by values, half of the width; what a block leaves free is filled at once."""
        ahead = self.plan(0), self.plan(1), self.plan(4)
        for place in range(_SLOTS):
            ahead = self.refill(jnp.int32(place), ahead)
        self.each_row(self.multiply_row, ahead)

    def multiply_row(self, row, first, stop, before, ahead):
        refs, mine = self.refs, jax.lax.axis_index("warpgroup") - 1

        def block(j, state):
            sums, _, ahead = state
            place = before + j - first
            slot = jax.lax.rem(place, _SLOTS)
            plgpu.barrier_wait(refs.full.at[slot])
            plgpu.barrier_wait(refs.p_full)
            shrink, total = (plgpu.layout_cast(refs.stats[i], _OF_ROWS) for i in range(2))
            sums = _accumulate(sums * _wide(shrink, self.half), refs.weights, refs.ring.at[slot, mine])
            plgpu.barrier_arrive(refs.p_free)
            return sums, total, jax.lax.cond(j + 1 < stop, after, lambda _, ahead: ahead, place, ahead)

        def after(place, ahead):
            plgpu.commit_smem()  # all four warps have read what is written over now
            return self.refill(place + _SLOTS, ahead)

        zeros = plgpu.layout_cast(jnp.zeros((ROWS, self.half), jnp.float32), plgpu.Layout.WGMMA)
        sums, total, ahead = jax.lax.fori_loop(first, stop, block, (zeros, _of_rows(1), ahead))
        place = before + stop - 1 - first
        self.store(row, jax.lax.rem(place, _SLOTS), sums * _wide(inverse(total), self.half))
        return self.refill(place + _SLOTS, ahead)

    def store(self, row, slot, sums) -> None:
        """Through where the row's last block was."""
        mine, (tile, core) = jax.lax.axis_index("warpgroup") - 1, self.here
        target = self.refs.sums.at[tile, row + core, :, pl.ds(mine * self.half, self.half)]
        for start in range(0, self.half, self.columns):
            self.refs.stage[slot, mine] = sums[:, start : start + self.columns]
            plgpu.commit_smem()
            part = self.refs.stage.at[slot, mine, : self.tile_rows]
            plgpu.copy_smem_to_gmem(part, target.at[:, start : start + self.columns])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def refill(self, place, ahead):
        """Have this half of the core's block ``place`` copied to its slot. ahead: its row, its number there, and how
        many that row has -> those of the block after it."""
        slot = jax.lax.rem(place, _SLOTS)
        copied = functools.partial(self.copy, slot)
        return jax.lax.cond(place < self.plan(2), copied, lambda *ahead: ahead, *ahead)

    def copy(self, slot, row, j, stop):
        refs, mine = self.refs, jax.lax.axis_index("warpgroup") - 1
        keys, full = refs.entry.at[refs.layer[0] * self.batch + row, pl.ds(j * KEYS, KEYS)], refs.full.at[slot]
        plgpu.copy_gmem_to_smem(keys.at[:, pl.ds(mine * self.half, self.half)], refs.ring.at[slot, mine], full)
        pl.when(mine == 0)(lambda: plgpu.copy_gmem_to_smem(keys.at[:, self.values :], refs.rope.at[slot], full))
        same, following = j + 1 < stop, jnp.minimum(row + 1, self.batch - 1)
        stop = jax.lax.cond(same, lambda: stop, lambda: refs.blocks[following])
        return jnp.where(same, row, following), jnp.where(same, j + 1, 0), stop


def _wide(of_rows, columns: int):
    return jax.lax.broadcast_in_dim(of_rows, (ROWS, columns), [0])


def _of_rows(value: float):
    return plgpu.layout_cast(jnp.full((ROWS,), value, jnp.float32), _OF_ROWS)


def inverse(total):
    """Of a sum of weights; 0 where there was nothing to weigh."""
    return jnp.where(total > 0, 1 / total, 0.0)


def _accumulate(sums, a, b):
    """``sums + a @ b``. A function of its own, since Mosaic GPU's interpreter has no ``run_state``."""
    return pl.run_state(lambda acc: plgpu.wgmma(acc, a, b))(plgpu.WGMMAAccumulatorRef.init(sums))
