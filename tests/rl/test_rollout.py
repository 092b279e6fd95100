"""Rollouts: what a batch holds, that learner and sampler agree, and that a killed run repeats it."""

import dataclasses
import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model.tiny import weights, whole
from small import SPEAKER, state, tokenizer

from deepseek_jax.compute import ComputeConfig
from deepseek_jax.data.chat import encode_prompt
from deepseek_jax.data.rows import PromptLoader
from deepseek_jax.data.template import ChatTemplate
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.files import read_json_lines
from deepseek_jax.inference.engine import Engine
from deepseek_jax.inference.generate import Generated
from deepseek_jax.inference.sampling import SamplingParams
from deepseek_jax.model import parameters
from deepseek_jax.rl import arithmetic
from deepseek_jax.rl.advantages import settled
from deepseek_jax.rl.asking import Answer, Question, ask, read_answers
from deepseek_jax.rl.grader import Grader
from deepseek_jax.rl.rollout import NoSignalError, Rollouts
from deepseek_jax.rl.rollout_config import RolloutConfig, open_questions
from deepseek_jax.rl.sample_log import SampleLog
from deepseek_jax.rl.samples import Sample, make_sample, rollout_batch
from deepseek_jax.rl.tasks import TaskConfig, make_task
from deepseek_jax.train.grpo import GRPOLoss
from deepseek_jax.train.loop_config import LoopConfig
from deepseek_jax.train.reference import Reference
from deepseek_jax.train.scoring import Scorer, score_tokens

CONFIG = RolloutConfig(prompts=3, group=4, max_prompt=12, max_tokens=20, temperature=1.3)
PROBLEMS = arithmetic.sample_problems(np.random.default_rng(0), 7, arithmetic.KINDS, held_out=False)
TASK = make_task(TaskConfig(name="arithmetic"))
MODEL = whole(SPEAKER, *weights(SPEAKER), tokenizer())


@pytest.fixture
def path(tmp_path):
    arithmetic.write_jsonl(tmp_path / "problems.jsonl", PROBLEMS)
    return tmp_path / "problems.jsonl"


def rollouts(path, config=CONFIG, seed=5, rewards=("accuracy", "format=0.5")) -> Rollouts:
    loader = open_questions(TASK, MODEL, (str(path),), config, batch_size=config.prompts, seed=1)
    return Rollouts(MODEL, TASK, Grader(rewards, task=TASK), loader, config, seed=seed)


CLOCKS = ("rollout_seconds", "reward_seconds", "rollout_tokens_per_second")


def untimed(metrics):
    return {name: value for name, value in metrics.items() if name not in CLOCKS}


def prompt_of(problem: arithmetic.Problem) -> list[int]:
    return encode_prompt(tokenizer(), arithmetic.to_prompt(problem))


# What a sampler would have to say: right and well formed, wrong, right without thinking, cut short though right.
RIGHT, WRONG, BARE, CUT = range(4)


def scripted(monkeypatch, scripts):
    """The engine answers each problem's group as its script says."""
    calls = iter(scripts)

    def generate_ids(self, prompts, sampling, key, experts):
        assert not experts
        kinds = [kind for group in next(calls) for kind in group]
        assert len(prompts) == len(kinds)
        tokens = np.full((len(prompts), sampling.max_tokens), tokenizer().pad_id, np.int32)
        lengths, stopped = [], []
        for row, (prompt, kind) in enumerate(zip(prompts, kinds, strict=True)):
            answer = "0x" if kind == WRONG else next(p for p in PROBLEMS if prompt_of(p) == prompt).answer
            ids = [tokenizer().think_id, *tokenizer().encode("so"), tokenizer().end_think_id]
            ids = ids * (kind != BARE) + tokenizer().encode(answer) + [tokenizer().eos_id] * (kind != CUT)
            tokens[row, : len(ids)] = ids
            lengths.append(len(ids))
            stopped.append(kind != CUT)
        logprobs = np.where(tokens == tokenizer().pad_id, 0.0, -0.1 * tokens).astype(np.float32)
        return Generated(tokens, logprobs, np.array(lengths, np.int32), np.array(stopped))  # pyright: ignore

    monkeypatch.setattr(Engine, "generate_ids", generate_ids)
    monkeypatch.setattr(Engine, "update", lambda *arrays: None)


