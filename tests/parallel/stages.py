"""Three stages in miniature for the tests of processes: `main([FOLDER, RUNS, STAGE...])` runs them one after another.

FOLDER has what `write_inputs` writes; RUNS is where the runs go. A stage is written NAME[:FIELD=VALUE...].
"""

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

from flax import nnx
from small import tokenizer

from deepseek_jax import Transformer, save_hf
from deepseek_jax.config import ModelConfig
from deepseek_jax.parallel.mesh import MeshConfig
from deepseek_jax.rl.rollout import RolloutConfig
from deepseek_jax.rl.tasks import TaskConfig
from deepseek_jax.train.grpo import GRPOLoss
from deepseek_jax.train.loop import LoopConfig
from deepseek_jax.train.losses import LanguageModelLoss
from deepseek_jax.train.optimizer import OptimizerConfig
from deepseek_jax.workflows.grpo import GRPOConfig, grpo
from deepseek_jax.workflows.pretrain import PretrainConfig, PretrainData, pretrain
from deepseek_jax.workflows.sft import SFTConfig, SFTData, sft
from deepseek_jax.workflows.task_eval import TaskEval

MODEL = ModelConfig(
    vocab_size=300,
    hidden_size=16,
    num_hidden_layers=2,
    intermediate_size=24,
    num_attention_heads=2,
    q_lora_rank=8,
    kv_lora_rank=8,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=8,
    n_routed_experts=8,
    num_experts_per_tok=2,
    moe_intermediate_size=8,
    max_position_embeddings=64,
    initializer_range=0.1,
    num_nextn_predict_layers=0,
)
OPTIMIZER = OptimizerConfig(peak_lr=1e-2, warmup_steps=0, constant_until=1.0, cosine_until=1.0)


def write_inputs(folder: Path) -> None:
    """A tokenizer, documents, chats, questions, a reward and the model that is tuned."""
    rng = random.Random(0)
    words = [f"{a}+{b}={a + b}" for a in range(30) for b in range(9)]
    lines = {
        "documents": [{"text": ", ".join(rng.sample(words, 5))} for _ in range(80)],
        "chats": [{"prompt": f"{a}+{b}?", "completion": f"{a + b}"} for a in range(12) for b in range(4)],
        "questions": [{"prompt": f"{a}+{b}?", "answer": f"{a + b}"} for a in range(9) for b in range(3)],
    }
    for name, rows in lines.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    reward = "def vowels(completion, row):\n    return sum(map(completion.count, 'aeo1+')) / 4\n"
    (folder / "mine.py").write_text(reward)
    for name in ("tokenizer", "model"):
        tokenizer().save(folder / name)
    save_hf(Transformer(MODEL, rngs=nnx.Rngs(0)), folder / "model", dtype="float32")


def configs(folder: Path, runs: Path) -> dict[str, tuple[Any, Any]]:
    common: dict[str, Any] = {
        "optimizer": OPTIMIZER,
        "mesh": MeshConfig(fsdp=2, expert=2),
        "loop": LoopConfig(steps=10, log_every=1, checkpoint_every=5, tensorboard=False, keep=9),
    }
    tuned: dict[str, Any] = {**common, "init_from": str(folder / "model")}
    questions = TaskConfig(path=(str(folder / "questions.jsonl"),))
    evaluation = TaskEval(questions, count=6, max_tokens=6, batch_size=4)
    evaluated = dataclasses.replace(common["loop"], eval_every=5)
    return {
        "pretrain": (
            pretrain,
            PretrainConfig(
                run_dir=str(runs / "pretrain"),
                model=MODEL,
                data=PretrainData(
                    path=(str(folder / "documents.jsonl"),),
                    heldout=(str(folder / "documents.jsonl"),),
                    tokenizer=str(folder / "tokenizer"),
                    seq_len=32,
                    cache=str(runs / "cache"),
                    workers=1,
                ),
                batch_size=8,
                loss=LanguageModelLoss(chunk=16),
                **common,
            ),
        ),
        "sft": (
            sft,
            SFTConfig(
                run_dir=str(runs / "sft"),
                data=SFTData(path=(str(folder / "chats.jsonl"),), heldout=(str(folder / "chats.jsonl"),), seq_len=32),
                batch_size=8,
                loss=LanguageModelLoss(isolate=True, chunk=16),
                evaluation=evaluation,
                **{**tuned, "loop": evaluated},
            ),
        ),
        "grpo": (
            grpo,
            GRPOConfig(
                run_dir=str(runs / "grpo"),
                task=questions,
                reward=(f"{folder / 'mine.py'}:vowels", "accuracy"),
                rollout=RolloutConfig(prompts=4, group=4, max_tokens=8, patience=0),
                loss=GRPOLoss(chunk=16, kl_weight=0.01),
                evaluation=evaluation,
                **{**tuned, "loop": evaluated},
            ),
        ),
    }


def main(arguments: list[str]) -> None:
    folder, runs, *stages = arguments
    for text in stages:
        name, *fields = text.split(":")
        run, config = configs(Path(folder), Path(runs))[name]
        for field in fields:
            path, value = field.split("=")
            config = replaced(config, path.split("."), json.loads(value))
        run(config)


def replaced(config: Any, path: list[str], value: Any) -> Any:
    name, *rest = path
    return dataclasses.replace(config, **{name: replaced(getattr(config, name), rest, value) if rest else value})
