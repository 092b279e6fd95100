"""Advantages, values and the step of PPO against numpy in float64, and what they must not depend on."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from model.tiny import relative_error, weights
from train.cases import TINY, on_device

from deepseek_jax.compute import ComputeConfig
from deepseek_jax.model import transformer
from deepseek_jax.model.scores import with_scores
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.rl.advantages import step_advantages
from deepseek_jax.train.grpo import GRPOLoss, group_advantages
from deepseek_jax.train.optimizer import OptimizerConfig, make_optimizer
from deepseek_jax.train.ppo import ActorCritic, CriticConfig, ValueLoss, advantages, judged, with_critic
from deepseek_jax.train.state import abstract_state, create_state
from deepseek_jax.train.step import StepConfig, make_step

ONE = make_mesh(devices=jax.devices()[:1])
# (prompt, answer) tokens of eight samples: single tokens, and a reward of steps that end at some of an answer's tokens.
LENGTHS = [(3, 5), (2, 1), (4, 7), (1, 4), (5, 2), (2, 6), (3, 3), (1, 1)]
OUTCOMES = [1.0, 0.2, 0.0, 0.0, 1.2, 0.7, 0.0, 1.0]
STEPS = {2: {1: 0.5, 4: -0.25}, 5: {0: 1.0}}


def token_rewards(sample):
    rewards = np.zeros(LENGTHS[sample][1])
    rewards[-1] = OUTCOMES[sample]
    for end, reward in STEPS.get(sample, {}).items():
        rewards[end] += reward
    return rewards


def make_batch(rows, width, seed=0):
    """The samples of each row, a segment each, and what rollouts say of them, as ``rollout_batch`` writes it; with
    random log-probabilities."""
    rng = np.random.default_rng(seed)
    drawn = [(rng.integers(3, TINY.vocab_size, p + a), *rng.normal(-1, 0.3, (2, a))) for p, a in LENGTHS]
    names = ("loss_mask", "advantages", "answer_tokens", "truncated", "old_logprobs", "reference_logprobs")
    batch = {name: np.zeros((len(rows), width), np.float32) for name in names}
    batch |= {name: np.zeros((len(rows), width), np.int32) for name in ("tokens", "segment_ids", "positions")}
    for row, samples in enumerate(rows):
        start = 0
        for segment, sample in enumerate(samples, start=1):
            (prompt, answer), (ids, old, reference) = LENGTHS[sample], drawn[sample]
            whole, said = slice(start, start + prompt + answer), slice(start + prompt, start + prompt + answer)
            batch["tokens"][row, whole], batch["segment_ids"][row, whole] = ids, segment
            batch["positions"][row, whole] = np.arange(prompt + answer)
            batch["loss_mask"][row, said], batch["answer_tokens"][row, said] = 1, answer
            batch["old_logprobs"][row, said], batch["reference_logprobs"][row, said] = old, reference
            batch["advantages"][row, said] = np.cumsum(token_rewards(sample)[::-1])[::-1]
            start = whole.stop
    batch["sampler_logprobs"] = batch["old_logprobs"]
    batch |= {"temperature": np.ones((len(rows), 1), np.float32), "max_tokens": np.full((len(rows), 1), 7, np.float32)}
    return batch


ALONE = [[sample] for sample in range(8)]
PACKED = [[0, 1], [2], [3, 4, 7], [5, 6]]


def of_samples(x_BS, rows):
    """What stands at each sample's answer, whatever rows they are in."""
    found = {}
    for row, samples in enumerate(rows):
        start = 0
        for sample in samples:
            prompt, answer = LENGTHS[sample]
            found[sample] = np.asarray(x_BS)[row, start + prompt : start + prompt + answer]
            start += prompt + answer
    return [found[sample] for sample in range(8)]


def gae_by_hand(rewards, values, gamma, gae_lambda):
    """Σ_k (γλ)^k δ_{t+k}, each sum written out."""
    following = [*values[1:], 0.0]
    deltas = [r + gamma * after - v for r, v, after in zip(rewards, values, following, strict=True)]
    return [sum((gamma * gae_lambda) ** k * d for k, d in enumerate(deltas[t:])) for t in range(len(deltas))]


