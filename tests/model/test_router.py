"""The routers of V1, V2 and V3 and the balance loss against the formulas of the facts page, in numpy."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from model import oracle
from model.tiny import V1, V2, V3, config, relative_error

from deepseek_jax.model.router import (
    _terms,
    best_experts,
    count_sequences,
    limit_to_groups,
    most_devices,
    route,
    router_stats,
)
from deepseek_jax.parallel.mesh import MeshConfig, make_mesh
from deepseek_jax.parallel.sharding import named_sharding
from deepseek_kernels import InStack, Target

T, D, E = 20, 6, 8
ROUTERS = {
    "v1": config(V1),
    "v2": config(V2),
    "v3": config(V3),
    "v3_plain_gates": config(V3, norm_topk_prob=False, routed_scaling_factor=1.0),
    "v3_one_group": config(V3, n_group=1, topk_group=1),
    "sigmoid_greedy": config(V3, topk_method="greedy"),
    "softmax_normalised": config(V1, norm_topk_prob=True, routed_scaling_factor=1.5),
}
each_router = pytest.mark.parametrize("tiny", ROUTERS.values(), ids=ROUTERS)


@functools.cache
def compiled(tiny):
    return jax.jit(functools.partial(route, tiny))


def run(tiny, x, w, bias):
    """experts (T K), gates (T K), affinities (T E)."""
    bias = jnp.asarray(bias, jnp.float32) if tiny.topk_method == "noaux_tc" else None
    routing = compiled(tiny)(jnp.asarray(x, jnp.float32), jnp.asarray(w, jnp.float32), bias)
    return tuple(np.asarray(a) for a in (routing.experts_TK, routing.weights_TK, routing.scores_TE))


def check(tiny, x, w, bias):
    experts, weights, scores = run(tiny, x, w, bias)
    for t, token in enumerate(np.asarray(x, np.float64)):
        s = oracle.affinities(tiny, token, np.asarray(w, np.float64))
        chosen = oracle.choose(tiny, s, bias)
        assert experts[t].tolist() == chosen, f"token {t}"
        np.testing.assert_allclose(weights[t], oracle.gates(tiny, s, chosen), rtol=1e-5)
        np.testing.assert_allclose(scores[t], s, rtol=1e-5)


@each_router
@pytest.mark.parametrize("level", [0.0, -3.0], ids=["bias_around_zero", "all_biased_scores_negative"])
def test_router_equals_its_formula(tiny, level):
    """A bias of about -3 makes every biased affinity negative: experts outside the groups must still lose."""
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((T, D)), rng.standard_normal((D, E))
    check(tiny, x, w, level + 0.4 * rng.standard_normal(E))


@each_router
def test_ties_go_to_the_lower_index(tiny):
    """Equal experts within a group, equal groups, and tokens for which all experts are equal."""
    rng = np.random.default_rng(1)
    pair = rng.integers(-2, 3, (D, 4)).astype(float)
    w = np.concatenate([pair[:, [0, 0]], pair[:, [1, 2]], pair[:, [0, 0]], pair[:, [1, 2]]], axis=1)
    x = rng.integers(-1, 2, (T, D)).astype(float)
    x[:2] = 0
    check(tiny, x, w, np.zeros(E))


@given(st.integers(0, 2**31), st.integers(0, 6), st.floats(-4, 4))
def test_v3_on_any_numbers(seed, scale, level):
    rng = np.random.default_rng(seed)
    x, w = rng.standard_normal((T, D)), scale * rng.standard_normal((D, E)) / 3
    check(ROUTERS["v3"], x, w, (level + rng.integers(-3, 4, E) / 4).astype(np.float32).astype(np.float64))


def test_groups_are_scored_by_maximum_in_v2_and_by_the_two_best_in_v3():
    scores = jnp.array([[0.9, 0.0, 0.5, 0.5, 0.6, 0.1, 0.2, 0.2]])
    kept_v2 = limit_to_groups(config(V2, topk_group=2), scores, best=1)[0] > -jnp.inf
    kept_v3 = limit_to_groups(config(V3, topk_group=2), scores, best=2)[0] > -jnp.inf
    assert np.flatnonzero(kept_v2).tolist() == [0, 1, 4, 5]
    assert np.flatnonzero(kept_v3).tolist() == [0, 1, 2, 3]


def test_bias_is_in_no_gate_and_no_gradient():
    tiny, rng = ROUTERS["v3"], np.random.default_rng(2)
    x, w, probe = (
        jnp.asarray(rng.standard_normal(shape), jnp.float32)
        for shape in ((T, D), (D, E), (T, tiny.num_experts_per_tok))
    )
    bias = jnp.asarray(2 * rng.standard_normal(E), jnp.float32)

    def loss(x, w, bias):
        routing = route(tiny, x, w, bias)
        return jnp.sum(routing.weights_TK * probe), routing.experts_TK

    (dx, dw, dbias), chosen = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(x, w, bias)
    assert not np.any(dbias)
    assert np.any(np.asarray(chosen) != run(tiny, x, w, 0 * bias)[0])  # yet it decides who is chosen

    x, w, probe = (np.asarray(a, np.float64) for a in (x, w, probe))
    ux, uw = rng.standard_normal(x.shape), rng.standard_normal(w.shape)

    def line(step):  # the choice stays: gates as a function of the affinities alone
        rows = zip(x + step * ux, np.asarray(chosen), probe, strict=True)
        return sum(p @ oracle.gates(tiny, oracle.affinities(tiny, t, w + step * uw), c) for t, c, p in rows)

    slope = (line(1e-5) - line(-1e-5)) / 2e-5
    np.testing.assert_allclose(np.sum(dx * ux) + np.sum(dw * uw), slope, rtol=1e-4)


def test_logits_are_float32_for_bfloat16_tokens():
    tiny, rng = ROUTERS["v3"], np.random.default_rng(3)
    x = jnp.asarray(rng.standard_normal((T, D)), jnp.bfloat16)
    w, bias = jnp.asarray(rng.standard_normal((D, E)), jnp.float32), jnp.zeros(E)
    routing = route(tiny, x, w, bias)
    s = [oracle.affinities(tiny, t, np.asarray(w, np.float64)) for t in np.asarray(x, np.float64)]
    assert routing.scores_TE.dtype == routing.weights_TK.dtype == jnp.float32
    assert relative_error(routing.scores_TE, s) < 1e-6


# Load and balance

SEGMENTS = np.array([[1, 1, 1, 1, 1, 2, 2, 2, 0, 0], [0, 0, 1, 2, 2, 2, 2, 3, 3, 3]])


def test_products_have_the_highest_precision():
    """A GPU's default is TF32, a TPU's bf16; the gradient's two products inherit what the logits' has."""
    tiny = config(V3)
    x, w, bias = jnp.ones((T, D), jnp.bfloat16), jnp.ones((D, E)), jnp.zeros(E)
    gradient = jax.grad(lambda x, w: jnp.sum(route(tiny, x, w, bias).weights_TK), argnums=(0, 1))
    program = jax.jit(gradient).lower(x, w).as_text()
    products = [line for line in program.splitlines() if "dot_general" in line]
    assert len(products) == 3 and all("precision = [HIGHEST, HIGHEST]" in line for line in products)


def stats_case(tiny, seed=0):
    """Affinities (B S E) and the experts that a strong bias picks, which are not the raw affinities' best."""
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal((*SEGMENTS.shape, E))
    if tiny.scoring == "sigmoid":
        scores = 1 / (1 + np.exp(-logits))
    else:
        scores = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    bias = np.linspace(-1, 1, E)
    chosen = [[oracle.choose(tiny, s, bias) for s in row] for row in scores]
    return scores.astype(np.float32), np.array(chosen, np.int32)


