"""The pure halves of a network: parameters as plain arrays, their logical axes, their first values."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from model import oracle
from model.tiny import QWEN, V1, V2_LITE, V3, config, float64, relative_error, weights

from deepseek_jax.model.parameters import init, logical_axes, merge, split
from deepseek_jax.model.transformer import Transformer
from deepseek_jax.parallel.sharding import ShardingRules

SHAPES = {"v1": config(V1), "v2_lite": config(V2_LITE), "v3": config(V3), "dense": config(QWEN)}


@pytest.mark.parametrize("tiny", SHAPES.values(), ids=SHAPES)
def test_merge_then_split_gives_the_arrays_back(tiny):
    params, bias = weights(tiny)
    again, bias_again = split(merge(tiny, params, bias))
    assert jax.tree.structure(again) == jax.tree.structure(params)
    assert all(a is b for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(params), strict=True))
    assert bias_again is bias
    assert (bias is not None) == tiny.has_router_bias
    assert "router_bias" not in params  # no gradient can reach it


@pytest.mark.parametrize("tiny", SHAPES.values(), ids=SHAPES)
def test_every_parameter_has_logical_axes_with_rules(tiny):
    params, _ = weights(tiny)
    axes = logical_axes(tiny)
    named = jax.tree.map(
        lambda leaf, names: (leaf.shape, names), params, axes, is_leaf=lambda x: isinstance(x, jax.Array)
    )
    for path, (shape, names) in jax.tree_util.tree_leaves_with_path(named, is_leaf=lambda x: isinstance(x, tuple)):
        assert len(shape) == len(names), path
        ShardingRules().spec(names)
        stacked = jax.tree_util.keystr(path[:1]) in ("['dense_layers']", "['moe_layers']")
        assert (names[0] == "layers") == stacked, path


def test_tied_head_is_the_embedding():
    tied, own = merge(config(QWEN), *weights(config(QWEN))), merge(config(V3), *weights(config(V3)))
    assert "head" not in weights(config(QWEN))[0]
    np.testing.assert_array_equal(tied.head_weight(), weights(config(QWEN))[0]["embed"].T)
    np.testing.assert_array_equal(own.head_weight(), weights(config(V3))[0]["head"]["w"])


def test_fresh_parameters():
    """N(0, initializer_range²), but gains are 1; a key is a set of numbers."""
    tiny = config(V1, num_hidden_layers=1, first_k_dense_replace=1, vocab_size=200, hidden_size=32)
    fresh = jax.jit(lambda key: init(tiny, key))
    params, bias = fresh(jax.random.key(3))
    drawn = {True: [], False: []}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        drawn["gain" in jax.tree_util.keystr(path)].append(np.ravel(leaf))
    assert np.all(np.concatenate(drawn[True]) == 1) and bias is None
    for values in drawn[False]:
        assert abs(values.std() / tiny.initializer_range - 1) < 4 / np.sqrt(2 * len(values))
        assert abs(values.mean() / tiny.initializer_range) < 4 / np.sqrt(len(values))
    again, other = (fresh(jax.random.key(seed))[0] for seed in (3, 4))
    assert all(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (params, again)), strict=True))
    assert not np.array_equal(params["embed"], other["embed"])


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_weights_drawn_together_are_those_drawn_one_by_one(impl):
    """By ``nnx.Rngs``'s rule: a key per weight in order, one for a stack that is split among its layers."""
    tiny = config(QWEN, hidden_size=12, num_hidden_layers=2, first_k_dense_replace=2)
    rngs = nnx.Rngs(jax.random.key(7, impl=impl))
    params, _ = split(Transformer(tiny, rngs=rngs))
    fold, sigma = jax.random.fold_in, np.float32(tiny.initializer_range)
    key = jax.random.key(7, impl=impl)
    layers = jax.random.split(fold(key, 1), 2)  # in a block: q, kv, o, wi, wo
    stack = params["dense_layers"]
    for found, keys in [
        (params["embed"][None], [fold(key, 0)]),
        (stack["attention"]["kv"], [fold(layer, 1) for layer in layers]),
        (stack["mlp"]["wo"], [fold(layer, 4) for layer in layers]),
    ]:
        normals = jax.vmap(functools.partial(jax.random.normal, shape=found.shape[1:]))(jnp.stack(keys))
        np.testing.assert_array_equal(found, sigma * normals)
    assert rngs.params.count[...] == 2


def test_routers_of_a_network_without_moe_layers():
    """Experts configured, but every layer dense: no routers, so no bias, no load and no MTP router."""
    tiny = config(V3, num_hidden_layers=2, first_k_dense_replace=2)
    _, bias = weights(tiny)
    assert tiny.num_moe_layers == 0 and tiny.num_routers == 0 and bias is None


def test_a_new_model_runs_outside_jit():
    """As in a notebook, without a mesh: defaults for positions and segments."""
    tiny = config(QWEN, num_hidden_layers=1, first_k_dense_replace=1)
    model = merge(tiny, *weights(tiny))
    assert isinstance(model, Transformer) and isinstance(model, nnx.Module)
    tokens = np.array([5, 0, 39, 5])
    logits = model(jnp.asarray(tokens[None], jnp.int32)).logits
    right = oracle.transformer(float64(weights(tiny)[0]), None, tiny, tokens)["logits"]
    assert logits is not None and relative_error(logits[0], right) < 1e-5
