"""Pretraining on documents: tokenize, FIM, pack, train, measure bits per byte on held-out text."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tyro

from deepseek_jax.checkpoint.model import Model
from deepseek_jax.config import ModelConfig
from deepseek_jax.data.files import ROWS, TEXTS
from deepseek_jax.data.fim import FimTokens, apply_fim
from deepseek_jax.data.packing import pack_stream
from deepseek_jax.data.rows import check_rows, sources_of, write_rows
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.data.tokens import Tokens, tokenize
from deepseek_jax.evals.text import HeldOut, Scores
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.parallel.processes import first_host_alone
from deepseek_jax.saying import doing, say
from deepseek_jax.train.losses import LanguageModelLoss
from deepseek_jax.typed import check_least, check_types
from deepseek_jax.workflows.own_run import open_start, owns_run, require
from deepseek_jax.workflows.row_batches import LoaderBatches, row_loader
from deepseek_jax.workflows.stage import train_stage
from deepseek_jax.workflows.stage_config import StageConfig, check_start
from deepseek_jax.workflows.stage_result import finish
from deepseek_kernels.cache import cache_folder, user_folder


@dataclasses.dataclass(frozen=True)
class PretrainData:
    """Documents, and how rows are made of them."""

    path: tuple[str, ...] = ()
    """Files of text, folders of them, quoted globs: .txt, .md, .jsonl(.gz|.zst), .parquet; or hf:NAME[:CONFIG]:SPLIT, a
    dataset of the Hugging Face hub."""
    text_field: str = "text"
    """The field or column of .jsonl and .parquet that holds the text."""
    heldout: tuple[str, ...] = ()
    """Documents like those of path, whose bits per byte and perplexity are measured, by file and by `kind`, where rows
    have such a field."""
    heldout_kinds: tuple[str, ...] = ()
    """Of rows with a kind, measure these alone; none for all."""
    tokenizer: str = ""
    """A tokenizer.json, or the folder of a model that has one; with init_from nothing, as that model has its own."""
    seq_len: int = 128
    """Tokens of a row."""
    fim_rate: float = 0.1
    """The share of documents rearranged as prefix-suffix-middle (V3 section 4.1)."""
    skip_broken: bool = False
    """Leave broken lines out, counted, instead of stopping."""
    cache: str = ""
    """The folder that keeps the tokens of corpora, for all runs; by default deepseek-jax/tokens in $XDG_CACHE_HOME,
    else in ~/.cache. It may be removed at any time."""
    workers: int = 0
    """Processes that tokenize; 0 for one per core, six at most."""

    def __post_init__(self) -> None:
        check_types(self)
        check_least(self, 2, "seq_len")
        if not 0 <= self.fim_rate <= 1:
            raise ValueError(f"fim_rate={self.fim_rate}: must lie in [0, 1]")
        if self.workers < 0:
            raise ValueError(f"workers={self.workers}: must be at least 1, or 0 for one per core")


# No part of the rows.
_BESIDE = ("heldout", "heldout_kinds", "cache", "workers")


@dataclasses.dataclass(frozen=True)
class PretrainConfig(StageConfig):
    """A pretraining run, of fresh parameters or of a model's. ``model.vocab_size``, left at its default, is the
    tokenizer's."""

    run_dir: str = "runs/pretrain"
    batch_size: int = 8
    """Rows of a step."""
    init_from: str = ""
    """The model to go on from, a run or a released model's folder; empty: fresh parameters. What model leaves at its
    default is then this model's own; another rope_scaling, rope_theta or max_position_embeddings extends its context
    from the first step on (V3 section 4.3), all else must be as it is. Adam's moments begin anew."""
    ignore_config: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A field of a released model's config.json to take as absent; give it several times for more."""
    data: PretrainData = PretrainData()
    model: ModelConfig = ModelConfig()
    loss: LanguageModelLoss = LanguageModelLoss()

    MAY_CHANGE = (*StageConfig.MAY_CHANGE, "ignore_config", *(f"data.{name}" for name in _BESIDE))


