"""PPO from the demo's cold start with the settings of demo/grpo, the comparison that the papers draw.

deepseek-jax ppo demo/ppo
"""

import dataclasses

from deepseek_jax.train.ppo import CriticConfig
from deepseek_jax.workflows.grpo import GRPOConfig
from deepseek_jax.workflows.ppo import PPOConfig
from deepseek_jax.workflows.recipe import load_recipe


def config() -> PPOConfig:
    grpo = load_recipe("demo/grpo", GRPOConfig)
    same = {field.name: getattr(grpo, field.name) for field in dataclasses.fields(grpo)}
    return PPOConfig(
        **same
        | {
            "run_dir": "runs/ppo",
            "rollout": dataclasses.replace(grpo.rollout, advantage="return", patience=0),
            "loss": dataclasses.replace(grpo.loss, normalise="dapo"),
            "critic": CriticConfig(optimizer=dataclasses.replace(grpo.optimizer, peak_lr=1e-3)),
        }
    )
