"""R1 as it was made, from DeepSeek-V3-Base (671 B parameters): the papers' own numbers (arXiv 2501.12948).

    deepseek-jax r1 r1/v3 --base DeepSeek-V3-Base
    deepseek-jax sft r1/students:qwen_7b --init-from Qwen2.5-Math-7B

A stage alone: deepseek-jax grpo r1/v3:zero --init-from DeepSeek-V3-Base, and so on. Never run: it took 64 nodes of 8
H800, 198 hours for R1-Zero and 80 for R1; here the mesh is of 512 devices.

A step is a rollout of 8,192 answers (512 questions × 16), of which each 512 (32 × 16) make an update. Not published, so
chosen here: the updates of stage 2 (1,600), warm-up and decay of the rates (none), the clipping of R1-Zero (0.2), the
answers to each question in rejection sampling (4), and what a long paragraph is. R1-Zero's last 2,200 of 10,400 updates
have answers of up to 65,536 tokens (zero_longer), and stage 4's last 400 of 1,700 general questions too, judged by
reward models (preferences): no sooner, or they are deceived. Each is a run of its own: Adam's moments begin anew.

data/rl.jsonl has rows of the task `mixed`: mathematics, code, science and logic; data/rl_general.jsonl others of it,
{"task": "rows", "prompt": "...", "answer": null}; data/general_sft.jsonl the 200,000 chats beside stage 3's samples;
data/helpful.jsonl and data/harmless.jsonl what reward models learn.
"""

import dataclasses

from deepseek_jax.compute import ComputeConfig
from deepseek_jax.data.preferences import Judges
from deepseek_jax.parallel.mesh import MeshConfig
from deepseek_jax.rl.rejection import Readable
from deepseek_jax.rl.rollout import RolloutConfig
from deepseek_jax.rl.tasks import TaskConfig
from deepseek_jax.train.grpo import GRPOLoss
from deepseek_jax.train.loop import LoopConfig
from deepseek_jax.train.optimizer import OptimizerConfig
from deepseek_jax.workflows.grpo import GRPOConfig
from deepseek_jax.workflows.questions import Asking
from deepseek_jax.workflows.r1 import R1Config
from deepseek_jax.workflows.rejection import RejectionConfig
from deepseek_jax.workflows.reward_model import PreferenceData, RewardModelConfig
from deepseek_jax.workflows.sft import SFTConfig, SFTData

RUN = "runs/r1"
BASE = f"{RUN}/pretrain"  # which --base takes the place of
QUESTIONS = TaskConfig(name="mixed", path=("data/rl.jsonl",))
COMPUTE = ComputeConfig(dtype="bfloat16", remat="full")
MESH = MeshConfig(fsdp=16, expert=32)
RULES = ("accuracy=1.0", "format=1.0", "language:en=1.0")


def config() -> R1Config:
    zero = reinforced("zero", BASE, 512, "accuracy=1.0", "tags=1.0", chat_template="r1_zero")
    rules = reinforced("all_scenarios", f"{RUN}/sft", 81, *RULES, clip=10.0, temperature=0.7)
    return R1Config(
        skip=("data", "student_base", "student", "evaluation"),
        zero=zero,
        zero_longer=dataclasses.replace(
            zero,
            run_dir=f"{RUN}/zero_longer",
            init_from=zero.run_dir,
            chat_template="",  # it has it
            rollout=dataclasses.replace(zero.rollout, max_tokens=65_536),
            loop=dataclasses.replace(zero.loop, steps=138),
        ),
        cold_start_samples=sampled("cold_start_samples", "zero_longer", Readable(per_prompt=1), count=20_000),
        # Two passes over thousands of samples, 5,000 of 6,000 tokens say.
        cold_start=fine_tuned("cold_start", f"{RUN}/cold_start_samples/kept.jsonl", steps=14),
        reasoning=reinforced("reasoning", f"{RUN}/cold_start", 100, *RULES, clip=10.0),
        samples=sampled("samples", "reasoning", Readable(code=False, paragraph=4000), count=0),
        # Two passes over 804,745 samples of 5,355.3 tokens, in rows that are not quite full.
        sft=fine_tuned("sft", f"{RUN}/samples/kept.jsonl", "data/general_sft.jsonl", steps=2100),
        helpful=judging("helpful", "summary"),
        harmless=judging("harmless", "all"),
        all_scenarios=rules,
        preferences=dataclasses.replace(
            rules,
            run_dir=f"{RUN}/preferences",
            init_from=rules.run_dir,
            task=dataclasses.replace(QUESTIONS, path=(*QUESTIONS.path, "data/rl_general.jsonl")),
            reward=(*RULES, f"model:{RUN}/helpful=1.0", f"model:{RUN}/harmless=1.0"),
            loop=dataclasses.replace(rules.loop, steps=25),
        ),
    )


def reinforced(
    name: str,
    start: str,
    steps: int,
    *reward: str,
    clip: float = 0.2,
    temperature: float = 1.0,
    chat_template: str = "",
) -> GRPOConfig:
    return GRPOConfig(
        run_dir=f"{RUN}/{name}",
        init_from=start,
        chat_template=chat_template,
        task=QUESTIONS,
        reward=reward,
        rollout=RolloutConfig(prompts=512, group=16, max_tokens=32_768, temperature=temperature),
        minibatches=16,
        reference_every=25,  # rollouts: 400 updates
        loss=GRPOLoss(kl_weight=0.001, clip_low=clip, clip_high=clip),
        optimizer=OptimizerConfig(peak_lr=3e-6, warmup_steps=0, constant_until=1.0, cosine_until=1.0),
        loop=LoopConfig(steps=steps, log_every=1, checkpoint_every=5),
        compute=COMPUTE,
        mesh=MESH,
    )


def sampled(name: str, teacher: str, keep: Readable, *, count: int) -> RejectionConfig:
    return RejectionConfig(
        run_dir=f"{RUN}/{name}",
        init_from=f"{RUN}/{teacher}",
        task=QUESTIONS,
        asking=Asking(samples=4, temperature=1.0, top_p=1.0, max_tokens=32_768, count=count),
        keep=keep,
        batch_size=4096,
        compute=COMPUTE,
        mesh=MESH,
    )


def fine_tuned(name: str, *chats: str, steps: int) -> SFTConfig:
    return SFTConfig(
        run_dir=f"{RUN}/{name}",
        init_from=BASE,
        data=SFTData(path=chats, seq_len=32_768, drop_long=True),
        batch_size=128,
        optimizer=OptimizerConfig(
            peak_lr=5e-5, warmup_steps=0, constant_until=0.0, cosine_until=1.0, end_ratio=0.1, tail_ratio=0.1
        ),
        loop=LoopConfig(steps=steps, log_every=1, checkpoint_every=100),
        compute=COMPUTE,
        mesh=MESH,
    )


def judging(name: str, judges: Judges) -> RewardModelConfig:
    """Batch 256, rate 6e-6, one pass, answers of up to 8,192 tokens."""
    return RewardModelConfig(
        run_dir=f"{RUN}/{name}",
        init_from=f"{RUN}/sft",
        judges=judges,
        data=PreferenceData(path=(f"data/{name}.jsonl",), seq_len=16_384, drop_long=True),
        batch_size=256,
        epochs=1,
        optimizer=OptimizerConfig(peak_lr=6e-6, warmup_steps=0, constant_until=1.0, cosine_until=1.0),
        compute=COMPUTE,
        mesh=MESH,
    )
