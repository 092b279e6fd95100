"""A model's arrays as decoding reads them, made once for many calls instead of in every one."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from deepseek_jax.checkpoint.hf_names import hf_tensors
from deepseek_jax.checkpoint.integers import Integers
from deepseek_jax.compute import ComputeConfig
from deepseek_jax.config import ModelConfig
from deepseek_jax.model import parameters
from deepseek_jax.parallel.copies import place_experts
from deepseek_jax.parallel.sharding import ShardingRules, named_sharding
from deepseek_kernels.block_fp8 import FP8, BlockScaled, scales_shape
from deepseek_kernels.fp8_on_hopper import laid_out
from deepseek_kernels.integers import bits_of

Weights = tuple[Any, jax.Array | None]  # parameters and routing bias

READ_IN_FLOAT32 = ("router", "gain")  # bfloat16 router weights would choose other experts than the learner's
# Of random numbers: 7 of it are the largest of FP8, and of integers what lies further out is cut off.
_WIDTHS = {str(jnp.dtype(FP8)): 64.0, "int8": 32.0, "int4": 2.5}
_AT_ONCE = 2**28  # random numbers, whose bits are as large as float32
READ_BY_HEAD = ("kv_b",)  # dequantised in each step, which would turn it back


def sampling_rules(rules: ShardingRules) -> ShardingRules:
    """What splits weights by experts, heads, feed-forward width and vocabulary stays; nothing else is split but the
    batch. A weight that is split by model width would be gathered anew for every token."""
    experts = tuple(name for name in rules.experts if name not in rules.experts_gathered)
    return dataclasses.replace(
        rules, sequence=(), embed=(), latent=(), experts=experts, experts_gathered=(), expert_embed=()
    )


def sampling_compute(compute: ComputeConfig) -> ComputeConfig:
    """With ``sampling_rules``, and ``exact``: an answer depends on no other's tokens."""
    return dataclasses.replace(compute.exact, rules=sampling_rules(compute.rules))


def sampling_config(config: ModelConfig) -> ModelConfig:
    """The network without its MTP module."""
    return dataclasses.replace(config, num_nextn_predict_layers=0)


@functools.partial(jax.jit, static_argnames=("config", "compute", "mesh", "mtp"))
def sampling_weights(
    params: dict[str, Any],
    router_bias: jax.Array | None,
    *,
    config: ModelConfig,
    compute: ComputeConfig,
    mesh: Mesh,
    mtp: bool = False,
) -> tuple[dict[str, Any], jax.Array | None]:
    """Parameters and bias of ``sampling_config(config)``, with ``mtp`` of all of ``config``: in ``compute.dtype`` what
    the network would bring to it in each product, or as it is where kernels widen it while they read; placed by
    ``compute.rules``, and layer by layer, unless ``compute.scan_decode`` wants stacks.

    Nothing of the result shares memory with ``params``, which a train step may then give away.
    """
    config = config if mtp else sampling_config(config)
    params = {name: tree for name, tree in params.items() if mtp or name != "mtp"}
    if router_bias is not None:
        whole = NamedSharding(mesh, PartitionSpec())
        router_bias = jax.lax.with_sharding_constraint(jnp.copy(router_bias[: config.num_routers]), whole)
    params = params if compute.scan_decode else parameters.unstack(params)
    # A CPU's products of few rows read bfloat16 as the float32 numbers that they are.
    widens = (compute.kernels.platform, compute.dtype, compute.param_dtype) == ("cpu", "float32", "bfloat16")
    widens = widens and mesh.size == 1

    def make(path, leaf, axes):
        if isinstance(leaf, BlockScaled):
            place = named_sharding(mesh, axes, leaf.shape, compute.rules)
            leaf = dataclasses.replace(leaf, values=jax.lax.with_sharding_constraint(jnp.copy(leaf.values), place))
            # On a mesh all but the experts are dequantised, in the order in which they came.
            as_it_is = _named(path, READ_BY_HEAD) or (mesh.size > 1 and "experts" not in axes)
            laid = leaf if as_it_is else laid_out(leaf, compute.kernels)
            return dataclasses.replace(laid, scales=jnp.copy(laid.scales))
        as_it_is = _named(path, READ_IN_FLOAT32) or (
            widens and "experts" not in axes and not _named(path, READ_BY_HEAD)
        )
        leaf = jnp.copy(leaf) if as_it_is else jnp.copy(leaf).astype(compute.dtype)
        return jax.lax.with_sharding_constraint(leaf, named_sharding(mesh, axes, leaf.shape, compute.rules))

    is_leaf = lambda leaf: isinstance(leaf, BlockScaled)  # noqa: E731
    axes = _axes(config, compute)
    return jax.tree_util.tree_map_with_path(make, params, axes, is_leaf=is_leaf), router_bias


def with_copies(
    params: dict[str, Any], expert_LP: np.ndarray, *, config: ModelConfig, rules: ShardingRules
) -> dict[str, Any]:
    """``sampling_weights``' parameters with the experts of MoE layer l in the places of ``expert_LP[l]``. They are used
    up, layer by layer."""
    layers = list(params["layers"])
    for layer, expert_P in enumerate(expert_LP, start=config.num_dense_layers):
        mlp = layers[layer]["mlp"]
        wi, wo = place_experts(mlp["wi"], mlp["wo"], expert_P, config.n_routed_experts, rules)
        jax.tree.map(lambda leaf: leaf.delete(), (mlp["wi"], mlp["wo"]))
        layers[layer] = layers[layer] | {"mlp": mlp | {"wi": wi, "wo": wo}}
    return params | {"layers": tuple(layers)}


