"""Tokens to experts and back: the layout against a loop, hand-written gradients against plain autodiff."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek_jax.parallel.dispatch import combine_rows, gather_rows, per_token_shard, sort_by_expert
from deepseek_jax.parallel.mesh import MeshConfig, make_mesh

T, K, E, D = 10, 3, 6, 4
sort = jax.jit(sort_by_expert, static_argnames=("experts", "block"))


def draw_experts(rng, tokens=T):
    """K different experts for each token; two experts stay empty."""
    return np.stack([rng.permutation(E - 2)[:K] for _ in range(tokens)]).astype(np.int32)


def layout_by_loop(experts_TK, experts, block):
    """Each expert's choices in token order, filled up to whole blocks."""
    rows, sizes = [], []
    for e in range(experts):
        mine = [t * K + k for t, row in enumerate(experts_TK) for k, chosen in enumerate(row) if chosen == e]
        mine += [experts_TK.size] * (-len(mine) % block)
        rows, sizes = rows + mine, [*sizes, len(mine)]
    return rows, sizes


@pytest.mark.parametrize("block", [1, 4])
@given(seed=st.integers(0, 2**31), used=st.integers(K, E))
def test_layout_equals_a_loop(block, seed, used):
    rng = np.random.default_rng(seed)
    experts = np.stack([rng.permutation(used)[:K] for _ in range(T)]).astype(np.int32)
    layout = sort(experts, experts=E, block=block)
    rows, sizes = layout_by_loop(experts, E, block)
    assert layout.group_sizes_E.tolist() == sizes and layout.block == block
    choices = layout.choice_P.tolist()
    assert len(choices) % block == 0 and len(choices) >= T * K
    assert choices == rows + [T * K] * (len(choices) - len(rows))
    assert [choices[slot] for slot in np.ravel(layout.slot_TK)] == list(range(T * K))


def test_worst_case_fits_the_buffer():
    """The buffer is as long for every routing: all choices on the fewest experts, and one row on each."""
    for experts in (np.tile(np.arange(K), (T, 1)), np.array([[0, 1, 2], [3, 4, 5]])):
        layout = sort(experts.astype(np.int32), experts=E, block=8)
        assert int(jnp.sum(layout.group_sizes_E)) <= layout.choice_P.shape[0]


def numpy_case(block, dtype=np.float32):
    rng = np.random.default_rng(0)
    experts = draw_experts(rng)
    x, y_scale = rng.standard_normal((T, D)).astype(dtype), rng.standard_normal(E).astype(dtype)
    weights, probe = rng.standard_normal((T, K)).astype(np.float32), rng.standard_normal((T, D)).astype(dtype)
    return experts, x, y_scale, weights, probe, sort(experts, experts=E, block=block)


@pytest.mark.parametrize("block", [1, 4])
def test_gather_copies_rows_and_fills_padding_with_the_last_token(block):
    experts, x, *_, layout = numpy_case(block)
    rows = np.asarray(gather_rows(jnp.asarray(x), layout))
    for choice, row in zip(layout.choice_P.tolist(), rows, strict=True):
        np.testing.assert_array_equal(row, x[min(choice // K, T - 1)])


@pytest.mark.parametrize("block", [1, 4])
def test_there_and_back_with_gradients(block):
    """An expert here multiplies by its number: ``out[t] = Σ_k w[t,k] · scale[expert[t,k]] · x[t]²``."""
    experts, x, scale, weights, probe, layout = numpy_case(block)

    def sorted_way(x, weights, scale):
        owner = jnp.repeat(jnp.arange(E), layout.group_sizes_E, total_repeat_length=layout.choice_P.shape[0])
        y = gather_rows(x, layout) ** 2 * scale[owner][:, None]
        return jnp.sum(combine_rows(y, weights, layout) * probe)

    def naive(x, weights, scale):
        return jnp.sum(jnp.einsum("tk,tk,td->td", weights, scale[experts], x**2) * probe)

    arguments = tuple(map(jnp.asarray, (x, weights, scale)))
    value, grads = jax.jit(jax.value_and_grad(sorted_way, (0, 1, 2)))(*arguments)
    right, right_grads = jax.jit(jax.value_and_grad(naive, (0, 1, 2)))(*arguments)
    np.testing.assert_allclose(value, right, rtol=1e-5)
    for grad, expected in zip(grads, right_grads, strict=True):
        np.testing.assert_allclose(grad, expected, rtol=1e-5, atol=1e-6)


def test_combine_ignores_what_padding_rows_hold():
    _, _, _, weights, _, layout = numpy_case(4)
    y = np.random.default_rng(1).standard_normal((layout.choice_P.shape[0], D)).astype(np.float32)
    padding = np.asarray(layout.choice_P) == T * K
    assert padding.any()
    poisoned = np.where(padding[:, None], np.nan, y)
    combined = [combine_rows(jnp.asarray(rows), jnp.asarray(weights), layout) for rows in (y, poisoned)]
    np.testing.assert_array_equal(combined[0], combined[1])
    expected = np.einsum("tkd,tk->td", y[np.asarray(layout.slot_TK)].astype(np.float64), weights)
    np.testing.assert_allclose(combined[0], expected, rtol=1e-5, atol=1e-6)


def test_bfloat16_rows_are_weighted_and_summed_in_float32():
    _, x, _, weights, _, layout = numpy_case(1)
    rows = gather_rows(jnp.asarray(x, jnp.bfloat16), layout)
    out = combine_rows(rows, jnp.asarray(weights), layout)
    assert rows.dtype == out.dtype == jnp.bfloat16
    exact = np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64) * weights.astype(np.float64).sum(1, keepdims=True)
    np.testing.assert_allclose(np.asarray(out, np.float64), exact, rtol=1.01 * 2**-8, atol=1e-6)


@pytest.mark.parametrize(
    "mesh",
    [MeshConfig(), MeshConfig(fsdp=2, context=2, tensor=2)],
    ids=["data8", "data1_fsdp2_context2_tensor2"],
)
def test_each_device_computes_its_own_tokens(mesh):
    """A toy of an expert layer, linear in F: value and gradients on the mesh are those of the plain call."""
    rng = np.random.default_rng(0)
    x, weights = rng.standard_normal((8, 2, D)), rng.standard_normal((8, 2, K))
    experts = rng.integers(0, E, (8, 2, K)).astype(np.int32)
    wi, wo = rng.standard_normal((E, D, 2, 6)), rng.standard_normal((E, 6, D))
    arrays = [jnp.asarray(a, jnp.float32) for a in (x, weights, wi, wo)]

    def compute(x, weights, experts, wi, wo):
        h = jnp.einsum("bsd,bskdf->bskf", x, wi[experts][..., 0, :]) ** 2
        return jnp.einsum("bskf,bsk,bskfd->bsd", h, weights, wo[experts])

    def loss(x, weights, wi, wo, run):
        return jnp.sum(jnp.sin(run(x, weights, jnp.asarray(experts), wi, wo)))

    def grads(run):
        return jax.jit(jax.value_and_grad(functools.partial(loss, run=run), (0, 1, 2, 3)))(*arrays)

    value, right = grads(compute)
    with jax.set_mesh(make_mesh(mesh)):
        on_mesh, mesh_grads = grads(functools.partial(per_token_shard, compute))
    np.testing.assert_allclose(on_mesh, value, rtol=1e-4)
    for grad, expected in zip(mesh_grads, right, strict=True):
        np.testing.assert_allclose(grad, expected, rtol=1e-4, atol=1e-4 * float(jnp.abs(expected).max()))
