"""DeepSeekMoE against a loop over tokens, its gradients against a dense formula, and on a mesh."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from model import oracle
from model.tiny import V1, V2, V3, config, float64, relative_error, weights

import deepseek_jax.parallel.exchange as exchanging
from deepseek_jax.compute import ComputeConfig
from deepseek_jax.model.moe import DeepSeekMoE
from deepseek_jax.parallel.mesh import MeshConfig, make_mesh
from deepseek_jax.parallel.sharding import ShardingRules
from deepseek_kernels import InStack, routed_experts
from deepseek_kernels.block_fp8 import FP8, BlockScaled

CONFIGS = {
    "v1": config(V1),
    "v2": config(V2),
    "v3": config(V3),
    "v3_no_shared": config(V3, n_shared_experts=0),
}
SEGMENTS = np.array([[1, 1, 1, 1, 1, 1], [1, 1, 2, 2, 2, 0], [1, 1, 1, 1, 0, 0], [1, 2, 3, 4, 5, 6]], np.int32)


def inputs(tiny):
    params, bias = weights(tiny)
    params = jax.tree.map(lambda leaf: leaf[0], params["moe_layers"]["mlp"])
    x = np.random.default_rng(0).standard_normal((*SEGMENTS.shape, tiny.hidden_size)).astype(np.float32)
    return params, None if bias is None else bias[0], x


def forward(tiny, params, bias, x):
    graph, state = nnx.split(nnx.eval_shape(lambda: DeepSeekMoE(tiny, ComputeConfig(), rngs=nnx.Rngs(0))))
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graph, state)(x, bias, jnp.asarray(SEGMENTS))


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_a_loop_over_tokens(name):
    tiny = CONFIGS[name]
    params, bias, x = inputs(tiny)
    y, stats = jax.jit(functools.partial(forward, tiny))(params, bias, x)
    p, b = float64(params), None if bias is None else float64(bias)
    load, total = np.zeros(tiny.n_routed_experts), 0.0
    for row in range(len(x)):
        assert relative_error(y[row], oracle.moe(p, tiny, x[row].astype(np.float64), b)[0]) < 1e-5
        for segment in set(SEGMENTS[row][SEGMENTS[row] > 0].tolist()):
            _, expected = oracle.moe(p, tiny, x[row][SEGMENTS[row] == segment].astype(np.float64), b)
            load, total = load + expected["load"], total + expected["balance"]
    np.testing.assert_array_equal(stats.load_E, load)
    assert load.sum() == tiny.num_experts_per_tok * np.sum(SEGMENTS > 0)
    np.testing.assert_allclose(stats.balance, total, rtol=1e-5)


@pytest.fixture(scope="module")
def gradients():
    """(function of params, x) -> y-weighted loss and gradients; the sorted computation without a mesh."""
    tiny = CONFIGS["v3"]
    params, bias, x = inputs(tiny)
    dy = np.random.default_rng(1).standard_normal(x.shape).astype(np.float32)

    def loss(params, x):
        y, stats = forward(tiny, params, bias, x)
        return jnp.sum(y * dy), stats

    make = lambda: jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))  # noqa: E731
    return tiny, bias, params, x, dy, make, make()(params, x)


def test_gradients_equal_those_of_all_experts_computed(gradients):
    """``y = shared + Σ_e gate_e · expert_e(x)`` with gate zero where not chosen, by plain autodiff."""
    tiny, _, params, x, dy, _, ((value, stats), grads) = gradients

    def dense(params, x):
        s = jax.nn.sigmoid(jnp.einsum("bsd,de->bse", x, params["router"]))
        chosen = jnp.sum(jax.nn.one_hot(stats.experts_BSK, tiny.n_routed_experts), axis=2)
        gate = s * chosen / jnp.sum(s * chosen, axis=-1, keepdims=True) * tiny.routed_scaling_factor
        wide = jnp.einsum("bsd,edxf->bsexf", x, params["wi"])
        each = jnp.einsum("bsef,efd->bsed", jax.nn.silu(wide[..., 0, :]) * wide[..., 1, :], params["wo"])
        wide = jnp.einsum("bsd,dxf->bsxf", x, params["shared"]["wi"])
        shared = (jax.nn.silu(wide[..., 0, :]) * wide[..., 1, :]) @ params["shared"]["wo"]
        return jnp.sum((shared + jnp.einsum("bsed,bse->bsd", each, gate)) * dy)

    right, right_grads = jax.jit(jax.value_and_grad(dense, (0, 1)))(params, x)
    np.testing.assert_allclose(value, right, rtol=1e-5)
    errors = jax.tree.map(relative_error, grads, right_grads)
    assert max(jax.tree.leaves(errors)) < 1e-5, errors


def test_a_mesh_changes_nothing(gradients):
    """Rows over data and expert, widths over tensor: value, gradients and load stay the same."""
    *_, params, x, _, make, ((value, stats), grads) = gradients
    with jax.set_mesh(make_mesh(MeshConfig(data=2, expert=2, tensor=2))):
        (on_mesh, mesh_stats), mesh_grads = make()(params, x)
    np.testing.assert_allclose(on_mesh, value, rtol=1e-5)
    np.testing.assert_array_equal(mesh_stats.load_E, stats.load_E)
    errors = jax.tree.map(relative_error, mesh_grads, grads)
    assert max(jax.tree.leaves(errors)) < 1e-5, errors


E, D, F = 4, 128, 256


@functools.cache
def in_fp8() -> Any:
    """Tokens, gates, choices, and matrices in FP8 with a scale for each block of 128 × 128."""
    rng = np.random.default_rng(0)
    values = lambda *shape: jnp.asarray(rng.normal(size=shape), FP8)  # noqa: E731
    scales = lambda *shape: jnp.asarray(rng.uniform(0.5, 1.5, shape) / 16, jnp.float32)  # noqa: E731
    wi = BlockScaled(values(E, D, 2, F), scales(E, 1, 2, 2), ((1, 128), (1, 1), (1, 128)))
    wo = BlockScaled(values(E, F, D), scales(E, 2, 1))
    x, gates = (jnp.asarray(rng.normal(size=(8, 2, n)), jnp.float32) for n in (D, 2))
    return x, gates, jnp.asarray(rng.integers(0, E, (8, 2, 2)), jnp.int32), wi, wo


@pytest.mark.parametrize("stored", ["as they are", "terms last", "in a stack"])
@pytest.mark.parametrize("axes", [{"expert": 4, "data": 2}, {"expert": 2, "tensor": 2, "fsdp": 2}], ids=str)
def test_experts_in_fp8_stay_where_they_lie(axes, stored):
    """And give on a mesh what they do on one device. In the program nothing of all experts' size is of another dtype,
    and each device multiplies by its own matrices."""
    x, gates, chosen, wi, wo = in_fp8()
    flat = [a.reshape(-1, a.shape[2]) for a in (x, gates, chosen)]
    expected = routed_experts(flat[0], flat[1], flat[2], wi, wo).reshape(x.shape)
    if stored == "terms last":
        wi, wo = wi.with_terms_last(), wo.with_terms_last()
    elif stored == "in a stack":
        wi, wo = (InStack(jax.tree.map(lambda leaf: jnp.stack([0 * leaf, leaf]), w), jnp.int32(1)) for w in (wi, wo))
    seen = []

    def experts(*operands):
        seen.append((tuple(operands[3].shape), tuple(operands[4].shape), operands[3].dtype))
        return routed_experts(*operands[:-1], most=operands[-1])

    mesh = make_mesh(MeshConfig(**axes), devices=jax.devices()[: math.prod(axes.values())])
    run = functools.partial(exchanging.exchange, experts, rules=ShardingRules())
    with jax.set_mesh(mesh):
        program = jax.jit(run).trace(x, gates, chosen, wi, wo)
        found, _ = program.lower().compile()(x, gates, chosen, wi, wo)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    own, width = E // axes["expert"], F // axes.get("tensor", 1)
    assert seen == [((own, D, 2, width), (own, width, D), FP8)]
    assert f"f32[{E},{D},2" not in str(program.jaxpr)
