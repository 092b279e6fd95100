"""Answers sampled from the policy that is being trained, rewarded, as batches for ``GRPOLoss``."""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.checkpoint.model import Model
from deepseek_jax.data.loader import LoaderOptions
from deepseek_jax.data.rows import PromptLoader
from deepseek_jax.inference.engine import Engine
from deepseek_jax.inference.sampling import SamplingParams
from deepseek_jax.rl.advantages import (
    choose_groups,
    has_signal,
    levelled,
    settled,
    step_advantages,
    token_ends,
)
from deepseek_jax.rl.asking import ask, read_answers
from deepseek_jax.rl.grader import Grader, Grades
from deepseek_jax.rl.rewards.length import overlong
from deepseek_jax.rl.samples import Sample, make_sample, rollout_batch
from deepseek_jax.rl.tasks import Row, Steps, Task, where
from deepseek_jax.train.grpo import Scale, group_advantages
from deepseek_jax.train.state import TrainState
from deepseek_jax.typed import check_least, check_types

logger = logging.getLogger(__name__)


class NoSignalError(RuntimeError):
    """Almost all groups have had equal rewards for many steps: there is nothing to learn from."""


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
    """How answers to train on are sampled and graded."""

    prompts: int = 16
    """Questions per step."""
    group: int = 8
    """Answers per question."""
    max_prompt: int = 0
    """The longest prompt in tokens; 0: what max_tokens leaves of the model's max_position_embeddings. A longer one ends
    the run before training."""
    drop_long: bool = False
    """Leave questions with longer prompts out instead."""
    max_tokens: int = 256
    """Of an answer."""
    temperature: float = 1.0
    """Of the answers, which the learner scores as they were sampled."""
    reward_seconds: float = 10.0
    """What a call of a reward from a file may take."""
    advantage: Scale = "std"
    """Of an answer: its reward less the group's mean, divided by the standard deviation or not (Dr. GRPO); or less the
    mean of the others (RLOO)."""
    overlong_buffer: int = 0
    """The last so many of max_tokens cost a growing part of overlong_weight (DAPO's overlong shaping); 0: nothing."""
    overlong_weight: float = 1.0
    """What an answer of max_tokens costs."""
    resample: int = 0
    """How often a step asks so many further prompts, at most, until as many groups as it trains on have signal (DAPO's
    dynamic sampling)."""
    tolerance: float = 1e-6
    """Rewards of a group that lie no further apart, overlong shaping aside, are equal: no signal."""
    replay_routing: bool = False
    """The learner takes the experts that the sampler took."""
    pack: int = 0
    """Tokens of a row that holds several prompts and answers, whose attention is kept apart; 0: one each. The longest
    prompt and max_tokens must fit."""
    min_signal: float = 0.1
    """Stop when under this share of the groups has unequal rewards for patience steps in a row."""
    patience: int = 20
    """Steps in a row; 0: never stop for it."""

    def __post_init__(self) -> None:
        check_types(self)
        check_least(self, 1, "prompts", "max_tokens")
        check_least(self, 2, "group")
        if self.overlong_buffer > self.max_tokens:
            raise ValueError(f"overlong_buffer={self.overlong_buffer}: is more than max_tokens={self.max_tokens}")
        if not self.temperature:
            raise ValueError(f"temperature={self.temperature}: rollouts are sampled, so it must be positive")

    def prompt_limit(self, positions: int) -> int:
        """The longest prompt for a model of so many positions. ValueError where they do not hold the answer as well."""
        limit = self.max_prompt or positions - self.max_tokens
        if limit < 1 or limit + self.max_tokens > positions:
            raise ValueError(
                f"rollout.max_prompt={self.max_prompt}, rollout.max_tokens={self.max_tokens}: together they must fit "
                f"into the model's max_position_embeddings={positions}"
            )
        return limit