@functools.cache
def compiled_stats(tiny):
    def both(experts, scores, segments):
        value = lambda scores: router_stats(tiny, experts, scores, segments)  # noqa: E731
        return value(scores), jax.grad(lambda scores: value(scores).balance)(scores)

    return jax.jit(both)


def oracle_balance(tiny, scores, chosen):
    total = 0.0
    for row, ids in enumerate(SEGMENTS):
        for segment in set(ids[ids > 0].tolist()):
            mine = ids == segment
            total += oracle.balance(tiny, scores[row][mine], chosen[row][mine].tolist())
    return total


@pytest.mark.parametrize("name", ["v1", "v2", "v3"])
def test_load_and_balance_per_segment_without_padding(name):
    tiny = ROUTERS[name]
    scores, chosen = stats_case(tiny)
    stats, dscores = compiled_stats(tiny)(chosen, scores, SEGMENTS)
    real = SEGMENTS > 0
    np.testing.assert_array_equal(stats.load_E, np.bincount(chosen[real].ravel(), minlength=E))
    expected = oracle_balance(tiny, scores.astype(np.float64), chosen)
    np.testing.assert_allclose(stats.balance, expected, rtol=1e-5)
    np.testing.assert_array_equal(stats.experts_BSK, chosen)

    direction = np.random.default_rng(1).standard_normal(scores.shape)
    line = [oracle_balance(tiny, scores.astype(np.float64) + h * direction, chosen) for h in (1e-5, -1e-5)]
    np.testing.assert_allclose(np.sum(dscores * direction), (line[0] - line[1]) / 2e-5, rtol=1e-4)
    assert not np.any(dscores[~real]) and np.any(dscores[real])


