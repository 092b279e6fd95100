"""The experts' gate, backward, on NVIDIA Hopper in Pallas' Mosaic GPU: one pass over its rows, at the memory's speed.

XLA takes three: one for the weights' gradients, which are sums along rows, one that makes dh float32, and one for the
gate's. A block takes 64 rows and streams them through shared memory 64 columns at a time.
"""

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jaxtyping import Array, Float

from deepseek_kernels.hopper_sizes import HOPPER, Sizes

_ROWS = _COLUMNS = 64  # of a tile: a row of 128 bytes


def takes(rows: int, hidden: int) -> bool:
    """Whether rows (rows, 2, hidden) are whole tiles."""
    return rows % _ROWS == 0 and hidden % _COLUMNS == 0


def gate_backward(
    gate_up_P2F: Float[Array, "P 2 F"],
    weight_P: Float[Array, "P"],
    dh_PF: Float[Array, "P F"],
    *,
    sizes: Sizes = HOPPER["gate"],
) -> tuple[Float[Array, "P 2 F"], Float[Array, "P"]]:
    """The gradients of ``weight · silu(gate) · up`` in gate and up, and in weight; P and F are multiples of 64."""
    P, _, F = gate_up_P2F.shape
    steps, swizzled = F // _COLUMNS, (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))

    def part(first):
        return plgpu.BlockSpec((_ROWS, _COLUMNS), lambda j: (0, first + j), transforms=swizzled)

    def kernel(gate_up, weight, dh, dgate_up, dweight, stored, numbers, arrived):
        rows = pl.ds(jax.lax.axis_index("rows") * _ROWS, _ROWS)
        plgpu.copy_gmem_to_smem(weight.at[rows], numbers, arrived)
        plgpu.barrier_wait(arrived)
        weight_R = plgpu.layout_cast(numbers[...], plgpu.Layout.WGMMA.reduce(1))
        weight_RC = jax.lax.broadcast_in_dim(weight_R, (_ROWS, _COLUMNS), [0])

        def tile(position, gate, up, dh, sum_R):
            (j,) = position
            gate, up, dh = (plgpu.layout_cast(a[...], plgpu.Layout.WGMMA).astype(jnp.float32) for a in (gate, up, dh))
            s = 1 / (1 + jnp.exp(-gate))
            silu = gate * s
            sum_R += jnp.sum(dh * silu * up, axis=1)
            dh = dh * weight_RC
            place = stored.at[j % 2]
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)  # the step before last has left this place
            place[0] = (dh * up * (s + silu * (1 - s))).astype(stored.dtype)
            place[1] = (dh * silu).astype(stored.dtype)
            plgpu.commit_smem()
            for half in range(2):
                columns = pl.ds(half * F + j * _COLUMNS, _COLUMNS)
                plgpu.copy_smem_to_gmem(place.at[half], dgate_up.at[rows, columns], commit_group=half == 1)
            return sum_R

        pipeline = plgpu.emit_pipeline(
            tile,
            grid=(steps,),
            in_specs=[part(0), part(steps), part(0)],
            max_concurrent_steps=min(sizes.stages, steps),
            init_carry=plgpu.layout_cast(jnp.zeros(_ROWS, jnp.float32), plgpu.Layout.WGMMA.reduce(1)),
        )
        numbers[...] = pipeline(gate_up.at[rows], gate_up.at[rows], dh.at[rows])
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(numbers, dweight.at[rows])
        plgpu.wait_smem_to_gmem(0)

    dtype = gate_up_P2F.dtype
    dgate_up_PG, dweight_P = plgpu.kernel(
        kernel,
        out_type=(jax.ShapeDtypeStruct((P, 2 * F), dtype), jax.ShapeDtypeStruct((P,), jnp.float32)),
        grid=(P // _ROWS,),
        grid_names=("rows",),
        scratch_types=[
            plgpu.SMEM((2, 2, _ROWS, _COLUMNS), dtype, transforms=swizzled),
            plgpu.SMEM((_ROWS,), jnp.float32),
            plgpu.Barrier(),
        ],
    )(gate_up_P2F.reshape(P, 2 * F), weight_P, dh_PF)
    return dgate_up_PG.reshape(P, 2, F), dweight_P