def open_questions(
    task: Task, model: Model, path: Sequence[str], config: RolloutConfig, **options: Unpack[LoaderOptions]
) -> PromptLoader:
    """A loader of the rows in ``path`` whose prompts fit. ValueError "FILE:LINE: ..." for the first that does not,
    or fits with its answer into no row of ``config.pack`` tokens."""
    limit = config.prompt_limit(model.config.max_position_embeddings)

    def fits(row: Row) -> bool:
        length = len(ask(task, model.text, row).prompt)
        if config.pack and config.pack - config.max_tokens < length <= limit:
            raise ValueError(
                f"{where(row)}: a prompt of {length} tokens and rollout.max_tokens={config.max_tokens} are more than "
                f"rollout.pack={config.pack}"
            )
        if length > limit and not config.drop_long:
            raise ValueError(
                f"{where(row)}: a prompt of {length} tokens, where rollout.max_prompt={config.max_prompt} and "
                f"rollout.max_tokens={config.max_tokens} allow {limit}; --rollout.drop-long leaves such rows out"
            )
        return length <= limit

    loader = PromptLoader(path, keep=fits, **options)
    if loader.dropped:
        logger.warning(
            "left out %d rows, whose prompts have over %d tokens; %d stay", loader.dropped, limit, len(loader.rows)
        )
    return loader