SCRIPT = [[RIGHT, WRONG, BARE, CUT], [RIGHT] * 4, [WRONG, WRONG, WRONG, RIGHT]]
TOTAL = {RIGHT: 1.5, WRONG: 0.5, BARE: 0.0, CUT: 0.0}


def test_a_batch_holds_prompts_answers_and_advantages(path, monkeypatch):
    scripted(monkeypatch, [SCRIPT])
    batch, metrics = rollouts(path).next(state())
    asked = next(PromptLoader(path, batch_size=3, seed=1))
    problems = [arithmetic.check_problem(row) for row in asked for _ in range(4)]
    kinds = np.ravel(SCRIPT)
    for row, (problem, kind) in enumerate(zip(problems, kinds, strict=True)):
        real = np.flatnonzero(batch["segment_ids"][row])
        prompt = prompt_of(problem)
        assert real.tolist() == list(range(len(real)))
        assert batch["tokens"][row, : len(prompt)].tolist() == prompt
        assert batch["positions"][row, real].tolist() == list(range(len(real)))
        answer = real[len(prompt) :]
        assert np.flatnonzero(batch["loss_mask"][row]).tolist() == answer.tolist()
        text = tokenizer().decode(batch["tokens"][row, answer].tolist())
        assert text.endswith("0x" if kind == WRONG else problem.answer)
        assert (batch["tokens"][row, answer[-1]] == tokenizer().eos_id) == (kind != CUT)
        expected = -0.1 * batch["tokens"][row, answer]
        np.testing.assert_allclose(batch["sampler_logprobs"][row, answer], expected, rtol=1e-6)
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
        "response_waits": 0,
        "truncated": 1 / 12,
        "signal_groups": 2 / 3,
    }
    assert all(metrics[name] >= 0 for name in CLOCKS)
    assert untimed(metrics) == pytest.approx(shares)
    per_row = {name for name, value in batch.items() if value.shape == (12, 1)}
    assert per_row == {"advantages", "truncated", "temperature", "max_tokens"}
    assert {value.shape for name, value in batch.items() if name not in per_row} == {(12, 32)}  # 12 + 20 at most


def test_the_answers_of_logged_steps_are_kept_as_text(path, tmp_path, monkeypatch):
    """With their rewards, reward and advantage; a run that goes on writes no step twice."""
    scripted(monkeypatch, [SCRIPT] * 5)
    log = lambda: SampleLog(tmp_path, LoopConfig(steps=9, log_every=2), most=5)  # noqa: E731
    run = rollouts(path)
    run.log = log()
    batches = [run.next(state(step))[0] for step in range(4)]  # the second and fourth steps have lines
    lines = read_json_lines(tmp_path / "rollouts.jsonl")
    assert [line["step"] for line in lines] == [2] * 5 + [4] * 5
    kinds = np.ravel(SCRIPT)[:5]
    for step, some in ((2, lines[:5]), (4, lines[5:])):
        np.testing.assert_allclose([line["advantage"] for line in some], batches[step - 1]["advantages"][:5, 0])
        assert [line["reward"] for line in some] == [TOTAL[kind] for kind in kinds]
    for line, kind in zip(lines, kinds, strict=False):
        row = run.loader.rows[line["question"]]
        assert line["prompt"] == arithmetic.check_problem(row).prompt and line["answer"] == row["answer"]
        assert line["rewards"] == {"accuracy": float(TOTAL[kind] > 0.5), "format": float(TOTAL[kind] > 0)}
        assert line["ended"] == (kind != CUT) and line["completion"].endswith("0x" if kind == WRONG else row["answer"])
    again = rollouts(path)
    again.log = log()
    again.next(state(2))  # from a checkpoint after two steps: the fourth's lines are gone
    assert [line["step"] for line in read_json_lines(tmp_path / "rollouts.jsonl")] == [2] * 5


