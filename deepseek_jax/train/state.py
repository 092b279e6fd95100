"""Everything a train step reads and writes, as one pytree of arrays."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from deepseek_jax.compute import ComputeConfig
from deepseek_jax.config import ModelConfig
from deepseek_jax.model import transformer
from deepseek_jax.parallel.sharding import ShardingRules, tree_shardings


@struct.dataclass
class TrainState:
    """step: steps taken, non-finite ones included. router_bias: (L E) or None. ema, reference: copies of the parameters
    or None: their running mean, and the policy that GRPO's KL term holds on to."""

    step: jax.Array
    params: Any
    opt_state: Any
    router_bias: jax.Array | None
    ema: Any = None
    reference: Any = None


def create_state(
    config: ModelConfig,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    *,
    compute: ComputeConfig = ComputeConfig(),
    seed: int = 0,
    params: Any = None,
    router_bias: jax.Array | None = None,
    ema: bool = False,
    reference: bool = False,
) -> TrainState:
    """A state at step 0 with each array created where the sharding rules put it.

    Parameters are drawn from ``seed`` unless given (an earlier stage's); those given are copied, never donated. They
    become float32 masters whatever they were, and so do the moments, the running mean and the gradients' sums.
    """

    def create(params, router_bias):
        if params is None:
            params, router_bias = transformer.init(config, seed)
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
        copy = functools.partial(jax.tree.map, lambda leaf: jnp.array(leaf, copy=True))
        return TrainState(
            step=jnp.int32(0),
            params=params,
            opt_state=optimizer.init(params),
            router_bias=router_bias,
            ema=copy(params) if ema else None,
            reference=copy(params) if reference else None,
        )

    shapes = jax.eval_shape(create, params, router_bias)
    return jax.jit(create, out_shardings=state_shardings(config, shapes, mesh, compute.rules))(params, router_bias)


def state_shardings(config: ModelConfig, state: TrainState, mesh: Mesh, rules: ShardingRules) -> Any:
    """Where each array lives: what is shaped like a parameter lies with it, the rest on every device."""
    params = tree_shardings(mesh, transformer.logical_axes(config), state.params, rules)
    whole = NamedSharding(mesh, PartitionSpec())
    like_params = lambda tree: jax.tree.structure(tree) == jax.tree.structure(params)  # noqa: E731

    def place(tree: Any) -> Any:
        return params if like_params(tree) else jax.tree.map(lambda _: whole, tree)

    return dataclasses.replace(
        state,
        step=whole,
        params=params,
        opt_state=jax.tree.map(place, state.opt_state, is_leaf=like_params),
        router_bias=place(state.router_bias),
        ema=place(state.ema),
        reference=place(state.reference),
    )
