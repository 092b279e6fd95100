"""Supervised fine-tuning on chats: loss on the answers only, attention kept within each sample."""

import dataclasses
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tyro

from deepseek_jax.checkpoint.model import Model
from deepseek_jax.data.chat import encode_chat
from deepseek_jax.data.conversations import Conversation, Sample, read_conversation
from deepseek_jax.data.files import ROWS
from deepseek_jax.data.packing import Row, pack_samples
from deepseek_jax.data.rows import check_rows, sources_of, write_rows
from deepseek_jax.data.text import RefusedError, read_chats
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.data.turns import count_turns
from deepseek_jax.evals.accuracy import accuracy
from deepseek_jax.evals.text import row_loss
from deepseek_jax.inference.engine import Engine
from deepseek_jax.parallel.processes import first_host_alone, require_own_rows
from deepseek_jax.rl.tasks import column, fill
from deepseek_jax.saying import doing
from deepseek_jax.train.losses import LanguageModelLoss
from deepseek_jax.typed import check_least, check_types
from deepseek_jax.workflows.own_run import open_start, owns_run, with_chat_template, with_turns
from deepseek_jax.workflows.row_batches import LoaderBatches, row_loader
from deepseek_jax.workflows.stage import train_stage
from deepseek_jax.workflows.stage_config import StageConfig, check_start
from deepseek_jax.workflows.stage_result import finish
from deepseek_jax.workflows.task_eval import Exam, TaskEval, open_exam


@dataclasses.dataclass(frozen=True)
class SFTData:
    """Chats, and how rows are made of them."""

    path: tuple[str, ...] = ()
    """Files of chats, folders of them, quoted globs: .jsonl(.gz|.zst), .parquet; or hf:NAME[:CONFIG]:SPLIT, a dataset
    of the Hugging Face hub. A row has `messages` (or ShareGPT's `conversations`), or a question and its answer:
    `prompt` with `completion` or `response`, `instruction` (`input`) with `output`, `question` with `answer`; beside
    them `system` and `tools`. Messages may hold reasoning, tool calls and parts of text; `weight` 0 is not learnt;
    nulls, and what no chat template reads, are passed over."""
    prompt: str = ""
    """The column that asks, of rows that call it something else: text, or a list of messages."""
    answer: str = ""
    """The column that answers, of such rows, or of those that template makes a question of."""
    template: str = ""
    """The user's turn, made of columns: "{question}\\nAnswer in {unit}." ("{{", "}}": braces)."""
    heldout: tuple[str, ...] = ()
    """Such files, whose loss is measured."""
    seq_len: int = 1024
    """Tokens of a packed row."""
    drop_long: bool = False
    """Leave samples longer than that out, counted, and go on."""
    skip_broken: bool = False
    """Leave broken lines out, counted, instead of stopping."""

    def __post_init__(self) -> None:
        check_types(self)
        check_least(self, 2, "seq_len")
        if self.prompt and self.template:
            raise ValueError(
                f"data.template makes the question of columns by name: data.prompt={self.prompt!r} is not used"
            )
        if bool(self.prompt or self.template) != bool(self.answer):
            raise ValueError(
                f"data.prompt={self.prompt!r}, data.template={self.template!r}, data.answer={self.answer!r}: name what "
                "asks, a column or a template, and the column that answers, or neither"
            )

    def conversation(self, row: Any) -> Conversation:
        """A row of the files as a chat. ValueError says what is wrong with it."""
        if not self.answer or not isinstance(row, Mapping):
            return read_conversation(row)
        asked = fill(self.template, row) if self.template else _said(row, self.prompt)
        told = _said(row, self.answer)
        beside = {name: row[name] for name in ("system", "tools", "history") if name in row}
        return read_conversation({"prompt": asked, "completion": told, **beside})


def _said(row: Mapping[str, Any], name: str) -> str | list[Any]:
    """What stands in a column: text, a number as text, or messages."""
    value = column(row, name)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str | list):
        raise ValueError(f'"{name}" is of type {type(value).__name__}; it must be text or a list of messages')
    return value


@dataclasses.dataclass(frozen=True)
class SFTConfig(StageConfig):
    """A fine-tuning run, by the model's own chat template."""

    run_dir: str = "runs/sft"
    batch_size: int = 8
    """Rows of a step."""
    init_from: str = ""
    """The model to start from: a run, or a released model's folder."""
    ignore_config: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A field of a released model's config.json to take as absent; give it several times for more."""
    chat_template: str = ""
    """Another chat template than the model's own: r1_zero, which a base model is asked by, or a file of jinja2 text.
    The run keeps it beside its tokenizer, and what starts from the run has it."""
    data: SFTData = SFTData()
    loss: LanguageModelLoss = LanguageModelLoss(isolate=True)
    check: TaskEval = TaskEval()
    """Questions whose sampled accuracy each loop.eval_every measures beside the loss of data.heldout."""
    enough_accuracy: float = 1.0
    """End early once check reaches this (1: never), so that reinforcement learning has something left to learn."""
    evaluation: TaskEval = TaskEval()
    """Questions to ask at the end, greedily and sampled."""

    MAY_CHANGE = (*StageConfig.MAY_CHANGE, "ignore_config", "evaluation", "check", "enough_accuracy", "data.heldout")


