"""The same network with its experts in another order: for a mesh, whose devices hold neighbours."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from deepseek_jax.config import ModelConfig


def reorder_experts(
    config: ModelConfig, params: dict[str, Any], router_bias: jax.Array | None, expert_LE: Int[np.ndarray, "N E"]
) -> tuple[dict[str, Any], jax.Array | None]:
    """Stacked parameters and routing bias in which expert ``e`` of layer ``l`` is the one that was ``expert_LE[l, e]``.

    It computes what it did: each expert takes its router's column and its bias along. Raises what ``check_order`` does.
    """
    order_LE = check_order(config, expert_LE)

    def moved(block, order, take):
        mlp = block["mlp"]
        routed = {name: mlp[name] for name in ("router", "wi", "wo")}
        return block | {"mlp": mlp | take(routed, jnp.asarray(order))}

    def take(mlp, order_E):
        return {"router": mlp["router"][:, order_E], "wi": mlp["wi"][order_E], "wo": mlp["wo"][order_E]}

    params = params | {"moe_layers": moved(params["moe_layers"], order_LE[: config.num_moe_layers], jax.vmap(take))}
    if "mtp" in params:
        params["mtp"] = params["mtp"] | {"block": moved(params["mtp"]["block"], order_LE[-1], take)}
    bias = None if router_bias is None else jnp.take_along_axis(router_bias, jnp.asarray(order_LE), axis=1)
    return params, bias


def check_order(config: ModelConfig, expert_LE: Int[np.ndarray, "N E"]) -> Int[np.ndarray, "L E"]:
    """The order for each of the network's routers; MTP's, where it is not given, stays as it is.

    ValueError where a row is no order of all experts, or tears the groups of a router that chooses these first.
    """
    experts = config.n_routed_experts
    if len(expert_LE) == config.num_moe_layers < config.num_routers:
        expert_LE = np.concatenate([expert_LE, np.arange(experts)[None]])
    if len(expert_LE) != config.num_routers:
        raise ValueError(f"{len(expert_LE)} orders of experts for {config.num_moe_layers} MoE layers")
    if expert_LE.shape[1] != experts or np.any(np.sort(expert_LE, axis=1) != np.arange(experts)):
        raise ValueError(f"a layer's order needs all of 0…{experts - 1} once")
    if config.topk_method != "greedy" and config.n_group > config.topk_group:
        group_LGX = expert_LE.reshape(len(expert_LE), config.n_group, -1) * config.n_group // experts
        if np.any(group_LGX != group_LGX[:, :, :1]):
            raise ValueError(
                f"the order tears apart some of the n_group={config.n_group} groups of which the router chooses "
                f"topk_group={config.topk_group}: whole they stay with as many nodes as groups"
            )
    return expert_LE
