"""GRPO's loss and advantages against a numpy transcription, on a table of logits and on a real network."""

import dataclasses
import itertools
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from model.tiny import relative_error, weights
from train.cases import TINY, on_device, state_of

from deepseek_jax.compute import ComputeConfig
from deepseek_jax.model import parameters, transformer
from deepseek_jax.parallel.mesh import MeshConfig, make_mesh
from deepseek_jax.parallel.sharding import place_batch, tree_shardings
from deepseek_jax.train.grpo import GRPOLoss, group_advantages, k3
from deepseek_jax.train.optimizer import OptimizerConfig, make_optimizer
from deepseek_jax.train.reference import Reference, fingerprint
from deepseek_jax.train.scoring import Scorer, score_batch
from deepseek_jax.train.state import create_state
from deepseek_jax.train.step import StepConfig, make_step

WIDTH = 6  # of the table's vocabulary
PROMPTS = [3, 5, 4]  # tokens, then the answer, then padding
ANSWERS = [[1, 4, 6], [2, 2, 6], [6, 6, 6]]  # a single token; all of the last group are cut short
TRUNCATED = [[0, 0, 1], [0, 0, 0], [1, 1, 1]]
REWARDS = [[1.0, 0.0, 0.2], [0.7, 0.7, 0.7], [0.0, 1.2, 0.2]]  # the second group is all equal
COLUMNS = 5 + 6


# Advantages


def advantages_by_hand(rewards, scale):
    made = np.zeros_like(rewards)
    for group, row in enumerate(rewards):
        mean = sum(row) / len(row)
        std = (sum((r - mean) ** 2 for r in row) / len(row)) ** 0.5
        for i, r in enumerate(row):
            if scale == "none":
                made[group, i] = r - mean
            elif scale == "leave_one_out":
                made[group, i] = r - (sum(row) - r) / (len(row) - 1)
            elif max(row) != min(row):
                made[group, i] = (r - mean) / std
    return made


@given(
    hnp.arrays(np.float64, (3, 4), elements=st.sampled_from([0.0, 0.2, 0.7, 1.0, 1.2])),
    st.sampled_from(["std", "none", "leave_one_out"]),
)
def test_advantages_equal_their_formula(rewards, scale):
    found = np.asarray(group_advantages(jnp.asarray(rewards, jnp.float32), scale=scale))
    np.testing.assert_allclose(found, advantages_by_hand(rewards, scale), atol=2e-6)


@pytest.mark.parametrize("reward", [0.0, 0.1, 1.2, -7.3])
def test_equal_rewards_are_no_signal(reward):
    """0.1 summed eight times is not 0.8: dividing that rounding by itself would invent an advantage."""
    found = group_advantages(jnp.full((2, 7), reward, jnp.float32))
    np.testing.assert_array_equal(found, np.zeros((2, 7)))


def test_k3_estimates_the_divergence():
    """Its mean over samples of p is KL(p, q), and it is never negative."""
    p, q = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.2, 0.6])
    estimates = np.asarray(k3(jnp.log(jnp.asarray(q / p, jnp.float32))))
    assert np.all(estimates >= 0)
    assert np.sum(p * estimates) == pytest.approx(np.sum(p * np.log(p / q)), rel=1e-5)
    assert float(k3(jnp.float32(1e-4))) == pytest.approx(5e-9, rel=5e-3)  # not lost to rounding


# The loss