@owns_run("data.path")
def pretrain(config: PretrainConfig) -> dict[str, Any]:
    """Run the stage, or go on with it; returns and writes its result."""
    run_dir = Path(config.run_dir)
    if config.init_from:
        start = _extended_start(config)
    else:
        config, start = _fresh_start(config)
    tokenizer, longest = start.text, start.config.max_position_embeddings
    if config.data.seq_len > longest:
        raise ValueError(f"data.seq_len={config.data.seq_len} is more than model.max_position_embeddings={longest}")
    heldout = _heldout(config.data)
    if config.loop.eval_every and heldout is None:
        raise ValueError(f"loop.eval_every={config.loop.eval_every}: nothing to evaluate without data.heldout")
    check_start(config, start)
    first_host_alone(lambda: prepare_rows(config.data, tokenizer, run_dir / "rows", seed=config.seed))
    loader = row_loader(run_dir / "rows", config, start.mesh)

    latest: Scores | None = None  # where anything is trained and evaluated, of its last step

    def measure(model: Model) -> Mapping[str, float]:
        nonlocal latest
        assert heldout is not None
        latest = heldout.scores(model, seq_len=config.data.seq_len, batch_size=config.batch_size)
        return latest.metrics()

    def measure_last() -> dict[str, Any]:
        if heldout is not None and latest is None:
            measure(trained)
        return {} if latest is None else latest.result()

    trained, facts = train_stage(
        config,
        stage="pretrain",
        start=start,
        loss=config.loss,
        batches=LoaderBatches(loader),
        evaluate=measure if config.loop.eval_every else None,
    )
    return finish(config, facts, measure_last)


def _fresh_start(config: PretrainConfig) -> tuple[PretrainConfig, Model]:
    """The model of ``config``, without arrays, and the settings with its vocabulary."""
    require(config, "data.tokenizer")
    config.model.check_speaks()
    tokenizer = Tokenizer.from_folder(config.data.tokenizer)
    config = dataclasses.replace(config, model=_with_vocabulary(config.model, tokenizer))
    mesh = make_mesh(config.mesh)
    return config, Model(config.model, config.compute.on(mesh), None, None, tokenizer, mesh)


def _extended_start(config: PretrainConfig) -> Model:
    """The model in ``init_from``, its context as ``config.model`` has it. One that was extended before stays so."""
    if config.data.tokenizer:
        raise ValueError(
            f"data.tokenizer={config.data.tokenizer!r}: the model in init_from={config.init_from!r} has its own; leave "
            "it empty"
        )
    start = open_start(config)
    return dataclasses.replace(start, config=with_context(start.config, config.model))


_CONTEXT = ("rope_theta", "rope_scaling", "max_position_embeddings")


def with_context(own: ModelConfig, given: ModelConfig) -> ModelConfig:
    """``own`` with those of the fields that make the context which ``given`` does not leave at their defaults.

    A ``max_position_embeddings`` left at its default beside another scaling is the length that this is made for,
    ``factor · original_max_position_embeddings``. ValueError where ``given`` names another value for any other field.
    """
    said = {
        field.name: value
        for field in dataclasses.fields(ModelConfig)
        if (value := getattr(given, field.name)) != field.default
    }
    differ = [
        f"model.{name}={value!r} (it has {getattr(own, name)!r})"
        for name, value in said.items()
        if name not in _CONTEXT and value != getattr(own, name)
    ]
    if differ:
        raise ValueError(
            f"{', '.join(differ)}: the model in init_from is another; of model, {', '.join(_CONTEXT)} alone may differ "
            "from it"
        )
    context = {name: said[name] for name in _CONTEXT if name in said}
    if (scaling := context.get("rope_scaling")) is not None and "max_position_embeddings" not in context:
        context["max_position_embeddings"] = round(scaling.factor * scaling.original_max_position_embeddings)
    extended = dataclasses.replace(own, **context)
    if extended != own:
        say(f"context: {_context(own)} → {_context(extended)}")
    return extended


def _context(model: ModelConfig) -> str:
    scaling = model.rope_scaling
    stretched = "" if scaling.type == "none" else f", {scaling.type} × {scaling.factor:g}"
    return f"{model.max_position_embeddings:,} positions{stretched}"


