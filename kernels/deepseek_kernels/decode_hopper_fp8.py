"""The kernel of decode_hopper_parts.py over an FP8 cache: blocks come as they are and are brought to bfloat16 in the core.

A product takes values in FP8 with the keys along rows alone, which they are not, and so needs them as bfloat16. The two
warp groups that multiply convert their half of a block each, 128 columns after another, which the first one scores as
soon as they are there. There is one place for a converted block, and two for those on their way, half as large.
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
_COLUMNS = 64  # converted at a time: with sums in 128 registers there are some 30 for them


class FP8Core(Core):
    """cache: values, scales, rope. more: of each slot the values and scales as they came; for each 128 columns of either
    half whether they have been converted."""

    RING: ClassVar[int] = 1
    COPIES: ClassVar[int] = 4

    @classmethod
    def scratch(cls, width: int, values: int, dtype: Any) -> tuple[Any, ...]:
        return (
            *super().scratch(width, values, dtype),
            plgpu.SMEM((SLOTS, 2, KEYS, values // 2), FP8, transforms=swizzled(_COLUMNS, FP8)),
            plgpu.SMEM((SLOTS, values // BLOCK, KEYS), jnp.bfloat16),
            plgpu.Barrier(num_arrivals=2, num_barriers=values // 2 // BLOCK),
        )

    def scores(self, slot):
        refs, (*_, converted) = self.refs, self.refs.more
        plgpu.barrier_wait(refs.full.at[slot])

        def product(acc):
            plgpu.wgmma(acc, refs.queries.at[:, self.values :], refs.rope.at[slot].transpose((1, 0)))
            for k in range(self.half // BLOCK):
                plgpu.barrier_wait(converted.at[k])
                for i in range(2):
                    columns = refs.queries.at[:, i * self.half + k * BLOCK : i * self.half + (k + 1) * BLOCK]
                    part = refs.ring.at[0, i, :, k * BLOCK : (k + 1) * BLOCK]
                    plgpu.wgmma(acc, columns, part.transpose((1, 0)))
            return acc[...]

        return pl.run_scoped(product, plgpu.WGMMAAccumulatorRef((ROWS, KEYS)))

    def multiply_block(self, place, slot, more, state):
        sums, _, ahead = state
        plgpu.barrier_wait(self.refs.full.at[slot])
        self.convert(slot)
        plgpu.barrier_wait(self.refs.p_full)
        ahead = self.refill(place + SLOTS, ahead)  # all of the slot, rotated keys too, has been read
        sums, total = self.add(sums, 0)
        plgpu.commit_smem()  # all four warps have read what the next block is written over
        return sums, total, ahead

    def end_row(self, last, ahead):
        return ahead

    def convert(self, slot) -> None:
        """This half of a block to bfloat16."""
        refs, mine, (raw, scales, converted) = self.refs, jax.lax.axis_index("warpgroup") - 1, self.refs.more
        for k in range(self.half // BLOCK):
            scale = plgpu.load(scales.at[slot, mine * (self.half // BLOCK) + k], layout=_BYTES.reduce(1))
            for start in range(k * BLOCK, (k + 1) * BLOCK, _COLUMNS):
                columns = slice(start, start + _COLUMNS)
                numbers = plgpu.load(raw.at[slot, mine, :, columns], layout=_BYTES).astype(jnp.float32)
                wide = jax.lax.broadcast_in_dim(scale.astype(jnp.float32), numbers.shape, [0])
                refs.ring[0, mine, :, columns] = (numbers * plgpu.layout_cast(wide, _BYTES)).astype(refs.ring.dtype)
            plgpu.commit_smem()
            plgpu.barrier_arrive(converted.at[k])

    def copy(self, slot, page, tokens) -> None:
        refs, mine, (raw, scales, _) = self.refs, jax.lax.axis_index("warpgroup") - 1, self.refs.more
        (values, of_groups, rope), full = refs.cache, refs.full.at[slot]
        half = values.at[page, tokens, pl.ds(mine * self.half, self.half)]
        plgpu.copy_gmem_to_smem(half, raw.at[slot, mine], full)

        @pl.when(mine == 0)
        def _():
            plgpu.copy_gmem_to_smem(rope.at[page, tokens], refs.rope.at[slot], full)
            plgpu.copy_gmem_to_smem(of_groups.at[page, :, tokens], scales.at[slot], full)
