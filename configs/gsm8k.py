"""GRPO on grade-school word problems (GSM8K), from any model that can be chatted with.

    deepseek-jax grpo gsm8k --init-from DIR --task.path train.jsonl

Rows have a question, and an answer that ends in #### NUMBER. Others are asked at the end with --evaluation.task.path
test.jsonl; --reward mine.py:score grades by a function of your own. Rate and KL weight are R1's. A model of a billion
parameters wants --compute.dtype bfloat16 --compute.remat full on a GPU. Not run to its end yet, so without a score; a
few steps: docs/results/tasks.md.
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
        run_dir="runs/gsm8k",
        task=TaskConfig(name="gsm8k"),
        rollout=RolloutConfig(prompts=16, group=8, max_tokens=256),
        loss=GRPOLoss(kl_weight=0.001),
        optimizer=OptimizerConfig(peak_lr=3e-6, warmup_steps=5, constant_until=1.0, cosine_until=1.0, weight_decay=0.0),
        step=StepConfig(microbatches=8),
        loop=LoopConfig(steps=400, log_every=1, checkpoint_every=50),
        evaluation=TaskEval(task=TaskConfig(name="gsm8k"), max_tokens=256),
    )
