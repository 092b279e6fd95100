"""Reinforcement learning with PPO: GRPO's stage with a critic, which the papers compare GRPO with."""

import dataclasses
from typing import Any

from deepseek_jax.rl.rollout import RolloutConfig
from deepseek_jax.train.grpo import GRPOLoss
from deepseek_jax.train.ppo import CriticConfig
from deepseek_jax.workflows.grpo import GRPOConfig, grpo


@dataclasses.dataclass(frozen=True)
class PPOConfig(GRPOConfig):
    """A PPO run: questions, answers, rewards, minibatches and the policy's loss are a GRPO run's; advantages are of
    tokens, and come from a critic that begins as the policy with a head of one number. It learns from groups of equal
    rewards too, so a run does not stop for them, unless it is given a rollout.patience."""

    run_dir: str = "runs/ppo"
    rollout: RolloutConfig = RolloutConfig(advantage="return", patience=0)
    loss: GRPOLoss = GRPOLoss(normalise="dapo")
    critic: CriticConfig = CriticConfig()

    STAGE = "ppo"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rollout.advantage != "return":
            raise ValueError(
                f"rollout.advantage={self.rollout.advantage!r}: must be 'return', of which the critic makes advantages"
            )

    @property
    def has_reference(self) -> bool:
        return super().has_reference or self.critic.kl_reward > 0

    @property
    def keeps_old(self) -> bool:
        return super().keeps_old or self.critic.kl_reward > 0

    def make_critic(self) -> CriticConfig:
        return self.critic


def ppo(config: PPOConfig) -> dict[str, Any]:
    """Run the stage, or go on with it; returns and writes its result. Errors as in ``grpo``."""
    return grpo(config)
