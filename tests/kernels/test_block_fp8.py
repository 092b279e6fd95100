"""FP8 blocks against a numpy transcription of the released format, ragged edges included."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from deepseek_kernels import BlockScaled, dequantise, dequantise_reference, quantise
from deepseek_kernels.block_fp8 import scales_shape

SHAPES = [(128, 256), (130, 255), (1, 1), (300, 64)]


def blocks(shape):
    for i in range(0, shape[0], 128):
        for j in range(0, shape[1], 128):
            yield (i // 128, j // 128), (slice(i, i + 128), slice(j, j + 128))


def draw(shape, seed=0):
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(shape) * np.exp(rng.standard_normal(shape))).astype(np.float32)


@pytest.mark.parametrize("shape", SHAPES)
def test_quantise_is_the_formula(shape):
    w = draw(shape)
    w[: min(128, shape[0]), :128] *= 0 if shape[0] == 300 else 1  # a block of zeros
    values, scales = quantise(jnp.asarray(w))
    assert values.dtype == ml_dtypes.float8_e4m3fn and values.shape == shape and scales.dtype == jnp.float32
    for at, part in blocks(shape):
        largest = np.abs(w[part]).max()
        scale = largest / np.float32(448) if largest else np.float32(1)
        np.testing.assert_allclose(scales[at], scale, rtol=1e-6)
        error = np.abs(np.asarray(values[part], np.float32) * np.asarray(scales[at]) - w[part])
        assert np.all(error <= np.abs(w[part]) * 2**-4 + scale * 2**-10)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_dequantise_is_the_formula(shape, dtype):
    bits = np.random.default_rng(1).integers(0, 256, shape, np.uint8)
    bits[bits & 0x7F == 0x7F] = 0  # NaN
    w8 = bits.view(ml_dtypes.float8_e4m3fn)
    scales = np.abs(draw((-(-shape[0] // 128), -(-shape[1] // 128)), 2))
    expected = np.empty(shape, np.float32)
    for at, part in blocks(shape):
        expected[part] = w8[part].astype(np.float32) * scales[at]
    expected = expected.astype(dtype)
    for function in (dequantise, dequantise_reference):
        np.testing.assert_array_equal(function(jnp.asarray(w8), jnp.asarray(scales), dtype), expected)


def test_quantising_again_keeps_every_value():
    """The largest of a block is 448 at once and for all, so the values do not drift."""
    once = quantise(jnp.asarray(draw((130, 255))))
    again = quantise(dequantise(*once, dtype=jnp.float32))
    np.testing.assert_array_equal(np.asarray(again[0]).view(np.uint8), np.asarray(once[0]).view(np.uint8))


def test_values_at_the_ends_of_float32():
    tiny, huge = jnp.full((2, 2), 1e-45, jnp.float32), jnp.full((2, 2), 3e38, jnp.float32)
    for w in (tiny, huge):
        assert bool(jnp.all(jnp.isfinite(dequantise(*quantise(w), dtype=jnp.float32))))


def test_scales_must_fit():
    with pytest.raises(ValueError, match=r"\(130, 255\) need scales of \(2, 2\), got \(1, 2\)"):
        dequantise(jnp.zeros((130, 255), jnp.float8_e4m3fn), jnp.ones((1, 2)))


def test_any_layout_indexing_and_scan():
    """Stacked, with heads split and two halves side by side: as each matrix by itself."""
    groups = ((1, 128), (1, 1), (2, 128))
    shape = (3, 150, 2, 5, 30)
    assert scales_shape(shape, groups) == (3, 2, 2, 2)
    values = jnp.asarray(draw(shape)).astype(jnp.float8_e4m3fn)
    scales = jnp.asarray(np.abs(draw((3, 2, 2, 2), 3)))
    scaled = BlockScaled(values, scales, groups)
    assert scaled.shape == shape and scaled.dtype == jnp.float8_e4m3fn and scaled[...] is scaled
    whole = scaled.astype(jnp.float32)
    for layer in range(3):
        for half in range(2):
            expected = dequantise_reference(
                values[layer, :, half].reshape(150, 150), scales[layer, :, half], jnp.float32
            )
            np.testing.assert_array_equal(whole[layer, :, half].reshape(150, 150), expected)
        np.testing.assert_array_equal(scaled[layer].astype(jnp.float32), whole[layer])
    scanned = jax.lax.scan(lambda carry, layer: (carry, layer.astype(jnp.float32)), 0, scaled)[1]
    np.testing.assert_array_equal(scanned, whole)
    with pytest.raises(IndexError, match="belongs to the scales' blocks"):
        scaled[0][0]