class Rollouts:
    """Batches for GRPO: each call samples a group of answers to the next questions with the state's own parameters.

    A batch is a function of (parameters, loader position, seed) alone, as far as the rewards are: so a run that was
    killed inside a rollout repeats it exactly. An answer that was cut off by ``max_tokens`` is an empty text for the
    package's rewards, as it has not come to its end; rewards from files see it as it stands.
    """

    def __init__(
        self,
        model: Model,
        task: Task,
        grader: Grader,
        loader: PromptLoader,
        config: RolloutConfig,
        *,
        seed: int,
        multiple: int = 1,
        minibatches: int = 1,
    ):
        """minibatches: parts of a batch with an update each. multiple: what the learner needs the number of each part's
        rows to be a multiple of, where they are packed."""
        if config.replay_routing and not model.config.num_moe_layers:
            raise ValueError("rollout.replay_routing=True: the model has no experts that could be replayed")
        self.engine, self.tokenizer, self.positions = Engine(model), model.text, model.config.max_position_embeddings
        self.task, self.grader, self.loader, self.config = task, grader, loader, config
        self.multiple, self.minibatches = multiple, minibatches
        self.key = jax.random.key(seed)
        self.quiet_steps = 0

    def next(self, state: TrainState) -> tuple[dict[str, np.ndarray], dict[str, float]]:
        """The next batch and its metrics, which are of all that was asked. Raises NoSignalError, see RolloutConfig."""
        config = self.config
        self.engine.update(state.params, state.router_bias)
        samples, grades, total_PG, signal_P = self._enough(int(state.step))
        signal = float(np.mean(signal_P))
        self._watch(signal)
        chosen = choose_groups(signal_P, config.prompts)
        trained = [samples[group * config.group + i] for group in chosen for i in range(config.group)]
        lengths = np.array([len(sample.ids) for sample in samples])
        metrics = {
            **grades.metrics(),
            "response_length": float(np.mean(lengths)),
            "truncated": 1 - float(np.mean([sample.answer.ended for sample in samples])),
            "signal_groups": signal,
        }
        if config.resample:
            metrics |= {"asked": float(len(signal_P)), "signal_groups_trained": float(np.mean(signal_P[chosen]))}
        total_PG = levelled(total_PG, config.tolerance)
        if config.overlong_buffer:
            overlong_N = overlong(lengths, limit=config.max_tokens, buffer=config.overlong_buffer)
            metrics["reward_overlong"] = float(np.mean(overlong_N))
            metrics["reward"] += config.overlong_weight * metrics["reward_overlong"]
            total_PG = total_PG + config.overlong_weight * overlong_N.reshape(total_PG.shape).astype(np.float32)
        steps = [grades.steps_N[group * config.group + i] for group in chosen for i in range(config.group)]
        batch = rollout_batch(
            trained,
            self._advantages(trained, total_PG[chosen], steps),
            pad_id=self.tokenizer.pad_id,
            most=config.prompt_limit(self.positions) + config.max_tokens,
            pack=config.pack,
            multiple=self.multiple,
            minibatches=self.minibatches,
        )
        same = {"temperature": config.temperature, "max_tokens": config.max_tokens}
        rows = len(batch["tokens"])
        return batch | {name: np.full((rows, 1), value, np.float32) for name, value in same.items()}, metrics

    def _enough(self, step: int) -> tuple[list[Sample], Grades, np.ndarray, np.ndarray]:
        """Samples of as many groups with signal as a step trains on, as far as ``resample`` allows, and of all others
        that were asked on the way; their grades, rewards (P G), and which groups have signal (P)."""
        config, samples, parts = self.config, list[Sample](), list[Grades]()
        while True:
            samples += self._sampled(step, len(parts))
            new = samples[-config.prompts * config.group :]
            texts, rows = [sample.answer.text for sample in new], [sample.question.row for sample in new]
            parts.append(self.grader.grade(texts, rows, ended=[sample.answer.ended for sample in new]))
            grades, groups = Grades.joined(parts), (-1, config.group)
            total_PG = settled(grades.total_N.reshape(groups), grades.failed_N.reshape(groups)).astype(np.float32)
            steps_PG = [grades.steps_N[i : i + config.group] for i in range(0, len(samples), config.group)]
            signal_P = has_signal(total_PG, steps_PG, config.tolerance)
            if np.sum(signal_P) >= config.prompts or len(parts) > config.resample:
                return samples, grades, total_PG, signal_P

    def _sampled(self, step: int, attempt: int) -> list[Sample]:
        """A group of answers to each of the loader's next questions."""
        config = self.config
        asked = [ask(self.task, self.tokenizer, row) for row in next(self.loader)]
        questions = [question for question in asked for _ in range(config.group)]
        sampling = SamplingParams(temperature=config.temperature, max_tokens=config.max_tokens)
        # Keys of no step's first attempt.
        key = self.key if not attempt else jax.random.fold_in(self.key, np.uint32(2**32 - attempt))
        prompts, key = [question.prompt for question in questions], jax.random.fold_in(key, step)
        out = jax.device_get(self.engine.generate_ids(prompts, sampling, key, experts=config.replay_routing))
        answers = read_answers(self.tokenizer, questions, out)
        return [make_sample(out, row, *pair) for row, pair in enumerate(zip(questions, answers, strict=True))]

    def _advantages(
        self, samples: list[Sample], total_PG: np.ndarray, steps: list[Steps]
    ) -> Sequence[float | np.ndarray]:
        """Of each answer; where some have steps, of its tokens: the answer's and its steps' together."""
        scale, group = self.config.advantage, self.config.group
        whole_N = np.asarray(group_advantages(jnp.asarray(total_PG), scale=scale)).ravel()
        if not any(steps):
            return whole_N.tolist()
        ends = [
            token_ends(self.tokenizer, sample.ids.tolist(), sample.question.start, sample.answer.text, own)
            for sample, own in zip(samples, steps, strict=True)
        ]
        lengths, made = [len(sample.ids) for sample in samples], list[np.ndarray]()
        for first in range(0, len(samples), group):
            some = slice(first, first + group)
            made += step_advantages(ends[some], lengths[some], scale=scale, tolerance=self.config.tolerance)
        return [whole + own for whole, own in zip(whole_N, made, strict=True)]

    def state(self) -> dict[str, Any]:
        return {"loader": self.loader.state(), "quiet_steps": self.quiet_steps}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.loader.restore(state["loader"])
        self.quiet_steps = state["quiet_steps"]

    def _watch(self, signal: float) -> None:
        self.quiet_steps = self.quiet_steps + 1 if signal < self.config.min_signal else 0
        if self.config.patience and self.quiet_steps >= self.config.patience:
            raise NoSignalError(
                f"fewer than {self.config.min_signal:.0%} of the groups had unequal rewards for {self.quiet_steps} "
                "steps: all answers to a question earn the same. Start from a model that answers some questions some "
                "of the time (more or less SFT), choose other questions, or a reward that tells answers apart."
            )
