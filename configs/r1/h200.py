"""R1's stages on one H200 from a base of 1.5 B parameters (Qwen2.5-Math-1.5B), and a student of another family.

    deepseek-jax r1 r1/h200 --base Qwen2.5-Math-1.5B --student.init-from Llama-3.2-1B-Instruct

What it reads: data/train.jsonl and data/test.jsonl, rows of the task `maths` (problem, answer); data/rl_mixed.jsonl,
such rows with {"task": "maths", ...} and others {"task": "rows", "prompt": ..., "answer": null}, for the reward models
to judge; data/general_sft.jsonl, chats; data/helpful.jsonl and data/harmless.jsonl, judged answers. Sizes are the
papers' shrunk to a card: answers of 4,096 tokens, 128 of them to an update. Not run yet, so without times and a score.
"""

import dataclasses

from deepseek_jax.compute import ComputeConfig
from deepseek_jax.data.preferences import Judges
from deepseek_jax.rl.rejection import Readable
from deepseek_jax.rl.rollout import RolloutConfig
from deepseek_jax.rl.tasks import TaskConfig
from deepseek_jax.train.grpo import GRPOLoss
from deepseek_jax.train.loop import LoopConfig
from deepseek_jax.train.losses import LanguageModelLoss
from deepseek_jax.train.optimizer import OptimizerConfig
from deepseek_jax.train.step import StepConfig
from deepseek_jax.workflows.grpo import GRPOConfig
from deepseek_jax.workflows.questions import Asking
from deepseek_jax.workflows.r1 import R1Config
from deepseek_jax.workflows.r1_evaluation import R1Evaluation
from deepseek_jax.workflows.rejection import RejectionConfig
from deepseek_jax.workflows.reward_model import PreferenceData, RewardModelConfig
from deepseek_jax.workflows.sft import SFTConfig, SFTData
from deepseek_jax.workflows.task_eval import TaskEval

RUN = "runs/r1"
BASE = f"{RUN}/pretrain"  # which --base takes the place of
MATHS = TaskConfig(name="maths", path=("data/train.jsonl",))
HELD_OUT = TaskConfig(name="maths", path=("data/test.jsonl",))
CHATS = f"{RUN}/samples/kept.jsonl", "data/general_sft.jsonl"
COMPUTE = ComputeConfig(dtype="bfloat16", remat="full")
RULES = ("maths=1.0", "format=0.2", "language:en=0.2")
MAX_TOKENS = 4096


def config() -> R1Config:
    general = "model:runs/r1/helpful", "model:runs/r1/harmless"
    scenarios = reinforced("all_scenarios", f"{RUN}/sft", 100, *RULES, *general)
    return R1Config(
        skip=("data", "student_base"),
        zero=dataclasses.replace(reinforced("zero", BASE, 400, "maths=1.0", "tags=1.0"), chat_template="r1_zero"),
        cold_start_samples=sampled("cold_start_samples", "zero", Readable(per_prompt=1)),
        cold_start=fine_tuned("cold_start", BASE, f"{RUN}/cold_start_samples/kept.jsonl", steps=60),
        reasoning=reinforced("reasoning", f"{RUN}/cold_start", 400, *RULES),
        samples=sampled("samples", "reasoning", Readable(code=False, paragraph=4000)),
        sft=fine_tuned("sft", BASE, *CHATS, steps=400),
        helpful=judging("helpful", "summary"),
        harmless=judging("harmless", "all"),
        all_scenarios=dataclasses.replace(scenarios, task=TaskConfig(name="mixed", path=("data/rl_mixed.jsonl",))),
        student=fine_tuned("student", "", *CHATS, steps=400),
        evaluation=R1Evaluation(
            run_dir=f"{RUN}/evaluation",
            base=BASE,
            chat_template="r1_zero",
            models=tuple(f"{RUN}/{name}" for name in ("zero", "reasoning", "sft", "all_scenarios", "student")),
            problems=HELD_OUT,
            asking=Asking(samples=4, max_tokens=MAX_TOKENS, count=500),
            batch_size=256,
            compute=COMPUTE,
        ),
    )


def reinforced(name: str, start: str, steps: int, *reward: str) -> GRPOConfig:
    return GRPOConfig(
        run_dir=f"{RUN}/{name}",
        init_from=start,
        task=MATHS,
        reward=reward,
        rollout=RolloutConfig(prompts=16, group=8, max_prompt=1024, max_tokens=MAX_TOKENS, drop_long=True),
        loss=GRPOLoss(kl_weight=0.001),
        reference_every=100,
        optimizer=OptimizerConfig(peak_lr=3e-6, warmup_steps=5, constant_until=1.0, cosine_until=1.0, weight_decay=0.0),
        step=StepConfig(microbatches=32),
        loop=LoopConfig(steps=steps, log_every=1, checkpoint_every=50),
        compute=COMPUTE,
        evaluation=TaskEval(task=HELD_OUT, count=500, max_tokens=MAX_TOKENS, batch_size=128),
    )


def sampled(name: str, teacher: str, keep: Readable) -> RejectionConfig:
    return RejectionConfig(
        run_dir=f"{RUN}/{name}",
        init_from=f"{RUN}/{teacher}",
        task=MATHS,
        asking=Asking(samples=4, temperature=1.0, top_p=1.0, max_tokens=MAX_TOKENS),
        keep=keep,
        batch_size=256,
        compute=COMPUTE,
    )


def fine_tuned(name: str, start: str, *chats: str, steps: int) -> SFTConfig:
    return SFTConfig(
        run_dir=f"{RUN}/{name}",
        init_from=start,
        data=SFTData(path=chats, seq_len=8192, drop_long=True),
        batch_size=16,
        optimizer=OptimizerConfig(peak_lr=5e-5, constant_until=0.0, cosine_until=1.0, end_ratio=0.1, tail_ratio=0.1),
        step=StepConfig(microbatches=16),
        loss=LanguageModelLoss(isolate=True),
        loop=LoopConfig(steps=steps, log_every=5, checkpoint_every=100),
        compute=COMPUTE,
    )


def judging(name: str, judges: Judges) -> RewardModelConfig:
    return RewardModelConfig(
        run_dir=f"{RUN}/{name}",
        init_from=f"{RUN}/sft",
        judges=judges,
        data=PreferenceData(path=(f"data/{name}.jsonl",), seq_len=8192, drop_long=True),
        batch_size=32,
        optimizer=OptimizerConfig(peak_lr=6e-6, warmup_steps=10, constant_until=1.0, cosine_until=1.0),
        step=StepConfig(microbatches=32),
        compute=COMPUTE,
    )