def random_weights(
    config: ModelConfig, compute: ComputeConfig, mesh: Mesh, seed: int = 0, *, mtp: bool = False
) -> tuple[dict[str, Any], jax.Array | None]:
    """What ``sampling_weights`` makes, drawn where it lies instead of made from a model, for measurements: no second
    copy, nothing in float32 but what is read so. The same widths as fresh weights, other numbers. With ``param_dtype``
    float8_e4m3 the matrices that V3's checkpoints have in FP8 are, with int8 and int4 those that become so."""
    config = config if mtp else sampling_config(config)
    shapes, bias = _shapes(config, compute, mesh)
    keys = iter(jax.random.split(jax.random.key(seed, impl="rbg"), len(jax.tree.leaves(shapes))))

    def make(path, leaf, axes):
        if isinstance(leaf, BlockScaled):
            draw = functools.partial(_drawn, next(keys), place=NamedSharding(mesh, PartitionSpec()))
            width = _WIDTHS[str(leaf.dtype)]
            values = draw(shape=leaf.values.shape, dtype=leaf.dtype, scale=width)
            scales = jnp.full(leaf.scales.shape, config.initializer_range / width, leaf.scales.dtype)
            return dataclasses.replace(leaf, values=values, scales=scales)
        place = named_sharding(mesh, axes, leaf.shape, compute.rules)
        scale = None if _named(path, ("gain",)) else config.initializer_range
        return _drawn(next(keys), shape=leaf.shape, dtype=leaf.dtype, scale=scale, place=place)

    is_leaf = lambda leaf: isinstance(leaf, BlockScaled)  # noqa: E731
    params = jax.tree_util.tree_map_with_path(make, shapes, _axes(config, compute), is_leaf=is_leaf)
    return params, None if bias is None else jnp.zeros(bias.shape, bias.dtype)


def abstract_weights(config: ModelConfig, compute: ComputeConfig, mesh: Mesh) -> tuple[dict[str, Any], Any]:
    """What ``sampling_weights`` makes of weights in bfloat16 or float32, as shapes, dtypes and shardings."""
    assert compute.param_dtype in ("float32", "bfloat16"), "where the parts of others lie depends on their kernels"
    config = sampling_config(config)
    shapes, bias = _shapes(config, compute, mesh)
    place = lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)  # noqa: E731
    axes = lambda leaf, axes: place(leaf, named_sharding(mesh, axes, leaf.shape, compute.rules))  # noqa: E731
    whole = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(axes, shapes, _axes(config, compute)), None if bias is None else place(bias, whole)


def _shapes(config: ModelConfig, compute: ComputeConfig, mesh: Mesh) -> tuple[dict[str, Any], Any]:
    """Shapes and dtypes of what ``sampling_weights`` makes of all of ``config``; FP8 or integers where ``param_dtype``
    says so."""
    scaled, integers, dtypes = {}, Integers.named(compute.param_dtype), (FP8, jnp.float32)
    if compute.param_dtype == "float8_e4m3":
        scaled = {tensor.path: tensor.groups for tensor in hf_tensors(config) if tensor.quantised}
    elif integers is not None:
        scaled = {tensor.path: integers.groups(tensor) for tensor in hf_tensors(config) if integers.takes(tensor)}
        dtypes = integers.dtype, jnp.bfloat16

    def kept(path, leaf):
        if (groups := scaled.get(tuple(part.key for part in path))) is None:
            return leaf
        scales = jax.ShapeDtypeStruct(scales_shape(leaf.shape, groups), dtypes[1])
        return BlockScaled(jax.ShapeDtypeStruct(leaf.shape, dtypes[0]), scales, groups)

    params, bias = parameters.abstract_arrays(config, dataclasses.replace(compute, param_dtype="bfloat16"))
    make = functools.partial(sampling_weights, config=config, compute=compute, mesh=mesh, mtp=True)
    return jax.eval_shape(make, jax.tree_util.tree_map_with_path(kept, params), bias)


@functools.partial(jax.jit, static_argnames=("shape", "dtype", "scale", "place"))
def _drawn(key, *, shape, dtype, scale, place):
    """Normal numbers, or ones: each device draws its own part, for the compiler would have all of them draw all."""
    parts = [(part,) if isinstance(part, str) else part or () for part in place.spec]
    names = tuple(name for part in parts for name in part if place.mesh.shape[name] > 1)

    def draw(key, shape):
        if math.prod(shape) > _AT_ONCE and len(shape) > 2:
            return jax.lax.map(lambda key: draw(key, shape[1:]), jax.random.split(key, shape[0]))
        drawn = scale * jax.random.normal(key, shape)
        if bits := bits_of(dtype):
            drawn = jnp.clip(jnp.round(drawn), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        return drawn.astype(dtype)

    def own(key):
        if scale is None:
            return jnp.ones(place.shard_shape(shape), dtype)
        return draw(jax.random.fold_in(key, jax.lax.axis_index(names)) if names else key, place.shard_shape(shape))

    return jax.shard_map(own, mesh=place.mesh, in_specs=PartitionSpec(), out_specs=place.spec, check_vma=False)(key)


def _named(path, names: tuple[str, ...]) -> bool:
    return any(getattr(part, "key", None) in names for part in path)


def _axes(config: ModelConfig, compute: ComputeConfig) -> dict[str, Any]:
    """Logical axes of ``sampling_weights``' result for all of ``config``."""
    axes = parameters.logical_axes(config)
    if compute.scan_decode:
        return axes
    layers = []
    for name, count in (("dense_layers", config.num_dense_layers), ("moe_layers", config.num_moe_layers)):
        stack = axes.pop(name, None)
        layer = jax.tree.map(lambda named: named[1:], stack, is_leaf=lambda named: isinstance(named, tuple))
        layers += [layer] * count
    return axes | {"layers": tuple(layers)}
