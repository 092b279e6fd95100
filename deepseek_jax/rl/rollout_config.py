"""How rollouts are made, and the questions that they are made for."""

import dataclasses
import logging
from collections.abc import Sequence
from typing import Unpack

from deepseek_jax.checkpoint.model import Model
from deepseek_jax.data.loader import LoaderOptions
from deepseek_jax.data.rows import PromptLoader
from deepseek_jax.rl.asking import ask
from deepseek_jax.rl.tasks import Row, Task, where
from deepseek_jax.train.grpo import Scale
from deepseek_jax.typed import check_least, check_types

logger = logging.getLogger(__name__)


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
    mean of the others (RLOO); or the reward itself, of which PPO's critic makes advantages."""
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
    slots: int = 0
    """Answers that are sampled at a time, over all devices, the next where another has ended: none waits for the
    longest, as long as there are others. 0: all of a step together, in one program."""
    staleness: int = 0
    """Sample and grade in a thread beside the training, by a policy that is so many updates old: what grading takes is
    hidden, at the cost of as many copies of the weights. It needs loss.tis_cap. 0: each step samples first."""
    min_signal: float = 0.1
    """Stop when under this share of the groups has unequal rewards for patience steps in a row."""
    patience: int = 20
    """Steps in a row; 0: never stop for it, as PPO's default is."""

    def __post_init__(self) -> None:
        check_types(self)
        check_least(self, 1, "prompts", "max_tokens")
        check_least(self, 2, "group")
        if self.overlong_buffer > self.max_tokens:
            raise ValueError(f"overlong_buffer={self.overlong_buffer}: is more than max_tokens={self.max_tokens}")
        for name in ("replay_routing", "staleness"):
            if self.slots and getattr(self, name):
                raise ValueError(
                    f"slots={self.slots} with {name}={getattr(self, name)}: that takes answers that are all sampled "
                    "together; expected slots=0"
                )
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

    def columns(self, positions: int) -> int:
        """Of a batch's rows, at most. ValueError as ``prompt_limit``'s."""
        return self.pack or self.prompt_limit(positions) + self.max_tokens


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
