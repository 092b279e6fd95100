"""Grouped-query attention with rotary positions: V1 (every head its own keys) and the dense students."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from deepseek_jax.compute import ComputeConfig
from deepseek_jax.config import ModelConfig
from deepseek_jax.model.fresh import Source
from deepseek_jax.model.layers import biased, param, zeros
from deepseek_jax.model.rope import rotate, softmax_scale
from deepseek_jax.parallel.context import Balanced, per_row_and_head
from deepseek_kernels import Visible, gqa_attention, gqa_decode, product
from deepseek_kernels.target import devices


class GQA(nnx.Module):
    """H query heads share ``num_key_value_heads`` key and value heads; optional biases on q, k and v (Qwen2)."""

    def __init__(self, config: ModelConfig, compute: ComputeConfig, *, rngs: Source):
        self.config, self.compute = config, compute
        D, H, G, N = (
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        self.q = param(config, compute, rngs, (D, H, N), ("embed", "heads", None))
        self.kv = param(config, compute, rngs, (D, 2, G, N), ("embed", None, None, None))
        self.o = param(config, compute, rngs, (H, N, D), ("heads", None, "embed"))
        if config.attention_bias:
            self.q_bias = zeros(compute, (H, N), ("heads", None))
            self.kv_bias = zeros(compute, (2, G, N), (None, None, None))
        else:
            self.q_bias = self.kv_bias = None

    def __call__(
        self,
        x_BSD: Float[Array, "B S D"],
        rope,
        visible: Visible | Balanced,
        memory: Any = None,
        *,
        absorbed: bool = False,
    ) -> tuple[Float[Array, "B S D"], Any]:
        """Attend over this row, or over all that ``memory`` holds. There is nothing to absorb: with ``absorbed`` it is
        the same attention, by the implementation that is named for decoding."""
        config, compute = self.config, self.compute
        options: dict[str, Any] = {"target": compute.kernels, "fp8": compute.fp8_matmul}
        q_BSHN = product("bsd,dhn->bshn", x_BSD, self.q[...], **options)
        kv = product("bsd,dxgn->bsxgn", x_BSD, self.kv[...], **options)
        if self.q_bias is not None and self.kv_bias is not None:
            q_BSHN, kv = biased(q_BSHN, self.q_bias[...]), biased(kv, self.kv_bias[...])
        q_BSHN = rotate(q_BSHN, rope, interleave=config.rope_interleave)
        k_BTGN, v_BTGN = rotate(kv[:, :, 0], rope, interleave=config.rope_interleave), kv[:, :, 1]
        kernel: dict[str, Any] = {"target": compute.kernels, "scale": softmax_scale(config)}
        if memory is not None:
            entry = jnp.stack([k_BTGN, v_BTGN], axis=2)
            memory, kept = memory.write(entry.reshape(*entry.shape[:2], -1))
            if absorbed and devices() == 1:
                assert isinstance(visible, Visible), "a cache's rows are not split"
                name = compute.decode_attention
                with jax.named_scope("attend"):
                    groups = config.num_key_value_heads
                    out = gqa_decode(q_BSHN, kept, visible, groups=groups, implementation=name, **kernel)
                return product("bshn,hnd->bsd", out, self.o[...], **options), memory
            kept = kept.astype(q_BSHN.dtype)  # which takes a layer out of its stack
            k_BTGN, v_BTGN = jnp.moveaxis(kept.reshape(*kept.shape[:2], *entry.shape[2:]), 2, 0)
        with jax.named_scope("attend"):
            name = compute.decode_attention if absorbed else compute.attention
            attend = functools.partial(gqa_attention, implementation=name, **kernel)
            out: jax.Array = per_row_and_head(attend, compute.rules, (q_BSHN, k_BTGN, v_BTGN), visible)
        return product("bshn,hnd->bsd", out, self.o[...], **options), memory
