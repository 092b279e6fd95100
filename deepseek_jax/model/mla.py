"""Multi-head latent attention (V2 section 2.1, V3 equations 1–11)."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from deepseek_jax.compute import ComputeConfig
from deepseek_jax.config import ModelConfig
from deepseek_jax.model.fresh import Source
from deepseek_jax.model.layers import Linear, RMSNorm, biased, multiply, param, zeros
from deepseek_jax.model.rope import rotate, softmax_scale
from deepseek_jax.parallel.context import Balanced, per_row_and_head
from deepseek_jax.parallel.sharding import per_device
from deepseek_kernels import Columns, InStack, Visible, mla_attention, mla_decode, product

LATENT_EPS = 1e-6  # of the two latents' norms, whatever rms_norm_eps says: so in the released code


class MLA(nnx.Module):
    """Keys and values of all heads come from one latent of width C; positions from R rotated numbers beside it.

    ``c_q = norm(x W_DQ)``, ``q = c_q W_UQ = [q_nope | q_rope]`` per head; ``[c | k_rope] = x W_DKV``, ``c = norm(c)``;
    ``[k_nope | v] = c W_UKV`` per head; scores ``(q_nope·k_nope + rope(q_rope)·rope(k_rope)) · scale``.

    The absorbed form never builds keys and values: ``W_UK`` moves to the query and ``W_UV`` behind the softmax, so that
    decoding is attention of H queries over the C + R cached numbers. Both forms give the same result.
    """

    def __init__(self, config: ModelConfig, compute: ComputeConfig, *, rngs: Source):
        self.config, self.compute = config, compute
        D, H, C, Q = config.hidden_size, config.num_attention_heads, config.kv_lora_rank, config.q_lora_rank
        N, R, V = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
        if Q:
            self.q_a = Linear(config, compute, (D, Q), ("embed", None), bias=config.attention_bias, rngs=rngs)
            self.q_norm = RMSNorm(config, compute, Q, eps=LATENT_EPS)
        else:
            self.q_a = self.q_norm = None
        self.q_b = param(config, compute, rngs, (Q or D, H, N + R), ("latent" if Q else "embed", "heads", None))
        self.kv_a = Linear(config, compute, (D, C + R), ("embed", None), bias=config.attention_bias, rngs=rngs)
        self.kv_norm = RMSNorm(config, compute, C, eps=LATENT_EPS)
        self.kv_b = param(config, compute, rngs, (C, H, N + V), ("latent", "heads", None))
        self.o = param(config, compute, rngs, (H, V, D), ("heads", None, "embed"))
        self.o_bias = zeros(compute, (D,), ("embed",)) if config.attention_bias else None

    def __call__(
        self,
        x_BSD: Float[Array, "B S D"],
        rope,
        visible: Visible | Balanced,
        memory: Any = None,
        *,
        absorbed: bool = False,
    ) -> tuple[Float[Array, "B S D"], Any]:
        """Attend over this row, or over all that ``memory`` holds once the new tokens are written to it."""
        q_BSHN, q_BSHR = self._queries(x_BSD, rope)
        entry = self._entry(x_BSD, rope)
        if memory is not None:
            memory, entry = memory.write(entry)
        attend = self._absorbed if absorbed else self._plain
        with jax.named_scope("attend"):
            out_BSHV: jax.Array = attend(q_BSHN, q_BSHR, entry, visible)
        y = multiply("bshv,hvd->bsd", out_BSHV, self.o[...], self.compute)
        if self.o_bias is not None:
            y = biased(y, self.o_bias[...])
        return y, memory

    def _queries(self, x_BSD, rope):
        config = self.config
        with jax.named_scope("queries"):
            c = x_BSD if self.q_a is None or self.q_norm is None else self.q_norm(self.q_a(x_BSD))
            q = multiply("bsq,qhn->bshn", c, self.q_b[...], self.compute)
            nope, pe = jnp.split(q, [config.qk_nope_head_dim], axis=-1)
            return nope, rotate(pe, rope, interleave=config.rope_interleave)

    def _entry(self, x_BSD, rope):
        """What a memory keeps of each token: the normalised latent, then the rotated shared key."""
        config = self.config
        with jax.named_scope("latent"):
            latent, pe = jnp.split(self.kv_a(x_BSD), [config.kv_lora_rank], axis=-1)
            pe = rotate(pe[:, :, None], rope, interleave=config.rope_interleave)[:, :, 0]
            return jnp.concatenate([self.kv_norm(latent), pe], axis=-1)

    def _plain(self, q_BSHN, q_BSHR, entry_BTW, visible):
        products = {"target": self.compute.kernels, "fp8": self.compute.fp8_matmul}

        def expand(entry_BTW, kv_b):
            latent_BTC, pe_BTR = jnp.split(entry_BTW, [self.config.kv_lora_rank], axis=-1)
            return product("btc,chw->bthw", latent_BTC, kv_b, **products), pe_BTR

        q, width = jnp.concatenate([q_BSHN, q_BSHR], axis=-1), self.config.cache_numbers_per_token_layer
        entry_BTW = entry_BTW.astype(q.dtype)[..., :width]
        kernel = {"target": self.compute.kernels, "implementation": self.compute.attention}
        attend = functools.partial(mla_attention, scale=softmax_scale(self.config), **kernel)
        more = {"expand": expand, "weights": {"kv_b": (self.kv_b[...], ("latent", "heads", None))}}
        return per_row_and_head(attend, self.compute.rules, (q, entry_BTW), visible, **more)

    def _absorbed(self, q_BSHN, q_BSHR, entry_BTW, visible):
        N, V, C = self.config.qk_nope_head_dim, self.config.v_head_dim, self.config.kv_lora_rank
        target, kv_b = self.compute.kernels, self.kv_b[...]
        q_BSHC = product("bshn,chn->bshc", q_BSHN, Columns(kv_b, 0, N), target=target)
        q_BSHW = jnp.concatenate([q_BSHC, q_BSHR], axis=-1)
        if wider := entry_BTW.shape[-1] - q_BSHW.shape[-1]:  # zeros behind each entry
            q_BSHW = jnp.pad(q_BSHW, ((0, 0), (0, 0), (0, 0), (0, wider)))
        kernel = {"target": target, "implementation": self.compute.decode_attention}
        decode = functools.partial(mla_decode, scale=softmax_scale(self.config), values=C, **kernel)
        context_BSHC = self._per_device(decode, q_BSHW, entry_BTW, visible)
        return product("bshc,chv->bshv", context_BSHC, Columns(kv_b, N, N + V), target=target)

    def _per_device(self, decode, q_BSHW, entry_BTW, visible):
        """Rows and heads stay where they are: a kernel is not split by the compiler."""
        heads = "batch", None, "heads", None
        rows = lambda x: ("batch" if len(x) > 1 else None, *[None] * (x.ndim - 1))  # noqa: E731
        if isinstance(entry_BTW, InStack):
            of_entry = InStack(jax.tree.map(lambda _: (None, "batch", None, None), entry_BTW.stack), ())
        else:
            of_entry = jax.tree.map(rows, entry_BTW)
        axes = heads, of_entry, jax.tree.map(rows, visible)
        return per_device(decode, self.compute.rules, (q_BSHW, entry_BTW, visible), axes, heads)