def _with_vocabulary(model: ModelConfig, tokenizer: Tokenizer) -> ModelConfig:
    """The tokenizer's vocabulary where the model's was left at its default."""
    if model.vocab_size != ModelConfig.vocab_size or model.vocab_size == tokenizer.vocab_size:
        return model
    say(f"model.vocab_size={tokenizer.vocab_size}, the tokenizer's")
    return dataclasses.replace(model, vocab_size=tokenizer.vocab_size)


def _heldout(data: PretrainData) -> HeldOut | None:
    return HeldOut(data.heldout, text_field=data.text_field, kinds=data.heldout_kinds) if data.heldout else None


def prepare_rows(data: PretrainData, tokenizer: Tokenizer, folder: Path, *, seed: int) -> Path:
    """Pack the documents into rows on disk, once; rows of other data or settings are refused by name.

    Documents are tokenized once for all runs (``data.tokens``). For a run they are shuffled, rearranged by FIM at
    ``fim_rate``, framed by begin and end of sentence, and cut into rows that follow one another without loss.
    """
    cache = Path(data.cache).expanduser() if data.cache else cache_folder() / "tokens"
    how = {name: value for name, value in dataclasses.asdict(data).items() if name not in (*_BESIDE, "tokenizer")}
    made_of = {
        "vocab_size": tokenizer.usable,
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "data": how | {"path": list(data.path)},
        "seed": seed,
        **sources_of(data.path, (*TEXTS, *ROWS), cache / "hashes"),
    }
    if folder.exists():
        check_rows(folder, made_of, data.path)
        return folder
    marks = _Marks.of(tokenizer, data.fim_rate)  # what a tokenizer lacks is known before a corpus is tokenized
    if not data.cache and user_folder() is None:
        say(
            "the cache folder ($XDG_CACHE_HOME, else ~/.cache) cannot be written: tokens are kept for this run alone; "
            "--data.cache names another"
        )
    tokens = _tokens(data, tokenizer, cache)
    documents = _shuffled(tokens, marks, seed=seed, fim_rate=data.fim_rate)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with doing(f"packing {tokens.count:,} tokens") as tell:
        told = _told(documents, lambda done: tell(f"{done:,} of {len(tokens):,} documents"))
        rows = pack_stream(told, data.seq_len, pad_id=tokenizer.pad_id)
        write_rows(folder, rows, meta=made_of | {"skipped": tokens.skipped})
    return folder


def _tokens(data: PretrainData, tokenizer: Tokenizer, cache: Path) -> Tokens:
    options = {"text_field": data.text_field, "skip_broken": data.skip_broken, "workers": data.workers}
    with doing("tokenising") as tell:

        def progress(done: int, total: int) -> None:
            tell(f"{done / 1e6:,.0f} of {total / 1e6:,.0f} MB")

        tokens = tokenize(data.path, tokenizer, cache, progress=progress, **options)
    if not tokens.count:
        raise ValueError(f"data.path={list(data.path)}: there is no text in it")
    say(f"{len(tokens):,} documents, {tokens.count:,} tokens in {tokens.folder}")
    return tokens


def _told(documents: Iterator[list[int]], tell: Callable[[int], None]) -> Iterator[list[int]]:
    for done, document in enumerate(documents):
        if done % 1000 == 0:
            tell(done)
        yield document


class _Marks(NamedTuple):
    """What is put around and into documents."""

    bos: list[int]
    eos: int
    fim: FimTokens | None

    @classmethod
    def of(cls, tokenizer: Tokenizer, fim_rate: float) -> "_Marks":
        """ValueError where the tokenizer lacks one; one without FIM will do where none is asked for."""
        return cls(tokenizer.bos_ids, tokenizer.eos_id, FimTokens.of(tokenizer) if fim_rate else None)


def _shuffled(tokens: Tokens, marks: _Marks, *, seed: int, fim_rate: float) -> Iterator[list[int]]:
    rng = np.random.default_rng([seed, 1])
    order = np.arange(len(tokens), dtype=np.uint32 if len(tokens) < 2**32 else np.uint64)
    rng.shuffle(order)  # as rng.permutation, in half its memory
    bos, eos, fim = marks
    for index in order:
        ids = tokens[int(index)].tolist()
        if fim is not None:
            ids = apply_fim(ids, rng=rng, rate=fim_rate, tokens=fim)
        yield [*bos, *ids, eos]
