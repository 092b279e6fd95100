"""The smallest modules: parameters with named axes, a linear map, a norm, a gated feed-forward."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from deepseek_jax.compute import ComputeConfig
from deepseek_jax.config import ModelConfig
from deepseek_kernels import weight_gradient


class RouterBias(nnx.Variable):
    """The routing bias of auxiliary-loss-free balancing: moved by a rule, never by a gradient."""


def param(
    config: ModelConfig, compute: ComputeConfig, rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str | None, ...]
) -> nnx.Param:
    """A weight drawn from N(0, initializer_range²), as all of V3's are, with its logical axes as metadata."""
    assert len(shape) == len(axes)
    value = config.initializer_range * jax.random.normal(rngs.params(), shape, jnp.float32)
    return nnx.Param(value.astype(compute.param_dtype), axes=axes)


def zeros(compute: ComputeConfig, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> nnx.Param:
    """A bias that begins at zero."""
    return nnx.Param(jnp.zeros(shape, compute.param_dtype), axes=axes)


def project(
    x: Float[Array, "*B I"], w: Float[Array, "I O"], dtype: jax.typing.DTypeLike | None = None
) -> Float[Array, "*B O"]:
    """``x w``, summed and returned in ``dtype`` where one is given. The gradient of w is ``weight_gradient``'s."""
    y: jax.Array = _project(x, w, dtype)
    return y


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _project(x, w, dtype):
    return jax.lax.dot_general(x, w, (((x.ndim - 1,), (0,)), ((), ())), preferred_element_type=dtype)


def _project_forward(x, w, dtype):
    return _project(x, w, dtype), (x, w)


def _project_backward(dtype, residuals, dy):
    x, w = residuals
    dx = jax.lax.dot_general(dy, w, (((dy.ndim - 1,), (1,)), ((), ())), preferred_element_type=dtype)
    return dx.astype(x.dtype), weight_gradient(x, dy).astype(w.dtype)


_project.defvjp(_project_forward, _project_backward)


def project_heads(x: Float[Array, "*B I"], w_IHN: Float[Array, "I H N"]) -> Float[Array, "*B H N"]:
    """``x w`` to N numbers for each of H heads."""
    return project(x, w_IHN.reshape(len(w_IHN), -1)).reshape(*x.shape[:-1], *w_IHN.shape[1:])


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
        rngs: nnx.Rngs,
    ):
        self.dtype = jnp.dtype(compute.dtype)
        self.w = param(config, compute, rngs, shape, axes)
        self.b = zeros(compute, shape[1:], axes[1:]) if bias else None

    def __call__(self, x: Float[Array, "*B I"]) -> Float[Array, "*B O"]:
        y = project(x.astype(self.dtype), self.w[...].astype(self.dtype))
        return y if self.b is None else y + self.b[...].astype(self.dtype)


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
        self.eps = config.rms_norm_eps if eps is None else eps
        self.gain = nnx.Param(jnp.ones(width, compute.param_dtype), axes=(axis,))

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        x32 = x.astype(jnp.float32)
        scale = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        return (x32 * scale * self.gain[...].astype(jnp.float32)).astype(x.dtype)


class SwiGLU(nnx.Module):
    """``down(silu(gate x) · up x)``; gate and up are one matrix (D, 2, F)."""

    def __init__(self, config: ModelConfig, compute: ComputeConfig, width: int, *, rngs: nnx.Rngs):
        self.dtype = jnp.dtype(compute.dtype)
        self.wi = param(config, compute, rngs, (config.hidden_size, 2, width), ("embed", None, "mlp"))
        self.wo = param(config, compute, rngs, (width, config.hidden_size), ("mlp", "embed"))

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        wi_D2F = self.wi[...].astype(self.dtype)
        width = wi_D2F.shape[2]
        gate_up = project(x, wi_D2F.reshape(-1, 2 * width))
        return project(jax.nn.silu(gate_up[..., :width]) * gate_up[..., width:], self.wo[...].astype(self.dtype))
