"""The kernel of decode_hopper_parts.py over an FP8 cache: blocks come as they are and are converted in the core.

A product takes FP8 with its terms along rows alone, which values do not have, and to bfloat16 there is no conversion in
one instruction: hence float16, which holds ``value · scale`` exactly (cached.py keeps scales in the range for that).
Each query is brought to its range by a power of two, which its scores make good. The rotated part stays bfloat16.

Each of the groups that multiply converts the first half of its columns, the one that scores the rest of both; it scores
128 columns of either half at a time. (One barrier for all columns would do; ptxas then spills twice as many registers.)
There is one place for a converted block, and two for those on their way, half as large.
"""

from typing import Any, ClassVar

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from deepseek_kernels.block_fp8 import BLOCK, FP8
from deepseek_kernels.decode_hopper_parts import KEYS, ROWS, SLOTS, Core
from deepseek_kernels.hopper_tiles import swizzled

_BYTES = plgpu.Layout.WGMMA_UPCAST_2X  # four numbers of a row at a time
_COLUMNS = 64  # converted at a time


class FP8Core(Core):
    """q: the latents' part, float16, and the rotated one. cache: values, scales, rope. more: of each slot the values
    and scales as they came; the queries' rotated part; whether each 128 columns of the halves are converted, whether
    the block has been scored."""

    DTYPE: ClassVar[Any] = jnp.float16
    RING: ClassVar[int] = 1
    COPIES: ClassVar[tuple[int, int]] = 4, 3

    @staticmethod
    def queries(q_BRW, values):
        q_BRW = q_BRW.astype(jnp.float32)
        _, exponent_BR = jnp.frexp(jnp.max(jnp.abs(q_BRW), axis=-1))
        exponent_BR = jnp.maximum(exponent_BR, -64)  # below it scores are nothing, and the factor must not be
        q_BRW = jnp.ldexp(q_BRW, (15 - exponent_BR)[..., None])  # the largest number is 2¹⁴ to 2¹⁵
        q = [q_BRW[..., :values].astype(jnp.float16), q_BRW[..., values:].astype(jnp.bfloat16)]
        return q, jnp.ldexp(jnp.float32(1), exponent_BR - 15)

    @classmethod
    def scratch(cls, width: int, values: int) -> tuple[Any, ...]:
        return (
            *super().scratch(values, values),
            plgpu.SMEM((SLOTS, 2, KEYS, values // 2), FP8, transforms=swizzled(_COLUMNS, FP8)),
            plgpu.SMEM((SLOTS, values // BLOCK, KEYS), jnp.bfloat16),
            plgpu.SMEM((ROWS, width - values), jnp.bfloat16, transforms=swizzled(64, jnp.bfloat16)),
            plgpu.Barrier(num_arrivals=2, num_barriers=values // 2 // BLOCK),
            plgpu.Barrier(num_arrivals=1),
        )

    def copy_queries(self, row, mine) -> None:
        refs, rope = self.refs, self.refs.more[2]
        super().copy_queries(row, mine)
        plgpu.copy_gmem_to_smem(refs.q[1].at[row, mine], rope.at[: self.tile_rows], refs.q_full)

    def scores(self, place, slot):
        refs, (_, _, rope, converted, scored) = self.refs, self.refs.more
        super().multiplied(place)
        plgpu.barrier_wait(refs.full.at[slot])
        for half in range(2):
            self.convert(slot, half, self.half // 2, self.half)
        plgpu.commit_smem()

        def product(acc):
            plgpu.wgmma(acc, rope, refs.rope.at[slot].transpose((1, 0)))
            for k in range(self.half // BLOCK):
                plgpu.barrier_wait(converted.at[k])
                for half in range(2):
                    columns = refs.queries.at[:, half * self.half + k * BLOCK : half * self.half + (k + 1) * BLOCK]
                    part = refs.ring.at[0, half, :, k * BLOCK : (k + 1) * BLOCK]
                    plgpu.wgmma(acc, columns, part.transpose((1, 0)))
            return acc[...]

        scores = pl.run_scoped(product, plgpu.WGMMAAccumulatorRef((ROWS, KEYS)))
        plgpu.barrier_arrive(scored)
        return scores

    def multiplied(self, place) -> None:
        """``scores`` has waited."""

    def multiply_block(self, place, slot, more, state):
        refs, (sums, _, ahead), mine = self.refs, state, jax.lax.axis_index("warpgroup") - 1
        plgpu.barrier_wait(refs.full.at[slot])
        for k in range(self.half // BLOCK):
            self.convert(slot, mine, k * BLOCK, min((k + 1) * BLOCK, self.half // 2))
            plgpu.commit_smem()
            plgpu.barrier_arrive(refs.more[3].at[k])
        plgpu.barrier_wait(refs.more[4])
        ahead = self.refill(place + SLOTS, ahead)  # all of the slot, rotated keys too, has been read
        plgpu.barrier_wait(refs.p_full)
        sums, total = self.add(sums, 0)
        plgpu.commit_smem()  # all four warps have read what is written over now
        pl.when(more)(lambda: plgpu.barrier_arrive(refs.p_free))
        return sums, total, ahead

    def end_row(self, last, ahead):
        plgpu.barrier_arrive(self.refs.p_free)  # the row's sums, too, have left the place of the block
        return ahead

    def convert(self, slot, half, start: int, stop: int) -> None:
        """Columns of a half of a block to float16."""
        (raw, scales, *_), ring = self.refs.more, self.refs.ring
        for first in range(start, stop, _COLUMNS):
            columns = slice(first, first + _COLUMNS)
            numbers = plgpu.layout_cast(raw[slot, half, :, columns], _BYTES).astype(jnp.float16)
            scale = scales[slot, half * (self.half // BLOCK) + first // BLOCK]
            scale = plgpu.layout_cast(scale, _BYTES.reduce(1))
            scale = jax.lax.broadcast_in_dim(scale.astype(jnp.float32).astype(jnp.float16), numbers.shape, [0])
            ring[0, half, :, columns] = numbers * plgpu.layout_cast(scale, _BYTES)

    def copy(self, slot, page, tokens) -> None:
        refs, mine, (raw, scales) = self.refs, jax.lax.axis_index("warpgroup") - 1, self.refs.more[:2]
        (values, of_groups, rope), full = refs.cache, refs.full.at[slot]
        half = values.at[page, tokens, pl.ds(mine * self.half, self.half)]
        plgpu.copy_gmem_to_smem(half, raw.at[slot, mine], full)

        @pl.when(mine == 0)
        def _():
            plgpu.copy_gmem_to_smem(rope.at[page, tokens], refs.rope.at[slot], full)
            plgpu.copy_gmem_to_smem(of_groups.at[page, :, tokens], scales.at[slot], full)
