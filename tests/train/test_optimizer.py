"""The learning-rate shape and AdamW against numpy transcriptions, and what is decayed."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from model.tiny import QWEN, relative_error, weights
from model.tiny import config as model_config
from train.cases import TINY

from deepseek_jax.train.optimizer import OptimizerConfig, guarded, learning_rate, make_optimizer


def v3_rate(tokens: float, warm: float) -> float:
    """V3 section 4.2 in trillions of tokens: 2.2e-4 to 10T, cosine to 2.2e-5 over 4.3T, 333B at that, 7.3e-6."""
    if tokens < 10:
        rate = 2.2e-4
    elif tokens < 14.3:
        rate = 2.2e-5 + (2.2e-4 - 2.2e-5) * (1 + np.cos(np.pi * (tokens - 10) / 4.3)) / 2
    elif tokens < 14.633:
        rate = 2.2e-5
    else:
        rate = 7.3e-6
    return rate * min(1.0, warm)


@given(st.integers(0, 147_999))
def test_the_default_shape_is_v3s(step):
    rate = learning_rate(OptimizerConfig(), 148_000)
    # Hundred steps per 10 billion tokens; at the joints both sides are close or the step is not drawn.
    if step not in (100_000, 143_000, 146_330):
        assert float(np.asarray(rate(jnp.int32(step)))) == pytest.approx(
            v3_rate(step / 10_000, (step + 1) / 2000), rel=2e-4
        )


def test_warm_up_is_linear_and_reaches_the_peak():
    config = OptimizerConfig(peak_lr=1.0, warmup_steps=4, constant_until=1.0, cosine_until=1.0)
    rates = [np.asarray(learning_rate(config, 10)(jnp.int32(step))) for step in range(10)]
    np.testing.assert_allclose(rates, [0.25, 0.5, 0.75] + [1.0] * 7, rtol=1e-6)
    plain = OptimizerConfig(peak_lr=1.0, warmup_steps=0, constant_until=0.0, cosine_until=1.0, end_ratio=0.0)
    rates = [np.asarray(learning_rate(plain, 8)(jnp.int32(step))) for step in range(7)]
    np.testing.assert_allclose(rates, (1 + np.cos(np.pi * np.arange(7) / 8)) / 2, rtol=1e-5)


CONFIG = OptimizerConfig(
    peak_lr=0.01, warmup_steps=2, constant_until=1.0, cosine_until=1.0, weight_decay=0.3, clip_norm=2.0
)


def decays(path: tuple) -> bool:
    """Norm gains and biases do not decay."""
    names = [key.key for key in path]
    return names[-1] not in ("gain", "b") and not names[-1].endswith("bias")


def adamw(params, gradients, config, rates):
    """Three lines of the AdamW paper (algorithm 2) after clipping by the global norm, for each step's gradients."""
    m = jax.tree.map(np.zeros_like, params)
    v = jax.tree.map(np.zeros_like, params)
    for t, (gradient, rate) in enumerate(zip(gradients, rates, strict=True), start=1):
        norm = np.sqrt(sum(np.sum(g.astype(np.float64) ** 2) for g in jax.tree.leaves(gradient)))
        scale = min(1.0, config.clip_norm / norm)
        gradient = jax.tree.map(lambda g, scale=scale: g * scale, gradient)
        m = jax.tree.map(lambda m, g: config.b1 * m + (1 - config.b1) * g, m, gradient)
        v = jax.tree.map(lambda v, g: config.b2 * v + (1 - config.b2) * g**2, v, gradient)

        def move(path, p, m, v, t=t, rate=rate):
            step = m / (1 - config.b1**t) / (np.sqrt(v / (1 - config.b2**t)) + config.eps)
            return p - rate * (step + config.weight_decay * decays(path) * p)

        params = jax.tree_util.tree_map_with_path(move, params, m, v)
    return params


@pytest.mark.parametrize("tiny", [TINY, model_config(QWEN)], ids=["v3", "biases_tied"])
def test_clipped_adamw_equals_numpy(tiny):
    params = jax.tree.map(np.asarray, weights(tiny)[0])
    rng = np.random.default_rng(0)
    sizes = (0.01, 1.0, 0.1)  # the second is clipped
    gradients = [
        jax.tree.map(lambda p, size=size: (size * rng.standard_normal(p.shape)).astype(np.float32), params)
        for size in sizes
    ]
    optimizer = make_optimizer(CONFIG, tiny, 10)

    @jax.jit
    def update(params, state, gradient):
        updates, state = optimizer.update(gradient, state, params)
        return jax.tree.map(jnp.add, params, updates), state

    found, state = params, optimizer.init(params)
    for gradient in gradients:
        found, state = update(found, state, gradient)
    expected = adamw(params, gradients, CONFIG, [0.005, 0.01, 0.01])
    jax.tree.map(lambda a, b: np.testing.assert_array_less(relative_error(a, b), 1e-6), found, expected)


@pytest.mark.parametrize("ours", [True, False])
def test_a_guarded_optimizer_keeps_its_state_where_it_is_told_to(ours):
    """Ours, whose moments are written in place, and any of optax's."""
    optimizer = make_optimizer(CONFIG, TINY, 10) if ours else guarded(optax.adam(0.01))
    params = weights(TINY)[0]
    update = jax.jit(optimizer.update, donate_argnums=1)
    state = update(params, optimizer.init(params), params, finite=True)[1]
    kept = jax.device_get(state)
    for gradients in (params, jax.tree.map(lambda leaf: leaf * jnp.nan, params)):
        state = update(gradients, state, params, finite=False)[1]
        jax.tree.map(np.testing.assert_array_equal, state, kept)
    moved = update(params, state, params, finite=True)[1]
    jax.tree.map(lambda new, old: np.testing.assert_(np.any(new != old)), moved, kept)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"peak_lr": 0.0}, "peak_lr=0.0"),
        ({"clip_norm": -1.0}, "clip_norm=-1.0"),
        ({"constant_until": 0.9, "cosine_until": 0.5}, "constant_until=0.9 and cosine_until=0.5"),
        ({"peak_lr": "fast"}, "peak_lr='fast'.*float"),
        ({"warmup_steps": 1.5}, "warmup_steps=1.5.*int"),
    ],
)
def test_what_makes_no_sense_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**fields)