def test_an_answer_whose_grading_failed_teaches_nothing():
    """Neither where rewards are negative nor where they are positive is a broken grader worth anything."""
    totals = np.array([[-3.0, 0.0, -1.0], [2.0, 4.0, 0.0], [0.0, 0.0, 0.0], [1.0, 0.0, 2.0]])
    failed = np.array([[0, 1, 0], [0, 0, 1], [1, 1, 1], [0, 0, 0]], bool)
    expected = [[-3, -2, -1], [2, 4, 3], [0, 0, 0], [1, 0, 2]]
    np.testing.assert_array_equal(settled(totals, failed), expected)


def test_advantages_without_scaling(path, monkeypatch):
    scripted(monkeypatch, [SCRIPT])
    config = dataclasses.replace(CONFIG, advantage="none")
    batch, _ = rollouts(path, config).next(state())
    rewards = np.array([TOTAL[kind] for group in SCRIPT for kind in group]).reshape(3, 4)
    np.testing.assert_allclose(
        batch["advantages"].reshape(3, 4), rewards - rewards.mean(axis=1, keepdims=True), atol=1e-6
    )


def test_overlong_answers_cost(path, monkeypatch):
    scripted(monkeypatch, [SCRIPT])
    config = dataclasses.replace(CONFIG, overlong_buffer=18, overlong_weight=0.5, advantage="none")
    batch, metrics = rollouts(path, config).next(state())
    lengths = batch["loss_mask"].sum(axis=1).reshape(3, 4)
    costs = -np.clip((lengths - 2) / 18, 0, 1)
    graded = np.array([TOTAL[kind] for group in SCRIPT for kind in group]).reshape(3, 4)
    rewards = graded + 0.5 * costs
    np.testing.assert_allclose(
        batch["advantages"].reshape(3, 4), rewards - rewards.mean(axis=1, keepdims=True), atol=1e-6
    )
    assert metrics["reward_overlong"] == pytest.approx(costs.mean()) and costs.min() < 0
    assert metrics["reward"] == pytest.approx(rewards.mean())
    assert metrics["signal_groups"] == 2 / 3  # the length alone is none


# Dynamic sampling


DULL, SHARP = [RIGHT] * 4, [RIGHT, WRONG, BARE, CUT]


def asked_of(batch) -> list[list[int]]:
    """The prompts of the groups, without their answers."""
    rows = zip(batch["tokens"][::4], batch["loss_mask"][::4], strict=True)
    return [tokens[: np.flatnonzero(mask)[0]].tolist() for tokens, mask in rows]


def test_groups_without_signal_are_replaced_by_further_questions(path, monkeypatch):
    script = [[SHARP, DULL, DULL], [DULL, DULL, SHARP], [SHARP, SHARP, DULL], [SHARP] * 3]
    scripted(monkeypatch, script)
    config = dataclasses.replace(CONFIG, resample=5)
    run, loader = rollouts(path, config), PromptLoader(path, batch_size=3, seed=1)
    asked = [prompt_of(arithmetic.check_problem(row)) for _ in range(4) for row in next(loader)]
    batch, metrics = run.next(state())
    # Of nine, the first three that have signal, in their order; the tenth is for the next step.
    assert asked_of(batch) == [asked[0], asked[5], asked[6]]
    assert metrics["asked"] == 9 and metrics["signal_groups_trained"] == 1 and metrics["signal_groups"] == 4 / 9
    kinds = [kind for groups in script[:3] for group in groups for kind in group]
    assert metrics["reward"] == pytest.approx(np.mean([TOTAL[kind] for kind in kinds]))  # of all, not of the chosen
    assert run.state()["loader"] == rollouts_after(path, config, 3)
    batch, metrics = run.next(state(1))
    assert asked_of(batch) == asked[9:] and metrics["asked"] == 3


def rollouts_after(path, config, batches: int):
    run = rollouts(path, config)
    for _ in range(batches):
        next(run.loader)
    return run.state()["loader"]


def test_resampling_is_bounded_and_what_is_missing_is_filled_up(path, monkeypatch):
    scripted(monkeypatch, [[DULL, DULL, DULL], [DULL, SHARP, DULL], [SHARP] * 3])
    config = dataclasses.replace(CONFIG, resample=1, patience=3, min_signal=0.2)
    run = rollouts(path, config)
    batch, metrics = run.next(state())
    assert metrics["asked"] == 6 and metrics["signal_groups_trained"] == 1 / 3
    assert [bool(np.any(group)) for group in batch["advantages"].reshape(3, 4)] == [False, False, True]
    assert run.state()["quiet_steps"] == 1  # one of six, which is what the run is watched by