@pytest.mark.parametrize("kl_reward", [0.0, 0.3])
@pytest.mark.parametrize(("gamma", "gae_lambda"), [(1.0, 1.0), (1.0, 0.95), (0.9, 0.5), (0.97, 0.0)])
@pytest.mark.parametrize(("rows", "width"), [(ALONE, 13), (PACKED, 16)], ids=["alone", "packed"])
def test_advantages_equal_numpy(rows, width, gamma, gae_lambda, kl_reward):
    batch = make_batch(rows, width)
    values_BS = np.random.default_rng(1).standard_normal((len(rows), width)).astype(np.float32)
    found = advantages(
        jnp.asarray(values_BS), on_device(batch), gamma=gamma, gae_lambda=gae_lambda, kl_reward=kl_reward
    )
    assert not np.asarray(found)[batch["loss_mask"] == 0].any()
    penalties = of_samples(np.float64(batch["old_logprobs"]) - batch["reference_logprobs"], rows)
    for sample, (A, values) in enumerate(zip(of_samples(found, rows), of_samples(values_BS, rows), strict=True)):
        rewards = token_rewards(sample) - kl_reward * penalties[sample]
        np.testing.assert_allclose(A, gae_by_hand(rewards, np.float64(values), gamma, gae_lambda), atol=2e-6)


def test_tokens_of_others_within_an_answer_are_passed_over():
    """A tool's two tokens between an answer's: as if they were not there."""
    batch = make_batch([[2]], 13)
    values_BS = np.random.default_rng(1).standard_normal((1, 13)).astype(np.float32)
    batch["loss_mask"][0, 6:8] = 0
    found = np.asarray(advantages(jnp.asarray(values_BS), on_device(batch), gamma=0.9, gae_lambda=0.7))[0]
    own = [4, 5, 8, 9, 10]
    to_go = np.append(batch["advantages"][0, own], 0.0)
    rewards = np.subtract(to_go[:-1], to_go[1:], dtype=np.float64)
    np.testing.assert_allclose(found[own], gae_by_hand(rewards, np.float64(values_BS[0, own]), 0.9, 0.7), atol=2e-6)
    assert not found[6:8].any()


def test_returns_to_go_are_rewards_as_they_are():
    rewards = np.array([[1.0, 0.2, 0.2]], np.float32)
    np.testing.assert_array_equal(group_advantages(jnp.asarray(rewards), scale="return"), rewards)
    found = step_advantages([[(0, 0.5), (2, 0.5)], []], [4, 2], scale="return")
    np.testing.assert_array_equal(found[0], [1.0, 0.5, 0.5, 0.0])
    np.testing.assert_array_equal(found[1], [0.0, 0.0])


class Table(transformer.Transformer):
    """In place of a critic: the scores themselves, position by position."""

    def __init__(self, table):
        self.table = nnx.data(table)

    def __call__(self, tokens_BS, **given):
        return types.SimpleNamespace(scores=self.table[..., None], router=None)


@pytest.mark.parametrize("value_clip", [0.0, 0.2])
def test_value_loss_and_gradient_equal_numpy(value_clip):
    batch, rng = make_batch(PACKED, 16), np.random.default_rng(2)
    shape = batch["tokens"].shape
    batch |= {name: rng.standard_normal(shape).astype(np.float32) for name in ("values", "returns")}
    table = (np.roll(batch["values"], -1, axis=1) + 0.3 * rng.standard_normal(shape)).astype(np.float32)
    loss, norm = ValueLoss(value_clip), ValueLoss().normalisers(on_device(batch))
    call = lambda table: loss(Table(table), on_device(batch), norm, jnp.int32(0))  # noqa: E731
    (value, parts), gradient = jax.value_and_grad(call, has_aux=True)(jnp.asarray(table))
    total, clipped, slope = 0.0, 0, np.zeros(shape)
    for row, column in zip(*np.nonzero(batch["loss_mask"]), strict=True):
        old, wanted, new = (float(x[row, at]) for x, at in
                            ((batch["values"], column), (batch["returns"], column), (table, column - 1)))  # fmt: skip
        near = min(max(new, old - value_clip), old + value_clip) if value_clip else new
        total += 0.5 * max((new - wanted) ** 2, (near - wanted) ** 2)
        if (near - wanted) ** 2 > (new - wanted) ** 2:
            clipped += 1
        else:
            slope[row, column - 1] = new - wanted
    count = batch["loss_mask"].sum()
    assert float(value) == pytest.approx(total / count, rel=1e-5)
    assert float(parts["clip_fraction"]) == pytest.approx(clipped / count) and (clipped > 0) == (value_clip > 0)
    np.testing.assert_allclose(gradient, slope / count, atol=1e-6)


# On networks

OPTIMIZER = OptimizerConfig(peak_lr=0.01, warmup_steps=0, eps=0.01, clip_norm=1e9)
CRITIC = CriticConfig(gamma=0.97, gae_lambda=0.9, kl_reward=0.05, optimizer=OPTIMIZER)


