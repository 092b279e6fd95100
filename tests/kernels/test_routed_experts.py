"""The routed experts in every implementation, and the C weight gradient, against numpy in float64."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek_kernels import BlockScaled, InStack, Target, routed_experts, weight_gradient
from deepseek_kernels.block_fp8 import FP8, scales_shape
from deepseek_kernels.experts_few import lay_out
from deepseek_kernels.experts_sorted import sort_by_expert
from deepseek_kernels.grouped_blocks import groups

CASES = {  # tokens, K, experts, D, F: whole and broken vectors, tiles and tasks
    "whole": (64, 2, 4, 64, 32),
    "broken": (50, 3, 5, 33, 20),
    "one_token": (1, 2, 4, 16, 8),
    "long_group": (450, 1, 2, 48, 17),
}


def draw(case):
    tokens, top, experts, width, hidden = case
    rng = np.random.default_rng(0)
    x, dy = rng.standard_normal((2, tokens, width))
    weights = rng.standard_normal((tokens, top))
    chosen = np.stack([rng.permutation(experts)[:top] for _ in range(tokens)]).astype(np.int32)
    wi = rng.standard_normal((experts, width, 2, hidden)) / width**0.5
    wo = rng.standard_normal((experts, hidden, width)) / hidden**0.5
    return x, weights, chosen, wi, wo, dy


def definition(x, weights, chosen, wi, wo, dy):
    """Choice after choice: y and the gradients of Σ y · dy in x, weights, wi and wo."""
    y, dx, dweights, dwi, dwo = (np.zeros(a.shape) for a in (x, x, weights, wi, wo))
    for t, k in np.ndindex(chosen.shape):
        e, weight = chosen[t, k], weights[t, k]
        if not 0 <= e < len(wi):
            continue
        gate, up = x[t] @ wi[e, :, 0], x[t] @ wi[e, :, 1]
        s = 1 / (1 + np.exp(np.minimum(-gate, 700)))
        h = gate * s * up
        y[t] += weight * (h @ wo[e])
        dh = wo[e] @ dy[t]
        dweights[t, k] = h @ dh
        dwo[e] += weight * np.outer(h, dy[t])
        dgate, dup = weight * dh * up * s * (1 + gate * (1 - s)), weight * dh * gate * s
        dwi[e] += np.stack([np.outer(x[t], dgate), np.outer(x[t], dup)], axis=1)
        dx[t] += wi[e, :, 0] @ dgate + wi[e, :, 1] @ dup
    return y, dx, dweights, dwi, dwo


IMPLEMENTATIONS = ["fused", "sorted", "plain"]


@functools.cache
def compiled(implementation, grouped):
    def both(x, weights, chosen, wi, wo, dy):
        function = functools.partial(routed_experts, implementation=implementation, grouped=grouped)
        y, pullback = jax.vjp(lambda x, weights, wi, wo: function(x, weights, chosen, wi, wo), x, weights, wi, wo)
        return y, *pullback(dy)

    return jax.jit(both)


def run(implementation, x, weights, chosen, wi, wo, dy, grouped="auto"):
    x, weights, wi, wo, dy = (jnp.asarray(a, jnp.float32) for a in (x, weights, wi, wo, dy))
    return compiled(implementation, grouped)(x, weights, jnp.asarray(chosen), wi, wo, dy)


def check(found, right):
    for name, value, expected in zip(("y", "dx", "dweights", "dwi", "dwo"), found, right, strict=True):
        assert value.shape == expected.shape and value.dtype == np.float32
        # Measured below 5e-7 of the norm; sums have up to 450 terms.
        assert np.linalg.norm(value - expected) <= 2e-6 * np.linalg.norm(expected), name


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_value_and_gradients_equal_the_definition(case, implementation):
    operands = draw(case)
    check(run(implementation, *operands), definition(*operands))


@pytest.mark.parametrize("grouped", ["c", "blocks", "ragged_dot"])
def test_choices_of_no_expert_add_nothing(grouped):
    """In any implementation, whatever lies in the buffer beside the experts' rows."""
    x, weights, chosen, wi, wo, dy = draw(CASES["broken"])
    chosen[::7, 0], chosen[::5, 1], chosen[3] = -1, len(wi), 1 << 30
    right = definition(x, weights, chosen, wi, wo, dy)
    for implementation in IMPLEMENTATIONS if grouped == "c" else ["sorted"]:
        found = run(implementation, x, weights, chosen, wi, wo, dy, grouped)
        check(found, right)
        assert not np.any(found[0][3]) and not np.any(np.asarray(found[2])[right[2] == 0])


def test_no_choice_of_any_expert():
    x, weights, chosen, wi, wo, dy = draw(CASES["whole"])
    for implementation in IMPLEMENTATIONS:
        found = run(implementation, x, weights, np.full_like(chosen, -1), wi, wo, dy)
        assert not any(np.any(part) for part in found)