def make_batch(vocab: int, seed: int = 0, temperature: float = 1.0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    answers, truncated = np.ravel(ANSWERS), np.ravel(TRUNCATED)
    index = np.broadcast_to(np.arange(COLUMNS), (9, COLUMNS))
    begin = np.repeat(PROMPTS, 3)[:, None]
    inside = index < begin + answers[:, None]
    answer = (inside & (index >= begin)).astype(np.float32)
    advantages = advantages_by_hand(np.array(REWARDS), "std").reshape(-1, 1)
    return {
        "tokens": np.where(inside, rng.integers(0, vocab, inside.shape), 0).astype(np.int32),
        "segment_ids": inside.astype(np.int32),
        "positions": np.where(inside, index, 0).astype(np.int32),
        "loss_mask": answer,
        "old_logprobs": (answer * rng.uniform(-4, -0.5, inside.shape)).astype(np.float32),
        "sampler_logprobs": (answer * rng.uniform(-4, -0.5, inside.shape)).astype(np.float32),
        "advantages": advantages.astype(np.float32),
        "truncated": truncated[:, None].astype(np.float32),
        "temperature": np.full((9, 1), temperature, np.float32),
        "max_tokens": np.full((9, 1), 6, np.float32),
    }


def by_hand(loss: GRPOLoss, batch, logits, reference) -> dict[str, float]:
    """Answer by answer and token by token (DeepSeekMath equation 3, Dr. GRPO, DAPO)."""

    def logprob(logits, row, t):
        z = np.asarray(logits, np.float64)[row, t - 1] / batch["temperature"][row, 0]
        z = z - z.max()
        return (z - np.log(np.exp(z).sum()))[batch["tokens"][row, t]], z - np.log(np.exp(z).sum())

    answers = []
    for row in range(len(logits)):
        if loss.mask_truncated and batch["truncated"][row, 0]:
            continue
        advantage = float(batch["advantages"][row, 0])
        tokens = []
        for t in np.flatnonzero(batch["loss_mask"][row]):
            new, distribution = logprob(logits, row, t)
            old = batch["old_logprobs"][row, t] if "old_logprobs" in batch else new
            ratio = np.exp(new - old)
            clipped = min(max(ratio, 1 - loss.clip_low), 1 + loss.clip_high)
            gain = min(ratio * advantage, clipped * advantage)
            other = np.exp(logprob(reference, row, t)[0] - new) if loss.kl_weight else 1.0
            back = np.exp(batch["sampler_logprobs"][row, t] - old)
            tokens.append(
                {
                    "term": gain - loss.kl_weight * (other - np.log(other) - 1),
                    "kl_reference": other - np.log(other) - 1,
                    "kl_sampler": back - np.log(back) - 1,
                    "clip_fraction": float(gain < ratio * advantage),
                    "entropy": -np.sum(np.exp(distribution) * distribution),
                }
            )
        answers.append(tokens)
    every = [token for tokens in answers for token in tokens]
    terms = [[token["term"] for token in tokens] for tokens in answers]
    if not every:
        return dict.fromkeys(("loss", *PARTS), 0.0)
    objective = {
        "grpo": np.mean([np.mean(row) for row in terms]),
        "dr_grpo": np.sum([np.sum(row) for row in terms]) / (len(terms) * batch["max_tokens"][0, 0]),
        "dapo": np.sum([np.sum(row) for row in terms]) / len(every),
    }[loss.normalise]
    return {"loss": -objective} | {name: float(np.mean([token[name] for token in every])) for name in PARTS}


PARTS = ("kl_reference", "kl_sampler", "clip_fraction", "entropy")


class Table(transformer.Transformer):
    """In place of a network: the table of logits itself, position by position."""

    def __init__(self, table):
        self.compute, self.table = ComputeConfig(), nnx.data(table)

    def __call__(self, tokens_BS, **given):
        assert tokens_BS.shape == self.table.shape[:2] and not given["head"]
        return types.SimpleNamespace(hidden=self.table, router=None)

    def head_weight(self):
        return jnp.eye(WIDTH)


def draw_logits(seed: int = 1):
    return jnp.asarray(np.random.default_rng(seed).standard_normal((2, 9, COLUMNS, WIDTH)), jnp.float32)


def table_loss(loss, logits, reference, batch):
    if reference is not None:
        batch = batch | {"reference_logprobs": score_batch(Table(reference), batch, chunk=4)}
    return loss(Table(logits), batch, loss.normalisers(batch), jnp.int32(0))


VARIANTS = [
    GRPOLoss(normalise=normalise, kl_weight=kl, mask_truncated=masked, chunk=4)
    for normalise, kl, masked in itertools.product(("grpo", "dr_grpo", "dapo"), (0.0, 0.5), (False, True))
] + [
    GRPOLoss(clip_low=0.1, clip_high=0.6),
    GRPOLoss(clip_low=0.9, clip_high=10.0, kl_weight=0.04),  # R1's first stage
    GRPOLoss(clip_low=0.0, clip_high=0.0),
]


@pytest.mark.parametrize("loss", VARIANTS, ids=lambda loss: f"{loss.normalise}-{loss.kl_weight}-{loss.mask_truncated}")
def test_loss_equals_numpy(loss):
    logits, reference = draw_logits()
    batch = make_batch(WIDTH, temperature=0.7)
    value, parts = table_loss(loss, logits, reference if loss.kl_weight else None, on_device(batch))
    expected = by_hand(loss, batch, logits, reference)
    assert value == pytest.approx(np.asarray(expected["loss"]), rel=2e-5)
    for name in PARTS:
        assert float(parts[name]) == pytest.approx(expected[name], rel=2e-5, abs=1e-6), name
    assert loss.clip_high > 1 or parts["clip_fraction"] > 0


@pytest.mark.parametrize("loss", [VARIANTS[2], VARIANTS[7], VARIANTS[11]], ids=lambda loss: loss.normalise)
def test_gradient_equals_finite_differences(loss):
    logits, reference = draw_logits()
    batch = make_batch(WIDTH)
    gradient = jax.grad(lambda x: table_loss(loss, x, reference, on_device(batch))[0])(logits)
    found, expected = [], []
    # Columns 4 to 9 hold logits of answers, 0 to 3 those of prompts.
    for place in [(0, 4, 2), (1, 5, 0), (1, 7, 3), (4, 5, 1), (7, 8, 5), (2, 9, 4), (0, 2, 1), (1, 10, 0)]:
        sides = []
        for h in (1e-4, -1e-4):
            moved = np.array(logits, np.float64)
            moved[place] += h
            sides.append(by_hand(loss, batch, moved, reference)["loss"])
        found.append(float(gradient[place]))
        expected.append((sides[0] - sides[1]) / 2e-4)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-6)
    assert np.count_nonzero(np.abs(expected) > 1e-4) >= 3


