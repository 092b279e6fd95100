"""Rollouts: what a batch holds, that learner and sampler agree, and that a killed run repeats it."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import SPEAKER, state, tokenizer

from deepseek_jax.data.chat import encode_prompt
from deepseek_jax.data.rows import PromptLoader
from deepseek_jax.inference.engine import Engine
from deepseek_jax.inference.generate import Generated
from deepseek_jax.model import transformer
from deepseek_jax.rl import problems as rl
from deepseek_jax.rl.rollout import NoSignalError, RolloutConfig, Rollouts, rollout_batch
from deepseek_jax.train.grpo import GRPOLoss

CONFIG = RolloutConfig(prompts=3, group=4, prompt_width=12, max_tokens=20, format_weight=0.5, temperature=1.3)
PROBLEMS = rl.sample_problems(np.random.default_rng(0), 7, rl.KINDS, held_out=False)


@pytest.fixture
def path(tmp_path):
    rl.write_jsonl(tmp_path / "problems.jsonl", PROBLEMS)
    return tmp_path / "problems.jsonl"


def rollouts(path, config=CONFIG, seed=5) -> Rollouts:
    loader = PromptLoader(path, batch_size=config.prompts, seed=1)
    return Rollouts(SPEAKER, tokenizer(), loader, config, seed=seed)


def asked(path, steps: int) -> list[list[rl.Problem]]:
    loader = PromptLoader(path, batch_size=CONFIG.prompts, seed=1)
    return [[rl.make_problem(row["kind"], row["a"], row["b"]) for row in next(loader)] for _ in range(steps)]


# What a sampler would have to say: right and well formed, wrong, right without thinking, cut short though right.
RIGHT, WRONG, BARE, CUT = range(4)


def scripted(monkeypatch, scripts):
    """The engine answers each problem's group as its script says."""
    calls = iter(scripts)

    def generate_ids(self, prompts, sampling, key, *, width):
        kinds = [kind for group in next(calls) for kind in group]
        assert len(prompts) == len(kinds) and width == CONFIG.prompt_width
        tokens = np.full((len(prompts), sampling.max_tokens), tokenizer().pad_id, np.int32)
        lengths, stopped = [], []
        for row, (prompt, kind) in enumerate(zip(prompts, kinds, strict=True)):
            problem = next(p for p in PROBLEMS if encode_prompt(tokenizer(), rl.to_prompt(p)) == prompt)
            answer = "0x" if kind == WRONG else problem.answer
            ids = [tokenizer().think_id, *tokenizer().encode("so"), tokenizer().end_think_id]
            ids = ids * (kind != BARE) + tokenizer().encode(answer) + [tokenizer().eos_id] * (kind != CUT)
            tokens[row, : len(ids)] = ids
            lengths.append(len(ids))
            stopped.append(kind != CUT)
        logprobs = np.where(tokens == tokenizer().pad_id, 0.0, -0.1 * tokens).astype(np.float32)
        return Generated(tokens, logprobs, np.array(lengths, np.int32), np.array(stopped))  # pyright: ignore

    monkeypatch.setattr(Engine, "generate_ids", generate_ids)


SCRIPT = [[RIGHT, WRONG, BARE, CUT], [RIGHT] * 4, [WRONG, WRONG, WRONG, RIGHT]]
TOTAL = {RIGHT: 1.5, WRONG: 0.5, BARE: 0.0, CUT: 0.0}


def test_a_batch_holds_prompts_answers_and_advantages(path, monkeypatch):
    scripted(monkeypatch, [SCRIPT])
    batch, metrics = rollouts(path).next(state())
    problems = [problem for problem in asked(path, 1)[0] for _ in range(4)]
    kinds = np.ravel(SCRIPT)
    for row, (problem, kind) in enumerate(zip(problems, kinds, strict=True)):
        real = np.flatnonzero(batch["segment_ids"][row])
        prompt = encode_prompt(tokenizer(), rl.to_prompt(problem))
        # One stretch from the prompt, which ends at column 11, to the last token of the answer.
        assert real.tolist() == list(range(12 - len(prompt), real[-1] + 1))
        assert batch["tokens"][row, real[: len(prompt)]].tolist() == prompt
        assert batch["positions"][row, real].tolist() == list(range(len(real)))
        answer = real[len(prompt) :]
        assert np.flatnonzero(batch["loss_mask"][row]).tolist() == answer.tolist()
        text = tokenizer().decode(batch["tokens"][row, answer].tolist())
        assert text.endswith("0x" if kind == WRONG else problem.answer)
        assert (batch["tokens"][row, answer[-1]] == tokenizer().eos_id) == (kind != CUT)
        np.testing.assert_allclose(
            batch["sampler_logprobs"][row, answer], -0.1 * batch["tokens"][row, answer], rtol=1e-6
        )
    assert not np.any(batch["sampler_logprobs"] * (1 - batch["loss_mask"]))
    assert batch["truncated"].ravel().tolist() == [kind == CUT for kind in kinds]
    rewards = np.array([TOTAL[int(kind)] for kind in kinds]).reshape(3, 4)
    std = rewards.std(axis=1, keepdims=True)
    expected = (rewards - rewards.mean(axis=1, keepdims=True)) / np.where(std > 0, std, 1)
    np.testing.assert_allclose(batch["advantages"], expected.reshape(-1, 1), atol=1e-6)
    shares = {
        "reward": rewards.mean(),
        "reward_accuracy": 6 / 12,
        "reward_format": 10 / 12,
        "response_length": batch["loss_mask"].sum() / 12,
        "truncated": 1 / 12,
        "signal_groups": 2 / 3,
    }
    assert metrics == pytest.approx(shares)
    lengths = {name: (value.shape, value.dtype) for name, value in batch.items()}
    assert {shape for shape, _ in lengths.values()} == {(12, 32), (12, 1)}
    assert {name for name, (shape, _) in lengths.items() if shape == (12, 1)} == {"advantages", "truncated"}