def test_weights_are_taken_as_they_are_stored():
    """bfloat16 tokens with float32 masters, a layer of a stack, scaled blocks: sorted, as on an accelerator."""
    x, weights, chosen, wi, wo, dy = (jnp.asarray(a) for a in draw(CASES["whole"]))
    x, dy = x.astype(jnp.bfloat16), dy.astype(jnp.bfloat16)
    cast = [np.asarray(w.astype(jnp.bfloat16), np.float32) for w in (wi, wo)]
    x64, weights64, dy64 = (np.asarray(a, np.float64) for a in (x, weights, dy))
    right = definition(x64, weights64, chosen, cast[0], cast[1], dy64)
    both = compiled("sorted", "blocks")
    found = both(x, weights, chosen, wi, wo, dy)
    assert [part.dtype.name for part in found] == ["bfloat16", "bfloat16", "float32", "float32", "float32"]
    for value, expected in zip(found, right, strict=True):
        assert np.linalg.norm(np.asarray(value, np.float64) - expected) <= 2**-7 * np.linalg.norm(expected)
    stacks = [InStack(jnp.stack([0 * w, w]), jnp.int32(1)) for w in (wi, wo)]
    np.testing.assert_array_equal(both(x, weights, chosen, *stacks, dy)[0], found[0])
    groups = ((1, 128), (1, 1), (1, 128)), ((1, 128), (1, 128))
    for implementation in IMPLEMENTATIONS:
        tokens = x.astype(jnp.float32) if implementation == "fused" else x
        scaled = [_scaled(w, g) for w, g in zip((wi, wo), groups, strict=True)]
        function = functools.partial(routed_experts, implementation=implementation, grouped="blocks")
        y, pullback = jax.vjp(lambda x, function=function: function(x, weights, chosen, *scaled), tokens)  # noqa: B023
        plain = function(tokens, weights, chosen, *(w.astype(tokens.dtype) for w in scaled))
        np.testing.assert_allclose(np.asarray(y, np.float32), np.asarray(plain, np.float32), atol=1e-6)
        assert np.all(np.isfinite(np.asarray(pullback(y)[0], np.float32)))


def _scaled(w, groups):
    return BlockScaled((64 * w).astype(FP8), jnp.full(scales_shape(w.shape, groups), 1 / 64), groups)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_sorted_program_holds_no_row_of_every_choice_beside_its_buffers(dtype):
    """(T, K, D) in any dtype, forward and backward."""
    T, K, E, D, F = 64, 4, 8, 24, 16
    shapes = ((T, D), dtype), ((T, K), jnp.float32), ((T, K), jnp.int32), ((E, D, 2, F), dtype), ((E, F, D), dtype)
    operands = [jax.ShapeDtypeStruct(*shape) for shape in shapes]

    def loss(x, weights, chosen, wi, wo):
        return jnp.sum(routed_experts(x, weights, chosen, wi, wo, target=Target("tpu")).astype(jnp.float32))

    text = str(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 3, 4)))(*operands))
    assert f"[{T},{K},{D}]" not in text and f"[{T},{D}]" in text


def test_experts_without_tokens_have_no_gradient():
    x, weights, chosen, wi, wo, dy = draw(CASES["whole"])
    chosen[:] = [2, 0]
    found = run("fused", x, weights, chosen, wi, wo, dy)
    check(found, definition(x, weights, chosen, wi, wo, dy))
    assert not np.any(found[3][1]) and not np.any(found[4][3])


def test_gates_far_from_zero():
    """Sigmoids of 0 and 1 to the last place, and what is not finite stays so."""
    x, weights, chosen, wi, wo, dy = draw(CASES["broken"])
    check(run("fused", 200 * x, weights, chosen, wi, wo, dy), definition(200 * x, weights, chosen, wi, wo, dy))
    x[4, 5] = np.nan
    y = run("fused", x, weights, chosen, wi, wo, dy)[0]
    assert np.all(np.isnan(y[4])) and np.all(np.isfinite(np.delete(y, 4, axis=0)))


def test_runs_agree_bit_for_bit():
    """Whichever thread takes which task."""
    operands = draw((2048, 2, 16, 128, 96))
    for first, second in zip(run("fused", *operands), run("fused", *operands), strict=True):
        np.testing.assert_array_equal(first, second)


def test_what_does_not_fit_is_refused_with_its_shapes():
    fused = functools.partial(
        inspect.unwrap(routed_experts), implementation="fused"
    )  # without the tests' own check of shapes
    x, weights, chosen, wi, wo, _ = (jnp.asarray(a) for a in draw(CASES["broken"]))
    with pytest.raises(ValueError, match=r"wo \(5, 20, 32\): expected"):
        fused(x, weights, chosen, wi, wo[:, :, 1:])
    with pytest.raises(ValueError, match=r"weights \(49, 3\).*T=50"):
        fused(x, weights[1:], chosen[1:], wi, wo)
    with pytest.raises(ValueError, match="'fused' of routed_experts cannot run.*float32, not bfloat16"):
        fused(x.astype(jnp.bfloat16), weights, chosen, wi, wo)


@given(st.integers(0, 400), st.integers(1, 60), st.integers(1, 70))
def test_weight_gradient(tokens, width, hidden):
    rng = np.random.default_rng(0)
    x, dy = rng.standard_normal((tokens, width)), rng.standard_normal((tokens, hidden))
    found = weight_gradient(jnp.asarray(x, jnp.float32), jnp.asarray(dy, jnp.float32))
    np.testing.assert_allclose(found, x.T @ dy, rtol=0, atol=1e-4)  # sums of up to 400 products of size 1


@pytest.mark.parametrize(("tokens", "top", "experts"), [(64, 6, 64), (5, 3, 7), (40, 4, 8)])
def test_few_choices_are_laid_out_as_many_are(tokens, top, experts):
    rng = np.random.default_rng(0)
    chosen = np.stack([rng.permutation(experts)[:top] for _ in range(tokens)]).astype(np.int32)
    chosen[::3, 0], chosen[1::4, 1] = -1, experts
    layout, blocks = lay_out(jnp.asarray(chosen), experts, block=16)
    right = sort_by_expert(jnp.asarray(chosen), experts, block=16)
    np.testing.assert_array_equal(layout.slot_TK, right.slot_TK)
    np.testing.assert_array_equal(layout.choice_P, right.choice_P)
    np.testing.assert_array_equal(blocks[:-1], groups(right.group_sizes_E, len(right.choice_P), 16))
    assert blocks[-1] == sum(right.group_sizes_E) // 16
