"""A network whose experts stand in another order computes what it did."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model.tiny import V1, V3, config, relative_error, weights

from deepseek_jax.model import parameters
from deepseek_jax.model.reorder import reorder_experts

TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 40, (2, 7)), jnp.int32)


def orders(tiny, rows):
    """Groups in another order, and experts within them, where the router chooses groups first; else any."""
    rng, found = np.random.default_rng(1), []
    for _ in range(rows):
        groups = np.arange(8).reshape(1 if tiny.topk_method == "greedy" else tiny.n_group, -1)
        found.append(np.concatenate([rng.permutation(groups[g]) for g in rng.permutation(len(groups))]))
    return np.array(found)


@pytest.mark.parametrize("tiny", [config(V3), config(V1)], ids=["v3", "v1"])
def test_the_same_network_in_another_order(tiny):
    params, bias = weights(tiny)
    order = orders(tiny, tiny.num_routers)
    moved_params, moved_bias = reorder_experts(tiny, params, bias, order)
    mtp = bool(tiny.num_nextn_predict_layers)
    run: Any = jax.jit(lambda *both: parameters.merge(tiny, *both)(TOKENS, mtp=mtp))
    one, other = run(params, bias), run(moved_params, moved_bias)
    assert relative_error(other.logits, one.logits) < 1e-5
    if mtp:
        assert relative_error(other.mtp_hidden, one.mtp_hidden) < 1e-5
    for was, now, row in zip(one.router.load_E, other.router.load_E, order, strict=True):
        np.testing.assert_array_equal(now, was[row])
        assert not np.array_equal(now, was)


def test_mtp_stays_where_its_load_is_unknown():
    tiny = config(V3)
    params, bias = weights(tiny)
    moved, moved_bias = reorder_experts(tiny, params, bias, orders(tiny, tiny.num_moe_layers))
    mtp = lambda params: params["mtp"]["block"]["mlp"]["wi"]  # noqa: E731
    np.testing.assert_array_equal(mtp(moved), mtp(params))
    assert bias is not None and moved_bias is not None
    np.testing.assert_array_equal(moved_bias[-1], bias[-1])


def test_orders_that_would_change_the_network_are_refused():
    tiny = config(V3)
    params, bias = weights(tiny)
    torn = np.tile(np.roll(np.arange(8), 1), (2, 1))
    with pytest.raises(ValueError, match="tears apart some of the n_group=4 groups"):
        reorder_experts(tiny, params, bias, torn)
    with pytest.raises(ValueError, match=r"all of 0…7 once"):
        reorder_experts(tiny, params, bias, np.zeros((2, 8), np.int64))
    with pytest.raises(ValueError, match="1 orders of experts for 2 MoE layers"):
        reorder_experts(tiny, params, bias, torn[:1])
