"""Supervised fine-tuning on chats: loss on the answers only, attention kept within each sample."""

import dataclasses
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from deepseek_jax.checkpoint.model import Model
from deepseek_jax.data.chat import encode_chat
from deepseek_jax.data.packing import Row, pack_samples
from deepseek_jax.data.rows import RowLoader, check_rows, file_sizes, write_rows
from deepseek_jax.data.text import RefusedError, read_chats
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.evals.accuracy import accuracy
from deepseek_jax.evals.text import row_loss
from deepseek_jax.inference.engine import Engine
from deepseek_jax.parallel.hosts import first_host_first, require_one_process
from deepseek_jax.saying import doing
from deepseek_jax.train.losses import LanguageModelLoss
from deepseek_jax.typed import check_least, check_types
from deepseek_jax.workflows.own_run import open_start, owns_run
from deepseek_jax.workflows.stage import (
    RESULT,
    LoaderBatches,
    StageConfig,
    read_result,
    train_stage,
    write_json,
)
from deepseek_jax.workflows.task_eval import Exam, TaskEval, open_exam


@dataclasses.dataclass(frozen=True)
class SFTData:
    """path: files of ``messages``, JSONL or Parquet. heldout: such files, whose loss is measured. seq_len: tokens of a
    packed row. drop_long: leave samples longer than that out, counted, and go on."""

    path: tuple[str, ...] = ()
    heldout: tuple[str, ...] = ()
    seq_len: int = 1024
    drop_long: bool = False
    skip_broken: bool = False

    def __post_init__(self) -> None:
        check_types(self)
        check_least(self, 2, "seq_len")


@dataclasses.dataclass(frozen=True)
class SFTConfig(StageConfig):
    """A fine-tuning run from the model in ``init_from``, a run or a released folder, by its own chat template.

    evaluation: questions to ask at the end, greedily and sampled. check: questions whose sampled accuracy each
    ``loop.eval_every`` measures beside the loss of ``data.heldout``; the stage ends early when it reaches
    ``enough_accuracy`` (1: never), so that reinforcement learning has something left to learn.
    """

    run_dir: str = "runs/sft"
    batch_size: int = 8
    init_from: str = ""
    data: SFTData = SFTData()
    loss: LanguageModelLoss = LanguageModelLoss(isolate=True)
    check: TaskEval = TaskEval()
    enough_accuracy: float = 1.0
    evaluation: TaskEval = TaskEval()

    MAY_CHANGE = (*StageConfig.MAY_CHANGE, "evaluation", "check", "enough_accuracy", "data.heldout")


@owns_run("init_from", "data.path")
def sft(config: SFTConfig) -> dict[str, Any]:
    """Run the stage, or go on with it; returns and writes its result."""
    run_dir = Path(config.run_dir)
    check, exam = (open_exam(questions, seed=config.seed) for questions in (config.check, config.evaluation))
    if check or exam:
        require_one_process("sft with evaluation or check")
    start = open_start(config)
    heldout = _packed(config.data, config.data.heldout, start.text, Counter()) if config.data.heldout else []
    rows = first_host_first(lambda: prepare_chats(config.data, start.text, run_dir / "rows"))
    loader = RowLoader(
        rows,
        batch_size=config.batch_size,
        seed=config.seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    trained, facts = train_stage(
        config,
        stage="sft",
        start=start,
        loss=config.loss,
        batches=LoaderBatches(loader),
        evaluate=_measure(config, heldout, check),
        stop_when=lambda found: found.get("eval/accuracy_held_in", 0.0) >= config.enough_accuracy < 1,
    )
    found = {"heldout_loss": _loss(trained, heldout, config)} if heldout else {}
    found |= exam.result(trained, run_dir, stage="sft") if exam else {}
    write_json(run_dir / RESULT, facts | found)
    return read_result(run_dir) or {}


def _measure(config: SFTConfig, heldout: list[Row], check: Exam | None):
    if not config.loop.eval_every:
        return None
    if not heldout and check is None:
        raise ValueError(
            f"loop.eval_every={config.loop.eval_every}: nothing to evaluate without data.heldout or check.task.path"
        )

    def measure(model: Model) -> Mapping[str, float]:
        found = {"eval/loss": _loss(model, heldout, config)} if heldout else {}
        if check is not None:
            found["eval/accuracy_held_in"], _ = accuracy(check.answers(Engine(model), "sampled"))
        return found

    return measure


def _loss(model: Model, rows: list[Row], config: SFTConfig) -> float:
    """Nats per token of what assistants say."""
    options = {"isolate": config.loss.isolate, "chunk": config.loss.chunk}
    nats, targets = row_loss(model, rows, batch_size=config.batch_size, **options)
    return nats / max(targets, 1)


def _packed(data: SFTData, path: tuple[str, ...], tokenizer: Tokenizer, skipped: Counter[str]) -> list[Row]:
    def encode(messages: list[dict[str, str]]) -> tuple[list[int], list[int]]:
        ids, mask = encode_chat(tokenizer, messages)
        if len(ids) > data.seq_len and not data.drop_long:
            raise RefusedError(
                f"{len(ids)} tokens, where data.seq_len={data.seq_len}; --data.drop-long leaves such out"
            )
        return ids, mask

    samples = list(read_chats(path, then=encode, skip_broken=data.skip_broken, skipped=skipped))
    return pack_samples(samples, data.seq_len, pad_id=tokenizer.pad_id, drop_long=data.drop_long, skipped=skipped)


def prepare_chats(data: SFTData, tokenizer: Tokenizer, folder: Path) -> Path:
    """Encode and pack the chats into rows on disk, once; rows of other data or settings are refused by name."""
    how = {name: value for name, value in dataclasses.asdict(data).items() if name != "heldout"}
    made_of = {
        "vocab_size": tokenizer.vocab_size,
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "data": how | {"path": list(data.path)},
        "sources": file_sizes(data.path),
    }
    if folder.exists():
        check_rows(folder, made_of)
        return folder
    skipped: Counter[str] = Counter()
    with doing("packing chats"):
        rows = _packed(data, data.path, tokenizer, skipped)
    if not rows:
        raise ValueError(f"data.path={list(data.path)}: there is no chat in it, or none is left ({dict(skipped)})")
    folder.parent.mkdir(parents=True, exist_ok=True)
    write_rows(folder, rows, meta=made_of | {"skipped": dict(skipped)})
    return folder