def test_rewards_within_the_tolerance_are_equal(path, monkeypatch):
    scripted(monkeypatch, [[[RIGHT, WRONG, WRONG, WRONG], [WRONG, BARE, BARE, WRONG], DULL]])
    batch, metrics = rollouts(path, dataclasses.replace(CONFIG, tolerance=0.6)).next(state())
    assert metrics["signal_groups"] == 1 / 3  # 1.5 and 0.5 are apart, 0.5 and 0 are not
    assert [bool(np.any(group)) for group in batch["advantages"].reshape(3, 4)] == [True, False, False]


def test_a_restored_run_resamples_the_same(path):
    """Further questions have keys of their own, and what was asked is known to the loader."""
    config = dataclasses.replace(CONFIG, resample=2, tolerance=100.0, patience=0)  # nothing is ever enough
    first = rollouts(path, config)
    saved = json.loads(json.dumps(first.state()))
    expected, metrics = first.next(state(3))
    again = rollouts(path, config)
    again.restore(saved)
    found, found_metrics = again.next(state(3))
    assert untimed(found_metrics) == untimed(metrics) and metrics["asked"] == 9
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value)
    assert first.state() == again.state()


# Rewards of steps


def test_a_reward_of_steps_gives_advantages_of_tokens(path, tmp_path, monkeypatch):
    """The thinking is worth 0.5 where it is there, and the whole 1 or 0: two steps that end where a token does."""
    source = """
def steps(completion, row):
    end = completion.find("</think>") + len("</think>")
    thought = [(end, 0.5)] if end > 7 else []
    return [*thought, (len(completion), float(row["answer"] in completion))]
"""
    (tmp_path / "mine.py").write_text(source)
    scripted(monkeypatch, [SCRIPT])
    run = rollouts(path, rewards=("accuracy", f"{tmp_path}/mine.py:steps=2"))
    with run.sampler.grader:
        batch, metrics = run.next(state())
    assert batch["advantages"].shape == batch["tokens"].shape
    assert not np.any(batch["advantages"] * (1 - batch["loss_mask"]))
    sums = np.array([[0.5 * (kind != BARE) + (kind != WRONG) for kind in group] for group in SCRIPT])
    assert metrics["reward_mine.steps"] == pytest.approx(sums.mean())
    assert metrics["reward"] == pytest.approx((2 * sums).mean() + metrics["reward_accuracy"])
    for index, group in enumerate(SCRIPT):
        rows = slice(4 * index, 4 * index + 4)
        steps = [[1.0] * (kind != BARE) + [2.0 * (kind != WRONG)] for kind in group]
        every = [reward for own in steps for reward in own]
        unit = np.std(every) or 1.0
        graded = np.array([float(kind == RIGHT) for kind in group])
        whole = (graded - graded.mean()) / (graded.std() or 1.0)
        for row, (own, outcome) in enumerate(zip(steps, whole, strict=True), start=rows.start):
            tokens = batch["tokens"][row, batch["loss_mask"][row] > 0].tolist()
            marks = [(reward - np.mean(every)) / unit for reward in own]
            thought = tokens.index(tokenizer().end_think_id) + 1 if tokenizer().end_think_id in tokens else 0
            expected = [outcome + (sum(marks) if t < thought else marks[-1]) for t in range(len(tokens))]
            np.testing.assert_allclose(batch["advantages"][row, batch["loss_mask"][row] > 0], expected, atol=1e-5)


def test_where_no_reward_applies_nothing_is_taught(path, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "def score(completion, row): return None\ndef steps(completion, row): return []\n"
    )
    scripted(monkeypatch, [SCRIPT])
    run = rollouts(path, rewards=(f"{tmp_path}/mine.py:score", f"{tmp_path}/mine.py:steps"))
    with run.sampler.grader:
        batch, metrics = run.next(state())
    assert not np.any(batch["advantages"]) and metrics["signal_groups"] == metrics["reward"] == 0


