"""GRPO on generated word problems of one and two steps, from a small model that can be chatted with.

    deepseek-jax puzzles one.jsonl --kind stories --size 1 --count 360
    deepseek-jax puzzles two.jsonl --kind stories --size 2 --count 1260
    head -n 300 one.jsonl >train.jsonl; head -n 1200 two.jsonl >>train.jsonl
    tail -n 60 one.jsonl >test.jsonl; tail -n 60 two.jsonl >>test.jsonl
    deepseek-jax grpo stories --init-from DIR --task.path train.jsonl --evaluation.task.path test.jsonl

No numbers of the test are in the training rows. SmolLM2-135M-Instruct on an H200, 60 steps at 3e-5 in bfloat16: 80 s,
greedy 23 → 35–47 %, sampled 2.6 → 37–43 % on three seeds (docs/results/r1-smollm2.md).
"""

from deepseek_jax.rl.rollout import RolloutConfig
from deepseek_jax.rl.tasks import TaskConfig
from deepseek_jax.train.grpo import GRPOLoss
from deepseek_jax.train.loop import LoopConfig
from deepseek_jax.train.optimizer import OptimizerConfig
from deepseek_jax.train.step import StepConfig
from deepseek_jax.workflows.grpo import GRPOConfig
from deepseek_jax.workflows.task_eval import TaskEval

TASK = TaskConfig(name="rows", template="{prompt} Write the calculation in one line, ending in = and the number.")


def config() -> GRPOConfig:
    return GRPOConfig(
        run_dir="runs/stories",
        task=TASK,
        reward=("accuracy",),
        rollout=RolloutConfig(prompts=32, group=16, max_tokens=64),
        loss=GRPOLoss(kl_weight=0.001),
        optimizer=OptimizerConfig(peak_lr=3e-5, warmup_steps=5, constant_until=1.0, cosine_until=1.0, weight_decay=0.0),
        step=StepConfig(microbatches=4),
        loop=LoopConfig(steps=60, log_every=1, checkpoint_every=50),
        evaluation=TaskEval(task=TASK, max_tokens=64, by="steps"),
    )
