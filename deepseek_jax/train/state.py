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
from deepseek_jax.model import parameters
from deepseek_jax.parallel.sharding import ShardingRules, state_sharding, tree_shardings
from deepseek_kernels import BlockScaled


@struct.dataclass
class TrainState:
    """step: steps taken, non-finite ones included. router_bias: (L E) or None. ema: the parameters' mean, or None.

    Parameters are float32 masters, and what is shaped like them is float32 too, but for moments that the optimizer is
    asked to keep in less.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    router_bias: jax.Array | None
    ema: Any = None


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
) -> TrainState:
    """A state at step 0 with each array created where the sharding rules put it.

    Parameters are drawn from ``seed`` unless given (an earlier stage's); those given are copied, never donated. They
    become float32 masters whatever they were, bfloat16 or block-scaled FP8.
    """

    create = functools.partial(_create, config, optimizer, seed, ema)
    shapes = jax.eval_shape(create, params, router_bias)
    return jax.jit(create, out_shardings=state_shardings(config, shapes, mesh, compute.rules))(params, router_bias)


def abstract_state(
    config: ModelConfig,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    *,
    compute: ComputeConfig = ComputeConfig(),
    ema: bool = False,
) -> TrainState:
    """What ``create_state`` makes as shapes, dtypes and shardings: all that a checkpoint is read into."""
    shapes = jax.eval_shape(functools.partial(_create, config, optimizer, 0, ema), None, None)
    place = lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)  # noqa: E731
    return jax.tree.map(place, shapes, state_shardings(config, shapes, mesh, compute.rules))


def _create(
    config: ModelConfig,
    optimizer: optax.GradientTransformation,
    seed: int,
    ema: bool,
    params: Any,
    router_bias: jax.Array | None,
) -> TrainState:
    if params is None:
        params, router_bias = parameters.init(config, seed)
    params = float32_copy(params)
    return TrainState(
        step=jnp.int32(0),
        params=params,
        opt_state=optimizer.init(params),
        router_bias=router_bias,
        ema=float32_copy(params) if ema else None,
    )


@jax.jit
def float32_copy(arrays: Any) -> Any:
    """The same numbers in float32 and in memory of their own, which may be donated; FP8 weights are dequantised."""
    scaled = lambda leaf: isinstance(leaf, BlockScaled)  # noqa: E731
    return jax.tree.map(lambda leaf: jnp.array(leaf.astype(jnp.float32), copy=True), arrays, is_leaf=scaled)


def state_shardings(config: ModelConfig, state: TrainState, mesh: Mesh, rules: ShardingRules) -> Any:
    """Where each array lives: what is shaped like a parameter by ``state_sharding``, the rest on every device."""
    axes = parameters.logical_axes(config)
    params = tree_shardings(mesh, axes, state.params, rules)
    beside = jax.tree.map(lambda leaf, axes: state_sharding(mesh, axes, leaf.shape, rules), state.params, axes)
    whole = NamedSharding(mesh, PartitionSpec())
    like_params = lambda tree: jax.tree.structure(tree) == jax.tree.structure(params)  # noqa: E731

    def place(tree: Any) -> Any:
        return beside if like_params(tree) else jax.tree.map(lambda _: whole, tree)

    return dataclasses.replace(
        state,
        step=whole,
        params=params,
        opt_state=jax.tree.map(place, state.opt_state, is_leaf=like_params),
        router_bias=place(state.router_bias),
        ema=place(state.ema),
    )