def test_answers_without_signal_give_no_gradient():
    """An all-equal group's advantage is 0; truncated answers count for nothing where they are masked."""
    logits, _ = draw_logits()
    batch = on_device(make_batch(WIDTH, seed=2))  # where none of the others is clipped in all its tokens
    for loss, silent in ((GRPOLoss(), [3, 4, 5]), (GRPOLoss(mask_truncated=True), [2, 3, 4, 5, 6, 7, 8])):
        gradient = jax.grad(lambda x, loss=loss: table_loss(loss, x, None, batch)[0])(logits)
        rows = np.flatnonzero(np.any(np.asarray(gradient), axis=(1, 2)))
        assert set(rows) == set(range(9)) - set(silent)


@pytest.mark.parametrize("normalise", ["grpo", "dr_grpo", "dapo"])
def test_nothing_but_truncated_answers_is_zero_not_nan(normalise):
    logits, reference = draw_logits()
    batch = make_batch(WIDTH) | {"truncated": np.ones((9, 1), np.float32)}
    loss = GRPOLoss(mask_truncated=True, kl_weight=0.1, normalise=normalise)
    run = lambda x: table_loss(loss, x, reference, on_device(batch))  # noqa: E731
    (value, parts), gradient = jax.value_and_grad(run, has_aux=True)(logits)
    assert value == 0 and not np.any(gradient)
    assert all(float(part) == 0 for part in parts.values())


def test_on_policy_gradient_is_the_policy_gradient():
    """Where π = π_old nothing is clipped, and the gradient is -A ∇log π over tokens (dapo)."""
    logits, _ = draw_logits()
    batch = make_batch(WIDTH)
    log_p = np.asarray(jax.nn.log_softmax(logits, axis=-1))
    old = np.zeros((9, COLUMNS), np.float32)
    expected = np.zeros(logits.shape)
    tokens = batch["loss_mask"].sum()
    for row, t in zip(*np.nonzero(batch["loss_mask"]), strict=True):
        token = batch["tokens"][row, t]
        old[row, t] = log_p[row, t - 1, token]
        one_hot = np.eye(WIDTH)[token]
        expected[row, t - 1] = -batch["advantages"][row, 0] * (one_hot - np.exp(log_p[row, t - 1])) / tokens
    batch = on_device(batch | {"old_logprobs": old, "sampler_logprobs": old})
    run = lambda x: table_loss(GRPOLoss(normalise="dapo"), x, None, batch)  # noqa: E731
    (_, parts), gradient = jax.value_and_grad(run, has_aux=True)(logits)
    np.testing.assert_allclose(gradient, expected, atol=1e-6)
    assert parts["kl_sampler"] < 1e-12 and parts["clip_fraction"] == 0
    # With one update a batch the old policy is the policy itself: the same without a pass that scores it.
    del batch["old_logprobs"]
    (_, parts), same = jax.value_and_grad(run, has_aux=True)(logits)
    np.testing.assert_allclose(same, expected, atol=1e-6)
    assert parts["kl_sampler"] < 1e-12 and parts["clip_fraction"] == 0


