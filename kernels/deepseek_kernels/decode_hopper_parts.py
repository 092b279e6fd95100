"""The kernel of decode_hopper.py that reads the cache: each core's share of the blocks of keys.

In a core three warp groups share two blocks in shared memory: one turns a block's keys into softmax weights while the
others multiply the weights of the block before with its values, half of the width each, and hold the sums. Who has
read its half of a block last has the next block copied there. With an FP8 cache some differs: decode_hopper_fp8.py.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from deepseek_kernels.hopper_tiles import swizzled

ROWS = 64  # of a tile of queries: what one product of a warp group takes
KEYS = 64  # of a block; 32, four at once, read long rows 5 % slower and multiply for 128 heads at 0.7 of the speed
LOWEST = -1e30  # in place of -inf: the exponential of a difference of two is never NaN
# Every store to shared memory is followed by a barrier, so that none needs to be added.
PARAMS = {"lowering_semantics": plgpu.LoweringSemantics.Lane, "unsafe_no_auto_barriers": True}
SLOTS = 2  # blocks on their way or in shared memory: 144 KiB, beside 72 KiB of queries and 8 KiB of weights
_OF_ROWS = plgpu.Layout.WGMMA.reduce(1)


class _Refs(NamedTuple):
    """What the first kernel reads and writes, then what it keeps in shared memory.

    rows: of each query the number of keys that it sees, and the factor of its scores, to base 2. stats: of each query
    the factor of older sums, the sum, and both of ``rows``; where the first of these was, the sum's logarithm goes out.
    stage: where half a block was, as float32 columns of all queries. full, q_full: a block, the queries are there;
    p_full, p_free: weights are there, have been multiplied. q, cache, more: an array each and nothing, or what FP8 has.
    """

    core: Any
    blocks: Any
    table: Any
    layer: Any
    rows: Any
    q: Any
    cache: Any
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
    more: Any


def parts(
    kind: type["Core"],
    core_C5: Int[Array, "C 5"],
    blocks_B: Int[Array, "B"],
    table_BJ: Int[Array, "B J"],
    layer: Int[Array, "1"],
    rows_B2R: Float[Array, "B 2 _"],
    q: list[Float[Array, "B R _"]],
    cache: list[jax.Array],
    values: int,
    pages: int,
) -> tuple[Float[Array, "I P _ V"], Float[Array, "I P _"]]:
    """The parts of all rows, for each tile I of queries: sums, normalised, and logarithms to base 2 of what they were
    divided by. core_C5, blocks_B: the plan. rows_B2R: as in ``_Refs``, of whole tiles. q, cache: what ``kind`` reads,
    the cache a stack of layers of ``pages`` each, one after another; table_BJ: the rows' pages."""
    (B, rows, _), cores = q[0].shape, len(core_C5)
    tiles, tile_rows = pl.cdiv(rows, ROWS), min(rows, ROWS)

    def kernel(*refs):
        scratch = kind.scratch(sum(part.shape[2] for part in q), values)
        pl.run_scoped(functools.partial(run, refs), *scratch, collective_axes="warpgroup")

    def run(refs, queries, union, *rest):
        plan, arrays, out = refs[:5], refs[5:-2], refs[-2:]
        arrays = arrays[: len(q)], arrays[len(q) :]
        refs = _Refs._make([*plan, *arrays, *out, queries, *union, *rest[:7], rest[7:]])
        core = kind(refs, B, pages, pl.cdiv(cache[0].shape[1], KEYS), values, tile_rows)
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
    )(core_C5, blocks_B, table_BJ, layer, rows_B2R, *q, *cache)