@pytest.mark.parametrize("devices", [2, 4])
@pytest.mark.parametrize("name", ["v1", "v2", "v3"])
def test_losses_over_devices_and_their_gradients(name, devices):
    """V2's, of each segment of packed rows with padding. Groups of two experts, so two devices have two groups each."""
    tiny = ROUTERS[name]
    scores, chosen = stats_case(tiny)
    most = min(devices, tiny.num_experts_per_tok if name == "v1" else tiny.topk_group)
    assert most_devices(tiny, devices) == most

    def losses(scores):
        stats = router_stats(tiny, jnp.asarray(chosen), scores, jnp.asarray(SEGMENTS), devices=devices)
        assert stats.device_balance is not None and stats.communication is not None
        return jnp.stack([stats.device_balance, stats.communication])

    def by_loops(scores):
        total = np.zeros(2)
        for row, ids in enumerate(SEGMENTS):
            for segment in set(ids[ids > 0].tolist()):
                mine = ids == segment
                total += oracle.device_losses(tiny, scores[row][mine], chosen[row][mine].tolist(), devices, most)
        return total

    found, gradients = jax.jit(lambda scores: (losses(scores), jax.jacrev(losses)(scores)))(scores)
    exact = scores.astype(np.float64)
    np.testing.assert_allclose(found, by_loops(exact), rtol=1e-5)
    direction = np.random.default_rng(1).standard_normal(scores.shape)
    line = [by_loops(exact + h * direction) for h in (1e-5, -1e-5)]
    slope = np.sum(gradients * direction, axis=(1, 2, 3))
    np.testing.assert_allclose(slope, (line[0] - line[1]) / 2e-5, rtol=1e-4)
    real = SEGMENTS > 0
    assert not np.any(gradients[:, ~real]) and np.all(np.any(gradients[:, real] != 0, axis=(1, 2)))


def test_even_devices_lose_one_a_sequence():
    """Each token on M=2 of 4 devices, all equally often."""
    tiny = config(V2, num_experts_per_tok=2)
    scores = jnp.full((1, 16, E), 1 / E)
    chosen = jnp.arange(32).reshape(1, 16, 2) * 2 % E
    stats = router_stats(tiny, chosen, scores, jnp.ones((1, 16), jnp.int32), devices=4)
    assert stats.device_balance == pytest.approx(1) and stats.communication == pytest.approx(1)
    assert router_stats(tiny, chosen, scores, jnp.ones((1, 16), jnp.int32)).device_balance is None
    with pytest.raises(ValueError, match="balance_devices=3 does not divide n_routed_experts=8: .* nearest is 2"):
        router_stats(tiny, chosen, scores, jnp.ones((1, 16), jnp.int32), devices=3)


