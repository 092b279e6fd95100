"""R1-Zero's last 2,200 of 10,400 updates: answers of up to 65,536 tokens, from where r1/v3's zero has come to.

    deepseek-jax grpo r1/v3_longer

A run's limits stay as they are, so it is a run of its own: Adam's moments begin anew. Never run, see r1/v3.
"""

import dataclasses

from deepseek_jax.workflows.grpo import GRPOConfig
from deepseek_jax.workflows.recipe import load_recipe


def config() -> GRPOConfig:
    zero = load_recipe("r1/v3:zero", GRPOConfig)
    return dataclasses.replace(
        zero,
        run_dir="runs/r1/zero_longer",
        init_from=zero.run_dir,
        chat_template="",  # it has it
        rollout=dataclasses.replace(zero.rollout, max_tokens=65_536),
        loop=dataclasses.replace(zero.loop, steps=138),
    )
