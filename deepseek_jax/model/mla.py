"""Multi-head latent attention (V2 section 2.1, V3 equations 1–11)."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from deepseek_jax.compute import ComputeConfig
from deepseek_jax.config import ModelConfig
from deepseek_jax.model.attention import einsum32, masked_softmax, write_columns
from deepseek_jax.model.layers import Linear, RMSNorm, param, project, project_heads, zeros
from deepseek_jax.model.rope import rotate, softmax_scale
from deepseek_kernels import mla_attention

LATENT_EPS = 1e-6  # of the two latents' norms, whatever rms_norm_eps says: so in the released code


class MLA(nnx.Module):
    """Keys and values of all heads come from one latent of width C; positions from R rotated numbers beside it.

    ``c_q = norm(x W_DQ)``, ``q = c_q W_UQ = [q_nope | q_rope]`` per head; ``[c | k_rope] = x W_DKV``, ``c = norm(c)``;
    ``[k_nope | v] = c W_UKV`` per head; scores ``(q_nope·k_nope + rope(q_rope)·rope(k_rope)) · scale``.

    The absorbed form never builds keys and values: ``W_UK`` moves to the query and ``W_UV`` behind the softmax, so that
    decoding is attention of H queries over the C + R cached numbers. Both forms give the same result.
    """

    def __init__(self, config: ModelConfig, compute: ComputeConfig, *, rngs: nnx.Rngs):
        self.config, self.compute = config, compute
        D, H, C, Q = config.hidden_size, config.num_attention_heads, config.kv_lora_rank, config.q_lora_rank
        N, R, V = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
        if Q:
            self.q_a = Linear(config, compute, (D, Q), ("embed", None), bias=config.attention_bias, rngs=rngs)
            self.q_norm = RMSNorm(config, compute, Q, eps=LATENT_EPS)
        else:
            self.q_a = self.q_norm = None
        self.q_b = param(config, compute, rngs, (Q or D, H, N + R), (None if Q else "embed", "heads", None))
        self.kv_a = Linear(config, compute, (D, C + R), ("embed", None), bias=config.attention_bias, rngs=rngs)
        self.kv_norm = RMSNorm(config, compute, C, eps=LATENT_EPS)
        self.kv_b = param(config, compute, rngs, (C, H, N + V), (None, "heads", None))
        self.o = param(config, compute, rngs, (H, V, D), ("heads", None, "embed"))
        self.o_bias = zeros(compute, (D,), ("embed",)) if config.attention_bias else None

    def __call__(
        self,
        x_BSD: Float[Array, "B S D"],
        rope,
        mask_BST: Bool[Array, "B S T"],
        cache: tuple[jax.Array, jax.Array] | None = None,
        *,
        absorbed: bool = False,
    ) -> tuple[Float[Array, "B S D"], jax.Array | None]:
        """Attend over this row, or over ``cache = (buffer, length)`` with the new columns written to it."""
        q_BSHN, q_BSHR = self._queries(x_BSD, rope)
        entry = self._entry(x_BSD, rope)
        buffer = None
        if cache is not None:
            entry = buffer = write_columns(*cache[:1], entry, cache[1])
        attend = self._absorbed if absorbed else self._plain
        with jax.named_scope("attend"):
            out_BSHV: jax.Array = attend(q_BSHN, q_BSHR, entry, mask_BST)
        o_HVD = self.o[...].astype(out_BSHV.dtype)
        y = project(out_BSHV.reshape(*x_BSD.shape[:2], -1), o_HVD.reshape(-1, o_HVD.shape[2]))
        if self.o_bias is not None:
            y = y + self.o_bias[...].astype(y.dtype)
        return y, buffer

    def _queries(self, x_BSD, rope):
        config = self.config
        with jax.named_scope("queries"):
            c = x_BSD if self.q_a is None or self.q_norm is None else self.q_norm(self.q_a(x_BSD))
            q = project_heads(c, self.q_b[...].astype(c.dtype))
            nope, pe = jnp.split(q, [config.qk_nope_head_dim], axis=-1)
            return nope, rotate(pe, rope, interleave=config.rope_interleave)

    def _entry(self, x_BSD, rope):
        """What the cache keeps of each token: the normalised latent, then the rotated shared key."""
        config = self.config
        with jax.named_scope("latent"):
            latent, pe = jnp.split(self.kv_a(x_BSD), [config.kv_lora_rank], axis=-1)
            pe = rotate(pe[:, :, None], rope, interleave=config.rope_interleave)[:, :, 0]
            return jnp.concatenate([self.kv_norm(latent), pe], axis=-1)

    def _plain(self, q_BSHN, q_BSHR, entry_BTW, mask_BST):
        latent_BTC, pe_BTR = jnp.split(entry_BTW, [self.config.kv_lora_rank], axis=-1)
        kv = project_heads(latent_BTC, self.kv_b[...].astype(latent_BTC.dtype))
        q = jnp.concatenate([q_BSHN, q_BSHR], axis=-1)
        return mla_attention(q, kv, pe_BTR, mask_BST, softmax_scale(self.config))

    def _absorbed(self, q_BSHN, q_BSHR, entry_BTW, mask_BST):
        config = self.config
        up_CHN, up_CHV = jnp.split(self.kv_b[...].astype(q_BSHN.dtype), [config.qk_nope_head_dim], axis=-1)
        q_BSHW = jnp.concatenate([jnp.einsum("bshn,chn->bshc", q_BSHN, up_CHN), q_BSHR], axis=-1)
        scores = einsum32("bshw,btw->bhst", q_BSHW, entry_BTW)
        p = masked_softmax(scores * softmax_scale(config), mask_BST).astype(entry_BTW.dtype)
        # The rotated keys ride along and are dropped: cheaper than a copy of the cache without them.
        context_BHSC = jnp.einsum("bhst,btw->bhsw", p, entry_BTW)[..., : config.kv_lora_rank]
        return jnp.einsum("bhsc,chv->bshv", context_BHSC, up_CHV)
