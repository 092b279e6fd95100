"""GRPO's relatives, one after the other as their papers write them: numpy in float64 on random ragged groups.

The network is a table of logits by the last token: nothing but the loss is compiled.
"""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from train.cases import TINY, on_device

from deepseek_jax.compute import ComputeConfig
from deepseek_jax.model import parameters, transformer
from deepseek_jax.parallel.mesh import MeshConfig, make_mesh
from deepseek_jax.parallel.sharding import place_batch
from deepseek_jax.train.grpo import GRPOLoss, group_advantages
from deepseek_jax.train.state import TrainState
from deepseek_jax.train.step import StepConfig, make_step

WIDTH, PROMPTS, GROUP, COLUMNS, LIMIT = 7, 3, 4, 12, 8
# The head of train/grpo.py, with clips that random policies reach; "steps" have advantages of their own on each token.
VARIANTS = {
    "grpo": GRPOLoss(kl_weight=0.04),
    "grpo steps": GRPOLoss(kl_weight=0.04),
    "r1": GRPOLoss(kl_weight=0.001, clip_low=10.0, clip_high=10.0),
    "dr_grpo": GRPOLoss(normalise="dr_grpo"),
    "dapo": GRPOLoss(normalise="dapo", clip_high=0.28, mask_truncated=True),
    "gspo": GRPOLoss(ratio="sequence", clip_low=0.1, clip_high=0.3),
    "gspo steps": GRPOLoss(ratio="sequence", clip_low=0.1, clip_high=0.3),
    "cispo": GRPOLoss(objective="cispo", normalise="dapo", clip_low=1.0, clip_high=0.5),
    "rloo": GRPOLoss(normalise="rloo"),
    "tis": GRPOLoss(tis_cap=1.2),
    "cispo tis kl": GRPOLoss(objective="cispo", ratio="sequence", tis_cap=2.0, kl_weight=0.1, mask_truncated=True),
}
VARIANTS = {name: dataclasses.replace(loss, chunk=5) for name, loss in VARIANTS.items()}
every_variant = pytest.mark.parametrize("name", VARIANTS)


def draw_batch(seed: int, *, steps: bool = False) -> dict[str, np.ndarray]:
    """Groups of answers of 1 to LIMIT tokens; the last group's rewards are all equal."""
    rng = np.random.default_rng(seed)
    rows, index = PROMPTS * GROUP, np.arange(COLUMNS)
    begin = np.repeat(rng.integers(1, 4, PROMPTS), GROUP)[:, None]
    end = begin + rng.integers(1, LIMIT + 1, (rows, 1))
    inside, answer = index < end, (index >= begin) & (index < end)
    rewards = rng.choice([0.0, 0.2, 1.0], (PROMPTS, GROUP))
    rewards[-1] = 0.2
    advantages = np.asarray(group_advantages(jnp.asarray(rewards, jnp.float32))).reshape(-1, 1)
    if steps:
        advantages = advantages + rng.standard_normal(answer.shape) * answer
    logprobs = lambda: (answer * rng.uniform(-2.5, -1.5, answer.shape)).astype(np.float32)  # noqa: E731
    return {
        "tokens": np.where(inside, rng.integers(0, WIDTH, inside.shape), 0).astype(np.int32),
        "segment_ids": inside.astype(np.int32),
        "positions": np.where(inside, index, 0).astype(np.int32),
        "loss_mask": answer.astype(np.float32),
        "old_logprobs": logprobs(),
        "sampler_logprobs": logprobs(),
        "reference_logprobs": logprobs(),
        "advantages": advantages.astype(np.float32),
        "truncated": (rng.random((rows, 1)) < 0.3).astype(np.float32),
        "temperature": np.full((rows, 1), 0.8, np.float32),
        "max_tokens": np.full((rows, 1), LIMIT, np.float32),
    }