# On a network


REAL = GRPOLoss(kl_weight=0.3, clip_high=0.4, mask_truncated=True, chunk=4)


def real_batch():
    """Eight answers, so that they split into four microbatches."""
    return {name: value[1:] for name, value in make_batch(TINY.vocab_size, seed=1, temperature=0.8).items()}


def test_loss_of_a_network_equals_numpy_for_any_split():
    params, bias = weights(TINY)
    other, _ = weights(TINY, 1)
    batch, optimizer = real_batch(), optax.trace(0.0)  # its state is the gradient
    placed = on_device(batch)
    policy = Reference(other, bias, path="other")
    scorer = Scorer(TINY, ComputeConfig(), chunk=4, microbatches=2, reference=policy)

    @jax.jit
    def forward(params):
        model = parameters.merge(TINY, params, bias)
        return model(placed["tokens"], positions_BS=placed["positions"], segment_ids_BS=placed["segment_ids"])

    logits, reference = forward(params), forward(other)
    expected = by_hand(REAL, batch, logits.logits, reference.logits)
    found: dict[int, Any] = {}
    for microbatches in (1, 4):
        step = make_step(TINY, REAL, optimizer, StepConfig(microbatches=microbatches, bias_update_speed=0.5))
        state = state_of(params, optimizer.init(params))
        found[microbatches] = jax.device_get(jax.jit(step)(state, scorer(state, placed)))
    for state, metrics in found.values():
        assert metrics["finite"] == 1
        for name in ("loss", *PARTS):
            assert metrics[name] == pytest.approx(expected[name], rel=1e-4), name
        load = np.asarray(logits.router.load_E)
        np.testing.assert_allclose(metrics["load"], load / load.sum(axis=1, keepdims=True), rtol=1e-6)
        # MTP does not run in GRPO: its router's bias, the last row, rests.
        moved = np.abs(state.router_bias - np.asarray(bias))
        assert np.all(moved[-1] == 0) and np.any(moved[:-1] == 0.5)
        assert not np.any(jax.tree.leaves(state.opt_state.trace["mtp"])[0])

    def check(path, split, whole):
        assert np.linalg.norm(split - whole) <= 1e-5 * np.linalg.norm(whole), jax.tree_util.keystr(path)

    jax.tree_util.tree_map_with_path(check, found[4][0].opt_state.trace, found[1][0].opt_state.trace)


class Stepwise:
    """Plain gradient descent on GRPO's loss, update by update, in Python."""

    def __init__(self, loss):
        self.loss = loss
        self.gradient = jax.jit(jax.grad(self.value, has_aux=True))

    def value(self, params, batch):
        model = parameters.merge(TINY, params, weights(TINY)[1])
        return self.loss(model, batch, self.loss.normalisers(batch), jnp.int32(0))

    def descend(self, params, batch, rate):
        gradients, parts = self.gradient(params, batch)
        return jax.tree.map(lambda p, g: p - rate * g, params, gradients), parts


def test_several_updates_are_so_many_steps_on_the_parts_of_a_batch():
    """Two epochs of two minibatches, on a mesh, against four updates by hand; old stays the policy before the first."""
    loss, rate = GRPOLoss(chunk=4, clip_low=0.02, clip_high=0.02, normalise="dapo"), 0.3
    params, _ = weights(TINY)
    batch = on_device(real_batch())
    del batch["old_logprobs"]
    mesh = make_mesh(MeshConfig(data=2, fsdp=2), jax.devices()[:4])
    optimizer = optax.sgd(rate)
    state = create_state(TINY, optimizer, mesh, params=params, router_bias=weights(TINY)[1])
    step = make_step(TINY, loss, optimizer, StepConfig(bias_update_speed=0.0), epochs=2, minibatches=2)
    with pytest.raises(ValueError, match="4 updates per batch need old_logprobs in the batch"):
        jax.eval_shape(step, state, batch)
    scorer = Scorer(TINY, ComputeConfig(), chunk=4, microbatches=2, old=True)
    with jax.set_mesh(mesh):
        placed = scorer(state, place_batch(batch, mesh))
        found, metrics = jax.device_get(jax.jit(step)(state, placed))
    batch["old_logprobs"] = jnp.asarray(jax.device_get(placed["old_logprobs"]))
    by_hand, expected, every = Stepwise(loss), params, []
    for part in (0, 1, 0, 1):
        expected, parts = by_hand.descend(expected, {name: x[part::2] for name, x in batch.items()}, rate)
        every.append(jax.device_get(parts))
    jax.tree.map(lambda a, b: np.testing.assert_array_less(relative_error(a, b), 1e-5), found.params, expected)
    for name in ("kl_sampler", "clip_fraction", "entropy"):
        assert metrics[name] == pytest.approx(np.mean([parts[name] for parts in every]), rel=1e-4), name
    assert every[0]["clip_fraction"] == 0 < every[-1]["clip_fraction"]
    assert metrics["finite"] == 1 and found.step == 1


