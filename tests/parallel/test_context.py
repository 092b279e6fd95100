"""Rows that several devices share: the same numbers as on one, equal work, and nothing gathered but what is kept."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model.tiny import QWEN, V2, V3, config, weights
from train.cases import BATCH, on_device

from deepseek_jax.compute import ComputeConfig
from deepseek_jax.model import transformer
from deepseek_jax.model.router import router_stats
from deepseek_jax.parallel.context import RowOrder, numbered, per_row_and_head, pieces
from deepseek_jax.parallel.mesh import MeshConfig, make_mesh
from deepseek_jax.parallel.sharding import ShardingRules, place_batch, tree_shardings
from deepseek_jax.train.losses import LanguageModelLoss
from deepseek_kernels import Target, Visible, mla_attention

RULES = ShardingRules()


def test_balanced_order_and_back():
    x = np.arange(2 * 24 * 3).reshape(2, 24, 3)
    for ways, others in (2, {"data": 2, "tensor": 2}), (4, {"tensor": 2}):
        with jax.set_mesh(make_mesh(MeshConfig(context=ways, **others))):
            order = RowOrder.of(RULES, 2, 24, Visible())
            spread = jax.jit(order.spread)(x)
            np.testing.assert_array_equal(
                spread, np.concatenate([np.split(x, 2 * ways, 1)[i] for i in pieces(ways)], 1)
            )
            np.testing.assert_array_equal(jax.jit(order.back)(spread), x)
            along = jax.jit(functools.partial(order.spread, axis=2))(x[None])
            np.testing.assert_array_equal(along[0], spread)


# What each mesh is told to be: a model, packed rows or not, and what else is split.
SAME = {
    "v3 packed, context 4, tensor 2": (V3, True, MeshConfig(context=4, tensor=2), {}),
    "v3, context 2, data 2, tensor 2": (V3, False, MeshConfig(context=2, data=2, tensor=2), {}),
    "v3 packed in blocks, context 8": (V3, True, MeshConfig(context=8), {"attention": "blockwise", "remat": "full"}),
    "v2 packed, context 2, expert 2, fsdp 2": (V2, True, MeshConfig(context=2, expert=2, fsdp=2), {}),
    "gqa packed, context 4, tensor 2": (QWEN, True, MeshConfig(context=4, tensor=2), {}),
    "gqa, context 2, tensor 4": (QWEN, False, MeshConfig(context=2, tensor=4), {}),  # two heads of keys on four devices
}


@pytest.mark.parametrize("case", SAME)
def test_loss_and_gradients_are_those_of_one_device(case):
    base, isolate, mesh_config, options = SAME[case]
    tiny = config(base, num_hidden_layers=2) if base is not QWEN else config(base)
    params, bias = weights(tiny)
    loss = LanguageModelLoss(balance_weight=0.5, isolate=isolate, chunk=8)

    def run(compute, batch, params):
        def value(params):
            model = transformer.merge(tiny, params, bias, compute)
            return loss(model, batch, loss.normalisers(batch), jnp.int32(0))

        return jax.value_and_grad(value, has_aux=True)(params)

    expected = jax.jit(functools.partial(run, ComputeConfig()))(on_device(BATCH), params)
    mesh = make_mesh(mesh_config)
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, tree_shardings(mesh, transformer.logical_axes(tiny), params))
        found = jax.jit(functools.partial(run, ComputeConfig(**options)))(place_batch(BATCH, mesh), placed)

    def close(path, value, wanted):
        error = np.linalg.norm(np.float64(value) - wanted)
        assert error <= 1e-5 * np.linalg.norm(np.float64(wanted)) + 1e-7, f"{jax.tree_util.keystr(path)}: {error}"

    jax.tree_util.tree_map_with_path(close, found, expected)
