"""GRPO on programming problems with tests (Codeforces, LiveCodeBench, MBPP), from any model that can be chatted with.

    deepseek-jax grpo code --init-from DIR --task.path train.jsonl

Rows have a prompt and tests, `assert`s or pairs of input and output; programs run in a sandbox, which needs bubblewrap
(docs/code.md). HumanEval is asked beside it with --evaluation.task.name humaneval --evaluation.task.path
HumanEval.jsonl.gz. Rate and KL weight are R1's. Not run to its end yet, so without a score.
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
        run_dir="runs/code",
        task=TaskConfig(name="code"),
        rollout=RolloutConfig(prompts=16, group=8, max_tokens=1024),
        loss=GRPOLoss(kl_weight=0.001),
        optimizer=OptimizerConfig(peak_lr=3e-6, warmup_steps=5, constant_until=1.0, cosine_until=1.0, weight_decay=0.0),
        step=StepConfig(microbatches=16),
        loop=LoopConfig(steps=400, log_every=1, checkpoint_every=50),
        evaluation=TaskEval(task=TaskConfig(name="code"), max_tokens=1024),
    )