def test_the_rate_counts_updates():
    """A schedule of four updates is through after one batch of four."""
    config = OptimizerConfig(peak_lr=1.0, warmup_steps=4, constant_until=1.0, cosine_until=1.0)
    optimizer, params = make_optimizer(config, TINY, 4), weights(TINY)[0]
    step = make_step(TINY, GRPOLoss(chunk=4), optimizer, StepConfig(), epochs=2, minibatches=2)
    batch = on_device(real_batch())
    state = jax.jit(step)(state_of(params, optimizer.init(params)), batch)[0]
    counts = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.dtype == jnp.int32]
    assert state.step == 1 and {int(count) for count in counts} == {4}


def test_what_is_dropped_in_a_step_is_of_all_its_updates():
    class Drops:
        def normalisers(self, batch):
            return {}

        def __call__(self, model, batch, norm, step):
            return jnp.sum(model.embed[...] ** 2), {"dropped": jnp.sum(batch["rows"]) * jnp.array([1.0, 2.0])}

    optimizer, params = optax.sgd(0.1), weights(TINY)[0]
    step = make_step(TINY, Drops(), optimizer, StepConfig(), epochs=2, minibatches=2)
    _, metrics = jax.jit(step)(state_of(params, optimizer.init(params)), {"rows": jnp.arange(4.0)})
    assert metrics["dropped"].tolist() == [12.0, 24.0] and metrics["dropped_sum"] == 36.0


# The reference


def test_a_reference_stays_or_follows_and_is_never_the_state_itself():
    params, bias = weights(TINY)
    moved = jax.tree.map(lambda leaf: leaf + 1, params)
    fixed, moving = (Reference(params, bias, path="runs/sft", every=every) for every in (0, 2))
    assert fixed.params is params and fixed.meta == {
        "every": 0,
        "path": "runs/sft",
        "fingerprint": fingerprint((params, bias)),
    }
    for step, finite, follows in ((1, 1.0, False), (2, 0.0, False), (4, 1.0, True)):
        state = dataclasses.replace(state_of(moved, None), step=jnp.int32(step))
        for reference in (fixed, moving):
            reference.follow(state, jnp.float32(finite))
        np.testing.assert_array_equal(moving.params["embed"], moved["embed"] if follows else params["embed"])
        assert fixed.params is params
    for leaf in jax.tree.leaves(moving.arrays):
        leaf.delete()
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((params, moved, bias)))


def test_a_fingerprint_names_the_numbers_alone():
    params, _ = weights(TINY)
    mesh = make_mesh(MeshConfig(fsdp=2, data=4))
    placed = jax.device_put(params, tree_shardings(mesh, parameters.logical_axes(TINY), params))
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    assert fingerprint(params) == fingerprint(placed) == fingerprint(half)
    embed = params["embed"]
    for other in (embed.at[3, 2].add(0.01), embed[::-1], embed.at[:, ::2].set(embed[:, 1::2])):
        assert fingerprint(params | {"embed": other}) != fingerprint(params)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"clip_low": -0.1}, "clip_low=-0.1"),
        ({"kl_weight": -1.0}, "kl_weight=-1.0"),
        ({"chunk": 0}, "chunk=0"),
        ({"normalise": "mean"}, "normalise='mean'.*'grpo', 'dr_grpo', 'dapo'"),
    ],
)
def test_what_makes_no_sense_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        GRPOLoss(**fields)
