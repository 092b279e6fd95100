"""Supervised fine-tuning on chats: loss on the answers only, attention kept within each sample."""

import dataclasses
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from deepseek_jax.checkpoint.model import Model, load
from deepseek_jax.config import check_types
from deepseek_jax.data.chat import encode_chat
from deepseek_jax.data.packing import pack_samples
from deepseek_jax.data.rows import RowLoader, open_rows, write_rows
from deepseek_jax.data.text import read_chats
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.evals.accuracy import accuracy, answer
from deepseek_jax.parallel.hosts import require_one_process
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.rl.problems import read_jsonl
from deepseek_jax.train.losses import LanguageModelLoss
from deepseek_jax.workflows.problems import ProblemEval, evaluate_problems
from deepseek_jax.workflows.stage import (
    RESULT,
    LoaderBatches,
    StageConfig,
    read_result,
    train_stage,
    write_json,
)


@dataclasses.dataclass(frozen=True)
class SFTData:
    """path: JSONL of ``messages``. drop_long: leave samples longer than ``seq_len`` out, counted, and go on."""

    path: tuple[str, ...] = ("runs/demo/corpus/sft.jsonl",)
    seq_len: int = 128
    drop_long: bool = False
    skip_broken: bool = False

    def __post_init__(self) -> None:
        check_types(self)


@dataclasses.dataclass(frozen=True)
class SFTConfig(StageConfig):
    """A fine-tuning run from the stage in ``init_from``.

    check_problems: held-in problems whose sampled accuracy each evaluation measures; the stage ends early when
    it reaches ``enough_accuracy`` (1: never), so that reinforcement learning has something left to learn.
    """

    run_dir: str = "runs/demo/sft"
    batch_size: int = 8
    init_from: str = "runs/demo/pretrain"
    data: SFTData = SFTData()
    loss: LanguageModelLoss = LanguageModelLoss(isolate=True)
    check_problems: str = "runs/demo/corpus/problems_train.jsonl"
    check_count: int = 128
    enough_accuracy: float = 0.25
    problems: ProblemEval = ProblemEval()

    MAY_CHANGE = (*StageConfig.MAY_CHANGE, "problems", "check_problems", "check_count", "enough_accuracy")


def sft(config: SFTConfig) -> dict[str, Any]:
    """Run the stage, or go on with it; returns and writes its result."""
    require_one_process("sft")
    run_dir = Path(config.run_dir)
    start = load(config.init_from, compute=config.compute, mesh=make_mesh(config.mesh))
    rows = prepare_chats(config.data, start.text, run_dir / "rows")
    loader = RowLoader(
        rows,
        batch_size=config.batch_size,
        seed=config.seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    asked = read_jsonl(config.check_problems)[: config.check_count] if config.loop.eval_every else []

    def measure(model: Model) -> Mapping[str, float]:
        answered = answer(
            model,
            asked,
            max_tokens=config.problems.max_tokens,
            temperature=1.0,
            batch_size=config.problems.batch_size,
            seed=config.seed,
        )
        return {"eval/accuracy_held_in": accuracy(answered)[0]}

    trained, facts = train_stage(
        config,
        stage="sft",
        start=start,
        loss=config.loss,
        batches=LoaderBatches(loader),
        evaluate=measure if asked else None,
        stop_when=lambda found: found.get("eval/accuracy_held_in", 0.0) >= config.enough_accuracy,
    )
    found = evaluate_problems(trained, config.problems, run_dir, stage="sft", seed=config.seed)
    write_json(run_dir / RESULT, facts | found)
    return read_result(run_dir) or {}


def prepare_chats(data: SFTData, tokenizer: Tokenizer, folder: Path) -> Path:
    """Encode and pack the chats into rows on disk, once; rows of other data or settings are refused by name."""
    made_of = {
        "vocab_size": tokenizer.vocab_size,
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "data": dataclasses.asdict(data) | {"path": list(data.path)},
    }
    if folder.exists():
        meta = open_rows(folder).meta
        differ = [name for name, value in made_of.items() if meta.get(name) != value]
        if differ:
            raise ValueError(f"{folder} was packed with another {', '.join(differ)}; choose another run_dir")
        return folder
    skipped: Counter[str] = Counter()
    chats = read_chats(data.path, skip_broken=data.skip_broken, skipped=skipped)
    samples = [encode_chat(tokenizer, messages) for messages in chats]
    rows = pack_samples(samples, data.seq_len, pad_id=tokenizer.pad_id, drop_long=data.drop_long, skipped=skipped)
    folder.parent.mkdir(parents=True, exist_ok=True)
    write_rows(folder, rows, meta=made_of | {"skipped": dict(skipped)})
    return folder
