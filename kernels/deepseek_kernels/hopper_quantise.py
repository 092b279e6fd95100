"""Rows to FP8 on NVIDIA Hopper in Pallas' Mosaic GPU: read once, where XLA reads them for the scales and again.

A block takes 64 rows and streams them through shared memory 128 columns at a time.
"""

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jaxtyping import Array, Float

from deepseek_kernels.block_fp8 import BLOCK, E4M3_MAX, FP8
from deepseek_kernels.hopper_sizes import HOPPER, Sizes
from deepseek_kernels.hopper_tiles import swizzled

_ROWS = 64


def quantise_rows(
    x_TD: Float[Array, "T D"], *, sizes: Sizes = HOPPER["quantise"]
) -> tuple[Float[Array, "T D"], Float[Array, "K T"]]:
    """``block_fp8.quantise_rows``, to the bit. T is a multiple of 64."""
    T, D = x_TD.shape

    def kernel(x, values, scales, stored, numbers):
        rows = pl.ds(jax.lax.axis_index("rows") * _ROWS, _ROWS)

        def step(position, x):
            (k,) = position
            place = k % 2
            x_RB = plgpu.layout_cast(x[...], plgpu.Layout.WGMMA).astype(jnp.float32)
            largest_R = jnp.max(jnp.abs(x_RB), axis=1)
            scale_R = jnp.where(largest_R > 0, largest_R / E4M3_MAX, 1.0)
            scaled_RB = x_RB / jax.lax.broadcast_in_dim(scale_R, x_RB.shape, [0])
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)  # the step before last has left this place
            stored[place] = jnp.clip(scaled_RB, -E4M3_MAX, E4M3_MAX).astype(FP8)
            numbers[place] = scale_R
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(stored.at[place], values.at[rows, pl.ds(k * BLOCK, BLOCK)], commit_group=False)
            plgpu.copy_smem_to_gmem(numbers.at[place], scales.at[k, rows])

        plgpu.emit_pipeline(
            step,
            grid=(D // BLOCK,),
            in_specs=[plgpu.BlockSpec((_ROWS, BLOCK), lambda k: (0, k), transforms=swizzled(64, x_TD.dtype))],
            max_concurrent_steps=sizes.stages,
        )(x.at[rows])
        plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        kernel,
        out_type=(jax.ShapeDtypeStruct((T, D), FP8), jax.ShapeDtypeStruct((D // BLOCK, T), jnp.float32)),
        grid=(T // _ROWS,),
        grid_names=("rows",),
        scratch_types=[
            plgpu.SMEM((2, _ROWS, BLOCK), FP8, transforms=swizzled(BLOCK, FP8)),
            plgpu.SMEM((2, _ROWS), jnp.float32),
        ],
    )(x_TD)