def draw(name: str, seed: int) -> tuple[GRPOLoss, np.ndarray, dict[str, np.ndarray]]:
    table = np.random.default_rng(100 + seed).standard_normal((WIDTH, WIDTH)) * 0.5
    return VARIANTS[name], table, draw_batch(seed, steps="steps" in name)


def by_hand(loss: GRPOLoss, table: np.ndarray, batch: dict[str, np.ndarray]) -> tuple[float, np.ndarray]:
    """The loss, and its gradient by the table."""
    rows = [row for row in range(len(batch["tokens"])) if not (loss.mask_truncated and batch["truncated"][row, 0])]
    every = sum(batch["loss_mask"][row].sum() for row in rows)
    value, gradient = 0.0, np.zeros_like(table)
    for row in rows:
        places = np.flatnonzero(batch["loss_mask"][row])
        before, said = batch["tokens"][row, places - 1], batch["tokens"][row, places]
        heat = float(batch["temperature"][row, 0])
        p = np.exp(table[before] / heat)
        p /= p.sum(axis=1, keepdims=True)
        new = np.log(p[np.arange(len(said)), said])
        old, sampler, reference = (
            batch[f"{whose}_logprobs"][row, places].astype(np.float64) for whose in ("old", "sampler", "reference")
        )
        advantage = np.broadcast_to(batch["advantages"][row].astype(np.float64), COLUMNS)[places]
        gain, slope = gains(loss, new, old, advantage)
        if loss.tis_cap:
            weight = np.minimum(np.exp(old - sampler), loss.tis_cap)
            gain, slope = weight * gain, weight * slope
        apart = reference - new
        gain = gain - loss.kl_weight * (np.exp(apart) - apart - 1)
        slope = slope - loss.kl_weight * (1 - np.exp(apart))
        share = {
            "grpo": 1 / (len(rows) * len(places)),
            "dr_grpo": 1 / (len(rows) * LIMIT),
            "dapo": 1 / every,
            "rloo": 1 / len(rows),
        }[loss.normalise]
        value -= share * gain.sum()
        by_logits = slope[:, None] * (np.eye(WIDTH)[said] - p) / heat
        np.add.at(gradient, before, -share * by_logits)
    return value, gradient


def gains(loss: GRPOLoss, new, old, advantage) -> tuple[np.ndarray, np.ndarray]:
    """What each token adds, and the derivative by its log π."""
    ratio = np.exp(new - old)
    if loss.ratio == "sequence":  # GSPO: equation 7; with advantages of tokens its GSPO-token, equation 14
        ratio = np.full(len(new), np.prod(ratio) ** (1 / len(new)))
    clipped = np.minimum(np.maximum(ratio, 1 - loss.clip_low), 1 + loss.clip_high)
    if loss.objective == "cispo":
        return clipped * advantage * new, clipped * advantage
    unclipped = ratio * advantage <= clipped * advantage
    return np.minimum(ratio * advantage, clipped * advantage), np.where(unclipped, ratio * advantage, 0.0)


class Bigram(transformer.Transformer):
    """In place of a network."""

    def __init__(self, table):
        self.compute, self.table = ComputeConfig(), nnx.data(table)

    def __call__(self, tokens_BS, **given):
        return types.SimpleNamespace(hidden=self.table[tokens_BS], router=None)

    def head_weight(self):
        return jnp.eye(WIDTH)


def run(loss: GRPOLoss, table, batch):
    (value, parts), gradient = jax.jit(
        jax.value_and_grad(lambda x, b: loss(Bigram(x), b, loss.normalisers(b), jnp.int32(0)), has_aux=True)
    )(jnp.asarray(table, jnp.float32), on_device(batch))
    return float(value), parts, np.asarray(gradient)


def assert_close(found, expected, tolerance=1e-5):
    assert np.abs(np.asarray(found) - expected).max() <= tolerance * max(np.abs(expected).max(), 1e-2)


