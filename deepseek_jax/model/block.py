"""One transformer layer: attention, then a feed-forward that is dense or a mixture of experts."""

import jax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from deepseek_jax.compute import ComputeConfig
from deepseek_jax.config import ModelConfig
from deepseek_jax.model.gqa import GQA
from deepseek_jax.model.layers import RMSNorm, SwiGLU
from deepseek_jax.model.mla import MLA
from deepseek_jax.model.moe import DeepSeekMoE
from deepseek_jax.model.router import RouterStats
from deepseek_jax.parallel.sharding import constrain


class Block(nnx.Module):
    """``x += attention(norm(x))``, ``x += feed_forward(norm(x))``."""

    def __init__(self, config: ModelConfig, compute: ComputeConfig, *, moe: bool, rngs: nnx.Rngs):
        self.rules = compute.rules
        self.attention_norm = RMSNorm(config, compute, config.hidden_size, "embed")
        self.attention = (MLA if config.attention == "mla" else GQA)(config, compute, rngs=rngs)
        self.mlp_norm = RMSNorm(config, compute, config.hidden_size, "embed")
        self.mlp = (
            DeepSeekMoE(config, compute, rngs=rngs)
            if moe
            else SwiGLU(config, compute, config.intermediate_size, rngs=rngs)
        )

    def __call__(
        self,
        x_BSD: Float[Array, "B S D"],
        rope,
        mask_BST: Bool[Array, "B S T"],
        segment_ids_BS: Int[Array, "B S"],
        bias_E: Float[Array, "E"] | None,
        cache: tuple[jax.Array, jax.Array] | None = None,
        *,
        absorbed: bool = False,
    ) -> tuple[Float[Array, "B S D"], RouterStats | None, jax.Array | None]:
        with jax.named_scope("attention"):
            y, buffer = self.attention(self.attention_norm(x_BSD), rope, mask_BST, cache, absorbed=absorbed)
            x_BSD = constrain(x_BSD + y, self.rules, "batch", "sequence", None)
        with jax.named_scope("mlp"):
            normed, stats = self.mlp_norm(x_BSD), None
            if isinstance(self.mlp, DeepSeekMoE):
                y, stats = self.mlp(normed, bias_E, segment_ids_BS)
            else:
                y = self.mlp(normed)
        return constrain(x_BSD + y, self.rules, "batch", "sequence", None), stats, buffer