@dataclasses.dataclass(frozen=True)
class Core:
    """What a core does for a tile of queries. pages: of a layer; blocks: of a page.

    DTYPE: of what is multiplied. RING: blocks in that form. COPIES: that bring a block, and queries."""

    refs: _Refs
    batch: int
    pages: int
    blocks: int
    values: int
    tile_rows: int
    DTYPE: ClassVar[Any] = jnp.bfloat16
    RING: ClassVar[int] = SLOTS
    COPIES: ClassVar[tuple[int, int]] = 3, 2

    @staticmethod
    def queries(q_BRW: Float[Array, "B R W"], values: int) -> tuple[list[jax.Array], Any]:
        """What the kernel reads of them, and by what scores are to be multiplied for that (B R)."""
        return [q_BRW], jnp.float32(1)

    @classmethod
    def scratch(cls, width: int, values: int) -> tuple[Any, ...]:
        """Shared memory and barriers, from ``_Refs.queries`` on. width: of queries."""
        half, tiled = values // 2, swizzled(64, cls.DTYPE)
        columns = plgpu.SMEM((cls.RING, 2, ROWS, cls.columns(half)), jnp.float32, transforms=swizzled(32, jnp.float32))
        return (
            plgpu.SMEM((ROWS, width), cls.DTYPE, transforms=tiled),
            plgpu.RefUnion(plgpu.SMEM((cls.RING, 2, KEYS, half), cls.DTYPE, transforms=tiled), columns),
            plgpu.SMEM((SLOTS, KEYS, 64), jnp.bfloat16, transforms=tiled),
            plgpu.SMEM((ROWS, KEYS), cls.DTYPE, transforms=tiled),
            plgpu.SMEM((4, ROWS), jnp.float32),
            plgpu.Barrier(num_arrivals=cls.COPIES[0], num_barriers=SLOTS),
            *(plgpu.Barrier(num_arrivals=number) for number in (cls.COPIES[1], 1, 2)),
        )

    @staticmethod
    def columns(half: int) -> int:
        """Of the stage."""
        return KEYS * half // (2 * ROWS)

    @property
    def half(self) -> int:
        return self.values // 2

    @property
    def here(self):
        """(tile, core)"""
        return jax.lax.axis_index("tile"), jax.lax.axis_index("core")

    def plan(self, i: int):
        return self.refs.core[self.here[1], i]

    def page(self, row, j):
        """Where the row's block ``j`` is: the page."""
        return self.refs.table[row, jax.lax.div(j, jnp.int32(self.blocks))]

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
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the row before has left its logarithms' place
        self.copy_queries(row, pl.ds(tile * ROWS, self.tile_rows))
        plgpu.copy_gmem_to_smem(refs.rows.at[row, :, pl.ds(tile * ROWS, ROWS)], refs.stats.at[2:4], refs.q_full)
        plgpu.barrier_wait(refs.q_full)
        limit, factor = (plgpu.layout_cast(refs.stats[i], _OF_ROWS) for i in (2, 3))
        limit = limit.astype(jnp.int32)

        def block(j, state):
            place = before + j - first
            scores = self.scores(place, jax.lax.rem(place, SLOTS))
            column = plgpu.broadcasted_iota(jnp.int32, scores.shape, 1, layout=plgpu.Layout.WGMMA)
            scores = jnp.where(column + j * KEYS < _wide(limit, KEYS), scores, -jnp.inf)
            top, total = state
            higher = jnp.maximum(top, jnp.max(scores, axis=1) * factor)
            shrink, p = jnp.exp2(top - higher), jnp.exp2(scores * _wide(factor, KEYS) - _wide(higher, KEYS))
            total = total * shrink + jnp.sum(p, axis=1)
            self.multiplied(place)
            refs.weights[...], refs.stats[0], refs.stats[1] = p.astype(refs.weights.dtype), shrink, total
            plgpu.commit_smem()
            plgpu.barrier_arrive(refs.p_full)
            return higher, total

        top, total = jax.lax.fori_loop(first, stop, block, (_of_rows(LOWEST), _of_rows(0)))
        refs.stats[2] = top + jnp.log(total) * math.log2(math.e)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(refs.stats.at[2], refs.logs.at[tile, row + core])
        return carry

    def copy_queries(self, row, mine) -> None:
        refs = self.refs
        plgpu.copy_gmem_to_smem(refs.q[0].at[row, mine], refs.queries.at[: self.tile_rows], refs.q_full)

    def multiplied(self, place) -> None:
        """Wait until the weights of the block before may be written over."""
        pl.when(place > 0)(lambda: plgpu.barrier_wait(self.refs.p_free))

    def scores(self, place, slot):
        """(queries, keys) of the core's block ``place``, in ``slot``, not scaled."""
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
        ahead = self.plan(0), self.plan(1), self.plan(4), self.page(self.plan(0), self.plan(1))
        for place in range(SLOTS):
            ahead = self.refill(jnp.int32(place), ahead)
        self.each_row(self.multiply_row, ahead)

    def multiply_row(self, row, first, stop, before, ahead):
        def block(j, state):
            place = before + j - first
            return self.multiply_block(place, jax.lax.rem(place, SLOTS), j + 1 < stop, state)

        zeros = plgpu.layout_cast(jnp.zeros((ROWS, self.half), jnp.float32), plgpu.Layout.WGMMA)
        sums, total, ahead = jax.lax.fori_loop(first, stop, block, (zeros, _of_rows(1), ahead))
        last = before + stop - 1 - first
        plgpu.commit_smem()  # all four warps have read what the sums are written over
        self.store(row, jax.lax.rem(last, self.RING), sums * _wide(inverse(total), self.half))
        return self.end_row(last, ahead)

    def multiply_block(self, place, slot, more, state):
        """more: whether the row has another one. state: sums, the sum of weights, ``refill``'s ahead."""
        refs, (sums, _, ahead) = self.refs, state
        plgpu.barrier_wait(refs.full.at[slot])
        plgpu.barrier_wait(refs.p_full)
        sums, total = self.add(sums, slot)
        plgpu.barrier_arrive(refs.p_free)

        def after(ahead):
            plgpu.commit_smem()  # all four warps have read what is written over now
            return self.refill(place + SLOTS, ahead)

        return sums, total, jax.lax.cond(more, after, lambda ahead: ahead, ahead)

    def end_row(self, last, ahead):
        """last: the row's last block, whose slot the row's sums have left by now."""
        return self.refill(last + SLOTS, ahead)

    def add(self, sums, slot):
        """One block's values, weighted, and the sum of all weights."""
        refs, mine = self.refs, jax.lax.axis_index("warpgroup") - 1
        shrink, total = (plgpu.layout_cast(refs.stats[i], _OF_ROWS) for i in range(2))
        return _accumulate(sums * _wide(shrink, self.half), refs.weights, refs.ring.at[slot, mine]), total

    def store(self, row, slot, sums) -> None:
        """Through where the row's last block was."""
        mine, (tile, core), width = jax.lax.axis_index("warpgroup") - 1, self.here, self.columns(self.half)
        target = self.refs.sums.at[tile, row + core, :, pl.ds(mine * self.half, self.half)]
        for start in range(0, self.half, width):
            self.refs.stage[slot, mine] = sums[:, start : start + width]
            plgpu.commit_smem()
            part = self.refs.stage.at[slot, mine, : self.tile_rows]
            plgpu.copy_smem_to_gmem(part, target.at[:, start : start + width])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def refill(self, place, ahead):
        """Have this half of the core's block ``place`` copied to its slot. ahead: its row, its number there, how many
        that row has, its page -> those of the block after it: a page's number is there before it is needed."""
        copied = functools.partial(self.copy_and_go_on, jax.lax.rem(place, SLOTS))
        return jax.lax.cond(place < self.plan(2), copied, lambda *ahead: ahead, *ahead)

    def copy_and_go_on(self, slot, row, j, stop, page):
        start = pl.multiple_of(jax.lax.rem(j, jnp.int32(self.blocks)) * KEYS, KEYS)
        self.copy(slot, self.refs.layer[0] * self.pages + page, pl.ds(start, KEYS))
        same, following = j + 1 < stop, jnp.minimum(row + 1, self.batch - 1)
        stop = jax.lax.cond(same, lambda: stop, lambda: self.refs.blocks[following])
        row, j = jnp.where(same, row, following), jnp.where(same, j + 1, 0)
        return row, j, stop, self.page(row, j)

    def copy(self, slot, page, tokens) -> None:
        refs, mine = self.refs, jax.lax.axis_index("warpgroup") - 1
        keys, full = refs.cache[0].at[page, tokens], refs.full.at[slot]
        plgpu.copy_gmem_to_smem(keys.at[:, pl.ds(mine * self.half, self.half)], refs.ring.at[slot, mine], full)
        pl.when(mine == 0)(lambda: plgpu.copy_gmem_to_smem(keys.at[:, self.values :], refs.rope.at[slot], full))


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