# Packing


def test_packed_rows_hold_every_answer_once(path):
    plain, metrics = rollouts(path).next(state())
    run = rollouts(path, dataclasses.replace(CONFIG, pack=70))
    run.sampler.multiple = 2
    batch, packed_metrics = run.next(state())
    assert untimed(packed_metrics) == untimed(metrics) and batch["tokens"].shape[1] == 70
    assert len(batch["tokens"]) % 2 == 0 and len(batch["tokens"]) < len(plain["tokens"])
    found, names = [], ("tokens", "positions", "loss_mask", "sampler_logprobs", "advantages", "truncated")
    for row in range(len(batch["tokens"])):
        for segment in range(1, batch["segment_ids"][row].max() + 1):
            own = batch["segment_ids"][row] == segment
            found.append([batch[name][row, own].tolist() for name in names])
            assert set(batch["answer_tokens"][row, own]) == {0, batch["loss_mask"][row, own].sum()}
    expected = []
    for row, real in enumerate(plain["segment_ids"] > 0):
        spread = {name: np.broadcast_to(plain[name][row], real.shape)[real] for name in names}
        for name in ("advantages", "truncated"):  # of the answer's tokens
            spread[name] = spread[name] * spread["loss_mask"]
        expected.append([spread[name].tolist() for name in names])
    assert sorted(found) == sorted(expected)


OTHERS = {"old_logprobs": 1.05, "reference_logprobs": 0.9}


def test_packed_answers_see_themselves_alone(path):
    """A network's loss, its parts and gradient are what they are with a row for each answer."""
    loss = GRPOLoss(chunk=16, ratio="sequence", kl_weight=0.1)
    params, bias = weights(SPEAKER)

    @jax.jit
    def run(batch):
        def value(params):
            network = parameters.merge(SPEAKER, params, bias)
            return loss(network, batch, loss.normalisers(batch), jnp.int32(0))

        return jax.value_and_grad(value, has_aux=True)(params)

    found = []
    for pack in (0, 96):
        config = dataclasses.replace(CONFIG, pack=pack, replay_routing=True)
        batch, _ = rollouts(path, config).next(state())
        others = {name: batch["sampler_logprobs"] * factor for name, factor in OTHERS.items()}
        found.append(jax.device_get(run({name: jnp.asarray(value) for name, value in (batch | others).items()})))
    ((plain, plain_parts), plain_gradient), ((packed, packed_parts), packed_gradient) = found
    assert packed == pytest.approx(float(plain), rel=1e-5) and abs(plain) > 1e-3
    for name in ("kl_sampler", "kl_reference", "clip_fraction", "entropy", "load"):
        np.testing.assert_allclose(packed_parts[name], plain_parts[name], rtol=1e-5, err_msg=name)
    norm = np.sqrt(sum(np.sum(leaf**2) for leaf in jax.tree.leaves(plain_gradient)))
    for one, other in zip(jax.tree.leaves(packed_gradient), jax.tree.leaves(plain_gradient), strict=True):
        assert np.linalg.norm(one - other) <= 1e-5 * norm


def test_packed_rows_come_in_few_numbers():
    questions = [Question({}, "", [1] * 9, "")] * 41
    samples = [Sample(question, Answer("", True), np.ones(1), np.ones(1)) for question in questions]
    sizes = set()
    for count in range(1, 42):
        batch = rollout_batch(samples[:count], [0.0] * count, pad_id=0, most=64, pack=10, multiple=3)
        rows = len(batch["tokens"])
        assert rows % 3 == 0 and count <= rows < 1.25 * count + 3
        sizes.add(rows)
    assert len(sizes) <= 12


