"""RMSNorm, and its gradients: XLA's, or of few rows by a kernel."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from deepseek_kernels import norm_hopper
from deepseek_kernels.registry import choose
from deepseek_kernels.target import Target, devices
from deepseek_kernels.weights import Weight, stack_and_layer, stored_gradient


def rms_norm(
    x: Float[Array, "*B D"], gain: Weight, eps: float, *, target: Target | None = None, implementation: str = "auto"
) -> Float[Array, "*B D"]:
    """``x / sqrt(mean(x²) + eps) · gain``, all in float32. gain: (D,), or a layer of a stack of such.

    Raises:
      ValueError: an implementation that cannot run.
    """
    rows, width = math.prod(x.shape[:-1]), x.shape[-1]
    facts: dict[str, Any] = {"rows": rows, "width": width, "devices": devices()}
    choice = choose("rms_norm", target or Target.here(), x.dtype, implementation=implementation, **facts)
    if choice.name == "plain":
        return _plain(x, gain, eps)
    y: Any = _by_kernel(x.reshape(rows, width), gain, eps)
    return y.reshape(x.shape)


def _plain(x, gain, eps):
    x32 = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return (x32 * scale * gain.astype(jnp.float32)).astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _by_kernel(x_TD, gain, eps):
    return norm_hopper.normalise(x_TD, *stack_and_layer(gain), eps)


def _forward(x_TD, gain, eps):
    return _by_kernel(x_TD, gain, eps), (x_TD, gain)


def _backward(eps, residuals, dy):
    x_TD, gain = residuals
    _, pullback = jax.vjp(functools.partial(_plain, eps=eps), x_TD, gain.astype(jnp.float32))
    dx, dgain = pullback(dy)
    return dx, stored_gradient(gain, lambda: dgain)


_by_kernel.defvjp(_forward, _backward)
