"""One transformer layer: attention, then a feed-forward that is dense or a mixture of experts."""

from typing import Any, Protocol, Self

import jax
from flax import nnx, struct
from jaxtyping import Array, Float, Int

from deepseek_jax.compute import ComputeConfig
from deepseek_jax.config import ModelConfig
from deepseek_jax.model.dropping import Balancing
from deepseek_jax.model.fresh import Source
from deepseek_jax.model.gqa import GQA
from deepseek_jax.model.layers import RMSNorm, SwiGLU
from deepseek_jax.model.mla import MLA
from deepseek_jax.model.moe import DeepSeekMoE
from deepseek_jax.model.router import RouterStats
from deepseek_jax.parallel.context import Balanced
from deepseek_jax.parallel.sharding import constrain
from deepseek_kernels import InStack, Visible


class Memory(Protocol):
    """What one layer keeps of earlier tokens; a pytree, each leaf of which is an ``InStack`` where layers are scanned.
    The model knows no more of a cache."""

    def write(self, entry_BSW: jax.Array) -> tuple[Self, jax.Array | InStack]:
        """Keep what attention needs of S new tokens -> (the memory with them, all that it holds (B T W))."""
        ...


@struct.dataclass
class Context:
    """What all layers share. rope: cosines and sines. segment_ids_BS: 0 marks padding, which counts in no load; a
    segment is a sequence of the balance loss. What attention may look at, ``visible`` alone says. balancing: what a
    loss asks of the routers."""

    rope: tuple[jax.Array, jax.Array]
    visible: Visible | Balanced
    segment_ids_BS: jax.Array
    balancing: Balancing | None = None


class Block(nnx.Module):
    """``x += attention(norm(x))``, ``x += feed_forward(norm(x))``."""

    def __init__(self, config: ModelConfig, compute: ComputeConfig, *, moe: bool, rngs: Source):
        self.rules = compute.rules
        self.attention_norm = RMSNorm(config, compute, config.hidden_size, "embed")
        self.attention = (MLA if config.attention == "mla" else GQA)(config, compute, rngs=rngs)
        self.mlp_norm = RMSNorm(config, compute, config.hidden_size, "embed")
        if moe:
            self.mlp = DeepSeekMoE(config, compute, rngs=rngs)
        else:
            self.mlp = SwiGLU(config, compute, config.intermediate_size, rngs=rngs)

    def __call__(
        self,
        x_BSD: Float[Array, "B S D"],
        context: Context,
        bias_E: Float[Array, "E"] | None,
        *,
        memory: Any = None,
        chosen_BSK: Int[Array, "B S K"] | None = None,
        absorbed: bool = False,
    ) -> tuple[Float[Array, "B S D"], RouterStats | None, Any]:
        """memory: see ``Memory``; returned with the new tokens. chosen_BSK: experts to take, see ``router.route``."""
        with jax.named_scope("attention"):
            normed = self.attention_norm(x_BSD)
            y, memory = self.attention(normed, context.rope, context.visible, memory, absorbed=absorbed)
            x_BSD = constrain(x_BSD + y, self.rules, "batch", "sequence", None)
        with jax.named_scope("mlp"):
            normed, stats = self.mlp_norm(x_BSD), None
            if isinstance(self.mlp, DeepSeekMoE):
                y, stats = self.mlp(normed, bias_E, context.segment_ids_BS, chosen_BSK, context.balancing)
            else:
                y = self.mlp(normed)
        return constrain(x_BSD + y, self.rules, "batch", "sequence", None), stats, memory
