"""cuDNN's causal attention against the definition: on a GPU with ``TEST_ON=cuda``; elsewhere that it is lowered."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_kernels import Target, Visible, gqa_attention, mla_attention
from deepseek_kernels.attention import attention_reference

HOPPER = Target("cuda", "9.0", 132)


def draw(dtype, size, heads, groups, key_width, value_width):
    shapes = ((2, size, heads, key_width), (2, size, groups, key_width), (2, size, groups, value_width))
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v = (jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=False))
    return q, k, v, jax.random.normal(keys[3], (2, size, heads, value_width), dtype)


def both(attention, dout, *inputs):
    out, pullback = jax.vjp(attention, *inputs)
    return out, *pullback(dout.astype(out.dtype))


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU: TEST_ON=cuda")
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("size", [64, 200, 1024])
@pytest.mark.parametrize(("groups", "key_width", "value_width"), [(4, 192, 128), (4, 128, 128), (2, 64, 64)])
def test_value_and_gradients_equal_the_definition(dtype, size, groups, key_width, value_width):
    scale = key_width**-0.5
    target = Target.here()
    if key_width != value_width and float(target.chip) < 9.0:
        pytest.skip("unequal widths need capability 9.0")
    q, k, v, dout = draw(dtype, size, 4, groups, key_width, value_width)
    attention = functools.partial(gqa_attention, visible=Visible(), scale=scale, implementation="cudnn")
    found = jax.jit(functools.partial(both, attention))(dout, q, k, v)
    exact = (a.astype(jnp.float32) for a in (dout, q, k, v))
    with jax.default_matmul_precision("highest"):
        right = both(functools.partial(attention_reference, visible=Visible(), scale=scale), *exact)
    for mine, wanted in zip(found, right, strict=True):
        assert mine.dtype == dtype
        mine, wanted = (np.asarray(a, np.float64) for a in (mine, wanted))
        assert np.linalg.norm(mine - wanted) <= 2**-7 * np.linalg.norm(wanted)


def test_it_is_lowered_for_cuda_without_a_gpu():
    """Chosen by itself for plain causal rows of V2-Lite's widths, forward and backward; not for segments."""
    q, kv, pe = (jax.ShapeDtypeStruct((2, 256, *rest), jnp.bfloat16) for rest in ((4, 192), (4, 256), (64,)))

    def text(visible):
        def loss(*inputs):
            return jnp.sum(mla_attention(*inputs, visible=visible, scale=0.1, target=HOPPER).astype(jnp.float32))

        traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(q, kv, pe)
        return traced.lower(lowering_platforms=("cuda",)).as_text()

    plain = text(Visible())
    assert "cudnn$fmhaSoftmax(" in plain and "cudnn$fmhaSoftmaxBackward(" in plain
    assert "cudnn" not in text(Visible.rows(jnp.ones((2, 256), jnp.int32)))
