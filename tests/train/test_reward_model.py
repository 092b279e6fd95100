"""The loss of a reward model and its gradient against numpy in float64, and what they must not depend on."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from model.tiny import V3, config, relative_error, weights
from train.cases import on_device

from deepseek_jax.data.preferences import Item, pack_items
from deepseek_jax.model import parameters, transformer
from deepseek_jax.train.reward_model import RewardModelLoss
from deepseek_jax.train.state import TrainState
from deepseek_jax.train.step import StepConfig, make_step

LOSS = RewardModelLoss()
TINY = config(V3, num_hidden_layers=2, num_nextn_predict_layers=0, num_labels=1)
# Pairs, and single answers: good (none worse) and bad (none better).
LENGTHS = [(3, 5), (4, 2), (0, 6), (7, 0), (2, 2), (0, 3), (5, 4)]


def items(seed=0):
    rng = np.random.default_rng(seed)
    drawn = [[rng.integers(3, TINY.vocab_size, length).tolist() for length in pair] for pair in LENGTHS]
    return [Item(*pair) for pair in drawn]


def batch(seq_len, rows=0, seed=0):
    packed = pack_items(items(seed), seq_len, pad_id=0)
    packed += [jax.tree.map(np.zeros_like, packed[0])] * (rows - len(packed))
    return {name: np.stack([row[name] for row in packed]) for name in packed[0]}


class Table(transformer.Transformer):
    """In place of a network: it scores a position by its token alone."""

    def __init__(self, table):
        self.table = nnx.data(table)

    def __call__(self, tokens_BS, **given):
        assert given["visible"] is not None  # each answer by itself
        return types.SimpleNamespace(scores=self.table[tokens_BS][..., None], router=None)


def table_loss(table, given):
    return LOSS(Table(table), given, LOSS.normalisers(given), jnp.int32(0))


def by_hand(table):
    """(loss, gradient by the table's entries, share of positive margins), item by item in float64."""
    total, right, gradient = 0.0, 0.0, np.zeros_like(table)
    for item in items():
        margin = (table[item.better[-1]] if item.better else 0) - (table[item.worse[-1]] if item.worse else 0)
        total += np.log1p(np.exp(-margin))
        right += 1.0 if margin > 0 else 0.5 if margin == 0 else 0.0
        for ids, sign in ((item.better, 1), (item.worse, -1)):
            if ids:
                gradient[ids[-1]] -= sign / (1 + np.exp(margin))
    return total / len(LENGTHS), gradient / len(LENGTHS), right / len(LENGTHS)


@pytest.mark.parametrize("scale", [0.0, 1.0, 30.0])
def test_loss_and_gradient_equal_numpy(scale):
    table = scale * np.random.default_rng(5).standard_normal(TINY.vocab_size)
    wanted, slope, share = by_hand(table)
    given = on_device(batch(12))
    (loss, parts), gradient = jax.value_and_grad(table_loss, has_aux=True)(jnp.asarray(table, jnp.float32), given)
    assert float(loss) == pytest.approx(wanted, rel=1e-5)
    np.testing.assert_allclose(gradient, slope, atol=1e-6)
    assert float(parts["agreement"]) == pytest.approx(share)


def test_a_network_learns_the_same_however_its_items_are_packed_and_split():
    """Rows of 12 or 30 tokens, rows of padding, microbatches: one step's loss and update."""
    params, bias = weights(TINY)
    optimizer = optax.sgd(0.1)

    def stepped(given, microbatches=1):
        step = jax.jit(make_step(TINY, LOSS, optimizer, StepConfig(microbatches=microbatches)))
        state = TrainState(jnp.int32(0), params, optimizer.init(params), bias)
        state, metrics = step(state, on_device(given))
        return float(metrics["loss"]), state.params["moe_layers"]["mlp"]["wi"], state.params["score"]["w"]

    network = parameters.merge(TINY, params, bias)

    def alone(ids):
        """An answer's score in a row of its own."""
        scores = network(jnp.asarray([ids])).scores if ids else jnp.zeros((1, 1, 1))
        return float(scores[0, -1, 0])  # pyright: ignore[reportOptionalSubscript]

    margins = np.array([alone(item.better) - alone(item.worse) for item in items()], np.float64)
    loss, *arrays = stepped(batch(12))
    assert loss == pytest.approx(np.mean(np.log1p(np.exp(-margins))), rel=1e-5)
    for found in (stepped(batch(30)), stepped(batch(12, rows=8), microbatches=4)):
        assert found[0] == pytest.approx(loss, rel=1e-5)
        assert max(relative_error(a, b) for a, b in zip(found[1:], arrays, strict=True)) < 1e-5
