"""Weights for sampling: what they hold, where they lie, and that they are copies."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from model.tiny import V2, V3, config, relative_error, weights

from deepseek_jax.compute import ComputeConfig
from deepseek_jax.inference.weights import _drawn, sampling_config, sampling_rules, sampling_weights
from deepseek_jax.model import parameters
from deepseek_jax.parallel.mesh import MeshConfig, make_mesh
from deepseek_jax.parallel.sharding import ShardingRules, tree_shardings
from deepseek_kernels.block_fp8 import FP8, BlockScaled

TINY = config(V3)


def make(tiny=TINY, mesh=None, params=None, **compute):
    mesh = mesh or make_mesh(devices=jax.devices()[:1])
    compute = ComputeConfig(**compute).on(mesh)
    given = weights(tiny) if params is None else (params, weights(tiny)[1])
    return sampling_weights(*given, config=tiny, compute=compute, mesh=mesh)


def test_products_take_the_compute_dtype_and_what_is_read_in_float32_stays():
    params, bias = make(dtype="bfloat16")
    given, given_bias = weights(TINY)
    assert "mtp" not in params and len(params["layers"]) == 3
    assert given_bias is not None
    np.testing.assert_array_equal(bias, given_bias[:2])
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path)
        assert leaf.dtype == (jnp.float32 if "gain" in name or "router" in name else jnp.bfloat16), name
    for layer, (stack, index) in enumerate((("dense_layers", 0), ("moe_layers", 0), ("moe_layers", 1))):
        for (path, leaf), original in zip(
            jax.tree_util.tree_leaves_with_path(params["layers"][layer]), jax.tree.leaves(given[stack]), strict=True
        ):
            np.testing.assert_array_equal(leaf, original[index].astype(leaf.dtype), err_msg=str(path))


@pytest.mark.parametrize("tiny", [TINY, config(V2)], ids=["v3", "v2"])
@pytest.mark.parametrize("scanned", [False, True])
def test_the_network_computes_the_same_with_them(tiny, scanned):
    compute = ComputeConfig(dtype="bfloat16", scan_decode=scanned)
    tokens = jnp.arange(12, dtype=jnp.int32).reshape(2, 6)
    run = jax.jit(lambda tiny, p, b: parameters.merge(tiny, p, b, compute)(tokens).logits, static_argnums=0)
    made = make(tiny, dtype="bfloat16", scan_decode=scanned)
    found, expected = run(sampling_config(tiny), *made), run(tiny, *weights(tiny))
    assert relative_error(found, expected) <= (0 if scanned else 0.03)  # unrolled, bfloat16 is rounded elsewhere


FP8_PARTS = {
    "o": ((2, 64, 128), ((2, 128), (1, 128))),
    "kv_b": ((128, 2, 64), ((1, 128), (2, 128))),
    "wo": ((4, 128, 128), ((1, 128), (1, 128))),
}


def with_fp8(params):
    def kept(path, leaf):
        if path[-1].key not in FP8_PARTS or (path[-1].key == "wo" and leaf.ndim < 4):
            return leaf
        shape, groups = FP8_PARTS[path[-1].key]
        scales = (len(leaf), *([shape[0]] if len(shape) > sum(axes for axes, _ in groups) else []), 1, 1)
        return BlockScaled(jnp.zeros((len(leaf), *shape), FP8), jnp.zeros(scales), groups)

    return jax.tree_util.tree_map_with_path(kept, params)


@pytest.mark.parametrize("devices", [1, 2])
def test_fp8_weights_lie_as_hoppers_kernels_read_them_but_what_is_read_by_head(devices):
    """On a mesh the experts alone, as other products dequantise them there."""
    params, bias = weights(TINY)
    mesh = make_mesh(MeshConfig(expert=devices), devices=jax.devices()[:devices])
    compute = ComputeConfig(dtype="bfloat16", target="cuda:9.0:132")
    run = functools.partial(sampling_weights, config=TINY, compute=compute, mesh=mesh)
    made, _ = jax.eval_shape(run, with_fp8(params), bias)
    for layer in made["layers"]:
        assert layer["attention"]["o"].terms_last == (devices == 1) and not layer["attention"]["kv_b"].terms_last
        assert getattr(layer["mlp"]["wo"], "terms_last", True)


def test_on_a_mesh_fp8_experts_stay_split():
    params, bias = weights(TINY)
    params = with_fp8(params)
    rules = sampling_rules(ShardingRules())
    assert (rules.experts, rules.embed) == (("expert",), ())
    mesh = make_mesh(MeshConfig(expert=4), devices=jax.devices()[:4])
    made, _ = make(TINY, mesh, params, rules=rules)
    (wo,) = [layer["mlp"]["wo"] for layer in made["layers"] if isinstance(layer["mlp"]["wo"], BlockScaled)][:1]
    assert wo.values.sharding.shard_shape(wo.shape) == (1, 128, 128)


def test_random_weights_are_drawn_where_they_lie():
    """No device holds another's experts, not even on the way; what all have is the same, and no two experts are."""
    mesh, shape = make_mesh(MeshConfig(expert=8)), (64, 128, 32)
    place = NamedSharding(mesh, PartitionSpec("expert"))
    given = jax.random.key(0, impl="rbg")
    compiled = _drawn.lower(given, shape=shape, dtype=jnp.float32, scale=1.0, place=place).compile()
    found: Any = compiled.memory_analysis()
    assert found.output_size_in_bytes + found.temp_size_in_bytes < 4 * math.prod(shape)
    experts = np.asarray(compiled(given))
    assert abs(experts.std() - 1) < 0.01 and len(np.unique(experts[:, 0, 0])) == 64
    same = _drawn(given, shape=(8, 8), dtype=jnp.float32, scale=1.0, place=NamedSharding(mesh, PartitionSpec()))
    assert all(np.array_equal(part.data, same) for part in same.addressable_shards)


def test_a_train_step_may_give_away_what_they_were_made_from():
    params = jax.tree.map(jnp.copy, weights(TINY)[0])
    made, _ = make(params=params)
    jax.tree.map(lambda leaf: leaf.delete(), params)
    np.testing.assert_array_equal(made["embed"], weights(TINY)[0]["embed"])


def test_on_a_mesh_only_experts_heads_widths_and_vocabulary_stay_split():
    mesh = make_mesh(MeshConfig(fsdp=2, expert=2, tensor=2))
    tiny = dataclasses.replace(TINY, vocab_size=40)
    given, _ = weights(tiny)
    params = jax.device_put(given, tree_shardings(mesh, parameters.logical_axes(tiny), given))
    made, bias = make(tiny, mesh, params, rules=sampling_rules(ShardingRules()))
    layer = made["layers"][1]
    assert layer["mlp"]["wi"].addressable_shards[0].data.shape == (4, 16, 2, 6)
    assert layer["attention"]["q_b"].addressable_shards[0].data.shape == (10, 1, 10)
    assert made["embed"].addressable_shards[0].data.shape == (20, 16)
    assert bias is not None and bias.sharding.is_fully_replicated
    np.testing.assert_array_equal(layer["mlp"]["wi"], given["moe_layers"]["mlp"]["wi"][0])
