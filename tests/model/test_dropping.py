"""V2's token dropping against a numpy transcription: who goes, what the layer then computes, and on a mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from model import oracle
from model.tiny import V2, config, float64, relative_error, weights

from deepseek_jax.compute import ComputeConfig
from deepseek_jax.model.dropping import Balancing, drop, spared_tokens
from deepseek_jax.model.moe import DeepSeekMoE
from deepseek_jax.parallel.collectives import collectives
from deepseek_jax.parallel.mesh import MeshConfig, make_mesh
from deepseek_jax.parallel.sharding import place_batch

TINY = config(V2)
E, K, D = TINY.n_routed_experts, TINY.num_experts_per_tok, 4
SEGMENTS = np.array([[1] * 5 + [2] * 5 + [3] * 2, [1] * 9 + [0] * 3, [1] * 12, [0] * 12], np.int32)
SHAPE = SEGMENTS.shape


@functools.cache
def compiled(capacity):
    def run(experts, weights, scores, segments, spared):
        return drop(TINY, Balancing(D, capacity, spared), experts, weights, scores, segments)

    return jax.jit(run)


def case(seed, skew=2.0, levels=0):
    """Experts skewed towards some devices; with ``levels`` affinities are so few numbers, and ties many."""
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal((*SHAPE, E)) + skew * rng.standard_normal(E)
    if levels:
        logits = np.round(logits * levels) / levels
    scores = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    if levels:
        scores = np.ceil(scores * levels) / levels
    experts = np.argsort(-scores, axis=-1, kind="stable")[..., :K].astype(np.int32)
    gates = rng.uniform(0.5, 1, (*SHAPE, K)).astype(np.float32)
    return experts, gates, scores.astype(np.float32), SEGMENTS, rng.random(SHAPE) < 0.2


def check(arguments, capacity):
    """Exactly those that the transcription drops; returns how many."""
    experts, gates, scores, segments, spared = arguments
    flat = lambda x: np.asarray(x).reshape(-1, *x.shape[2:])  # noqa: E731
    gone = oracle.dropped(E, flat(scores), flat(experts), flat(spared), flat(segments) > 0, D, capacity)
    wanted = flat(experts).copy()
    wanted[flat(segments) == 0] = -1
    for choice in gone:
        wanted[choice] = -1
    found, kept_gates, count = compiled(capacity)(*arguments)
    np.testing.assert_array_equal(flat(found), wanted)
    np.testing.assert_array_equal(kept_gates, np.where(found < 0, 0, gates))
    assert count == len(gone)
    return len(gone)


@given(st.integers(0, 2**31), st.sampled_from([0.0, 1.0, 4.0]), st.sampled_from([0, 0, 2, 5]))
def test_those_of_least_affinity_go_until_the_budget_holds(seed, skew, levels):
    """Ties too, of which the later go."""
    check(case(seed, skew, levels), 1.0)


@pytest.mark.parametrize("capacity", [0.25, 1.0, 1.5, 4.0])
def test_capacity_is_a_factor_on_the_mean(capacity):
    arguments = case(1)
    gone, choices = check(arguments, capacity), K * np.sum(SEGMENTS > 0)
    assert (gone == 0) == (capacity == 4.0)
    nobody = (*arguments[:4], np.zeros(SHAPE, bool))
    check(nobody, capacity)
    kept_on = np.bincount(np.asarray(compiled(capacity)(*nobody)[0]).ravel() // (E // D) + 1, minlength=D + 1)[1:]
    assert max(kept_on) <= capacity * choices / D


def test_spared_tokens_lose_nothing_be_the_budget_exceeded():
    experts, gates, scores, segments, _ = case(2, skew=4.0)
    everyone = np.ones(SHAPE, bool)
    found, kept_gates, count = compiled(1.0)(experts, gates, scores, segments, everyone)
    real = SEGMENTS > 0
    assert count == 0 and check((experts, gates, scores, segments, ~everyone), 1.0) > 0
    np.testing.assert_array_equal(found[real], experts[real])
    assert np.all(found[~real] == -1)


def test_one_token_that_all_are_equal_to():
    """Where all affinities are the same, the first of the batch stay."""
    experts = np.zeros((*SHAPE, K), np.int32) + np.array([0, 2, 4])
    scores = np.full((*SHAPE, E), 1 / E, np.float32)
    check((experts, np.ones((*SHAPE, K), np.float32), scores, SEGMENTS, np.zeros(SHAPE, bool)), 1.0)


def test_a_mesh_drops_the_same():
    """And brings nothing together for it: devices exchange counts."""
    arguments = case(3, levels=5)
    expected = compiled(1.0)(*arguments)
    with jax.set_mesh(mesh := make_mesh(MeshConfig(data=2, expert=2, context=2))):
        names = "experts", "gates", "scores", "segments", "spared"
        placed = place_batch(dict(zip(names, arguments, strict=True)), mesh).values()
        found, program = compiled(1.0)(*placed), compiled(1.0).lower(*placed).compile().as_text()
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)
    assert program
    moved = collectives(program)
    assert {each.kind for each in moved} == {"all-reduce"} and max(each.shape_bytes for each in moved) <= 4 * D * 16


def test_sequences_are_spared_whole_by_what_they_hold():
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 50_000, (400, 48)), jnp.int32)
    segments = jnp.broadcast_to(jnp.arange(48) // 16 + 1, tokens.shape)
    run = jax.jit(spared_tokens, static_argnums=2)
    spared = np.asarray(run(tokens, segments, 0.1)).reshape(400, 3, 16)
    assert np.all(spared == spared[:, :, :1]) and 0.07 < np.mean(spared) < 0.13
    # In other rows, at another place, beside others.
    again = np.asarray(run(tokens[::-1, 16:], segments[:, :32], 0.1)).reshape(400, 2, 16)
    np.testing.assert_array_equal(again[::-1], spared[:, 1:])
    assert not np.any(run(tokens, segments, 0.0)) and np.all(run(tokens, segments, 1.0))


# The layer


def layer(params, x, compute, balancing):
    graph, state = nnx.split(nnx.eval_shape(lambda: DeepSeekMoE(TINY, compute, rngs=nnx.Rngs(0))))
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graph, state)(x, None, jnp.asarray(SEGMENTS), balancing=balancing)


@pytest.fixture(scope="module")
def layer_case():
    params = jax.tree.map(lambda leaf: leaf[0], weights(TINY)[0]["moe_layers"]["mlp"])
    params["router"] = 3 * params["router"]  # skewed
    x = np.random.default_rng(0).standard_normal((*SHAPE, TINY.hidden_size)).astype(np.float32)
    return params, jnp.asarray(x)


@pytest.mark.parametrize("experts", ["sorted", "fused", "plain"])
def test_the_layer_computes_what_is_left(layer_case, experts):
    """By every implementation: a token gets the shared expert's output and that of the choices kept; the gradient is
    theirs, and the choices told are the router's."""
    params, x = layer_case
    real, rng = SEGMENTS > 0, np.random.default_rng(1)
    balancing, compute = Balancing(D, 1.0, jnp.asarray(case(0)[4])), ComputeConfig(experts=experts)
    dy = (rng.standard_normal(x.shape) * real[..., None]).astype(np.float32)

    def value(params, x):
        y, stats = layer(params, x, compute, balancing)
        return jnp.sum(y * dy), (y, stats, layer(params, x, compute, None)[1])

    (_, (y, stats, all_stats)), gradients = jax.jit(jax.value_and_grad(value, argnums=(0, 1), has_aux=True))(params, x)
    np.testing.assert_array_equal(stats.experts_BSK, all_stats.experts_BSK)
    np.testing.assert_array_equal(stats.load_E, all_stats.load_E)
    assert stats.balance == all_stats.balance and all_stats.dropped == 0

    p, exact, chosen = float64(params), np.asarray(x, np.float64), np.asarray(stats.experts_BSK)
    scores = np.array([[oracle.affinities(TINY, token, p["router"]) for token in row] for row in exact])
    flat = lambda x: np.asarray(x).reshape(-1, *x.shape[2:])  # noqa: E731
    gone = oracle.dropped(E, flat(scores), flat(chosen), flat(balancing.spared_BS), flat(real), D, 1.0)
    assert stats.dropped == len(gone) > 5
    left = chosen.copy()
    for choice in gone:
        flat(left)[choice] = -1

    def outputs(p, x):
        y = np.zeros_like(x)
        for at in map(tuple, np.argwhere(real)):
            gates = oracle.gates(TINY, oracle.affinities(TINY, x[at], p["router"]), chosen[at].tolist())
            y[at] = oracle.swiglu(p["shared"]["wi"], p["shared"]["wo"], x[at])
            for i, gate in zip(left[at], gates, strict=True):
                y[at] += gate * oracle.swiglu(p["wi"][i], p["wo"][i], x[at]) if i >= 0 else 0
        return y

    assert relative_error(y[real], outputs(p, exact)[real]) < 1e-5
    along = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape), (p, exact))
    moved = lambda h: outputs(*jax.tree.map(lambda leaf, way: leaf + h * way, (p, exact), along))  # noqa: E731
    slope = np.sum((moved(1e-6) - moved(-1e-6)) / 2e-6 * dy)
    found = sum(jax.tree.leaves(jax.tree.map(lambda g, way: np.sum(g * way), gradients, along)))
    np.testing.assert_allclose(found, slope, rtol=1e-4)


@pytest.mark.parametrize("dispatch", ["gather", "all_to_all"])
def test_dropped_choices_go_nowhere_on_a_mesh(layer_case, dispatch):
    """However tokens come to experts that lie on four devices, the layer computes what one device does."""
    params, x = layer_case
    spared = jnp.asarray(case(0)[4])
    run = lambda compute: jax.jit(lambda params, x: layer(params, x, compute, Balancing(D, 1.0, spared)))(params, x)  # noqa: E731
    whole = run(ComputeConfig())
    mesh = make_mesh(MeshConfig(expert=4), jax.devices()[:4])
    with jax.set_mesh(mesh):
        found = run(ComputeConfig(dispatch=dispatch, dispatch_capacity=4.0))
    assert relative_error(found[0], whole[0]) < 1e-5
    assert found[1].dropped == whole[1].dropped > 5
