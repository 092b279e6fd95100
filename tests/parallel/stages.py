"""Three stages in miniature, for one process or several; what they need of files, `write_inputs` writes."""

import contextlib
import dataclasses
import json
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flax import nnx
from small import tokenizer

from deepseek_jax import Transformer, save_hf
from deepseek_jax.config import ModelConfig
from deepseek_jax.data.rows import RowSource
from deepseek_jax.parallel.mesh import MeshConfig
from deepseek_jax.rl.rollout import RolloutConfig
from deepseek_jax.rl.tasks import TaskConfig
from deepseek_jax.train.grpo import GRPOLoss
from deepseek_jax.train.loop import LoopConfig
from deepseek_jax.train.losses import LanguageModelLoss
from deepseek_jax.train.optimizer import OptimizerConfig
from deepseek_jax.workflows.grpo import GRPOConfig, grpo
from deepseek_jax.workflows.pretrain import PretrainConfig, PretrainData, pretrain
from deepseek_jax.workflows.row_batches import LoaderBatches
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
    save_hf(Transformer(MODEL, rngs=nnx.Rngs(0)), folder / "model", dtype="float32")
    for name in ("tokenizer", "model"):
        tokenizer().save(folder / name)


def run(name: str, folder: Path, run_dir: Path, **changed: Any) -> dict[str, Any]:
    """The stage's result; ``folder`` has the inputs."""
    stage, config = _stages(folder)[name]
    return stage(dataclasses.replace(config, run_dir=str(run_dir), **changed))


@contextlib.contextmanager
def signalled(number: signal.Signals, batch: int, *, here: bool, after: Path = Path()) -> Iterator[None]:
    """This process, if ``here``, sends itself a signal when its loader is asked for that batch and ``after`` is there:
    a checkpoint, which threads of all processes write."""
    given, original = 0, LoaderBatches.next

    def counted(self: LoaderBatches, state: Any) -> Any:
        nonlocal given
        given += 1
        if here and given == batch:
            while not after.exists():
                time.sleep(0.05)
            os.kill(os.getpid(), number)
        return original(self, state)

    LoaderBatches.next = counted
    try:
        yield
    finally:
        LoaderBatches.next = original


@contextlib.contextmanager
def rows_read() -> Iterator[list[int]]:
    """The numbers of the packed rows that this process reads, in their order."""
    found, original = list[int](), RowSource.__getitem__

    def noted(self: RowSource, index: int) -> Any:
        found.append(int(index))
        return original(self, index)

    RowSource.__getitem__ = noted
    try:
        yield found
    finally:
        RowSource.__getitem__ = original


def _stages(folder: Path) -> dict[str, tuple[Any, Any]]:
    """By name, its function and what that takes."""
    common: dict[str, Any] = {
        "optimizer": OptimizerConfig(peak_lr=1e-2, warmup_steps=0, constant_until=1.0, cosine_until=1.0),
        "mesh": MeshConfig(fsdp=2, expert=2),
        "loop": LoopConfig(steps=10, log_every=1, checkpoint_every=5, tensorboard=False, keep=9),
    }
    tuned: dict[str, Any] = {**common, "init_from": str(folder / "model")}
    path = {name: (str(folder / f"{name}.jsonl"),) for name in ("documents", "chats", "questions")}
    questions = TaskConfig(path=path["questions"])
    documents = PretrainData(
        path["documents"],
        heldout=path["documents"],
        tokenizer=str(folder / "tokenizer"),
        seq_len=32,
        cache=str(folder / "cache"),
        workers=1,
    )
    pretraining = PretrainConfig(model=MODEL, data=documents, batch_size=8, loss=LanguageModelLoss(chunk=16), **common)
    tuning = SFTConfig(
        data=SFTData(path["chats"], heldout=path["chats"], seq_len=32),
        batch_size=8,
        loss=LanguageModelLoss(isolate=True, chunk=16),
        **tuned,
    )
    reinforcing = GRPOConfig(
        task=questions,
        reward=(f"{folder / 'mine.py'}:vowels", "accuracy"),
        rollout=RolloutConfig(prompts=4, group=4, max_tokens=8, patience=0, resample=1, tolerance=0.4),
        loss=GRPOLoss(chunk=16, kl_weight=0.01),
        evaluation=TaskEval(questions, count=5, max_tokens=8, batch_size=4),  # of the last no process but one has any
        **tuned,
    )
    return {"pretrain": (pretrain, pretraining), "sft": (sft, tuning), "grpo": (grpo, reinforcing)}
