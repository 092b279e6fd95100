"""The fused experts and the weight gradient of the C kernels against numpy in float64, forward and backward."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek_kernels import can_fuse_experts, fused_experts, fused_experts_reference, weight_gradient

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


def run(function, x, weights, chosen, wi, wo, dy):
    operands = [jnp.asarray(a, jnp.float32) for a in (x, weights, wi, wo)]
    y, pullback = jax.vjp(lambda x, weights, wi, wo: function(x, weights, chosen, wi, wo), *operands)
    return y, *pullback(jnp.asarray(dy, jnp.float32))


def check(found, right):
    for name, value, expected in zip(("y", "dx", "dweights", "dwi", "dwo"), found, right, strict=True):
        assert value.shape == expected.shape and value.dtype == np.float32
        # Measured below 5e-7 of the norm; sums have up to 450 terms.
        assert np.linalg.norm(value - expected) <= 2e-6 * np.linalg.norm(expected), name


@pytest.mark.parametrize("function", [fused_experts, fused_experts_reference], ids=["fused", "reference"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_value_and_gradients_equal_the_definition(case, function):
    assert can_fuse_experts(*[jnp.zeros(1)] * 3)
    operands = draw(case)
    check(run(function, *operands), definition(*operands))


def test_choices_of_no_expert_add_nothing():
    x, weights, chosen, wi, wo, dy = draw(CASES["broken"])
    chosen[::7, 0], chosen[::5, 1], chosen[3] = -1, len(wi), 1 << 30
    found = run(fused_experts, x, weights, chosen, wi, wo, dy)
    check(found, definition(x, weights, chosen, wi, wo, dy))
    assert not np.any(found[0][3]) and not np.any(found[2][3])


def test_experts_without_tokens_have_no_gradient():
    x, weights, chosen, wi, wo, dy = draw(CASES["whole"])
    chosen[:] = [2, 0]
    found = run(fused_experts, x, weights, chosen, wi, wo, dy)
    check(found, definition(x, weights, chosen, wi, wo, dy))
    assert not np.any(found[3][1]) and not np.any(found[4][3])


def test_gates_far_from_zero():
    """Sigmoids of 0 and 1 to the last place, and what is not finite stays so."""
    x, weights, chosen, wi, wo, dy = draw(CASES["broken"])
    check(run(fused_experts, 200 * x, weights, chosen, wi, wo, dy), definition(200 * x, weights, chosen, wi, wo, dy))
    x[4, 5] = np.nan
    y = run(fused_experts, x, weights, chosen, wi, wo, dy)[0]
    assert np.all(np.isnan(y[4])) and np.all(np.isfinite(np.delete(y, 4, axis=0)))


def test_runs_agree_bit_for_bit():
    """Whichever thread takes which task."""
    operands = draw((2048, 2, 16, 128, 96))
    for first, second in zip(run(fused_experts, *operands), run(fused_experts, *operands), strict=True):
        np.testing.assert_array_equal(first, second)


def test_what_does_not_fit_is_refused_with_its_shapes():
    fused = inspect.unwrap(fused_experts)  # without the tests' own check of shapes
    x, weights, chosen, wi, wo, _ = (jnp.asarray(a) for a in draw(CASES["broken"]))
    with pytest.raises(ValueError, match=r"wo \(5, 20, 32\): expected"):
        fused(x, weights, chosen, wi, wo[:, :, 1:])
    with pytest.raises(ValueError, match=r"weights \(49, 3\).*T=50"):
        fused(x, weights[1:], chosen[1:], wi, wo)
    with pytest.raises(ValueError, match="x is bfloat16"):
        fused(x.astype(jnp.bfloat16), weights, chosen, wi, wo)
    with pytest.raises(ValueError, match="the same rows"):
        inspect.unwrap(weight_gradient)(x, weights[1:])


@given(st.integers(0, 400), st.integers(1, 60), st.integers(1, 70))
def test_weight_gradient(tokens, width, hidden):
    rng = np.random.default_rng(0)
    x, dy = rng.standard_normal((tokens, width)), rng.standard_normal((tokens, hidden))
    found = weight_gradient(jnp.asarray(x, jnp.float32), jnp.asarray(dy, jnp.float32))
    np.testing.assert_allclose(found, x.T @ dy, rtol=0, atol=1e-4)  # sums of up to 400 products of size 1
    half = weight_gradient(jnp.asarray(x, jnp.bfloat16), jnp.asarray(dy, jnp.bfloat16))
    assert half.dtype == jnp.bfloat16
