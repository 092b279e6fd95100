"""DeepSeekMoE: fine-grained routed experts beside shared ones (MoE section 3, V3 equations 12–15)."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from deepseek_jax.compute import ComputeConfig
from deepseek_jax.config import ModelConfig
from deepseek_jax.model.layers import SwiGLU, param
from deepseek_jax.model.router import RouterStats, route, router_stats
from deepseek_jax.parallel.dispatch import combine_rows, gather_rows, per_token_shard, sort_by_expert
from deepseek_kernels import can_fuse_experts, fused_experts, grouped_matmul, row_alignment


class DeepSeekMoE(nnx.Module):
    """``y = shared(x) + Σ_k g_k · expert_k(x)``: the shared experts as one wide SwiGLU, K of E routed, no drops."""

    def __init__(self, config: ModelConfig, compute: ComputeConfig, *, rngs: nnx.Rngs):
        self.config, self.compute = config, compute
        D, E, F = config.hidden_size, config.n_routed_experts, config.moe_intermediate_size
        self.router = param(config, compute, rngs, (D, E), ("embed", None))
        self.wi = param(config, compute, rngs, (E, D, 2, F), ("experts", "embed", None, "mlp"))
        self.wo = param(config, compute, rngs, (E, F, D), ("experts", "mlp", "embed"))
        self.shared = (
            SwiGLU(config, compute, config.n_shared_experts * F, rngs=rngs) if config.n_shared_experts else None
        )

    def __call__(
        self,
        x_BSD: Float[Array, "B S D"],
        bias_E: Float[Array, "E"] | None,
        segment_ids_BS: Int[Array, "B S"],
    ) -> tuple[Float[Array, "B S D"], RouterStats]:
        config, batch, size = self.config, *x_BSD.shape[:2]
        with jax.named_scope("router"):
            routing = route(config, x_BSD.reshape(batch * size, -1), self.router[...], bias_E)
            unflatten = functools.partial(jnp.reshape, shape=(batch, size, -1))
            experts_BSK, weights_BSK = unflatten(routing.experts_TK), unflatten(routing.weights_TK)
            stats = router_stats(config, experts_BSK, unflatten(routing.scores_TE), segment_ids_BS)
        dtype = x_BSD.dtype
        with jax.named_scope("experts"):
            y = per_token_shard(
                routed_experts,
                x_BSD,
                weights_BSK,
                experts_BSK,
                self.wi[...].astype(dtype),
                self.wo[...].astype(dtype),
                self.compute.rules,
            )
        if self.shared is not None:
            with jax.named_scope("shared_experts"):
                y = y + self.shared(x_BSD)
        return y, stats


def routed_experts(x_BSD, weights_BSK, experts_BSK, wi_ED2F, wo_EFD):
    """The K chosen experts of each token, weighted and summed: sort by expert, two grouped products, unsort. In
    float32 on a CPU one C kernel does it all."""
    batch, size, width = x_BSD.shape
    experts, _, _, hidden = wi_ED2F.shape
    tokens, top = batch * size, experts_BSK.shape[2]
    if can_fuse_experts(x_BSD, wi_ED2F, wo_EFD):
        flat = (x_BSD.reshape(tokens, width), weights_BSK.reshape(tokens, top), experts_BSK.reshape(tokens, top))
        return fused_experts(*flat, wi_ED2F, wo_EFD).reshape(x_BSD.shape)
    block = row_alignment(tokens * top, experts, x_BSD.dtype)
    layout = sort_by_expert(experts_BSK.reshape(tokens, top), experts, block=block)
    x_PD = gather_rows(x_BSD.reshape(tokens, width), layout)
    gate_up = grouped_matmul(x_PD, wi_ED2F.reshape(experts, width, -1), layout.group_sizes_E, aligned=block)
    h_PF = jax.nn.silu(gate_up[:, :hidden]) * gate_up[:, hidden:]
    y_PD = grouped_matmul(h_PF, wo_EFD, layout.group_sizes_E, aligned=block)
    return combine_rows(y_PD, weights_BSK.reshape(tokens, top), layout).reshape(x_BSD.shape)
