"""Rotary positions: the frequencies of YaRN and Llama 3.1, the two pairings, and the softmax scale."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from model import oracle
from model.tiny import V2_LITE, config, relative_error

from deepseek_jax.config import ModelConfig, RopeScaling
from deepseek_jax.model.rope import inverse_frequencies, rotary_tables, rotate, softmax_scale, yarn_mscale

YARN = RopeScaling("yarn", factor=40.0, original_max_position_embeddings=4096, beta_fast=32.0, beta_slow=1.0)
LLAMA = RopeScaling(
    "llama3", factor=8.0, original_max_position_embeddings=8192, low_freq_factor=1.0, high_freq_factor=4.0
)


def test_yarn_frequencies_of_the_released_models():
    plain = 10000.0 ** (-np.arange(32) / 32)
    ratio = inverse_frequencies(64, 10000.0, YARN) / plain
    np.testing.assert_allclose(ratio[:11], 1, rtol=1e-12)
    np.testing.assert_allclose(ratio[23:], 1 / 40, rtol=1e-12)
    blended = [(1 - ramp) + ramp / 40 for ramp in (np.arange(11, 23) - 10) / 13]
    np.testing.assert_allclose(ratio[11:23], blended, rtol=1e-12)


@pytest.mark.parametrize(
    "scaling", [YARN, LLAMA, RopeScaling(), V2_LITE["rope_scaling"], RopeScaling("yarn", 4.0, 16, 2.0, 1.9)]
)
@pytest.mark.parametrize(("width", "theta"), [(64, 10000.0), (128, 500000.0), (4, 10000.0)])
def test_frequencies_equal_the_written_rule(scaling, width, theta):
    np.testing.assert_allclose(
        inverse_frequencies(width, theta, scaling), oracle.frequencies(width, theta, scaling), rtol=1e-12
    )


def test_llama3_keeps_short_waves_and_divides_long_ones():
    ratio = inverse_frequencies(128, 500000.0, LLAMA) * 500000.0 ** (np.arange(64) / 64)
    assert ratio[0] == 1 and ratio[-1] == pytest.approx(1 / 8)
    assert np.all(np.diff(ratio) <= 1e-12) and np.any((ratio > 0.2) & (ratio < 0.9))


def test_mscale_and_softmax_scales_of_the_released_models():
    assert yarn_mscale(40, 1.0) == pytest.approx(1.3688879, abs=1e-7)
    assert yarn_mscale(40, 0.707) == pytest.approx(1.2608038, abs=1e-7)
    assert yarn_mscale(1.0, 1.0) == yarn_mscale(0.5, 1.0) == 1.0
    heads: dict[str, Any] = dict(qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128)

    def scale(**scaling):
        return softmax_scale(ModelConfig(**heads, rope_scaling=RopeScaling(**scaling)))

    assert scale() == pytest.approx(0.0721688, abs=1e-7)
    assert scale(type="yarn", factor=40.0) == pytest.approx(0.1352338, abs=1e-7)
    assert scale(type="yarn", factor=40.0, mscale=0.707, mscale_all_dim=0.707) == pytest.approx(0.1147214, abs=1e-7)
    assert scale(type="yarn", factor=40.0, mscale_all_dim=0.0) == pytest.approx(0.0721688, abs=1e-7)


def turn(config, x, positions):
    """x (S H R) at these positions, through the tables."""
    tables = rotary_tables(config, jnp.asarray(positions, jnp.int32)[None])
    return np.asarray(rotate(jnp.asarray(x, jnp.float32)[None], tables, interleave=config.rope_interleave)[0])


@pytest.mark.parametrize("interleave", [True, False])
@pytest.mark.parametrize("scaling", [RopeScaling(), V2_LITE["rope_scaling"]], ids=["plain", "yarn_amplitude"])
def test_rotation_equals_complex_multiplication(interleave, scaling):
    tiny = config(qk_rope_head_dim=8, rope_interleave=interleave, rope_scaling=scaling)
    x, positions = np.random.default_rng(0).standard_normal((4, 3, 8)), [0, 5, 2, 300]
    expected = [[oracle.rope(tiny, head, t) for head in row] for row, t in zip(x, positions, strict=True)]
    # Angles are float32: 300 radians are known to 300 · 2⁻²⁴.
    assert relative_error(turn(tiny, x, positions), expected) < 2e-5


def test_both_pairings_agree_under_the_permutation():
    """Half-split of the de-interleaved vector is the de-interleaved result (facts 2.3: 0, 2, …, 1, 3, …)."""
    width = 8
    order = [*range(0, width, 2), *range(1, width, 2)]
    x, positions = np.random.default_rng(0).standard_normal((5, 2, width)), [3, 0, 9, 1, 50]
    interleaved = turn(config(qk_rope_head_dim=width), x, positions)
    halves = turn(config(qk_rope_head_dim=width, rope_interleave=False), x[..., order], positions)
    np.testing.assert_allclose(halves, interleaved[..., order], atol=1e-6)


def test_dot_products_depend_on_the_distance_only():
    tiny = config(qk_rope_head_dim=8)
    q, k = np.random.default_rng(0).standard_normal((2, 1, 1, 8))
    near = [np.sum(turn(tiny, q, [s + 7]) * turn(tiny, k, [s])) for s in (0, 4, 40)]
    np.testing.assert_allclose(near, near[0], rtol=1e-4)
    assert abs(np.sum(turn(tiny, q, [9]) * turn(tiny, k, [0])) - near[0]) > 1e-2


def test_bfloat16_input_is_turned_in_float32():
    tiny = config(qk_rope_head_dim=8)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 1, 1, 8)), jnp.bfloat16)
    turned = rotate(x, rotary_tables(tiny, jnp.array([[100]])), interleave=True)
    assert turned.dtype == jnp.bfloat16
    exact = oracle.rope(tiny, np.asarray(x[0, 0, 0], np.float64), 100)
    np.testing.assert_allclose(np.asarray(turned[0, 0, 0], np.float64), exact, rtol=1.01 * 2**-8, atol=2e-5)
