"""Scores of targets against a plain softmax, and that all logits are never held."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model.tiny import V3, config, relative_error
from train.cases import BATCH, LENGTHS, S, on_device

from deepseek_jax.model import parameters
from deepseek_jax.train.cross_entropy import cross_entropy, score_targets
from deepseek_jax.train.losses import LanguageModelLoss


def plain_scores(hidden, w, targets, temperature):
    """log softmax at the targets, entropy, and d(sum of the former)/d(hidden, w), in float64."""
    hidden, w = np.asarray(hidden, np.float64), np.asarray(w, np.float64)
    logits = hidden @ w / temperature
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    one_hot = np.eye(w.shape[1])[targets]
    d_logits = (one_hot - p) / temperature
    gradients = d_logits @ w.T, np.einsum("bsd,bsw->dw", hidden, d_logits)
    return np.log((p * one_hot).sum(-1)), -(p * np.log(p)).sum(-1), gradients


@pytest.mark.parametrize("chunk", [1, 3, 4, 7, 8, 100])
@pytest.mark.parametrize("temperature", [None, 0.7])
def test_chunked_scores_equal_the_plain_softmax(chunk, temperature):
    rng = np.random.default_rng(chunk)
    hidden = jnp.asarray(rng.standard_normal((2, 7, 5)), jnp.float32)
    w = jnp.asarray(2 * rng.standard_normal((5, 11)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, 11, (2, 7)), jnp.int32)
    divisor = None if temperature is None else jnp.float32([[temperature], [1.0]])

    def total(hidden, w):
        scores = score_targets(hidden, w, targets, chunk=chunk, temperature_B1=divisor)
        return jnp.sum(scores.logprob_BS), scores

    (_, scores), gradients = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(hidden, w)
    by = 1.0 if divisor is None else np.asarray(divisor)[..., None]
    logprob, entropy, expected = plain_scores(hidden, w, targets, by)
    assert scores.logprob_BS.dtype == jnp.float32
    assert relative_error(scores.logprob_BS, logprob) < 1e-6
    assert relative_error(scores.entropy_BS, entropy) < 5e-5
    for gradient, plain in zip(gradients, expected, strict=True):
        assert relative_error(gradient, plain) < 1e-5


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
@pytest.mark.parametrize("dtype, w_dtype", [("float32", "float32"), ("bfloat16", "bfloat16"), ("bfloat16", "float32")])
def test_cross_entropy_and_its_gradient_equal_the_scores(chunk, dtype, w_dtype):
    """Weighted, zero weights included, behind a factor; bfloat16 within its rounding of 2⁻⁸."""
    rng = np.random.default_rng(chunk)
    hidden = jnp.asarray(rng.standard_normal((2, 7, 5)), dtype)
    w = jnp.asarray(2 * rng.standard_normal((5, 11)), jnp.bfloat16).astype(w_dtype)
    targets = jnp.asarray(rng.integers(0, 11, (2, 7)), jnp.int32)
    weights = jnp.asarray(rng.uniform(size=(2, 7)) * rng.integers(0, 2, (2, 7)), jnp.float32)

    def fused(hidden, w):
        return 3 * cross_entropy(hidden, w, targets, weights, chunk)

    def plain(hidden, w):
        return -3 * jnp.sum(jax.nn.log_softmax(hidden @ w)[*np.indices((2, 7)), targets] * weights)

    value, gradients = jax.value_and_grad(fused, argnums=(0, 1))(hidden, w)
    expected, exact = jax.value_and_grad(plain, argnums=(0, 1))(*(x.astype(jnp.float32) for x in (hidden, w)))
    assert relative_error(value, expected) < 1e-6 and relative_error(fused(hidden, w), expected) < 1e-6
    for gradient, right, wanted in zip(gradients, exact, (dtype, w_dtype), strict=True):
        assert gradient.dtype == wanted
        assert relative_error(gradient, right) < (1e-6 if dtype == "float32" else 2**-8)


@pytest.mark.parametrize("dtype, error", [("float32", 1e-6), ("bfloat16", 4e-3)])
@pytest.mark.parametrize("function", ["cross_entropy", "score_targets"])
def test_the_heads_products_against_float64(function, dtype, error):
    """Float32 sums of products in the compute dtype; w's gradient is not rounded to it."""
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.standard_normal((2, 60, 48)), dtype)
    w = jnp.asarray(0.2 * rng.standard_normal((48, 96)), jnp.bfloat16).astype(jnp.float32)
    targets = jnp.asarray(rng.integers(0, 96, (2, 60)), jnp.int32)

    def total(hidden, w):
        if function == "cross_entropy":
            return -cross_entropy(hidden, w, targets, jnp.ones((2, 60)), 16)
        return jnp.sum(score_targets(hidden, w, targets, chunk=16).logprob_BS)

    value, (d_hidden, d_w) = jax.value_and_grad(total, argnums=(0, 1))(hidden, w)
    logprob, _, expected = plain_scores(hidden, w, targets, 1.0)
    assert relative_error(value, logprob.sum()) < 1e-6
    assert (d_hidden.dtype, d_w.dtype) == (dtype, jnp.float32)
    assert relative_error(d_hidden, expected[0]) < error and relative_error(d_w, expected[1]) < error
    assert dtype == "float32" or np.any(d_w != d_w.astype(dtype))


def test_entropy_has_no_gradient():
    hidden, w = jnp.ones((1, 3, 2)), jnp.arange(8.0).reshape(2, 4)
    targets = jnp.zeros((1, 3), jnp.int32)
    entropy = lambda hidden, w: jnp.sum(score_targets(hidden, w, targets, chunk=2).entropy_BS)  # noqa: E731
    assert all(not np.any(g) for g in jax.grad(entropy, argnums=(0, 1))(hidden, w))


def largest_array(jaxpr) -> int:
    """Elements of the largest value that any equation makes, those inside scans and calls included."""
    largest = 0
    for equation in jaxpr.eqns:
        for variable in equation.outvars:
            largest = max(largest, math.prod(getattr(variable.aval, "shape", ())))
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            if hasattr(inner, "eqns"):
                largest = max(largest, largest_array(inner))
    return largest


@pytest.mark.parametrize("chunk, holds_all", [(4, False), (S, True)])
def test_all_logits_are_never_held_at_once(chunk, holds_all):
    """In the loss with MTP and its gradient, for a vocabulary that outweighs everything else."""
    wide = config(V3, num_hidden_layers=2, vocab_size=4096)
    loss = LanguageModelLoss(chunk=chunk, isolate=True)
    params, bias = jax.eval_shape(lambda: parameters.init(wide))
    run = lambda p, b, x: loss(parameters.merge(wide, p, b), x, loss.normalisers(x), jnp.int32(0))  # noqa: E731
    found = largest_array(jax.make_jaxpr(jax.grad(run, has_aux=True))(params, bias, on_device(BATCH)).jaxpr)
    assert (found >= len(LENGTHS) * S * wide.vocab_size) == holds_all
