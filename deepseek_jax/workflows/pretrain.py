"""Pretraining on documents: tokenize, FIM, pack, train, measure bits per byte on held-out text."""

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from deepseek_jax.checkpoint.model import Model
from deepseek_jax.config import ModelConfig
from deepseek_jax.data.fim import FimTokens, apply_fim
from deepseek_jax.data.packing import pack_stream
from deepseek_jax.data.rows import RowLoader, check_rows, file_sizes, write_rows
from deepseek_jax.data.text import read_documents, read_objects
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.evals.text import bits_per_byte
from deepseek_jax.parallel.hosts import first_host_first
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.train.losses import LanguageModelLoss
from deepseek_jax.typed import check_types
from deepseek_jax.workflows.stage import (
    RESULT,
    LoaderBatches,
    StageConfig,
    read_result,
    require,
    train_stage,
    write_json,
)


@dataclasses.dataclass(frozen=True)
class PretrainData:
    """Text to train on, and how rows are made of it."""

    path: tuple[str, ...] = ()
    """Files of text: .jsonl, .parquet, .txt."""
    heldout: str = ""
    """A file of documents with a kind, of which code and prose are measured; empty for none."""
    tokenizer: str = ""
    """A tokenizer.json, or the folder of a model that has one."""
    seq_len: int = 128
    """Tokens of a row."""
    fim_rate: float = 0.1
    """Share of documents rearranged as prefix, suffix, middle (V3 section 4.1)."""
    skip_broken: bool = False
    """Leave broken lines out, counted, instead of stopping."""

    def __post_init__(self) -> None:
        check_types(self)
        if not 0 <= self.fim_rate <= 1:
            raise ValueError(f"fim_rate={self.fim_rate}: must lie in [0, 1]")


@dataclasses.dataclass(frozen=True)
class PretrainConfig(StageConfig):
    """A pretraining run."""

    run_dir: str = "runs/pretrain"
    batch_size: int = 8
    """Rows of a step."""
    data: PretrainData = PretrainData()
    model: ModelConfig = ModelConfig()
    loss: LanguageModelLoss = LanguageModelLoss()

    MAY_CHANGE = (*StageConfig.MAY_CHANGE, "data.heldout")


def pretrain(config: PretrainConfig) -> dict[str, Any]:
    """Run the stage, or go on with it; returns and writes its result."""
    require(config, "data.path", "data.tokenizer")
    run_dir = Path(config.run_dir)
    tokenizer = Tokenizer.from_folder(config.data.tokenizer)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ValueError(
            f"model.vocab_size={config.model.vocab_size} is less than the tokenizer's {tokenizer.vocab_size}"
        )
    rows = first_host_first(lambda: prepare_rows(config.data, tokenizer, run_dir / "rows", seed=config.seed))
    loader = RowLoader(
        rows,
        batch_size=config.batch_size,
        seed=config.seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    heldout = _heldout_texts(config.data)

    def measure(model: Model) -> Mapping[str, float]:
        found = bits_per_byte(model, heldout, seq_len=config.data.seq_len, batch_size=config.batch_size)
        return {"eval/bits_per_byte": found}

    mesh = make_mesh(config.mesh)
    start = Model(config.model, config.compute.on(mesh), None, None, tokenizer, mesh)

    trained, facts = train_stage(
        config,
        stage="pretrain",
        start=start,
        loss=config.loss,
        batches=LoaderBatches(loader),
        evaluate=measure if heldout and config.loop.eval_every else None,
    )
    result = facts
    if heldout:
        result["bits_per_byte"] = measure(trained)["eval/bits_per_byte"]
    write_json(run_dir / RESULT, result)
    return read_result(run_dir) or {}


def prepare_rows(data: PretrainData, tokenizer: Tokenizer, folder: Path, *, seed: int) -> Path:
    """Pack the documents into rows on disk, once; rows of other data or settings are refused by name.

    Documents are shuffled, rearranged by FIM at ``fim_rate``, framed by begin and end of sentence, and cut into rows
    that follow one another without loss.
    """
    made_of = {
        "vocab_size": tokenizer.vocab_size,
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "data": dataclasses.asdict(data) | {"path": list(data.path), "heldout": None},  # is no part of the rows
        "sources": file_sizes(data.path),
        "seed": seed,
    }
    if folder.exists():
        check_rows(folder, made_of)
        return folder
    skipped: Counter[str] = Counter()
    documents = list(read_documents(data.path, skip_broken=data.skip_broken, skipped=skipped))
    if not any(documents):
        raise ValueError(f"data.path={list(data.path)}: there is no text in it")
    rng = np.random.default_rng([seed, 1])
    fim = FimTokens.of(tokenizer)

    def encoded() -> Iterator[list[int]]:
        for index in rng.permutation(len(documents)):
            ids = apply_fim(tokenizer.encode(documents[index]), rng=rng, rate=data.fim_rate, tokens=fim)
            yield [*tokenizer.bos_ids, *ids, tokenizer.eos_id]

    folder.parent.mkdir(parents=True, exist_ok=True)
    rows = pack_stream(encoded(), data.seq_len, pad_id=tokenizer.pad_id)
    write_rows(folder, rows, meta=made_of | {"skipped": dict(skipped)})
    return folder


def _heldout_texts(data: PretrainData) -> list[str]:
    if not data.heldout:
        return []
    return [row["text"] for row in read_objects(data.heldout) if row.get("kind") in ("code", "prose")]
