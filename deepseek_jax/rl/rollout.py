"""Answers sampled from the policy that is being trained, rewarded, as batches for ``GRPOLoss``."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.checkpoint.model import Model
from deepseek_jax.config import check_types
from deepseek_jax.data.chat import encode_prompt
from deepseek_jax.data.rows import PromptLoader
from deepseek_jax.inference.engine import Engine
from deepseek_jax.inference.generate import Generated, pad_prompts
from deepseek_jax.inference.sampling import SamplingParams
from deepseek_jax.rl.problems import make_problem, to_prompt
from deepseek_jax.rl.rewards import score
from deepseek_jax.train.grpo import group_advantages
from deepseek_jax.train.state import TrainState


class NoSignalError(RuntimeError):
    """Almost all groups have had equal rewards for many steps: there is nothing to learn from."""


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
    """prompts: problems per step. group: answers per problem. advantage: ``std`` or ``none``, see
    ``group_advantages``. A run stops when under ``min_signal`` of the groups have unequal rewards for ``patience``
    steps in a row (0: never)."""

    prompts: int = 16
    group: int = 8
    prompt_width: int = 16
    max_tokens: int = 32
    temperature: float = 1.0
    accuracy_weight: float = 1.0
    format_weight: float = 0.2
    advantage: str = "std"
    min_signal: float = 0.1
    patience: int = 20

    def __post_init__(self) -> None:
        check_types(self)
        if self.prompts < 1 or self.group < 2:
            raise ValueError(f"prompts={self.prompts}, group={self.group}: expected at least 1 and 2")
        if self.advantage not in ("std", "none"):
            raise ValueError(f"advantage={self.advantage!r}: expected 'std' or 'none'")
        if self.temperature <= 0:
            raise ValueError(f"temperature={self.temperature}: rollouts are sampled, so it must be positive")

    @property
    def weights(self) -> dict[str, float]:
        return {"accuracy": self.accuracy_weight, "format": self.format_weight}


class Rollouts:
    """Batches for GRPO: each call samples a group of answers to the next problems with the state's own parameters.

    A batch is a pure function of (parameters, loader position, seed), so a run that was killed inside a rollout
    repeats it exactly.
    """

    def __init__(
        self,
        model: Model,
        loader: PromptLoader,
        config: RolloutConfig,
        *,
        seed: int,
    ):
        self.model, self.tokenizer, self.loader, self.config = model, model.text, loader, config
        self.key = jax.random.key(seed)
        self.quiet_steps = 0

    def next(self, state: TrainState) -> tuple[dict[str, np.ndarray], dict[str, float]]:
        """The next batch and its metrics. Raises NoSignalError, see RolloutConfig."""
        config, size = self.config, self.config.group
        problems = [make_problem(row["kind"], row["a"], row["b"]) for row in next(self.loader) for _ in range(size)]
        prompts = [encode_prompt(self.tokenizer, to_prompt(problem)) for problem in problems]
        engine = Engine(dataclasses.replace(self.model, params=state.params, router_bias=state.router_bias))
        sampling = SamplingParams(temperature=config.temperature, max_tokens=config.max_tokens)
        key = jax.random.fold_in(self.key, int(state.step))
        out = jax.device_get(engine.generate_ids(prompts, sampling, key, width=config.prompt_width))
        out = jax.tree.map(lambda x: x[: len(prompts)], out)
        rewards = [
            score(self._text(engine, out, row), problem.answer, config.weights) for row, problem in enumerate(problems)
        ]
        total_PG = np.array([reward["total"] for reward in rewards], np.float32).reshape(-1, size)
        batch = rollout_batch(prompts, out, total_PG, self.tokenizer.pad_id, config)
        signal = float(np.mean(np.ptp(total_PG, axis=1) > 1e-6))
        self._watch(signal)
        metrics = {
            "reward": float(total_PG.mean()),
            "reward_accuracy": float(np.mean([reward["accuracy"] for reward in rewards])),
            "reward_format": float(np.mean([reward["format"] for reward in rewards])),
            "response_length": float(np.mean(out.lengths_B)),
            "truncated": float(np.mean(~out.stopped_B)),
            "signal_groups": signal,
        }
        return batch, metrics

    def state(self) -> dict[str, Any]:
        return {"loader": self.loader.state(), "quiet_steps": self.quiet_steps}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.loader.restore(state["loader"])
        self.quiet_steps = state["quiet_steps"]

    def _text(self, engine: Engine, out: Generated, row: int) -> str:
        """The answer without its end of sentence; one cut short has none, and whatever it says earns nothing for it."""
        length = int(out.lengths_B[row]) - int(out.stopped_B[row])
        return engine.decode(out.tokens_BN[row, :length].tolist()) if out.stopped_B[row] else ""

    def _watch(self, signal: float) -> None:
        self.quiet_steps = self.quiet_steps + 1 if signal < self.config.min_signal else 0
        if self.config.patience and self.quiet_steps >= self.config.patience:
            raise NoSignalError(
                f"fewer than {self.config.min_signal:.0%} of the groups had unequal rewards for {self.quiet_steps} "
                "steps: every answer to a problem is right, or every one is wrong. Start from a model that answers "
                "some problems some of the time (more or less SFT), or choose other problems."
            )


def rollout_batch(
    prompts: Sequence[Sequence[int]],
    out: Generated,
    rewards_PG: np.ndarray,
    pad_id: int,
    config: RolloutConfig,
) -> dict[str, np.ndarray]:
    """Prompt and answer side by side, as sampled; ``loss_mask`` is 1 on the answer, its stop token included."""
    tokens_BP, positions_BP = pad_prompts(prompts, pad_id, config.prompt_width)
    index_BN = np.broadcast_to(np.arange(out.tokens_BN.shape[1]), out.tokens_BN.shape)
    answer_BN = index_BN < np.asarray(out.lengths_B)[:, None]
    positions_BN = np.where(answer_BN, positions_BP[:, -1:] + 1 + index_BN, -1)
    positions = np.concatenate([positions_BP, positions_BN], axis=1).astype(np.int32)
    nothing = np.zeros(tokens_BP.shape, np.float32)
    advantages = np.asarray(
        group_advantages(jnp.asarray(rewards_PG), scale="std" if config.advantage == "std" else "none")
    )
    same = functools.partial(np.full, (len(prompts), 1), dtype=np.float32)
    return {
        "tokens": np.concatenate([tokens_BP, out.tokens_BN], axis=1).astype(np.int32),
        "segment_ids": (positions >= 0).astype(np.int32),
        "positions": np.maximum(positions, 0),
        "loss_mask": np.concatenate([nothing, answer_BN], axis=1).astype(np.float32),
        "sampler_logprobs": np.concatenate([nothing, out.logprobs_BN], axis=1).astype(np.float32),
        "advantages": advantages.reshape(-1, 1).astype(np.float32),
        "truncated": (~np.asarray(out.stopped_B))[:, None].astype(np.float32),
        "temperature": same(config.temperature),
        "max_tokens": same(config.max_tokens),
    }
