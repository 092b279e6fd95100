"""A small real model, SmolLM2-135M-Instruct, taught Countdown with three numbers: by GRPO alone, and by distillation.

    deepseek-jax grpo r1/smollm2:grpo --task.path train.jsonl --evaluation.task.path test.jsonl
    deepseek-jax distill r1/smollm2:distill --samples.init-from TEACHER --samples.task.path train.jsonl

smollm2 is the model's folder in Hugging Face's form (the tests' parity/test_gguf.py says how one is made of its GGUF);
TEACHER is any model, with whatever tokenizer. Rows have numbers and target. For one GPU; what was measured stands in
docs/results/r1-smollm2.md.
"""

import dataclasses

from deepseek_jax.compute import ComputeConfig
from deepseek_jax.rl.rejection import Readable
from deepseek_jax.rl.rollout import RolloutConfig
from deepseek_jax.rl.tasks import TaskConfig
from deepseek_jax.train.grpo import GRPOLoss
from deepseek_jax.train.loop import LoopConfig
from deepseek_jax.train.optimizer import OptimizerConfig
from deepseek_jax.train.step import StepConfig
from deepseek_jax.workflows.distill import DistillConfig
from deepseek_jax.workflows.grpo import GRPOConfig
from deepseek_jax.workflows.questions import Asking
from deepseek_jax.workflows.rejection import RejectionConfig
from deepseek_jax.workflows.sft import SFTConfig, SFTData
from deepseek_jax.workflows.task_eval import TaskEval

COUNTDOWN = TaskConfig(name="countdown")
COMPUTE = ComputeConfig(dtype="bfloat16", remat="full")
EXAM = TaskEval(task=COUNTDOWN, count=500, max_tokens=256, batch_size=256)


@dataclasses.dataclass(frozen=True)
class SmolLM2:
    grpo: GRPOConfig = GRPOConfig(
        run_dir="runs/smollm2/grpo",
        init_from="smollm2",
        task=COUNTDOWN,
        reward=("accuracy=1.0",),
        rollout=RolloutConfig(prompts=32, group=16, max_prompt=256, max_tokens=256, resample=1),
        loss=GRPOLoss(kl_weight=0.001),
        optimizer=OptimizerConfig(
            peak_lr=5e-6, warmup_steps=10, constant_until=1.0, cosine_until=1.0, weight_decay=0.0
        ),
        step=StepConfig(microbatches=4),
        loop=LoopConfig(steps=200, log_every=1, checkpoint_every=50),
        compute=COMPUTE,
        evaluation=EXAM,
    )
    distill: DistillConfig = DistillConfig(
        run_dir="runs/smollm2/distill",
        samples=RejectionConfig(
            task=COUNTDOWN,
            asking=Asking(samples=8, temperature=1.0, top_p=1.0, max_tokens=256),
            keep=Readable(per_prompt=2, thought=False),
            batch_size=512,
            compute=COMPUTE,
        ),
        student=SFTConfig(
            init_from="smollm2",
            data=SFTData(seq_len=1024),
            batch_size=32,
            optimizer=OptimizerConfig(
                peak_lr=1e-4, constant_until=0.0, cosine_until=1.0, end_ratio=0.1, tail_ratio=0.1
            ),
            loop=LoopConfig(steps=200, log_every=5, checkpoint_every=100),
            compute=COMPUTE,
            evaluation=EXAM,
        ),
    )


def config() -> SmolLM2:
    return SmolLM2()
