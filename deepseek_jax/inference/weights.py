"""A model's arrays as decoding reads them, made once for many calls instead of in every one."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from deepseek_jax.compute import ComputeConfig
from deepseek_jax.config import ModelConfig
from deepseek_jax.model import transformer
from deepseek_jax.parallel.sharding import ShardingRules, named_sharding
from deepseek_kernels.block_fp8 import BlockScaled
from deepseek_kernels.fp8_on_hopper import laid_out

READ_IN_FLOAT32 = ("router", "gain")  # bfloat16 router weights would choose other experts than the learner's


def sampling_rules(rules: ShardingRules) -> ShardingRules:
    """What splits weights by heads, feed-forward width and vocabulary stays; nothing else is split but the batch.

    A weight that is split by model width, or by experts, would be gathered anew for every token.
    """
    return dataclasses.replace(rules, sequence=(), embed=(), experts=(), expert_embed=())


def sampling_config(config: ModelConfig) -> ModelConfig:
    """The network without its MTP module."""
    return dataclasses.replace(config, num_nextn_predict_layers=0)


@functools.partial(jax.jit, static_argnames=("config", "compute", "mesh"))
def sampling_weights(
    params: dict[str, Any],
    router_bias: jax.Array | None,
    *,
    config: ModelConfig,
    compute: ComputeConfig,
    mesh: Mesh,
) -> tuple[dict[str, Any], jax.Array | None]:
    """Parameters and bias of ``sampling_config(config)``: in ``compute.dtype`` what the network would bring to it in
    each product, placed by ``compute.rules``, and layer by layer, unless ``compute.scan_decode`` wants stacks.

    Nothing of the result shares memory with ``params``, which a train step may then give away.
    """
    params = {name: tree for name, tree in params.items() if name != "mtp"}
    axes = {name: tree for name, tree in transformer.logical_axes(config).items() if name != "mtp"}
    if router_bias is not None:
        whole = NamedSharding(mesh, PartitionSpec())
        router_bias = jax.lax.with_sharding_constraint(jnp.copy(router_bias[: config.num_moe_layers]), whole)
    if not compute.scan_decode:
        params, axes = transformer.unstack(params), _unstacked(config, axes)

    def make(path, leaf, axes):
        if isinstance(leaf, BlockScaled):
            return jax.tree.map(jnp.copy, laid_out(leaf, compute.kernels))
        kept = any(getattr(part, "key", None) in READ_IN_FLOAT32 for part in path)
        leaf = jnp.copy(leaf) if kept else jnp.copy(leaf).astype(compute.dtype)
        return jax.lax.with_sharding_constraint(leaf, named_sharding(mesh, axes, leaf.shape, compute.rules))

    is_leaf = lambda leaf: isinstance(leaf, BlockScaled)  # noqa: E731
    return jax.tree_util.tree_map_with_path(make, params, axes, is_leaf=is_leaf), router_bias


def _unstacked(config: ModelConfig, axes: dict[str, Any]) -> dict[str, Any]:
    """Logical axes of ``transformer.unstack``'s result."""
    axes, layers = dict(axes), []
    for name, count in (("dense_layers", config.num_dense_layers), ("moe_layers", config.num_moe_layers)):
        stack = axes.pop(name, None)
        layer = jax.tree.map(lambda named: named[1:], stack, is_leaf=lambda named: isinstance(named, tuple))
        layers += [layer] * count
    return axes | {"layers": tuple(layers)}
