"""The smallest modules: parameters with named axes, a linear map, a norm, a gated feed-forward."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from deepseek_jax.compute import ComputeConfig
from deepseek_jax.config import ModelConfig
from deepseek_jax.model.fresh import Source, Together
from deepseek_jax.parallel.sharding import per_rows
from deepseek_kernels import InStack, product
from deepseek_kernels.norm import rms_norm
from deepseek_kernels.weights import Weight


class RouterBias(nnx.Variable):
    """The routing bias of auxiliary-loss-free balancing: moved by a rule, never by a gradient."""


def param(
    config: ModelConfig, compute: ComputeConfig, rngs: Source, shape: tuple[int, ...], axes: tuple[str | None, ...]
) -> nnx.Param:
    """A weight drawn from N(0, initializer_range²), as all of V3's are, with its logical axes as metadata."""
    assert len(shape) == len(axes)
    if isinstance(rngs, Together):
        return nnx.Param(rngs.pending(shape, config.initializer_range, compute.param_dtype), axes=axes)
    value = config.initializer_range * jax.random.normal(rngs.params(), shape, jnp.float32)
    return nnx.Param(value.astype(compute.param_dtype), axes=axes)


def zeros(compute: ComputeConfig, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> nnx.Param:
    """A bias that begins at zero."""
    return nnx.Param(jnp.zeros(shape, compute.param_dtype), axes=axes)


def biased(y: Float[Array, "*B O"], b: Weight) -> Float[Array, "*B O"]:
    """``y + b`` in y's dtype, added in float32: so b's gradient, a sum over all rows, is never rounded to less."""
    return (y.astype(jnp.float32) + b.astype(jnp.float32)).astype(y.dtype)


def multiply(equation: str, x: Float[Array, "B *S"], w: Weight, compute: ComputeConfig) -> Float[Array, "B *O"]:
    """``product`` with a weight of the network. Where decoding has stacks and a mesh splits the rows alone, a device
    multiplies its own: the kernels that read a layer where it lies are for one device."""
    run = functools.partial(product, equation, target=compute.kernels, fp8=compute.fp8_matmul)
    y: jax.Array = per_rows(run, compute.rules, x, w) if isinstance(w, InStack) else run(x, w)
    return y


class Linear(nnx.Module):
    """``y = x W (+ b)`` in the compute dtype."""

    def __init__(
        self,
        config: ModelConfig,
        compute: ComputeConfig,
        shape: tuple[int, int],
        axes: tuple[str | None, str | None],
        *,
        bias: bool = False,
        rngs: Source,
    ):
        self.compute = compute
        self.w = param(config, compute, rngs, shape, axes)
        self.b = zeros(compute, shape[1:], axes[1:]) if bias else None

    def __call__(self, x: Float[Array, "*B I"]) -> Float[Array, "*B O"]:
        y = multiply("...i,io->...o", x.astype(self.compute.dtype), self.w[...], self.compute)
        return y if self.b is None else biased(y, self.b[...])


class RMSNorm(nnx.Module):
    """``x / sqrt(mean(x²) + eps) · gain``, statistics in float32."""

    def __init__(
        self,
        config: ModelConfig,
        compute: ComputeConfig,
        width: int,
        axis: str | None = None,
        *,
        eps: float | None = None,
    ):
        self.eps, self.compute = config.rms_norm_eps if eps is None else eps, compute
        self.gain = nnx.Param(jnp.ones(width, compute.param_dtype), axes=(axis,))

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        return rms_norm(x, self.gain[...], self.eps, target=self.compute.kernels)


class SwiGLU(nnx.Module):
    """``down(silu(gate x) · up x)``; gate and up are one matrix (D, 2, F)."""

    def __init__(self, config: ModelConfig, compute: ComputeConfig, width: int, *, rngs: Source):
        self.compute = compute
        self.wi = param(config, compute, rngs, (config.hidden_size, 2, width), ("embed", None, "mlp"))
        self.wo = param(config, compute, rngs, (width, config.hidden_size), ("mlp", "embed"))

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        gate_up = multiply("...d,dgf->...gf", x, self.wi[...], self.compute)
        h = jax.nn.silu(gate_up[..., 0, :]) * gate_up[..., 1, :]
        return multiply("...f,fd->...d", h, self.wo[...], self.compute)
