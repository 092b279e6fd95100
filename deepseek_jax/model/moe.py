"""DeepSeekMoE: fine-grained routed experts beside shared ones (MoE section 3, V3 equations 12–15)."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from deepseek_jax.compute import ComputeConfig
from deepseek_jax.config import ModelConfig
from deepseek_jax.model.fresh import Source
from deepseek_jax.model.layers import SwiGLU, param
from deepseek_jax.model.router import RouterStats, route, router_stats
from deepseek_jax.parallel.dispatch import Dispatch
from deepseek_jax.parallel.exchange import exchange
from deepseek_kernels import routed_experts


class DeepSeekMoE(nnx.Module):
    """``y = shared(x) + Σ_k g_k · expert_k(x)``: the shared experts as one wide SwiGLU, K of E routed."""

    def __init__(self, config: ModelConfig, compute: ComputeConfig, *, rngs: Source):
        self.config, self.compute = config, compute
        D, E, F = config.hidden_size, config.n_routed_experts, config.moe_intermediate_size
        self.router = param(config, compute, rngs, (D, E), ("embed", None))
        self.wi = param(config, compute, rngs, (E, D, 2, F), ("experts", "expert_embed", None, "expert_mlp"))
        self.wo = param(config, compute, rngs, (E, F, D), ("experts", "expert_mlp", "expert_embed"))
        shared = config.n_shared_experts * F
        self.shared = SwiGLU(config, compute, shared, rngs=rngs) if shared else None

    def __call__(
        self,
        x_BSD: Float[Array, "B S D"],
        bias_E: Float[Array, "E"] | None,
        segment_ids_BS: Int[Array, "B S"],
        chosen_BSK: Int[Array, "B S K"] | None = None,
    ) -> tuple[Float[Array, "B S D"], RouterStats]:
        config, compute, (B, S, _) = self.config, self.compute, x_BSD.shape
        flatten = lambda x: x.reshape(B * S, -1)  # noqa: E731
        unflatten = functools.partial(jnp.reshape, shape=(B, S, -1))
        with jax.named_scope("router"):
            chosen_TK = None if chosen_BSK is None else flatten(chosen_BSK)
            w_DE = self.router[...].astype(jnp.float32)
            routing = route(config, flatten(x_BSD), w_DE, bias_E, chosen_TK)
            experts_BSK, weights_BSK = unflatten(routing.experts_TK), unflatten(routing.weights_TK)
            stats = router_stats(config, experts_BSK, unflatten(routing.scores_TE), segment_ids_BS, compute.rules)

        def experts(*operands):
            kernel = {"implementation": compute.experts, "grouped": compute.grouped_matmul, "target": compute.kernels}
            return routed_experts(*operands[:-1], **kernel, most=operands[-1])

        with jax.named_scope("experts"):
            operands = x_BSD, weights_BSK, experts_BSK, self.wi[...], self.wo[...]
            groups = (1, 1) if config.topk_method == "greedy" else (config.n_group, config.topk_group)
            dispatch = Dispatch(compute.dispatch, compute.dispatch_capacity, compute.dispatch_nodes, *groups)
            y, dropped = exchange(experts, *operands, compute.rules, dispatch)
        if self.shared is not None:
            with jax.named_scope("shared_experts"):
                y = y + self.shared(x_BSD)
        return y, dataclasses.replace(stats, dropped=stats.dropped + dropped)
