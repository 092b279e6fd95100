"""What a network costs, from its shapes alone: parameters and arithmetic."""

import dataclasses

import jax
import jax.numpy as jnp

from deepseek_jax.compute import ComputeConfig
from deepseek_jax.config import ModelConfig
from deepseek_jax.model import parameters


def count_parameters(config: ModelConfig) -> dict[str, int]:
    """Parameters in all, and those that one token of the main model uses (MTP left out, the embedding in).

    The routing bias counts: 14,848 of the 671,026,419,200 numbers of V3's main model.
    """
    params, _ = parameters.abstract_arrays(config)
    size = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))  # noqa: E731
    bias = config.n_routed_experts if config.has_router_bias else 0
    total = size(params) + config.num_routers * bias
    active = size({name: tree for name, tree in params.items() if name != "mtp"}) + config.num_moe_layers * bias
    if config.num_moe_layers:
        mlp = params["moe_layers"]["mlp"]
        routed = size([mlp["wi"], mlp["wo"]])
        active -= routed - routed * config.num_experts_per_tok // config.n_routed_experts
    return {"parameters_total": total, "parameters_active": active}


def forward_flops(config: ModelConfig) -> int:
    """Per token of the main model: ``2 · (active parameters - embedding)``, attention's own products left out.

    The embedding is a look-up; where it is the head too, it is multiplied once.
    """
    embedding = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    return 2 * (count_parameters(config)["parameters_active"] - embedding)


def attention_flops(config: ModelConfig, context: int, *, absorbed: bool = False) -> int:
    """Per token that attends to ``context`` others, over all layers: scores and their product with the values.

    Plain MLA: ``2 H T (N + R + V)``; absorbed: ``2 H T (C + R + C)``, what decoding does; GQA: ``2 H T · 2 N``.
    """
    if config.attention == "gqa":
        width = 2 * config.head_dim
    elif absorbed:
        width = 2 * config.kv_lora_rank + config.qk_rope_head_dim
    else:
        width = config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim
    return 2 * config.num_hidden_layers * config.num_attention_heads * context * width


def bytes_of_step(config: ModelConfig, compute: ComputeConfig, rows: int, context: float) -> float:
    """That a step of decoding must read: the main model's weights, of routed experts those that any of ``rows`` rows
    chooses where all are as likely, ``E (1 - (1 - K/E)^rows)``, and the rows' cache of ``context`` tokens each; all of
    them in ``compute.dtype``."""
    counted = count_parameters(dataclasses.replace(config, num_nextn_predict_layers=0))
    numbers = counted["parameters_total"] - (
        0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    )
    if experts := config.num_moe_layers and config.n_routed_experts:
        one = 3 * config.hidden_size * config.moe_intermediate_size
        idle = (1 - config.num_experts_per_tok / experts) ** rows
        numbers -= config.num_moe_layers * experts * one * idle
    numbers += rows * context * config.cache_numbers_per_token_layer * config.num_hidden_layers
    return numbers * jnp.dtype(compute.dtype).itemsize
