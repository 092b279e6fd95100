"""R1's last 400 of stage 4's 1,700 updates: general questions too, judged by reward models; no sooner, or they are
deceived (arXiv 2501.12948).

    deepseek-jax grpo r1/v3_preferences

data/rl_general.jsonl has rows {"task": "rows", "prompt": "...", "answer": null}. A run's rewards stay as they are, so
it is a run of its own, from where r1/v3's all_scenarios has come to: Adam's moments begin anew. Never run, see r1/v3.
"""

import dataclasses

from deepseek_jax.workflows.grpo import GRPOConfig
from deepseek_jax.workflows.recipe import load_recipe


def config() -> GRPOConfig:
    before = load_recipe("r1/v3:all_scenarios", GRPOConfig)
    return dataclasses.replace(
        before,
        run_dir="runs/r1/preferences",
        init_from=before.run_dir,
        task=dataclasses.replace(before.task, path=(*before.task.path, "data/rl_general.jsonl")),
        reward=(*before.reward, "model:runs/r1/helpful=1.0", "model:runs/r1/harmless=1.0"),
        loop=dataclasses.replace(before.loop, steps=25),
    )
