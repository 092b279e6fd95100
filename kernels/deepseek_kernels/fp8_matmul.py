"""Products with a weight that stays in FP8, or in integers: no copy of it in another dtype is made.

``hopper`` multiplies bfloat16 rows with the weight's numbers, exact but for the result's rounding. ``hopper_fp8``
brings the rows to FP8 as well, one scale for 128 numbers, as DeepSeek-V3 is served: nearly twice as fast for many rows,
and 2.5 % of the result's norm off for normal numbers, so it must be named. ``reference`` computes the same anywhere.
Integers have ``hopper`` too, ``c`` on a CPU, and with ``dequantised`` a part of their numbers at a time in x's dtype.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from deepseek_kernels.block_fp8 import BLOCK, quantise_rows, split_shape
from deepseek_kernels.fp8_on_hopper import facts, multiply
from deepseek_kernels.integers import dequantised_product, grouped_c, in_integers
from deepseek_kernels.registry import choose
from deepseek_kernels.target import Target, devices
from deepseek_kernels.weights import Weight, block_scaled


def fp8_matmul(
    x: Float[Array, "*B D"], w: Weight, *, target: Target | None = None, implementation: str = "auto"
) -> Float[Array, "*B F"]:
    """``y = x W`` in x's dtype with float32 sums. The weight has no gradient; x's is as if nothing were rounded.

    Args:
      w: a BlockScaled in FP8 or integers, or a layer of a stack (InStack), whose first group of axes is D in all; what
        follows is F. The kernels read ``with_terms_last()``; any other is transposed in every call, as it is stored.
      implementation: ``hopper``, ``hopper_fp8``, ``c``, ``dequantised`` or ``reference``.

    Raises:
      ValueError: a weight that is in neither or does not fit, or an implementation that cannot run.
    """
    scaled = block_scaled(w)
    if scaled is None or len(split_shape(tuple(w.shape), scaled.groups)[0]):
        raise ValueError(f"w {tuple(w.shape)} of {w.dtype}: expected an FP8 weight with scales, its first axes D")
    depth = math.prod(w.shape[: scaled.groups[0][0]])
    if x.shape[-1] != depth:
        raise ValueError(f"x {x.shape} and w {tuple(w.shape)}: expected (…, {depth})")
    target = target or Target.here()
    rows = math.prod(x.shape[:-1])
    name = choose("fp8_matmul", target, x.dtype, implementation=implementation, rows=rows, **facts(w)).name
    y_TF: Any = _matmul(x.reshape(-1, depth), w, name, target.cores)
    return y_TF.reshape(*x.shape[:-1], -1)


def _dense(x_TD, w, name, cores):
    if name == "c":
        return grouped_c(x_TD, w, jnp.array([len(x_TD)]))
    if name == "dequantised" and in_integers(block_scaled(w)) and devices() == 1:
        return dequantised_product(x_TD, w)
    if name == "dequantised":
        return x_TD @ w.astype(x_TD.dtype).reshape(x_TD.shape[1], -1)
    if name == "reference":
        return reference(x_TD, w)
    if not (rows := len(x_TD)):
        return jnp.zeros((0, math.prod(w.shape) // x_TD.shape[1]), x_TD.dtype)
    # The weight is read once for each tile of rows.
    tile = next((tile for tile in (16, 32, 64) if rows <= tile), BLOCK)
    padded = jnp.pad(x_TD, ((0, -rows % tile), (0, 0)))
    group_N = jnp.zeros(len(padded) // tile, jnp.int32)
    return multiply(padded, w, group_N, cores=cores, quantised=name == "hopper_fp8")[:rows]


def reference(x_TD: Float[Array, "T D"], w: Weight) -> Float[Array, "T F"]:
    """``Σ_k s[t, k] (x8[t, k] @ W8[k]) scale[k]`` over blocks k of 128 terms with rows in FP8, all sums in float32."""
    x8_TD, scale_KT = quantise_rows(x_TD)
    x_TD32 = x8_TD.astype(jnp.float32) * jnp.repeat(scale_KT.T, BLOCK, axis=1)
    w_DF = w.astype(jnp.float32).reshape(x_TD.shape[1], -1)
    return jnp.matmul(x_TD32, w_DF, precision="highest").astype(x_TD.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _matmul(x_TD, w, name, cores):
    return _dense(x_TD, w, name, cores)


def _forward(x_TD, w, name, cores):
    return _matmul(x_TD, w, name, cores), w


def _backward(name, cores, w, dy_TF):
    return dy_TF @ w.astype(dy_TF.dtype).reshape(-1, dy_TF.shape[1]).T, None


_matmul.defvjp(_forward, _backward)
