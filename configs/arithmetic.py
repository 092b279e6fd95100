"""GRPO on two-operand arithmetic, from any model that can be chatted with; the demo trains its own (demo/grpo).

    deepseek-jax corpus demo/corpus
    deepseek-jax grpo arithmetic --init-from DIR --task.path runs/demo/corpus/problems_train.jsonl

Others are asked at the end with --evaluation.task.path runs/demo/corpus/problems_heldout.jsonl. Not run to its end yet,
so without a score; a few steps: docs/results/tasks.md.
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
        run_dir="runs/arithmetic",
        task=TaskConfig(name="arithmetic"),
        rollout=RolloutConfig(prompts=16, group=8, max_tokens=64),
        loss=GRPOLoss(kl_weight=0.001),
        optimizer=OptimizerConfig(peak_lr=1e-5, warmup_steps=5, constant_until=1.0, cosine_until=1.0, weight_decay=0.0),
        step=StepConfig(microbatches=1),
        loop=LoopConfig(steps=400, log_every=1, checkpoint_every=50),
        evaluation=TaskEval(task=TaskConfig(name="arithmetic"), max_tokens=64, by="kind"),
    )