@pytest.mark.parametrize("seed", range(3))
@every_variant
def test_loss_and_gradient_equal_numpy(name, seed):
    loss, table, batch = draw(name, seed)
    value, gradient = by_hand(loss, table, batch)
    found, parts, found_gradient = run(loss, table, batch)
    assert_close(found, value)
    assert_close(found_gradient, gradient)
    assert np.abs(gradient).max() > 1e-3
    assert parts["clip_fraction"] > 0 or loss.clip_high > 1
    assert ("tis_capped" in parts) == bool(loss.tis_cap) and 0 <= parts.get("tis_capped", 0.5) <= 1


@pytest.mark.parametrize("name", ["grpo", "r1", "dr_grpo", "dapo", "rloo", "tis"])
def test_the_transcription_is_its_own_derivative(name):
    """Where no gradient is stopped, the slopes above are those of the values."""
    loss, table, batch = draw(name, 0)
    slopes = np.zeros_like(table)
    for place in np.ndindex(table.shape):
        moved = [table.copy(), table.copy()]
        moved[0][place] += 1e-6
        moved[1][place] -= 1e-6
        slopes[place] = (by_hand(loss, moved[0], batch)[0] - by_hand(loss, moved[1], batch)[0]) / 2e-6
    assert_close(slopes, by_hand(loss, table, batch)[1])


def test_gspo_is_its_papers_objective_over_answers():
    """Equation 5, ``1/G Σ min(s A, clip(s) A)`` by finite differences, against the form by tokens."""
    loss, table, batch = draw("gspo", 1)

    def objective(table):
        terms = []
        for row, mask in enumerate(batch["loss_mask"]):
            places = np.flatnonzero(mask)
            z = table[batch["tokens"][row, places - 1]] / float(batch["temperature"][row, 0])
            log_p = z - np.log(np.exp(z).sum(axis=1, keepdims=True))
            new = log_p[np.arange(len(places)), batch["tokens"][row, places]]
            s = np.exp(np.mean(new - batch["old_logprobs"][row, places]))
            advantage = float(batch["advantages"][row, 0])
            terms.append(min(s * advantage, np.clip(s, 1 - loss.clip_low, 1 + loss.clip_high) * advantage))
        return np.mean(terms)

    value, _, gradient = run(loss, table, batch)
    assert value == pytest.approx(-objective(table), rel=1e-5)
    for place in ((0, 1), (3, 3), (5, 2), (6, 6)):
        step = np.zeros_like(table)
        step[place] = 1e-6
        slope = (objective(table + step) - objective(table - step)) / 2e-6
        assert gradient[place] == pytest.approx(-slope, rel=1e-4, abs=1e-6)


@every_variant
def test_on_policy_the_gradient_is_reinforce(name):
    """With one update a batch, and no KL and no sampler apart, each is ``-A ∇log π`` under its own average."""
    loss, table, batch = draw(name, 2)
    loss = dataclasses.replace(loss, kl_weight=0.0, tis_cap=0.0)
    _, parts, found = run(loss, table, {name: value for name, value in batch.items() if name != "old_logprobs"})
    plain = dataclasses.replace(loss, objective="cispo", ratio="token", clip_low=0.0, clip_high=0.0)  # of weight 1
    assert_close(found, by_hand(plain, table, batch)[1])
    assert parts["clip_fraction"] == 0


def step_of(monkeypatch, loss, optimizer, **options):
    def merged(config, params, router_bias, compute):
        return Bigram(params["table"])

    monkeypatch.setattr(parameters, "merge", merged)
    monkeypatch.setattr(parameters, "logical_axes", lambda config: {"table": (None, None)})
    step = jax.jit(make_step(TINY, loss, optimizer, StepConfig(options.pop("microbatches", 1)), **options))

    def take(table, batch):
        params = {"table": jnp.asarray(table, jnp.float32)}
        return jax.device_get(step(TrainState(jnp.int32(0), params, optimizer.init(params), None), batch))

    return take


