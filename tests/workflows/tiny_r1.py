"""Every stage of R1 at a few steps, on questions that a network of a few hundred numbers learns to answer."""

import dataclasses
import json
from pathlib import Path

from deepseek_jax.config import ModelConfig
from deepseek_jax.data.preferences import Judges
from deepseek_jax.rl.rejection import Readable
from deepseek_jax.rl.rollout import RolloutConfig
from deepseek_jax.rl.tasks import TaskConfig
from deepseek_jax.train.grpo import GRPOLoss
from deepseek_jax.train.loop import LoopConfig
from deepseek_jax.train.losses import LanguageModelLoss
from deepseek_jax.train.optimizer import OptimizerConfig
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

RUN = "runs/r1"
DATA = f"{RUN}/data"
ZERO = f"{DATA}/zero.jinja"
OPTIMIZER = OptimizerConfig(peak_lr=1e-2, warmup_steps=2, constant_until=1.0, cosine_until=1.0)
MODEL = ModelConfig(
    vocab_size=300,
    hidden_size=16,
    num_hidden_layers=1,
    intermediate_size=24,
    attention="gqa",
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    rope_interleave=False,
    max_position_embeddings=128,
    n_routed_experts=0,
    first_k_dense_replace=1,
    num_nextn_predict_layers=0,
    initializer_range=0.1,
)


def write_questions(folder: Path) -> None:
    """pages.jsonl to pretrain on and questions.jsonl: what is asked does not matter, the answer is yes or no."""
    answers = [{"prompt": f"q{number}", "answer": "no" if number % 4 else "yes"} for number in range(24)]
    pages = [{"text": f"User: {row['prompt']}\nAssistant: {row['answer']}", "kind": "page"} for row in answers]
    for name, rows in (("questions", answers), ("pages", pages * 8)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def config(folder: Path) -> R1Config:
    """write_questions has written to the folder."""
    questions = TaskConfig(path=(f"{folder}/questions.jsonl",))
    loop = LoopConfig(steps=6, log_every=1, checkpoint_every=2, keep=1, tensorboard=False)

    def pretrained(name: str, tokenizer: str, vocab: int) -> PretrainConfig:
        return PretrainConfig(
            run_dir=f"{RUN}/{name}",
            model=dataclasses.replace(MODEL, vocab_size=vocab),
            data=PretrainData(
                path=(f"{folder}/pages.jsonl",), tokenizer=f"{tokenizer}/tokenizer.json", seq_len=32, fim_rate=0.0
            ),
            batch_size=4,
            optimizer=OPTIMIZER,
            loss=LanguageModelLoss(chunk=16),
            loop=dataclasses.replace(loop, steps=60, checkpoint_every=20),
        )

    def reinforced(name: str, start: str, *reward: str, more: tuple[str, ...] = ()) -> GRPOConfig:
        return GRPOConfig(
            run_dir=f"{RUN}/{name}",
            init_from=f"{RUN}/{start}",
            task=TaskConfig(path=(*questions.path, *more)),
            reward=reward,
            rollout=RolloutConfig(prompts=2, group=4, max_prompt=64, max_tokens=16, patience=0),
            loss=GRPOLoss(chunk=16),
            optimizer=OPTIMIZER,
            loop=loop,
        )

    def sampled(name: str, teacher: str) -> RejectionConfig:
        return RejectionConfig(
            run_dir=f"{RUN}/{name}",
            init_from=f"{RUN}/{teacher}",
            task=questions,
            asking=Asking(samples=4, temperature=1.0, top_p=1.0, max_tokens=16),
            keep=Readable(thought=False),
            batch_size=32,
        )

    def fine_tuned(name: str, start: str, *chats: str) -> SFTConfig:
        data = SFTData(path=chats, seq_len=160)
        return SFTConfig(
            run_dir=f"{RUN}/{name}",
            init_from=f"{RUN}/{start}",
            data=data,
            batch_size=2,
            optimizer=OPTIMIZER,
            loop=loop,
        )

    def judging(name: str, judges: Judges) -> RewardModelConfig:
        return RewardModelConfig(
            run_dir=f"{RUN}/{name}",
            init_from=f"{RUN}/sft",
            judges=judges,
            data=PreferenceData(path=(f"{DATA}/{name}.jsonl",), heldout=(f"{DATA}/{name}_heldout.jsonl",), seq_len=256),
            batch_size=2,
            epochs=0,
            optimizer=OPTIMIZER,
            loop=loop,
        )

    chats = f"{RUN}/samples/kept.jsonl", f"{DATA}/requests_sft.jsonl"
    corpus = CorpusConfig(
        vocab_size=300,
        max_code_bytes=40_000,
        max_file_bytes=4_000,
        sft_per_kind=1,
        train_per_kind=8,
        heldout_per_kind=4,
    )
    return R1Config(
        quiet=True,
        data=R1Data(
            run_dir=DATA,
            corpus=corpus,
            pages=40,
            request_pages=20,
            requests_sft=8,
            requests_train=8,
            preferences=12,
            student_vocab_size=290,
        ),
        pretrain=pretrained("pretrain", DATA, 300),
        zero=dataclasses.replace(reinforced("zero", "pretrain", "accuracy"), chat_template=ZERO),
        cold_start_samples=sampled("cold_start_samples", "zero"),
        cold_start=fine_tuned("cold_start", "pretrain", f"{RUN}/cold_start_samples/kept.jsonl"),
        reasoning=reinforced("reasoning", "cold_start", "accuracy", "language:en"),
        samples=sampled("samples", "reasoning"),
        sft=fine_tuned("sft", "pretrain", *chats),
        helpful=judging("helpful", "summary"),
        harmless=judging("harmless", "all"),
        all_scenarios=reinforced(
            "all_scenarios",
            "sft",
            "accuracy",
            f"model:{RUN}/helpful=0.5",
            f"model:{RUN}/harmless=0.5",
            more=(f"{DATA}/requests_train.jsonl",),
        ),
        student_base=pretrained("student_base", f"{DATA}/student", 290),
        student=fine_tuned("student", "student_base", *chats),
        evaluation=R1Evaluation(
            run_dir=f"{RUN}/evaluation",
            base=f"{RUN}/pretrain",
            chat_template=ZERO,
            models=(f"{RUN}/all_scenarios", f"{RUN}/student"),
            problems=questions,
            requests=TaskConfig(path=(f"{DATA}/requests_heldout.jsonl",)),
            asking=Asking(samples=2, temperature=1.0, top_p=1.0, max_tokens=16, count=8),
            batch_size=8,
        ),
    )
