"""GRPO on rows of several tasks at once, as R1's, from any model that can be chatted with.

    deepseek-jax grpo mixed --init-from DIR --task.path rows.jsonl

Each row says in a column `task` which it is of, and has that task's columns: {"task": "maths", "problem": "...",
"answer": "..."}, {"task": "choice", ...}, {"task": "rows", "prompt": "..."} for a question without a right answer, with
"answer": null, which a reward model may judge (--reward accuracy --reward model:RUN). Not run to its end yet, so
without a score.
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
        run_dir="runs/mixed",
        task=TaskConfig(name="mixed"),
        rollout=RolloutConfig(prompts=16, group=8, max_tokens=1024),
        loss=GRPOLoss(kl_weight=0.001),
        optimizer=OptimizerConfig(peak_lr=3e-6, warmup_steps=5, constant_until=1.0, cosine_until=1.0, weight_decay=0.0),
        step=StepConfig(microbatches=8),
        loop=LoopConfig(steps=400, log_every=1, checkpoint_every=50),
        evaluation=TaskEval(task=TaskConfig(name="mixed"), max_tokens=1024),
    )
