"""RMSNorm of few rows on NVIDIA Hopper: one kernel, where XLA takes one for the sum and one for the rest."""

import functools
import math
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jaxtyping import Array, Float

from deepseek_kernels import hopper_sizes
from deepseek_kernels.target import Target

_ROWS = 64  # at most
_THREADS = 128


def refuses(target: Target, dtype: Any, *, rows: int = 1, width: int = _THREADS, devices: int = 1) -> str:
    """Why ``normalise`` cannot run; "" where it can."""
    if why := hopper_sizes.refuses(target, dtype):
        return why
    if rows > _ROWS or width % _THREADS:
        return f"it needs {_ROWS} rows at most, of a multiple of {_THREADS} numbers, not {rows} of {width}"
    return "" if devices == 1 else f"it needs one device, not {devices}"


@functools.partial(jax.jit, static_argnames="eps")  # lowered once for all layers
def normalise(x_TD: Float[Array, "T D"], gain_LD: Float[Array, "L D"], layer: Any, eps: float) -> Float[Array, "T D"]:
    """``x / sqrt(mean(x²) + eps) · gain[layer]`` in float32, rounded once."""
    rows, width = x_TD.shape
    layout = plgpu.Layout.WG_STRIDED((width,), vec_size=math.gcd(width // _THREADS, 8))

    def kernel(layer, x, gain, out):
        row = jax.lax.axis_index("row")
        # Each is loaded in the layout that its cast asks for, as that comes next.
        x_D = plgpu.layout_cast(x[row], layout).astype(jnp.float32)
        gain_D = plgpu.layout_cast(gain[layer[0]], layout).astype(jnp.float32)
        scale = jax.lax.rsqrt(jnp.sum(x_D * x_D) / width + eps)
        out[row] = (x_D * scale * gain_D).astype(out.dtype)

    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct(x_TD.shape, x_TD.dtype),
        grid=(rows,),
        grid_names=("row",),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
    )(jnp.asarray(layer, jnp.int32).reshape(1), x_TD, gain_LD)
