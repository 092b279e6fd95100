"""A head of scores in place of the vocabulary's, for reward models and critics: the network and its parameters."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from deepseek_jax.config import ModelConfig


def scoring(config: ModelConfig, num_labels: int) -> ModelConfig:
    """The network with a head of ``num_labels`` scores in place of its own; MTP is left out."""
    changes = {"num_labels": num_labels, "num_nextn_predict_layers": 0, "tie_word_embeddings": False}
    return dataclasses.replace(config, **changes)


def with_scores(
    config: ModelConfig, params: dict[str, Any], router_bias: jax.Array | None, num_labels: int
) -> tuple[ModelConfig, dict[str, Any], jax.Array | None]:
    """``scoring``'s network with the body of ``config``'s, and scores that are all zero at first.

    The body's arrays are those given, not copies. Scores that there are already stay, if they are as many: ValueError
    otherwise.
    """
    if config.num_labels:
        if config.num_labels != num_labels:
            raise ValueError(f"num_labels={config.num_labels}: {num_labels} wanted")
        return config, params, router_bias
    config = scoring(config, num_labels)
    body = {name: tree for name, tree in params.items() if name not in ("head", "mtp")}
    w_DX = jnp.zeros((config.hidden_size, num_labels), params["norm"]["gain"].dtype)
    return config, body | {"score": {"w": w_DX}}, None if router_bias is None else router_bias[: config.num_routers]
