"""Answers sampled from the policy that is being trained, rewarded, as batches for ``GRPOLoss``."""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Unpack

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.checkpoint.model import Model
from deepseek_jax.data.loader import LoaderOptions
from deepseek_jax.data.rows import PromptLoader
from deepseek_jax.inference.engine import Engine
from deepseek_jax.inference.generate import Generated
from deepseek_jax.inference.sampling import SamplingParams
from deepseek_jax.rl.asking import ask, read_answers
from deepseek_jax.rl.grader import Grader
from deepseek_jax.rl.tasks import Row, Task, where
from deepseek_jax.train.grpo import group_advantages
from deepseek_jax.train.state import TrainState
from deepseek_jax.typed import check_least, check_types

logger = logging.getLogger(__name__)

_LEAST_WIDTH = 128  # shorter rows share one program


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
    advantage: Literal["std", "none"] = "std"
    """Of an answer: its reward less the group's mean, divided by the standard deviation or not (Dr. GRPO)."""
    min_signal: float = 0.1
    """Stop when under this share of the groups has unequal rewards for patience steps in a row."""
    patience: int = 20
    """Steps in a row; 0: never stop for it."""

    def __post_init__(self) -> None:
        check_types(self)
        check_least(self, 1, "prompts", "max_tokens")
        check_least(self, 2, "group")
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
    """A loader of the rows in ``path`` whose prompts fit. ValueError "FILE:LINE: ..." for the first that does not."""
    limit = config.prompt_limit(model.config.max_position_embeddings)

    def fits(row: Row) -> bool:
        length = len(ask(task, model.text, row).prompt)
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
        self, model: Model, task: Task, grader: Grader, loader: PromptLoader, config: RolloutConfig, *, seed: int
    ):
        self.engine, self.tokenizer, self.positions = Engine(model), model.text, model.config.max_position_embeddings
        self.task, self.grader, self.loader, self.config = task, grader, loader, config
        self.key = jax.random.key(seed)
        self.quiet_steps = 0

    def next(self, state: TrainState) -> tuple[dict[str, np.ndarray], dict[str, float]]:
        """The next batch and its metrics. Raises NoSignalError, see RolloutConfig."""
        config = self.config
        asked = [ask(self.task, self.tokenizer, row) for row in next(self.loader)]
        questions = [question for question in asked for _ in range(config.group)]
        prompts = [question.prompt for question in questions]
        self.engine.update(state.params, state.router_bias)
        sampling = SamplingParams(temperature=config.temperature, max_tokens=config.max_tokens)
        key = jax.random.fold_in(self.key, int(state.step))
        out = jax.device_get(self.engine.generate_ids(prompts, sampling, key))
        answers = read_answers(self.tokenizer, questions, out)
        ended = [answer.ended for answer in answers]
        rows = [question.row for question in questions]
        grades = self.grader.grade([answer.text for answer in answers], rows, ended=ended)
        groups = -1, config.group
        total_PG = settled(grades.total_N.reshape(groups), grades.failed_N.reshape(groups)).astype(np.float32)
        most = config.prompt_limit(self.positions) + config.max_tokens
        batch = rollout_batch(prompts, out, pad_id=self.tokenizer.pad_id, most=most)
        signal = float(np.mean(np.ptp(total_PG, axis=1) > 1e-6))
        self._watch(signal)
        metrics = {
            **grades.metrics(),
            "response_length": float(np.mean(out.lengths_B[: len(prompts)])),
            "truncated": 1 - float(np.mean(ended)),
            "signal_groups": signal,
        }
        same = {"temperature": config.temperature, "max_tokens": config.max_tokens}
        advantages = np.asarray(group_advantages(jnp.asarray(total_PG), scale=config.advantage))
        batch["advantages"] = advantages.reshape(-1, 1).astype(np.float32)
        return batch | {name: np.full((len(prompts), 1), value, np.float32) for name, value in same.items()}, metrics

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


def settled(total_PG: np.ndarray, failed_PG: np.ndarray) -> np.ndarray:
    """Rewards in which an answer whose grading failed has the mean of its group's others, so that it teaches nothing:
    a grader that breaks must be worth neither less nor more than the others. 0 where all of a group failed."""
    counted_PG = np.where(failed_PG, 0.0, total_PG)
    mean_P1 = counted_PG.sum(axis=1, keepdims=True) / np.maximum((~failed_PG).sum(axis=1, keepdims=True), 1)
    return np.where(failed_PG, mean_P1, total_PG)


def rollout_batch(prompts: Sequence[Sequence[int]], out: Generated, *, pad_id: int, most: int) -> dict[str, np.ndarray]:
    """Each row a prompt, its answer as sampled and padding; ``loss_mask`` is 1 on the answer, its stop token included.

    The width S is that of the longest row, rounded up to a power of two from 128 on, at most ``most``: other lengths
    compile few programs.
    """
    count, lengths_B = len(prompts), np.asarray(out.lengths_B)
    longest = max(len(prompt) + int(length) for prompt, length in zip(prompts, lengths_B, strict=False))
    shape = count, min(max(_LEAST_WIDTH, 1 << (longest - 1).bit_length()), most)
    batch = {
        "tokens": np.full(shape, pad_id, np.int32),
        "segment_ids": np.zeros(shape, np.int32),
        "positions": np.zeros(shape, np.int32),
        "loss_mask": np.zeros(shape, np.float32),
        "sampler_logprobs": np.zeros(shape, np.float32),
        "truncated": (~np.asarray(out.stopped_B[:count], bool))[:, None].astype(np.float32),
    }
    for row, prompt in enumerate(prompts):
        begin, length = len(prompt), int(lengths_B[row])
        end = begin + length
        batch["tokens"][row, :begin] = prompt
        batch["tokens"][row, begin:end] = out.tokens_BN[row, :length]
        batch["segment_ids"][row, :end] = 1
        batch["positions"][row, :end] = np.arange(end)
        batch["loss_mask"][row, begin:end] = 1
        batch["sampler_logprobs"][row, begin:end] = out.logprobs_BN[row, :length]
    return batch
