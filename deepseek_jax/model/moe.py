"""DeepSeekMoE: fine-grained routed experts beside shared ones (MoE section 3, V3 equations 12–15)."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from deepseek_jax.compute import ComputeConfig
from deepseek_jax.config import ModelConfig
from deepseek_jax.model.dropping import Balancing, drop
from deepseek_jax.model.fresh import Source
from deepseek_jax.model.layers import SwiGLU, param
from deepseek_jax.model.router import RouterStats, route, router_stats
from deepseek_jax.parallel.copies import Placed
from deepseek_jax.parallel.dispatch import Dispatch
from deepseek_jax.parallel.exchange import exchange
from deepseek_jax.parallel.sharding import per_device
from deepseek_kernels import InStack, routed_experts


class DeepSeekMoE(nnx.Module):
    """``y = shared(x) + Σ_k g_k · expert_k(x)``: the shared experts as one wide SwiGLU, K of E routed.

    All choices are computed, unless ``balancing`` has a capacity.
    """

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
        balancing: Balancing | None = None,
    ) -> tuple[Float[Array, "B S D"], RouterStats]:
        config, compute = self.config, self.compute
        with jax.named_scope("router"):
            # XLA gathers what it takes the highest numbers of.
            tokens, w_DE, w_axes = ("batch", "sequence", None), self.router[...], (None, None)
            if isinstance(w_DE, InStack):
                w_axes = InStack((None, None, None), ())
            else:  # its gradient is added up over devices in float32
                w_DE = w_DE.astype(jnp.float32)
            operands, axes = (x_BSD, w_DE, bias_E, chosen_BSK), (tokens, w_axes, (None,), tokens)
            axes = tuple(None if x is None else axis for x, axis in zip(operands, axes, strict=True))
            route_each = functools.partial(_routed, config, compute.kernels)
            experts_BSK, weights_BSK, scores_BSE = per_device(route_each, compute.rules, operands, axes, tokens)
            devices = 1 if balancing is None else balancing.devices
            stats = router_stats(config, experts_BSK, scores_BSE, segment_ids_BS, compute.rules, devices=devices)
            if balancing is not None and balancing.capacity:
                choices = experts_BSK, weights_BSK, scores_BSE
                experts_BSK, weights_BSK, dropped = drop(config, balancing, *choices, segment_ids_BS)
                stats = dataclasses.replace(stats, dropped=dropped)

        def experts(*operands):
            kernel = {"implementation": compute.experts, "grouped": compute.grouped_matmul, "target": compute.kernels}
            return routed_experts(*operands[:-1], **kernel, most=operands[-1])

        with jax.named_scope("experts"):
            wi, wo = self.wi[...], self.wo[...]
            if isinstance(wi, Placed):
                wi, experts_BSK = wi.weight, wi.choose(experts_BSK)
            operands = x_BSD, weights_BSK, experts_BSK, wi, wo
            groups = (1, 1) if config.topk_method == "greedy" else (config.n_group, config.topk_group)
            sizes = compute.dispatch_capacity, compute.dispatch_nodes, *groups
            dispatch = Dispatch(compute.dispatch, *sizes, target=compute.kernels)
            y, dropped = exchange(experts, *operands, compute.rules, dispatch)
        if self.shared is not None:
            with jax.named_scope("shared_experts"):
                y = y + self.shared(x_BSD)
        return y, dataclasses.replace(stats, dropped=stats.dropped + dropped)


def _routed(config, target, x_BSD, w_DE, bias_E, chosen_BSK):
    """Experts, weights and scores of each token."""
    chosen_TK = None if chosen_BSK is None else chosen_BSK.reshape(-1, chosen_BSK.shape[2])
    routing = route(config, x_BSD.reshape(-1, x_BSD.shape[2]), w_DE, bias_E, chosen_TK, target)
    found = routing.experts_TK, routing.weights_TK, routing.scores_TE
    return tuple(x.reshape(*x_BSD.shape[:2], -1) for x in found)
