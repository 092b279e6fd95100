"""Multi-token prediction, depth 1 (V3 section 2.2)."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from deepseek_jax.compute import ComputeConfig
from deepseek_jax.config import ModelConfig
from deepseek_jax.model.block import Block, Context
from deepseek_jax.model.fresh import Source
from deepseek_jax.model.layers import Linear, RMSNorm
from deepseek_jax.model.router import RouterStats


class MTP(nnx.Module):
    """``h'_i = norm(block(W [norm(emb(t_{i+1})) | norm(h_i)]))``, which the shared head turns into a guess of t_{i+2}.

    The embedding comes first, as in the released weights (the report's equation 21 has it second), and ``h`` is the
    main model's hidden state after its final norm. The block is a layer of the last kind.
    """

    def __init__(self, config: ModelConfig, compute: ComputeConfig, *, rngs: Source):
        width = config.hidden_size
        self.embed_norm = RMSNorm(config, compute, width, "embed")
        self.hidden_norm = RMSNorm(config, compute, width, "embed")
        self.proj = Linear(config, compute, (2 * width, width), (None, "embed"), rngs=rngs)
        self.block = Block(config, compute, moe=config.num_moe_layers > 0, rngs=rngs)
        self.norm = RMSNorm(config, compute, width, "embed")

    def __call__(
        self,
        hidden_BSD: Float[Array, "B S D"],
        next_embedding_BSD: Float[Array, "B S D"],
        context: Context,
        bias_E: Float[Array, "E"] | None,
        *,
        memory: Any = None,
        chosen_BSK: Int[Array, "B S K"] | None = None,
        absorbed: bool = False,
    ) -> tuple[Float[Array, "B S D"], RouterStats | None, Any]:
        both = jnp.concatenate([self.embed_norm(next_embedding_BSD), self.hidden_norm(hidden_BSD)], axis=-1)
        options = {"memory": memory, "chosen_BSK": chosen_BSK, "absorbed": absorbed}
        x, stats, memory = self.block(self.proj(both), context, bias_E, **options)
        return self.norm(x), stats, memory


def mtp_segments(segment_ids_BS: Int[Array, "B S"]) -> Int[Array, "B S"]:
    """Segments as the MTP module sees them: a segment's last token has no next one, so it counts as padding."""
    following = jnp.pad(segment_ids_BS, ((0, 0), (0, 1)))[:, 1:]
    return jnp.where(segment_ids_BS == following, segment_ids_BS, 0)
