"""A layer's weight as it leaves its stack: rounded if it is to be, its gradient brought to where it belongs."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from deepseek_jax.parallel.mesh import current_mesh
from deepseek_jax.parallel.sharding import Axes, ShardingRules, placed, placed_as_state


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rounded:
    """A stack of float32 weights, each of which its layer reads in ``gradient``'s dtype: rounded all at once, the stack
    would be there twice. Their gradient is that of ``gradient``, zeros of the same shape that nothing reads, in whose
    dtype the mesh so adds it up."""

    master: jax.Array
    gradient: jax.Array

    def __getitem__(self, index: Any) -> "Rounded":
        """``[...]``, as an array has it."""
        assert index is Ellipsis, index
        return self


def weight_of_layer(w: Any, axes: Axes, rules: ShardingRules) -> Any:
    """A layer's weight as it is, whose gradient each layer brings to where ``state_sharding`` has it: stacked whole and
    split behind the loop over layers, it would be summed whole on every device."""
    mesh = current_mesh()
    if isinstance(w, Rounded):
        return _rounded(w.master, w.gradient, axes, rules)
    if mesh is None or mesh.size == 1 or not isinstance(w, jax.Array):
        return w
    return _with_gradient_at(w, axes, rules)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _with_gradient_at(w, axes, rules):
    return w


_with_gradient_at.defvjp(
    lambda w, axes, rules: (w, None),
    lambda axes, rules, _, dw: (placed_as_state([dw], [axes], rules)[0],),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _rounded(master, gradient, axes, rules):
    # Times a 1 that XLA does not know: it would round the stack before it takes a layer out, and for want of memory
    # again for each layer.
    one = jax.lax.optimization_barrier(jnp.ones((), master.dtype))
    return placed([(master * one).astype(gradient.dtype)], [axes], rules)[0]


_rounded.defvjp(
    lambda master, gradient, axes, rules: (_rounded(master, gradient, axes, rules), None),
    lambda axes, rules, _, dw: (None, placed_as_state([dw], [axes], rules)[0]),
)
