"""Grouped-query attention with rotary positions: V1 (every head its own keys) and the dense students."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from deepseek_jax.compute import ComputeConfig
from deepseek_jax.config import ModelConfig
from deepseek_jax.model.attention import einsum32, masked_softmax, write_columns
from deepseek_jax.model.layers import param, zeros
from deepseek_jax.model.rope import rotate, softmax_scale


class GQA(nnx.Module):
    """H query heads share ``num_key_value_heads`` key and value heads; optional biases on q, k and v (Qwen2)."""

    def __init__(self, config: ModelConfig, compute: ComputeConfig, *, rngs: nnx.Rngs):
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
        mask_BST: Bool[Array, "B S T"],
        cache: tuple[jax.Array, jax.Array] | None = None,
        *,
        absorbed: bool = False,
    ) -> tuple[Float[Array, "B S D"], jax.Array | None]:
        """Attend over this row, or over ``cache = (buffer, length)``. There is nothing to absorb: one form."""
        del absorbed
        config, dtype = self.config, x_BSD.dtype
        groups, width = config.num_key_value_heads, config.head_dim
        q_BSHN = jnp.einsum("bsd,dhn->bshn", x_BSD, self.q[...].astype(dtype))
        kv = jnp.einsum("bsd,dxgn->bsxgn", x_BSD, self.kv[...].astype(dtype))
        if self.q_bias is not None and self.kv_bias is not None:
            q_BSHN, kv = q_BSHN + self.q_bias[...].astype(dtype), kv + self.kv_bias[...].astype(dtype)
        q_BSHN = rotate(q_BSHN, rope, interleave=config.rope_interleave)
        k_BSGN = rotate(kv[:, :, 0], rope, interleave=config.rope_interleave)
        kv = jnp.stack([k_BSGN, kv[:, :, 1]], axis=2)
        buffer = None
        if cache is not None:
            flat = kv.reshape(*kv.shape[:2], -1)
            buffer = write_columns(cache[0], flat, cache[1])
            kv = buffer.reshape(*buffer.shape[:2], 2, groups, width)
        k_BTGN, v_BTGN = kv[:, :, 0], kv[:, :, 1]
        q_BSGMN = q_BSHN.reshape(*q_BSHN.shape[:2], groups, -1, width)
        with jax.named_scope("attend"):
            scores = einsum32("bsgmn,btgn->bgmst", q_BSGMN, k_BTGN) * softmax_scale(config)
            merged = scores.reshape(scores.shape[0], -1, *scores.shape[3:])
            p = masked_softmax(merged, mask_BST).astype(dtype).reshape(scores.shape)
            out = jnp.einsum("bgmst,btgn->bsgmn", p, v_BTGN).reshape(q_BSHN.shape)
        return jnp.einsum("bshn,hnd->bsd", out, self.o[...].astype(dtype)), buffer
