"""Rotary position embedding, YaRN and Llama 3.1's stretching."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from deepseek_jax.config import ModelConfig, RopeScaling


def yarn_mscale(factor: float, mscale: float) -> float:
    """``0.1 · mscale · ln(factor) + 1`` above factor 1 (YaRN's temperature, V2 section 3.1.4)."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def inverse_frequencies(width: int, theta: float, scaling: RopeScaling) -> np.ndarray:
    """Angle per position of each of the ``width / 2`` rotated pairs, float64.

    YaRN: with ``corr(n) = width · ln(original / 2πn) / (2 ln theta)``, pairs up to ``⌊corr(beta_fast)⌋`` keep their
    frequency, pairs from ``⌈corr(beta_slow)⌉`` on are divided by ``factor``, and those between are blended.
    """
    freq = theta ** (-np.arange(0, width, 2, dtype=np.float64) / width)
    original = scaling.original_max_position_embeddings
    if scaling.type == "yarn":

        def corr(turns: float) -> float:
            return width * math.log(original / (2 * math.pi * turns)) / (2 * math.log(theta))

        low = max(math.floor(corr(scaling.beta_fast)), 0)
        high = min(math.ceil(corr(scaling.beta_slow)), width - 1)
        ramp = np.clip((np.arange(width // 2) - low) / ((high - low) or 0.001), 0, 1)
        return freq * (1 - ramp) + freq / scaling.factor * ramp
    if scaling.type == "llama3":
        low_factor, high_factor = scaling.low_freq_factor, scaling.high_freq_factor
        wavelength = 2 * np.pi / freq
        smooth = np.clip((original / wavelength - low_factor) / (high_factor - low_factor), 0, 1)
        return (1 - smooth) * freq / scaling.factor + smooth * freq
    return freq


def softmax_scale(config: ModelConfig) -> float:
    """``head width^-0.5``, times ``yarn_mscale(factor, mscale_all_dim)²`` under YaRN (MLA only)."""
    if config.attention == "gqa":
        return config.head_dim**-0.5
    scale = (config.qk_nope_head_dim + config.qk_rope_head_dim) ** -0.5
    scaling = config.rope_scaling
    if scaling.type == "yarn" and scaling.mscale_all_dim:
        scale *= yarn_mscale(scaling.factor, scaling.mscale_all_dim) ** 2
    return scale


def rotary_tables(
    config: ModelConfig, positions_BS: Int[Array, "B S"]
) -> tuple[Float[Array, "B S 1 R2"], Float[Array, "B S 1 R2"]]:
    """Cosines and sines of each position's R/2 angles, float32, with an axis for the heads."""
    scaling = config.rope_scaling
    freq = jnp.asarray(inverse_frequencies(config.rope_dim, config.rope_theta, scaling), jnp.float32)
    angles = positions_BS.astype(jnp.float32)[:, :, None, None] * freq
    amplitude = 1.0
    if scaling.type == "yarn":
        amplitude = yarn_mscale(scaling.factor, scaling.mscale) / yarn_mscale(scaling.factor, scaling.mscale_all_dim)
    return jnp.cos(angles) * amplitude, jnp.sin(angles) * amplitude


def rotate(x_BSHR: Float[Array, "B S H R"], tables, *, interleave: bool) -> Float[Array, "B S H R"]:
    """Turn each pair of ``x`` by its angle. Pairs are neighbours (DeepSeek V2, V3) or the two halves (V1, Llama)."""
    cos, sin = tables
    x32 = x_BSHR.astype(jnp.float32)
    if interleave:
        pairs = x32.reshape(*x32.shape[:-1], -1, 2)
        a, b = pairs[..., 0], pairs[..., 1]
        turned = jnp.stack([a * cos - b * sin, a * sin + b * cos], axis=-1).reshape(x32.shape)
    else:
        a, b = jnp.split(x32, 2, axis=-1)
        turned = jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)
    return turned.astype(x_BSHR.dtype)