@owns_run("init_from", "data.path")
def sft(config: SFTConfig) -> dict[str, Any]:
    """Run the stage, or go on with it; returns and writes its result."""
    run_dir = Path(config.run_dir)
    check, exam = (open_exam(questions, seed=config.seed) for questions in (config.check, config.evaluation))
    start = with_chat_template(config, open_start(config))
    check_start(config, start)
    if check or exam:
        require_own_rows(start.mesh, start.compute.rules.batch, "check and evaluation")
    heldout = _packed(config.data, config.data.heldout, start.text, Counter(), set()) if config.data.heldout else []
    if config.data.heldout and not heldout:
        raise ValueError(f"data.heldout={list(config.data.heldout)}: there is no chat in it, or none is left")
    by = config.chat_template
    first_host_alone(lambda: prepare_chats(config.data, start.text, run_dir / "rows", chat_template=by))
    loader = row_loader(run_dir / "rows", config, start.mesh)
    start = with_turns(config, start, loader.meta.get("turns", ()))
    latest: dict[str, float] = {}  # where anything is trained and evaluated, of its last step
    trained, facts = train_stage(
        config,
        stage="sft",
        start=start,
        loss=config.loss,
        batches=LoaderBatches(loader),
        evaluate=_measure(config, heldout, check, latest),
        stop_when=lambda found: found.get("eval/accuracy_held_in", 0.0) >= config.enough_accuracy < 1,
    )

    def measure_last() -> dict[str, Any]:
        loss = latest["eval/loss"] if "eval/loss" in latest else _loss(trained, heldout, config) if heldout else None
        found = {} if loss is None else {"heldout_loss": loss}
        return found | (exam.result(trained, run_dir, stage="sft") if exam else {})

    return finish(config, facts, measure_last)


def _measure(config: SFTConfig, heldout: list[Row], check: Exam | None, latest: dict[str, float]):
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
        latest.update(found)
        return found

    return measure


def _loss(model: Model, rows: list[Row], config: SFTConfig) -> float:
    """Nats per token of what assistants say."""
    options = {"isolate": config.loss.isolate, "chunk": config.loss.chunk}
    nats, targets = row_loss(model, rows, batch_size=config.batch_size, **options)
    return nats / max(targets, 1)


def _packed(
    data: SFTData, path: tuple[str, ...], tokenizer: Tokenizer, skipped: Counter[str], turns: set[int]
) -> list[Row]:
    """Rows of the chats; ``turns`` gets the numbers of questions that they have."""

    def encode(chat: Conversation) -> list[Sample]:
        turns.add(count_turns(chat.messages))
        samples = encode_chat(tokenizer, chat.messages, chat.tools)
        longest = max(len(ids) for ids, _ in samples)
        if longest > data.seq_len and not data.drop_long:
            raise RefusedError(f"{longest} tokens, where data.seq_len={data.seq_len}; --data.drop-long leaves such out")
        return samples

    chats = read_chats(path, read=data.conversation, then=encode, skip_broken=data.skip_broken, skipped=skipped)
    samples = [sample for chat in chats for sample in chat]
    return pack_samples(samples, data.seq_len, pad_id=tokenizer.pad_id, drop_long=data.drop_long, skipped=skipped)


def prepare_chats(data: SFTData, tokenizer: Tokenizer, folder: Path, *, chat_template: str = "") -> Path:
    """Encode and pack the chats into rows on disk, once; rows of other data or settings are refused by name.

    chat_template: what the tokenizer was given in place of the model's own."""
    how = {name: value for name, value in dataclasses.asdict(data).items() if name != "heldout"}
    made_of = {
        "vocab_size": tokenizer.usable,
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "data": how | {"path": list(data.path)},
        **sources_of(data.path, ROWS),
        **({"chat_template": chat_template} if chat_template else {}),
    }
    if folder.exists():
        check_rows(folder, made_of, data.path)
        return folder
    skipped, turns = Counter[str](), set[int]()
    with doing("packing chats"):
        rows = _packed(data, data.path, tokenizer, skipped, turns)
    if not rows:
        left_out = f", or none is left ({dict(skipped)})" if skipped else ""
        raise ValueError(f"data.path={list(data.path)}: there is no chat in it{left_out}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    write_rows(folder, rows, meta=made_of | {"skipped": dict(skipped), "turns": sorted(turns)})
    return folder
