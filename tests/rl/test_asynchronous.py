"""Rollouts ahead of the training: whose answers they are, that donation does no harm, and how they end."""

import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError
from contextlib import contextmanager

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model.tiny import weights
from rl.test_rollout import CONFIG, MODEL, PROBLEMS, TASK, untimed
from small import SPEAKER

from deepseek_jax.inference.engine import Engine
from deepseek_jax.rl import arithmetic
from deepseek_jax.rl.asynchronous import Ahead
from deepseek_jax.rl.grader import Grader
from deepseek_jax.rl.rollout import Rollouts
from deepseek_jax.rl.rollout_config import RolloutConfig, open_questions
from deepseek_jax.train.grpo import GRPOLoss
from deepseek_jax.train.state import TrainState
from deepseek_jax.workflows.grpo import GRPOConfig

FIELDS = {"max_prompt": CONFIG.max_prompt, "max_tokens": 8, "prompts": 2, "group": 2, "patience": 0}


@pytest.fixture
def path(tmp_path):
    arithmetic.write_jsonl(tmp_path / "problems.jsonl", PROBLEMS)
    return str(tmp_path / "problems.jsonl")


@contextmanager
def rollouts(path, staleness: int = 0, steps: int = 5) -> Iterator[Rollouts]:
    config = RolloutConfig(**FIELDS, staleness=staleness)  # pyright: ignore[reportArgumentType]
    loader = open_questions(TASK, MODEL, (path,), config, batch_size=2, seed=1)
    with (
        Grader(["accuracy"], task=TASK) as grader,
        Rollouts(MODEL, TASK, grader, loader, config, seed=5, steps=steps) as run,
    ):
        yield run
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("rollouts")]


def policy(step: int, count: int | None = None) -> TrainState:
    """A network of its own for each step; ``count``: the step that its state says it is, if another."""
    params, bias = weights(SPEAKER)
    params = jax.tree.map(lambda leaf: leaf * (1 + 0.2 * step), params)
    return TrainState(step=jnp.int32(step if count is None else count), params=params, opt_state=None, router_bias=bias)


def donated(state: TrainState) -> None:
    """As a train step leaves it."""
    jax.tree.map(lambda leaf: leaf.delete(), state.params)


@pytest.mark.parametrize("staleness", [1, 2])
def test_a_batch_is_what_the_policy_of_so_many_steps_before_would_have_sampled_for_it(path, staleness):
    """To the bit, with the log-probabilities of that policy, whose state has been donated since."""
    policies = [max(step - staleness, 0) for step in range(5)]
    with rollouts(path) as synchronous:
        expected = [synchronous.next(policy(old, step)) for step, old in enumerate(policies)]
    with rollouts(path, staleness) as run:
        for step, old in enumerate(policies):
            state = policy(step)
            batch, metrics = run.next(state)
            donated(state)
            time.sleep(0.05 * step)  # whichever of the two is the faster
            assert metrics["staleness"] == step - old
            assert untimed(metrics) == untimed(expected[step][1]) | {"staleness": step - old}
            for name, value in expected[step][0].items():
                np.testing.assert_array_equal(batch[name], value)


def test_a_run_that_goes_on_asks_what_it_had_not_trained_on(path):
    """The position is that behind the last batch that was given, however much has been sampled ahead of it."""
    with rollouts(path) as synchronous:
        questions = [asked(synchronous.next(policy(0, step))[0]) for step in range(4)]
    found, saved = [], None
    for first in (0, 2):
        with rollouts(path, 2) as run:
            if saved is not None:
                run.restore(saved)
            found += [asked(run.next(policy(step))[0]) for step in (first, first + 1)]
            saved = json.loads(json.dumps(run.state()))
    assert found == questions


def asked(batch) -> list[list[int]]:
    return [tokens[mask == 0].tolist()[:6] for tokens, mask in zip(batch["tokens"], batch["loss_mask"], strict=True)]


def test_what_fails_in_the_thread_fails_in_the_step_that_it_was_made_for(path, monkeypatch):
    with rollouts(path, 1) as run:
        grade, calls = run.sampler.grader.grade, iter(range(9))

        def broken(*args, **options):
            if next(calls) == 1:
                raise ValueError("reward broken")
            return grade(*args, **options)

        monkeypatch.setattr(run.sampler.grader, "grade", broken)
        run.next(policy(0))
        with pytest.raises(ValueError, match="reward broken"):
            run.next(policy(1))


class Weights(Engine):
    """An engine that is nothing but the step of its policy."""

    def __init__(self):
        self.policy = -1

    def update(self, params, router_bias) -> None:
        self.policy = params


def scalar(step: int) -> TrainState:
    return TrainState(step=jnp.int32(step), params=step, opt_state=None, router_bias=None)  # pyright: ignore


def test_nothing_is_made_for_steps_behind_the_last():
    made = []
    ahead = Ahead(lambda engine, step, dispatched: made.append(step), [Weights(), Weights()], steps=3)
    for step in range(3):
        ahead.take(scalar(step))
    ahead.close()
    assert made == [0, 1, 2]


def test_the_end_waits_for_what_is_being_made_and_begins_no_more():
    """Ctrl-C comes out of the wait for a batch; the thread then ends at its next sampling."""
    sampling, graded, ended = threading.Event(), threading.Event(), []

    def make(engine, step, dispatched):
        try:
            dispatched()
            if step == 0:
                return step
            sampling.set()
            graded.wait(10)
            dispatched()  # further questions, as with resample
        except CancelledError:
            ended.append(step)
            raise

    ahead = Ahead(make, [Weights(), Weights()], steps=9)
    assert ahead.take(scalar(0)) == (0, 0)
    assert sampling.wait(10)
    threading.Timer(0.2, graded.set).start()
    ahead.close()
    assert ended == [1]  # the second, not yet begun, never was


def test_sampling_is_given_to_the_devices_before_the_step_beside_it():
    """Or the grading behind it would have no training to run beside."""
    order = []

    def make(engine, step, dispatched):
        time.sleep(0.1)
        order.append(f"sampling {step} by {engine.policy}")
        dispatched()

    ahead = Ahead(make, [Weights()], steps=4)
    for step in range(4):
        ahead.take(scalar(step))
        order.append(f"training {step}")
    ahead.close()
    expected = ["sampling 0 by 0", "sampling 1 by 0", "training 0", "sampling 2 by 1", "training 1"]
    assert order == [*expected, "sampling 3 by 2", "training 2", "training 3"]


def test_what_makes_it_wrong_is_refused():
    stale = RolloutConfig(staleness=1)
    with pytest.raises(ValueError, match="rollout.staleness=1: answers of an older policy.*loss.tis_cap"):
        GRPOConfig(rollout=stale)
    GRPOConfig(rollout=stale, loss=GRPOLoss(tis_cap=2.0))
    with pytest.raises(ValueError, match="staleness=-1"):
        RolloutConfig(staleness=-1)