def trained(rows, width, microbatches=1, epochs=1, minibatches=1, updates=2):
    """Two steps of policy and critic -> their parameters and the last metrics."""
    params, bias = weights(TINY)
    optimizer, options = make_optimizer(OPTIMIZER, TINY, 100), StepConfig(microbatches=microbatches)
    state = create_state(TINY, optimizer, ONE, params=params, router_bias=bias)
    how = {"epochs": epochs, "minibatches": minibatches, "compute": ComputeConfig()}
    policy = make_step(TINY, GRPOLoss(normalise="dapo", chunk=4), optimizer, options, **how)
    step, state = with_critic(policy, state, TINY, CRITIC, options, **how, steps=100, mesh=ONE)
    step, batch, metrics = jax.jit(step), on_device(make_batch(rows, width)), {}
    for _ in range(updates):
        state, metrics = step(state, batch)
    return {"policy": state.params, "critic": state.critic.params}, metrics


def assert_same(found, wanted):
    apart = jax.tree.map(relative_error, found[0], wanted[0])
    assert max(jax.tree.leaves(apart)) < 1e-5, apart
    for name in ("loss", "value_loss", "value", "return", "explained_variance"):
        assert float(found[1][name]) == pytest.approx(float(wanted[1][name]), rel=1e-4, abs=1e-5), name


def test_padding_packing_and_microbatches_change_nothing():
    whole = trained(ALONE, 13)
    assert whole[1]["finite"] == 1 and whole[1]["value_grad_norm"] > 0
    start, body = weights(TINY)[0], whole[0]["critic"]
    assert "head" not in body and "mtp" not in body and body["score"]["w"].any()
    assert (
        relative_error(body["embed"], start["embed"]) > 1e-4
        and relative_error(body["embed"], whole[0]["policy"]["embed"]) > 1e-4
    )
    for rows, width, microbatches in ((ALONE, 20, 1), (ALONE, 13, 4), ([*PACKED, [], [], [], []], 16, 2)):
        assert_same(trained(rows, width, microbatches), whole)


def test_the_step_is_policy_and_critic_each_on_the_same_advantages():
    """Two epochs of two minibatches, against each network's own steps on a batch that was judged once."""
    found = trained(ALONE, 13, epochs=2, minibatches=2, updates=1)
    params, bias = weights(TINY)
    value_config, body, body_bias = with_scores(TINY, params, bias, 1)
    wanted = {}
    for name, config, loss, (arrays, own) in (
        ("critic", value_config, ValueLoss(), (body, body_bias)),
        ("policy", TINY, GRPOLoss(normalise="dapo", chunk=4), (params, bias)),
    ):
        optimizer = make_optimizer(OPTIMIZER, config, 400)
        state = create_state(config, optimizer, ONE, params=arrays, router_bias=own)
        if name == "critic":
            batch, about = judged(value_config, CRITIC, 1, ComputeConfig(), state, on_device(make_batch(ALONE, 13)))
        step = make_step(config, loss, optimizer, StepConfig(), epochs=2, minibatches=2)
        wanted[name] = jax.jit(step)(state, batch)[0].params
    assert max(jax.tree.leaves(jax.tree.map(relative_error, found[0], wanted))) < 1e-5
    mask = np.asarray(batch["loss_mask"]) > 0
    assert not batch["values"].any()  # a critic begins without a preference
    whitened = np.asarray(batch["advantages"])[mask]
    assert abs(whitened.mean()) < 1e-6 and whitened.std() == pytest.approx(1, abs=1e-3)
    assert float(about["explained_variance"]) == pytest.approx(0, abs=1e-6)


def test_a_state_that_is_to_be_read_has_the_same_shapes():
    params, bias = weights(TINY)
    optimizer = make_optimizer(OPTIMIZER, TINY, 10)
    how = {"steps": 10, "compute": ComputeConfig(), "mesh": ONE}
    policy = make_step(TINY, GRPOLoss(), optimizer, StepConfig())
    _, state = with_critic(policy, create_state(TINY, optimizer, ONE, params=params, router_bias=bias), TINY, CRITIC,
                           StepConfig(), **how)  # fmt: skip
    _, shapes = with_critic(policy, abstract_state(TINY, optimizer, ONE), TINY, CRITIC, StepConfig(), **how)
    assert isinstance(state, ActorCritic)
    same = jax.tree.map(lambda a, b: (a.shape, a.dtype, a.sharding) == (b.shape, b.dtype, b.sharding), state, shapes)
    assert all(jax.tree.leaves(same))


@pytest.mark.parametrize(
    ("fields", "message"), [({"gamma": 1.1}, "gamma=1.1"), ({"gae_lambda": 2.0}, "gae_lambda=2.0")]
)
def test_what_makes_no_sense_is_refused(fields, message):
    with pytest.raises(ValueError, match=f"{message}: must lie in"):
        dataclasses.replace(CriticConfig(), **fields)
