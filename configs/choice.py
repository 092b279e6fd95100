"""GRPO on multiple choice (MMLU, MMLU-Pro, GPQA), from any model that can be chatted with.

    deepseek-jax grpo choice --init-from DIR --task.path train.jsonl

Rows have question, options or choices, a list, and answer, a letter or an index from 0; or GPQA's columns. Others are
asked at the end with --evaluation.task.path test.jsonl. Not run to its end yet, so without a score.
"""

from deepseek_jax.rl.rollout import RolloutConfig
from deepseek_jax.rl.tasks import TaskConfig
from deepseek_jax.train.grpo import GRPOLoss
from deepseek_jax.train.loop import LoopConfig
from deepseek_jax.train.optimizer import OptimizerConfig
from deepseek_jax.train.step import StepConfig
from deepseek_jax.workflows.grpo import GRPOConfig
from deepseek_jax.workflows.task_eval import TaskEval


def config() -> GRPOConfig:
    return GRPOConfig(
        run_dir="runs/choice",
        task=TaskConfig(name="choice"),
        rollout=RolloutConfig(prompts=16, group=8, max_tokens=1024),
        loss=GRPOLoss(kl_weight=0.001),
        optimizer=OptimizerConfig(peak_lr=3e-6, warmup_steps=5, constant_until=1.0, cosine_until=1.0, weight_decay=0.0),
        step=StepConfig(microbatches=8),
        loop=LoopConfig(steps=400, log_every=1, checkpoint_every=50),
        evaluation=TaskEval(task=TaskConfig(name="choice"), max_tokens=1024),
    )
