"""Answers sampled from the policy that is being trained, rewarded, as batches for ``GRPOLoss``."""

import sys
import time
from collections.abc import Mapping
from typing import Any, Self

import numpy as np

from deepseek_jax.checkpoint.model import Model
from deepseek_jax.data.rows import PromptLoader
from deepseek_jax.inference.engine import Engine
from deepseek_jax.parallel.processes import require_own_rows
from deepseek_jax.rl.asynchronous import Ahead
from deepseek_jax.rl.grader import Grader
from deepseek_jax.rl.rollout_config import RolloutConfig
from deepseek_jax.rl.sample_log import SampleLog
from deepseek_jax.rl.sampler import Sampler
from deepseek_jax.rl.tasks import Task
from deepseek_jax.train.state import TrainState


class NoSignalError(RuntimeError):
    """Almost all groups have had equal rewards for many steps: there is nothing to learn from."""


class Rollouts:
    """Batches for GRPO: each call samples a group of answers to the next questions with the state's own parameters.

    A batch is a function of (parameters, loader position, seed) alone, as far as the rewards are: so a run that was
    killed inside a rollout repeats it exactly. An answer that was cut off by ``max_tokens`` is an empty text for the
    package's rewards, as it has not come to its end; rewards from files see it as it stands.

    With a ``staleness`` a thread makes them ahead, see ``Ahead``; what a run that stops has not trained on is sampled
    anew when it goes on, from the same questions.
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
        log: SampleLog | None = None,
        steps: int = sys.maxsize,
    ):
        """minibatches: parts of a batch with an update each. multiple: what the learner needs the number of each part's
        rows to be a multiple of, where they are packed. log: where some of the answers are kept. steps: of the run."""
        require_own_rows(model.mesh, model.compute.rules.batch, "rollouts")
        if config.replay_routing and not model.config.num_moe_layers:
            raise ValueError("rollout.replay_routing=True: the model has no experts that could be replayed")
        if config.staleness and model.mesh.size > 1:
            raise ValueError(
                f"rollout.staleness={config.staleness} on {model.mesh.size} devices: programs of two threads could "
                "come to them in different orders, and wait for each other forever; expected one device"
            )
        self.config, self.log, self.loader = config, log, loader
        positions = model.config.max_position_embeddings
        options: dict[str, Any] = {"positions": positions, "multiple": multiple, "minibatches": minibatches}
        self.sampler = Sampler(task, grader, loader, config, seed=seed, **options)
        self.engines = [Engine(model, at_once=config.slots) for _ in range(max(config.staleness, 1))]
        self._ahead = Ahead(self.sampler.make, self.engines, steps=steps) if config.staleness else None
        self._position: dict[str, Any] | None = None  # of the loader, behind the newest batch that was given
        self.quiet_steps = 0
        self._asked_at = self._given_at = 0.0
        self._asked = 0

    def next(self, state: TrainState) -> tuple[dict[str, np.ndarray], dict[str, float]]:
        """The next batch and its metrics, which are of all that was asked. Raises NoSignalError, see RolloutConfig."""
        step = int(state.step)
        self._asked_at = time.monotonic()
        metrics = {}
        if self._ahead is None:
            self.engines[0].update(state.params, state.router_bias)
            made = self.sampler.make(self.engines[0], step)
        else:
            made, metrics["staleness"] = self._ahead.take(state)
        self._asked, self._position = made.asked, made.loader
        if self.log is not None:
            self.log.write(step + 1, made.answers)
        self._watch(made.signal)
        self._given_at = time.monotonic()
        return made.batch, made.metrics | metrics

    def trained(self) -> dict[str, float]:
        """Metrics of the step that the devices have just finished: seconds since it had its batch, and answers per
        second since it asked for it."""
        now = time.monotonic()
        return {
            "train_seconds": now - self._given_at,
            "samples_per_second": self._asked / (now - self._asked_at),
        }

    def state(self) -> dict[str, Any]:
        return {"loader": self._position or self.loader.state(), "quiet_steps": self.quiet_steps}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.loader.restore(state["loader"])
        self.quiet_steps = state["quiet_steps"]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the thread that samples ahead, if there is one."""
        if self._ahead is not None:
            self._ahead.close()

    def _watch(self, signal: float) -> None:
        self.quiet_steps = self.quiet_steps + 1 if signal < self.config.min_signal else 0
        if self.config.patience and self.quiet_steps >= self.config.patience:
            raise NoSignalError(
                f"fewer than {self.config.min_signal:.0%} of the groups had unequal rewards for {self.quiet_steps} "
                "steps: all answers to a question earn the same. Start from a model that answers some questions some "
                "of the time (more or less SFT), choose other questions, or a reward that tells answers apart."
            )