def test_advantages_without_scaling(path, monkeypatch):
    scripted(monkeypatch, [SCRIPT])
    config = dataclasses.replace(CONFIG, advantage="none")
    batch, _ = rollouts(path, config).next(state())
    rewards = np.array([TOTAL[kind] for group in SCRIPT for kind in group]).reshape(3, 4)
    np.testing.assert_allclose(
        batch["advantages"].reshape(3, 4), rewards - rewards.mean(axis=1, keepdims=True), atol=1e-6
    )


def test_learner_and_sampler_agree(path):
    """KL under 1e-6 in float32: prefill and absorbed decoding over the cache against the packed training pass."""
    batch, metrics = rollouts(path).next(state())
    assert metrics["response_length"] > 10
    loss = GRPOLoss(chunk=8)
    placed = {name: jnp.asarray(value) for name, value in batch.items()}
    run = jax.jit(
        lambda state, batch: loss(
            transformer.merge(SPEAKER, state.params, state.router_bias), batch, loss.normalisers(batch), state.step
        )[1]
    )
    parts = run(state(), placed)
    assert 0 <= parts["kl_sampler"] < 1e-6 and parts["clip_fraction"] == 0
    # The metric sees what is wrong: at another temperature, or one token further, they do not agree.
    shifted = placed | {"sampler_logprobs": jnp.roll(placed["sampler_logprobs"], 1, axis=1)}
    assert run(state(), shifted)["kl_sampler"] > 1e-2


def test_a_restored_run_samples_the_same_batch(path):
    first = rollouts(path)
    first.next(state())
    saved = json.loads(json.dumps(first.state()))
    later = state(1)
    expected, metrics = first.next(later)
    again = rollouts(path)
    again.restore(saved)
    found, found_metrics = again.next(later)
    assert found_metrics == metrics
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value)
    other, _ = rollouts(path, seed=6).next(later)
    assert not np.array_equal(other["tokens"], expected["tokens"])


def test_a_step_samples_anew(path):
    """The same problem in a later step gets other answers: the key follows the step."""
    batches = []
    for step in (0, 1):
        fresh = rollouts(path)  # at the same position of the loader
        batches.append(fresh.next(state(step))[0])
    np.testing.assert_array_equal(batches[0]["tokens"][:, :12], batches[1]["tokens"][:, :12])
    assert not np.array_equal(batches[0]["tokens"], batches[1]["tokens"])


def test_a_run_without_signal_stops_with_a_message(path, monkeypatch):
    """Under min_signal of the groups for `patience` steps in a row, counted across a restart."""
    config = dataclasses.replace(CONFIG, min_signal=0.4, patience=3)
    none, one, two = [[RIGHT] * 4] * 3, [[RIGHT] * 4, [WRONG] * 4, [RIGHT, RIGHT, WRONG, WRONG]], SCRIPT
    scripted(monkeypatch, [none, one, two, one, none, one])
    run = rollouts(path, config)
    for _ in range(5):  # the third has signal
        run.next(state())
    assert run.state()["quiet_steps"] == 2
    resumed = rollouts(path, config)
    resumed.restore(json.loads(json.dumps(run.state())))
    with pytest.raises(NoSignalError, match="fewer than 40% of the groups had unequal rewards for 3 steps"):
        resumed.next(state())


def test_a_run_may_be_told_not_to_stop(path, monkeypatch):
    config = dataclasses.replace(CONFIG, patience=0)
    scripted(monkeypatch, [[[RIGHT] * 4] * 3] * 4)
    run = rollouts(path, config)
    for _ in range(4):
        assert run.next(state())[1]["signal_groups"] == 0


def test_prompts_wider_than_the_batch_are_refused():
    out = Generated(*(np.zeros((1, 2)) for _ in range(4)))  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="prompt 0 has 13 tokens: expected 1…12"):
        rollout_batch([[1] * 13], out, np.zeros((1, 1)), 2, CONFIG)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"group": 1}, "group=1: expected at least 1 and 2"),
        ({"prompts": 0}, "prompts=0"),
        ({"advantage": "mean"}, "advantage='mean': expected 'std' or 'none'"),
        ({"temperature": 0.0}, "temperature=0.0.*must be positive"),
        ({"patience": None}, "patience=None.*int"),
    ],
)
def test_what_makes_no_sense_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        RolloutConfig(**fields)