@every_variant
def test_neither_split_nor_padding_nor_mesh_matters(name, monkeypatch):
    loss, table, batch = draw(name, 3)
    wide = {k: np.pad(v, ((0, 0), (0, 4))) if v.shape[1] > 1 else v for k, v in batch.items()}
    mesh = make_mesh(MeshConfig(data=2, fsdp=2), jax.devices()[:4])
    take = step_of(monkeypatch, loss, optax.trace(0.0), microbatches=3)  # its state is the gradient
    with jax.set_mesh(mesh):
        state, metrics = take(table, place_batch(wide, mesh))
    value, gradient = by_hand(loss, table, batch)
    assert_close(metrics["loss"], value)
    assert_close(state.opt_state.trace["table"], gradient)


def packed(batch: dict[str, np.ndarray], together: int, width: int) -> dict[str, np.ndarray]:
    """So many rows behind each other in one, a segment each, and a row of padding behind the last."""
    rows = len(batch["tokens"]) // together
    made = {name: np.zeros((rows + 1, width), value.dtype) for name, value in batch.items()}
    made["answer_tokens"] = np.zeros((rows + 1, width), np.float32)
    for row in range(rows):
        start = 0
        for segment, one in enumerate(range(row * together, (row + 1) * together), start=1):
            real = batch["segment_ids"][one] > 0
            place = slice(start, start + real.sum())
            for name, value in batch.items():
                made[name][row, place] = np.broadcast_to(value[one], real.shape)[real]
            made["segment_ids"][row, place] = segment
            made["answer_tokens"][row, place] = batch["loss_mask"][one].sum() * batch["loss_mask"][one][real]
            start = place.stop
    constant = {name: np.full((rows + 1, 1), batch[name][0, 0]) for name in ("temperature", "max_tokens")}
    return made | constant


@every_variant
def test_packing_does_not_matter(name, monkeypatch):
    loss, table, batch = draw(name, 6)
    value, gradient = by_hand(loss, table, batch)
    together = packed(batch, 4, 4 * COLUMNS + 3)
    assert together["segment_ids"].max() == 4
    take = step_of(monkeypatch, loss, optax.trace(0.0), microbatches=2)  # of rows with answers and with none
    state, metrics = take(table, on_device(together))
    assert_close(metrics["loss"], value)
    assert_close(state.opt_state.trace["table"], gradient)


@every_variant
def test_several_updates_of_several_minibatches(name, monkeypatch):
    loss, table, batch = draw(name, 4)
    take = step_of(monkeypatch, loss, optax.sgd(0.3), epochs=2, minibatches=2)
    state, metrics = take(table, on_device(batch))
    moved, values = table, []
    for part in (0, 1, 0, 1):
        value, gradient = by_hand(loss, moved, {k: v[part::2] for k, v in batch.items()})
        moved = moved - 0.3 * gradient
        values.append(value)
    assert_close(state.params["table"] - table, moved - table, 3e-5)
    assert metrics["loss"] == pytest.approx(np.mean(values), rel=1e-4, abs=1e-6)


@every_variant
def test_groups_that_say_nothing_teach_nothing(name):
    loss, table, batch = draw(name, 5)
    silent = dataclasses.replace(loss, kl_weight=0.0)
    value, _, gradient = run(silent, table, batch | {"advantages": 0 * batch["advantages"]})
    assert value == 0 and not gradient.any()
    cut = dataclasses.replace(loss, mask_truncated=True)
    value, parts, gradient = run(cut, table, batch | {"truncated": np.ones_like(batch["truncated"])})
    assert value == 0 and not gradient.any() and not any(float(part) for part in parts.values())


@pytest.mark.parametrize("scale", ["std", "none", "leave_one_out"])
def test_a_single_answer_and_equal_ones_have_no_advantage(scale):
    for rewards in (np.array([[0.7], [-2.0]]), np.full((2, 5), 0.5)):
        found = np.asarray(group_advantages(jnp.asarray(rewards, jnp.float32), scale=scale))
        np.testing.assert_array_equal(found, 0 * rewards)
