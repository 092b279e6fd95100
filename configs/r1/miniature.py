"""R1 in miniature: every stage of the paper on a 3 M-parameter DeepSeek-V3, and a Llama distilled from it.

    deepseek-jax r1 r1/miniature        (make r1)

2 CPU cores: 12 minutes, tests beside it half of the time. Right answers to held-out problems, sampled: base 44 %,
R1-Zero 94 %; stages 1 to 4 56, 89, 79 and 88 %; student 71 % (docs/results/r1.md).

A stage alone: deepseek-jax grpo r1/miniature:zero, and so on.
"""

import dataclasses

from deepseek_jax.compute import ComputeConfig
from deepseek_jax.config import ModelConfig
from deepseek_jax.data.preferences import Judges
from deepseek_jax.rl.rejection import Readable
from deepseek_jax.rl.rollout import RolloutConfig
from deepseek_jax.rl.tasks import TaskConfig
from deepseek_jax.train.grpo import GRPOLoss
from deepseek_jax.train.loop import LoopConfig
from deepseek_jax.train.losses import LanguageModelLoss
from deepseek_jax.train.optimizer import OptimizerConfig
from deepseek_jax.train.step import StepConfig
from deepseek_jax.workflows.corpus import CorpusConfig
from deepseek_jax.workflows.grpo import GRPOConfig
from deepseek_jax.workflows.pretrain import PretrainConfig, PretrainData
from deepseek_jax.workflows.questions import Asking
from deepseek_jax.workflows.r1 import R1Config
from deepseek_jax.workflows.r1_data import R1Data
from deepseek_jax.workflows.r1_evaluation import R1Evaluation
from deepseek_jax.workflows.rejection import RejectionConfig
from deepseek_jax.workflows.reward_model import PreferenceData, RewardModelConfig
from deepseek_jax.workflows.sft import SFTConfig, SFTData
from deepseek_jax.workflows.task_eval import TaskEval

RUN = "runs/r1"
DATA = f"{RUN}/data"
ZERO = f"{DATA}/zero.jinja"
PROBLEMS = f"{DATA}/problems_train.jsonl"
HELD_OUT = TaskConfig(path=(f"{DATA}/problems_heldout.jsonl",))
EXAM = TaskEval(task=HELD_OUT, count=192, max_tokens=44, batch_size=96, by="kind")
COMPUTE = ComputeConfig(scan_unroll=3)
CHATS = f"{RUN}/samples/kept.jsonl", f"{DATA}/requests_sft.jsonl"  # of stage 3 and of the student
EVALUATED = ("zero", "cold_start", "reasoning", "sft", "all_scenarios", "student")
GENERAL = f"{RUN}/helpful", f"{RUN}/harmless"


def config() -> R1Config:
    corpus = CorpusConfig(vocab_size=640, arithmetic_share=0.4, max_code_bytes=300_000, sft_per_kind=1)
    zero = reinforced("zero", "pretrain", 160, "accuracy", "tags=0.2")
    return R1Config(
        data=R1Data(run_dir=DATA, corpus=corpus),
        pretrain=pretrained("pretrain", DATA, BASE, steps=900),
        zero=dataclasses.replace(zero, chat_template=ZERO),
        cold_start_samples=sampled("cold_start_samples", "zero", 1200),
        cold_start=fine_tuned("cold_start", "pretrain", f"{RUN}/cold_start_samples/kept.jsonl", steps=120),
        reasoning=reinforced("reasoning", "cold_start", 120, "accuracy", "format=0.2", "language:en=0.2"),
        samples=sampled("samples", "reasoning", 2000),
        sft=fine_tuned("sft", "pretrain", *CHATS, steps=320),
        helpful=judging("helpful", "summary"),
        harmless=judging("harmless", "all"),
        all_scenarios=dataclasses.replace(
            reinforced(
                "all_scenarios",
                "sft",
                120,
                "accuracy",
                "format=0.2",
                "language:en=0.2",
                *(f"model:{path}=0.2" for path in GENERAL),
                more=(f"{DATA}/requests_train.jsonl",),
            ),
            loss=GRPOLoss(chunk=32, kl_weight=0.05),  # or it says to all what the model for helpfulness likes best
        ),
        student_base=pretrained("student_base", f"{DATA}/student", STUDENT, steps=600),
        student=fine_tuned("student", "student_base", *CHATS, steps=480),
        evaluation=R1Evaluation(
            run_dir=f"{RUN}/evaluation",
            base=f"{RUN}/pretrain",
            chat_template=ZERO,
            models=tuple(f"{RUN}/{name}" for name in EVALUATED),
            problems=HELD_OUT,
            requests=TaskConfig(path=(f"{DATA}/requests_heldout.jsonl",)),
            asking=Asking(samples=2, temperature=1.0, top_p=1.0, max_tokens=44, count=192),
            batch_size=96,
            compute=COMPUTE,
        ),
    )