def test_packed_minibatches_have_the_answers_that_they_have_in_rows_of_their_own():
    """Though one row would hold them all; none is an update of padding alone. Two processes, whose rows follow one
    another, deal them as one does."""
    samples = [
        Sample(Question({}, "", [3] * 2, ""), Answer("", True), np.full(1 + index % 4, 10 + index), np.zeros(1))
        for index in range(10)
    ]
    make = functools.partial(rollout_batch, pad_id=0, most=64)
    packing: dict[str, Any] = {"pack": 64, "multiple": 2, "minibatches": 3}
    plain, packed = make(samples, [0.0] * 10)["tokens"], make(samples, [0.0] * 10, **packing)["tokens"]
    halves = [make(samples[i : i + 5], [0.0] * 5, first=i, **packing)["tokens"] for i in (0, 5)]
    assert packed.shape == halves[0].shape == (6, 64)

    def answers(tokens, part):
        return np.sort(tokens[part::3][tokens[part::3] >= 10])

    for part in range(3):
        for tokens in (packed, np.concatenate(halves)):
            assert len(answers(tokens, part)) and np.array_equal(answers(tokens, part), answers(plain, part))


# Routing replay


def test_the_learner_takes_the_experts_that_the_sampler_took():
    """Two dense layers, then two of experts: the sampler's first choice belongs to the third layer. A learner whose
    routers and bias have moved on sends each token where the sampler did, which alone it would not."""
    config = dataclasses.replace(SPEAKER, num_hidden_layers=4, first_k_dense_replace=2)
    params, bias = weights(config)
    assert bias is not None
    engine = Engine(whole(config, params, bias, tokenizer()))
    questions = [Question({}, "", tokenizer().encode(text), "") for text in ("12+34=", "7*8=5")]
    prompts = [question.prompt for question in questions]
    key, sampling = jax.random.key(0), SamplingParams(max_tokens=9)
    out = jax.device_get(engine.generate_ids(prompts, sampling, key, experts=True))
    answers = [Answer("", bool(stopped)) for stopped in out.stopped_B]
    samples = [make_sample(out, row, question, answers[row]) for row, question in enumerate(questions)]
    batch = rollout_batch(samples, [0.0] * 2, pad_id=0, most=64)
    most = batch["tokens"].shape[1]
    assert batch["experts"].shape == (2, most, 2, config.num_experts_per_tok)
    placed = {name: jnp.asarray(value) for name, value in batch.items()} | {"temperature": jnp.ones((2, 1))}
    ran_BS = batch["segment_ids"] * (np.roll(batch["segment_ids"], -1, axis=1) > 0)  # but for an answer's last token
    assert np.array_equal(batch["experts"][:, :, 0, 0] >= 0, ran_BS > 0)

    def load(params, bias, batch):
        return score_tokens(parameters.merge(config, params, bias), batch, 16)[1]["load"]

    run = jax.jit(load)
    experts = params["moe_layers"]["mlp"]
    moved = params | {"moe_layers": params["moe_layers"] | {"mlp": experts | {"router": -experts["router"]}}}
    alone = {name: value for name, value in placed.items() if name != "experts"}
    taken = batch["experts"][ran_BS > 0]
    expected = np.stack([np.bincount(taken[:, layer].ravel(), minlength=8) for layer in range(2)])
    assert not np.array_equal(expected[0], expected[1])
    last = 2 * config.num_experts_per_tok  # of either layer: these the router chose
    for arrays in ((params, bias), (moved, -bias)):
        surplus = np.asarray(run(*arrays, placed)) - expected
        assert np.all(surplus >= 0) and np.all(surplus.sum(axis=1) == last)
    assert np.any(np.asarray(run(moved, -bias, alone)) - expected < 0)
    # The old policy is scored with the same experts, a reference with its own.
    reference = Reference(moved, -bias, path="other")
    scorer = Scorer(config, ComputeConfig(), chunk=16, old=True, reference=reference)
    found = scorer(dataclasses.replace(state(), params=moved, router_bias=-bias), placed)
    assert np.abs(found["old_logprobs"] - found["reference_logprobs"]).max() > 1e-3
    own = scorer(dataclasses.replace(state(), params=moved, router_bias=-bias), alone)
    np.testing.assert_array_equal(own["reference_logprobs"], found["reference_logprobs"])


