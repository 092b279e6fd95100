"""The products of hopper.py and hopper_few.py: tiles taken one after another, each a sum of products over steps. FP8
has a pipeline of its own (hopper_fp8.py), which takes from here how memory is swizzled.

One warp group streams both operands of the steps to shared memory, two multiply, each its part of the tile. As many
blocks as the GPU has processors take the tiles in turn.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from deepseek_kernels.hopper_sizes import CORES


def tiled(
    tile: Callable[..., tuple],
    product: Callable[..., tuple],
    steps_of: tuple[Any, Any],
    sums: tuple[int, int],
    out: jax.ShapeDtypeStruct,
    *,
    grid: tuple[int, ...],
    cores: int,
    stages: int,
    stored: int = 0,
    turned: bool = False,
    joined: Callable[..., jax.Array] | None = None,
) -> Callable[..., jax.Array]:
    """The kernel of ``(index, lhs, rhs) -> out``.

    Args:
      tile: ``(place in the grid, warp group, index, lhs, rhs, out)`` -> lhs' and rhs' part of all steps, this warp
        group's part of out and the number of steps, 0 for a tile of zeros. What sticks out of an array is read as zero
        and not written.
      product: ``(warp group, lhs, rhs)`` of a step -> what is multiplied; with ``joined`` for each of several sums.
      steps_of: the blocks of a step of lhs and rhs; of several parts of rhs a tuple, as ``tile`` and ``product`` have.
      sums: shape of a warp group's part of a tile.
      cores: of the target, 0 for an H100's.
      stages: steps in shared memory at once.
      stored: columns of the sums that are handed over at once.
      turned: the sums are handed over transposed, in one go.
      joined: of as many sums as rhs has parts, what is handed over.
    """
    block = _Block(product, steps_of, sums, out.dtype, grid, stages, stored, turned, joined)

    def kernel(index, lhs, rhs, out_ref):
        tiles = functools.partial(block.tiles, lambda *place: tile(*place, index, lhs, rhs, out_ref))
        pl.run_scoped(tiles, *block.scratch(lhs, rhs), collective_axes="warpgroup")
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    return three_warp_groups(kernel, out, cores, plgpu.LoweringSemantics.Warpgroup, approximate=joined is not None)


def three_warp_groups(
    kernel: Callable, out: Any, cores: int, semantics: plgpu.LoweringSemantics, *, approximate: bool = False
) -> Callable:
    """The kernel on each core: two warp groups that multiply and one that copies. out: its result's shape and dtype.
    cores: of the target, 0 for an H100's. approximate: functions such as exp to 2⁻²² only, in one instruction each."""
    return plgpu.kernel(
        kernel,
        out_type=out,
        grid=(cores or CORES,),
        grid_names=("block",),
        num_threads=3,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(lowering_semantics=semantics, approx_math=approximate),
    )


class _Block(NamedTuple):
    """What a block of threads does: its share of the tiles, one after another. The fields are ``tiled``'s; dtype: of
    the result."""

    product: Callable[..., tuple]
    steps_of: tuple[Any, Any]
    sums: tuple[int, int]
    dtype: Any
    grid: tuple[int, ...]
    stages: int
    stored: int
    turned: bool
    joined: Callable[..., jax.Array] | None

    def scratch(self, lhs, rhs) -> tuple:
        """Steps under way, each warp group's room for what it hands over, and a barrier that says a tile is summed."""
        handed = self.sums[::-1] if self.turned else (self.sums[0], self.stored)
        room = swizzled(min(handed[1], 128 // self.dtype.itemsize), self.dtype)
        rhs = (rhs,) * len(self.steps_of[1]) if self.joined else rhs
        return (
            self.pipeline(self.stages, lambda *_: None, lambda _: None).get_allocations(lhs, rhs),
            plgpu.SMEM((2, *handed), self.dtype, transforms=room),
            plgpu.Barrier(num_arrivals=2),
        )

    def pipeline(self, steps, multiply, compute):
        return plgpu.emit_pipeline_warp_specialized(
            multiply,
            grid=(steps,),
            in_specs=list(self.steps_of),
            max_concurrent_steps=self.stages,
            memory_registers=40,
            wg_axis="warpgroup",
            num_compute_wgs=2,
            compute_context=compute,
        )

    def tiles(self, tile, allocations, room, multiplied) -> None:
        warpgroup, several = jax.lax.axis_index("warpgroup"), len(self.steps_of[1]) if self.joined else 1

        def multiply(_, lhs, rhs, accs):
            products = self.product(warpgroup, lhs, rhs)
            for acc, operands in zip(accs, products if self.joined else [products], strict=True):
                plgpu.wgmma(acc, *operands)
            plgpu.wgmma_wait(several)  # for the step before, whose place in shared memory is released now
            return accs

        @plgpu.nd_loop(self.grid, collective_axes="block")
        def _(loop):
            lhs_part, rhs_part, out_part, steps = tile(loop.index, warpgroup)

            def compute(run):
                pl.run_scoped(functools.partial(store, run), *[plgpu.WGMMAAccumulatorRef(self.sums)] * several)

            def store(run, *accs):
                run(accs)
                values = [acc[...] for acc in accs]
                pl.when(steps > 0)(lambda: plgpu.barrier_arrive(multiplied))
                values = (self.joined(*values) if self.joined else values[0]).astype(self.dtype)
                width = self.sums[1] if self.turned else self.stored
                _hand_over(values, room.at[warpgroup], out_part, width, self.turned)

            self.pipeline(steps, multiply, compute)(lhs_part, rhs_part, allocations=allocations)

            @pl.when((warpgroup == 2) & (steps > 0))
            def _():  # the last step's place is not released: the next tile must not be streamed over it
                plgpu.barrier_wait(multiplied)


def step(block: tuple[int, int], terms_first: bool) -> plgpu.BlockSpec:
    """Block of one step of a bfloat16 operand whose terms lie along the first or the second axis."""
    where = (lambda k: (k, 0)) if terms_first else (lambda k: (0, k))
    return plgpu.BlockSpec(block, where, transforms=swizzled(64, jnp.bfloat16), delay_release=1)


def _hand_over(values, room, out_part, width: int, turned: bool) -> None:
    """A warp group's sums to memory, ``width`` columns at a time by way of its ``room``."""
    for first in range(0, values.shape[1], width):
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        if turned:
            turned_room = room.transpose((1, 0))
            turned_room[...] = plgpu.layout_cast(values, plgpu.Layout.WGMMA_TRANSPOSED)
        else:
            room[...] = values[:, first : first + width]
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(room, out_part if turned else out_part.at[:, first : first + width])


def swizzled(columns: int, dtype: Any) -> tuple[Any, Any]:
    """Rows of 128 bytes or less, in tiles of 8: what products read and copies write without two lanes in one bank."""
    return plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(columns * jnp.dtype(dtype).itemsize)