BASE = ModelConfig(
    vocab_size=640,
    hidden_size=128,
    num_hidden_layers=4,
    intermediate_size=384,
    num_experts_per_tok=2,
    moe_intermediate_size=96,
    initializer_range=0.02,
)
STUDENT = ModelConfig(
    vocab_size=400,
    hidden_size=128,
    num_hidden_layers=4,
    intermediate_size=384,
    attention="gqa",
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    rope_interleave=False,
    n_routed_experts=0,
    first_k_dense_replace=4,
    num_nextn_predict_layers=0,
    initializer_range=0.02,
)


def pretrained(name: str, tokenizer: str, model: ModelConfig, *, steps: int) -> PretrainConfig:
    return PretrainConfig(
        run_dir=f"{RUN}/{name}",
        model=model,
        compute=COMPUTE,
        data=PretrainData(
            path=(f"{DATA}/documents/train.jsonl",),
            heldout=(f"{DATA}/documents/heldout.jsonl",),
            heldout_kinds=("code", "prose"),
            tokenizer=f"{tokenizer}/tokenizer.json",
            seq_len=128,
        ),
        batch_size=16,
        optimizer=OptimizerConfig(peak_lr=3e-3, warmup_steps=20),
        step=StepConfig(microbatches=2, bias_update_speed=0.003),
        loss=LanguageModelLoss(chunk=64),
        loop=LoopConfig(steps=steps, log_every=10, checkpoint_every=100),
    )


def fine_tuned(name: str, start: str, *chats: str, steps: int) -> SFTConfig:
    return SFTConfig(
        run_dir=f"{RUN}/{name}",
        init_from=f"{RUN}/{start}",
        data=SFTData(path=chats, seq_len=128),
        batch_size=8,
        compute=COMPUTE,
        optimizer=OptimizerConfig(peak_lr=3e-3, warmup_steps=5, constant_until=0.6, cosine_until=1.0),
        step=StepConfig(bias_update_speed=0.003),
        loss=LanguageModelLoss(isolate=True, chunk=64),
        loop=LoopConfig(steps=steps, log_every=10, checkpoint_every=100),
        evaluation=EXAM,
    )


def reinforced(name: str, start: str, steps: int, *reward: str, more: tuple[str, ...] = ()) -> GRPOConfig:
    return GRPOConfig(
        run_dir=f"{RUN}/{name}",
        init_from=f"{RUN}/{start}",
        task=TaskConfig(path=(PROBLEMS, *more)),
        reward=reward,
        rollout=RolloutConfig(prompts=16, group=8, max_prompt=20, max_tokens=44),
        loss=GRPOLoss(chunk=32),
        compute=COMPUTE,
        optimizer=OptimizerConfig(peak_lr=3e-4, warmup_steps=5, constant_until=0.6, cosine_until=1.0, weight_decay=0.0),
        step=StepConfig(microbatches=2, bias_update_speed=0.001),
        loop=LoopConfig(steps=steps, log_every=5, checkpoint_every=50),
        evaluation=EXAM,
    )


def sampled(name: str, teacher: str, count: int) -> RejectionConfig:
    return RejectionConfig(
        run_dir=f"{RUN}/{name}",
        init_from=f"{RUN}/{teacher}",
        task=TaskConfig(path=(PROBLEMS,)),
        asking=Asking(samples=2, temperature=1.0, top_p=1.0, max_tokens=44, count=count),
        keep=Readable(per_prompt=1),
        batch_size=128,
        compute=COMPUTE,
    )


def judging(name: str, judges: Judges) -> RewardModelConfig:
    return RewardModelConfig(
        run_dir=f"{RUN}/{name}",
        init_from=f"{RUN}/sft",
        judges=judges,
        data=PreferenceData(path=(f"{DATA}/{name}.jsonl",), heldout=(f"{DATA}/{name}_heldout.jsonl",), seq_len=128),
        batch_size=8,
        epochs=0,
        compute=COMPUTE,
        optimizer=OptimizerConfig(peak_lr=1e-3, warmup_steps=5, constant_until=1.0, cosine_until=1.0),
        loop=LoopConfig(steps=40, log_every=5, checkpoint_every=40),
    )