@pytest.mark.parametrize("tiny", [config(net, n_routed_experts=16) for net in (V2, V3)], ids=["v2", "v3"])
@pytest.mark.parametrize("ways", [4, 8], ids=["a device a group", "a node of two devices a group"])
def test_a_token_reaches_as_many_nodes_as_groups(tiny, ways):
    """Experts as a mesh lays them out over its axis ``expert``: those of a group stand on one node. Taken from all
    experts, a token's choices would reach more."""
    mesh = make_mesh(MeshConfig(expert=ways), jax.devices()[:ways])
    weight = named_sharding(mesh, ("experts", "expert_embed", None, "expert_mlp"), (16, 8, 2, 8))
    places = weight.devices_indices_map((16, 8, 2, 8))
    device_of = {e: at for at, d in enumerate(mesh.devices.flat) for e in range(16)[places[d][0]]}
    assert sorted(device_of) == list(range(16))
    rng = np.random.default_rng(0)
    x, w = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((200, D), (D, 16)))
    bias = jnp.asarray(rng.standard_normal(16) / 4, jnp.float32)

    def nodes(tiny):
        chosen = np.asarray(route(tiny, x, w, bias if tiny.topk_method == "noaux_tc" else None).experts_TK)
        return [len({device_of[e] * tiny.n_group // ways for e in row}) for row in chosen.tolist()]

    assert max(nodes(tiny)) == tiny.topk_group
    assert max(nodes(dataclasses.replace(tiny, topk_method="greedy"))) > tiny.topk_group
    assert most_devices(tiny, tiny.n_group) == tiny.topk_group


def test_v3_counts_the_raw_affinities_and_v2_the_chosen_experts():
    v3, v2 = ROUTERS["v3"], ROUTERS["v2"]
    scores, chosen = stats_case(v3)
    other = (chosen + 1) % E
    balance_v3 = [compiled_stats(v3)(c, scores, SEGMENTS)[0].balance for c in (chosen, other)]
    balance_v2 = [compiled_stats(v2)(c, scores, SEGMENTS)[0].balance for c in (chosen, other)]
    assert balance_v3[0] == balance_v3[1] and balance_v2[0] != balance_v2[1]


def test_perfect_balance_is_one_a_sequence():
    """With equal shares and equal counts Σ f P = 1, whatever the length of the sequence."""
    tiny = ROUTERS["v1"]
    scores = np.full((1, 16, E), 1 / E, np.float32)
    chosen = (np.arange(48).reshape(1, 16, 3) % E).astype(np.int32)
    segments = np.array([[1] * 8 + [2] * 8])
    stats = router_stats(tiny, jnp.asarray(chosen), jnp.asarray(scores), jnp.asarray(segments))
    np.testing.assert_allclose(stats.balance, 2, rtol=1e-6)


def test_count_sequences():
    assert count_sequences(jnp.asarray(SEGMENTS)) == 5
    assert count_sequences(jnp.array([[0, 0], [0, 0]])) == 0
    assert count_sequences(jnp.array([[1, 1], [1, 2]])) == 3


def test_what_a_gpu_does_for_few_tokens_is_the_same(monkeypatch):
    """Best experts by comparing, ties and -inf among them, and one token's scores by eight rows."""
    rng = np.random.default_rng(0)
    choice = jnp.asarray(rng.integers(0, 5, (3, 16)), jnp.float32).at[0, :12].set(-jnp.inf)
    x, w = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((1, 32), (32, 16)))
    expected = best_experts(choice, 6), route(config(V1), x, w[:, : config(V1).n_routed_experts], None)
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *operands, cuda, default: cuda(*operands))
    np.testing.assert_array_equal(best_experts(choice, 6), expected[0])
    found = route(config(V1), x, w[:, : config(V1).n_routed_experts], None)
    np.testing.assert_array_equal(found.experts_TK, expected[1].experts_TK)
    np.testing.assert_allclose(found.weights_TK, expected[1].weights_TK, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_gpu_multiplies_many_tokens_in_three_terms_of_a_layer_in_its_stack(dtype):
    """As exact as a product in float32, where it gives other numbers. Gradients are that one's, bit for bit, and so is
    all that is computed with an array."""
    tiny, rng = config(V1), np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((2100, 512)), jnp.bfloat16)
    w = jnp.asarray(rng.standard_normal((512, tiny.n_routed_experts)) / 8, jnp.float32).astype(dtype)
    d_TE = jnp.asarray(rng.standard_normal((len(x), tiny.n_routed_experts)), jnp.float32)

    def scores(stacked, target, x, w):
        weight = InStack(jnp.stack([jnp.full_like(w, jnp.nan), w]), jnp.int32(1)) if stacked else w
        return route(tiny, x, weight, None, target=Target(target)).scores_TE

    def trained(*case):
        def both(x, w):
            y, pullback = jax.vjp(functools.partial(scores, *case), x, w)
            return y, *pullback(d_TE)

        return jax.jit(both)(x, w)

    found, plain, array = (
        jax.jit(functools.partial(scores, *case))(x, w) for case in ((True, "cuda"), (True, "cpu"), (False, "cuda"))
    )
    s = [oracle.affinities(tiny, t, np.asarray(w, np.float64)) for t in np.asarray(x, np.float64)]
    errors = [relative_error(each, s) for each in (found, plain)]
    assert errors[0] < 2 * errors[1] and errors[1] < 1e-6 and np.any(found != plain)
    np.testing.assert_array_equal(array, jax.jit(functools.partial(scores, False, "cpu"))(x, w))
    for stacked in (True, False):
        for one, other in zip(trained(stacked, "cuda"), trained(stacked, "cpu"), strict=True):
            np.testing.assert_array_equal(one, other)


def test_three_terms_are_the_whole_weight():
    """Of numbers of all sizes; by XLA too, which takes casts to bfloat16 and back for nothing."""
    rng = np.random.default_rng(0)
    w = (rng.standard_normal(4096) * 2.0 ** rng.integers(-60, 60, 4096)).astype(np.float32)
    terms = jax.jit(_terms)(w)
    assert all(term.dtype == jnp.bfloat16 for term in terms)
    np.testing.assert_array_equal(sum(np.asarray(term, np.float64) for term in terms), w)