def test_replayed_routing_leaves_a_policy_that_agrees_as_it_was(path):
    batch, _ = rollouts(path, dataclasses.replace(CONFIG, replay_routing=True)).next(state())
    plain, _ = rollouts(path).next(state())
    assert batch.keys() - plain.keys() == {"experts"} and batch["experts"].dtype == np.int16
    np.testing.assert_array_equal(batch["tokens"], plain["tokens"])
    loss = GRPOLoss(chunk=8, tis_cap=2.0)
    placed = {name: jnp.asarray(value) for name, value in batch.items()}
    parts = jax.jit(lambda batch: loss(MODEL.network(), batch, loss.normalisers(batch), jnp.int32(0))[1])(placed)
    assert 0 <= parts["kl_sampler"] < 1e-6 and parts["tis_capped"] == 0


def test_a_model_without_experts_has_nothing_to_replay(path):
    config = dataclasses.replace(SPEAKER, n_routed_experts=0, first_k_dense_replace=2)
    dense = whole(config, *weights(config), tokenizer())
    loader = open_questions(TASK, dense, (str(path),), CONFIG, batch_size=3, seed=1)
    with pytest.raises(ValueError, match="rollout.replay_routing=True: the model has no experts"):
        Rollouts(dense, TASK, None, loader, dataclasses.replace(CONFIG, replay_routing=True), seed=0)  # pyright: ignore


def test_a_users_reward_sees_what_was_cut_off_and_the_row(path, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("def said(completion, row): return row['answer'] in completion\n")
    scripted(monkeypatch, [SCRIPT])
    run = rollouts(path, rewards=("accuracy", f"{tmp_path}/mine.py:said=2"))
    with run.sampler.grader:
        _, metrics = run.next(state())
    assert metrics["reward_accuracy"] == 6 / 12 and metrics["reward_mine.said"] == 8 / 12
    assert metrics["reward"] == pytest.approx((6 + 2 * 8) / 12) and metrics["reward_errors"] == 0


def test_learner_and_sampler_agree(path, monkeypatch):
    """KL under 1e-6 in float32: prefill and absorbed decoding over the cache against the packed training pass. Answers
    in turn are the same, and give their cache back before anybody trains."""
    batch, metrics = rollouts(path).next(state())
    assert metrics["response_length"] > 10
    freed, own = list[Engine](), rollouts(path, dataclasses.replace(CONFIG, slots=5))
    monkeypatch.setattr(Engine, "free", lambda engine: freed.append(engine))
    in_turn, _ = own.next(state())
    assert freed == own.engines
    for name, value in batch.items():
        np.testing.assert_allclose(in_turn[name], value, atol=1e-4 * (name == "sampler_logprobs"), err_msg=name)
    loss = GRPOLoss(chunk=8)
    placed = {name: jnp.asarray(value) for name, value in batch.items()}
    run = jax.jit(lambda batch: loss(MODEL.network(), batch, loss.normalisers(batch), jnp.int32(0))[1])
    parts = run(placed)
    assert 0 <= parts["kl_sampler"] < 1e-6 and parts["clip_fraction"] == 0
    # The metric sees what is wrong: at another temperature, or one token further, they do not agree.
    for name, wrong in (
        ("temperature", placed["temperature"] * 0.8),
        ("sampler_logprobs", jnp.roll(placed["sampler_logprobs"], 1, axis=1)),
    ):
        assert run(placed | {name: wrong})["kl_sampler"] > 1e-3


def test_a_restored_run_samples_the_same_batch(path):
    first = rollouts(path)
    first.next(state())
    saved = json.loads(json.dumps(first.state()))
    later = state(1)
    expected, metrics = first.next(later)
    again = rollouts(path)
    again.restore(saved)
    found, found_metrics = again.next(later)
    assert untimed(found_metrics) == untimed(metrics)
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
    prompts = [np.where(batch["loss_mask"] > 0, 0, batch["tokens"])[:, :6] for batch in batches]
    np.testing.assert_array_equal(prompts[0], prompts[1])
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


def test_prompts_that_are_too_long_are_named_or_left_out(path, tmp_path, caplog):
    long = arithmetic.make_problem("mul", 7, 48)
    rows = [dataclasses.asdict(problem) for problem in (PROBLEMS[0], long, PROBLEMS[1])]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    lengths = [len(prompt_of(arithmetic.check_problem(row))) for row in rows]
    limit = max(lengths) - 1
    kept = [row["prompt"] for row, length in zip(rows, lengths, strict=True) if length <= limit]
    assert 0 < len(kept) < 3
    options: Any = {"batch_size": 1, "seed": 0}
    config = RolloutConfig(max_prompt=limit, max_tokens=20)
    with pytest.raises(ValueError, match=rf"problems\.jsonl:\d: a prompt of {limit + 1} tokens.*allow {limit}; --roll"):
        open_questions(TASK, MODEL, (str(path),), config, **options)
    found = open_questions(TASK, MODEL, (str(path),), dataclasses.replace(config, drop_long=True), **options)
    assert [row["prompt"] for row in found.rows] == kept and f"left out {3 - len(kept)} rows" in caplog.text
    with pytest.raises(ValueError, match="fingerprint"):  # other rows, other batches
        PromptLoader(path, **options).restore(found.state())


def test_packed_rows_hold_the_longest_prompt_with_its_answer(path):
    longest = max(len(prompt_of(problem)) for problem in PROBLEMS)
    for pack in (longest + 20, longest + 19):
        config = dataclasses.replace(CONFIG, pack=pack)
        if pack == longest + 20:
            assert rollouts(path, config).next(state())[0]["tokens"].shape[1] == pack
        else:
            message = rf"jsonl:\d: a prompt of {longest} tokens and rollout.max_tokens=20 .* rollout.pack={pack}"
            with pytest.raises(ValueError, match=message):
                rollouts(path, config)


def test_the_limit_is_what_the_positions_leave():
    assert RolloutConfig(max_tokens=20).prompt_limit(64) == 44
    assert RolloutConfig(max_tokens=20, max_prompt=7).prompt_limit(64) == 7
    for config in (RolloutConfig(max_tokens=64), RolloutConfig(max_prompt=45, max_tokens=20)):
        with pytest.raises(ValueError, match="max_position_embeddings=64"):
            config.prompt_limit(64)


@pytest.mark.parametrize(("longest", "most", "width"), [(9, 35, 35), (9, 999, 128), (129, 999, 256), (600, 700, 700)])
def test_widths_come_in_few_sizes(longest, most, width):
    questions = [Question({}, "", prompt, "") for prompt in ([1] * (longest - 1), [1])]
    samples = [Sample(question, Answer("", True), np.ones(1), np.ones(1)) for question in questions]
    batch = rollout_batch(samples, [0.0] * 2, pad_id=0, most=most)
    assert batch["tokens"].shape == (2, width) and batch["segment_ids"].sum(axis=1).tolist() == [longest, 2]


def test_an_answer_begins_with_the_thinking_that_the_prompt_has_opened():
    template = ChatTemplate("{% for m in messages %}{{ m['content'] }}{% endfor %}<｜Assistant｜><think>\n", {})
    opened = Tokenizer(tokenizer()._special, template=template)
    row = dataclasses.asdict(PROBLEMS[0])
    ids = tokenizer().encode("so</think>", allow_special=True)
    out = Generated(np.array([ids]), np.zeros((1, len(ids))), np.array([len(ids)]), np.array([False]))  # pyright: ignore
    for text, start in ((opened, "<think>"), (tokenizer(), "")):
        question = ask(TASK, text, row)
        assert question.text == PROBLEMS[0].prompt
        assert read_answers(text, [question], out)[0].text == f"{start}so</think>"


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"group": 1}, "group=1: must be at least 2"),
        ({"prompts": 0}, "prompts=0"),
        ({"max_tokens": 0}, "max_tokens=0"),
        ({"advantage": "mean"}, "advantage='mean': expected .*Literal"),
        ({"temperature": 0.0}, "temperature=0.0.*must be positive"),
        ({"overlong_buffer": 21, "max_tokens": 20}, "overlong_buffer=21: is more than max_tokens=20"),
        ({"tolerance": -0.1}, "tolerance=-0.1"),
        ({"patience": None}, "patience=None.*int"),
        ({"slots": 8, "staleness": 1}, "slots=8 with staleness=1: .*; expected slots=0"),
        ({"slots": 8, "replay_routing": True}, "slots=8 with replay_routing=True: "),
    ],
)
def test_what_makes_no_sense_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        RolloutConfig(**fields)
