"""How well a model predicts text: bits per byte and perplexity, by file and kind, and the mean loss of packed rows."""

import dataclasses
import functools
import math
from collections.abc import Iterable
from itertools import islice
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.checkpoint.model import Model
from deepseek_jax.compute import ComputeConfig
from deepseek_jax.config import ModelConfig
from deepseek_jax.data.files import ROWS, TEXTS, PathLike, find_files
from deepseek_jax.data.packing import Row, pack_stream
from deepseek_jax.data.text import read_texts
from deepseek_jax.data.tokenizer import whole_text
from deepseek_jax.model import parameters
from deepseek_jax.parallel.processes import together
from deepseek_jax.parallel.sharding import place_batch
from deepseek_jax.train.losses import LanguageModelLoss


@functools.cache
def _negative_log_likelihood(config: ModelConfig, compute: ComputeConfig, isolate: bool, chunk: int):
    """A compiled function of (params, router_bias, batch): nats summed over the targets, and their number."""
    loss = LanguageModelLoss(mtp_weight=0.0, balance_weight=0.0, isolate=isolate, chunk=chunk)

    @jax.jit
    def sums(params, router_bias, batch):
        norm = loss.normalisers(batch)
        network = parameters.merge(config, params, router_bias, compute)
        return loss(network, batch, norm, jnp.int32(0))[1]["ce"] * norm["targets"], norm["targets"]

    return together(sums)


def row_loss(
    model: Model,
    rows: Iterable[Row],
    *,
    batch_size: int,
    isolate: bool = False,
    chunk: int = 128,
) -> tuple[float, int]:
    """Cross-entropy in nats summed over all targets of ``rows``, and how many there are. No token is dropped."""
    sums = _negative_log_likelihood(model.config, model.compute.exact, isolate, chunk)
    nats, targets, rows = 0.0, 0.0, iter(rows)
    while group := list(islice(rows, batch_size)):
        if not any(row["loss_mask"].any() for row in group):
            continue  # a count of 0 targets would come back as 1
        empty = {name: np.zeros_like(value) for name, value in group[0].items()}
        group += [empty] * (batch_size - len(group))
        stacked = {name: np.stack([row[name] for row in group]) for name in empty}
        batch = place_batch(stacked, model.mesh, model.compute.rules, whole=True)
        with jax.set_mesh(model.mesh):
            part, count = jax.device_get(sums(model.params, model.router_bias, batch))
        nats, targets = nats + float(part), targets + float(count)
    return nats, round(targets)


@dataclasses.dataclass(frozen=True)
class Score:
    """What a model makes of some text. Scores add up."""

    documents: int = 0
    bytes: int = 0
    tokens: int = 0
    targets: int = 0
    """Tokens that are predicted: all but the first of each row."""
    nats: float = 0.0
    """-ln p of the targets."""

    def __add__(self, other: "Score") -> "Score":
        return Score(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))

    @property
    def bits_per_byte(self) -> float:
        """``-log2 p(text) / bytes``, the bytes reduced in the same proportion as the tokens that are predicted."""
        return self.nats / math.log(2) / (self.bytes * self.targets / self.tokens) if self.targets else math.nan

    @property
    def perplexity(self) -> float:
        """``exp`` of the nats per token, which only models of one tokenizer can be compared by; inf past float64."""
        try:
            return math.exp(self.nats / self.targets) if self.targets else math.nan
        except OverflowError:
            return math.inf

    def numbers(self) -> dict[str, float]:
        return {"bits_per_byte": self.bits_per_byte, "perplexity": self.perplexity}


def score_text(model: Model, documents: Iterable[str], *, seq_len: int, batch_size: int) -> Score:
    """The score of documents packed into rows of ``seq_len``, as in pretraining."""
    model.config.check_speaks()
    tokenizer = model.text
    size = tokens = count = 0

    def encoded():
        nonlocal size, tokens, count
        for text in documents:
            ids = [*tokenizer.bos_ids, *tokenizer.encode(text), tokenizer.eos_id]
            size, tokens, count = size + len(text.encode()), tokens + len(ids), count + 1
            yield ids

    rows = pack_stream(encoded(), seq_len, pad_id=tokenizer.pad_id)
    nats, targets = row_loss(model, rows, batch_size=batch_size)
    return Score(count, size, tokens, targets, nats)


class HeldOut:
    """Documents to be measured on, read into memory: of files of any kind, by file and by ``kind`` where rows have one.

    kinds: of rows with a kind, these alone. Raises what ``read_documents`` does, and ValueError that names a file
    without documents.
    """

    def __init__(self, paths: Iterable[PathLike], *, text_field: str = "text", kinds: tuple[str, ...] = ()):
        files = list(dict.fromkeys(find_files(paths, (*TEXTS, *ROWS))))
        short = {file: whole_text(file.name) for file in files}  # JSON and TensorBoard take no other names
        if len(set(short.values())) < len(files):
            short = {file: whole_text(str(file)) for file in files}
        self.documents: dict[tuple[str, str | None], list[str]] = {}
        for file in files:
            rows = list(read_texts(file, text_field=text_field, also="kind"))
            if not rows:
                raise ValueError(f"{file}: there is no document in it to measure")
            for row in rows:
                kind = None if row.get("kind") is None else whole_text(str(row["kind"]))
                if not kinds or kind is None or kind in kinds:
                    self.documents.setdefault((short[file], kind), []).append(row[text_field])
        if not self.documents:
            raise ValueError(f"{', '.join(map(str, files))}: no document is of the kinds {', '.join(kinds)}")

    def scores(self, model: Model, *, seq_len: int, batch_size: int) -> "Scores":
        """Each file's documents of a kind are packed by themselves, in their order."""
        options = {"seq_len": seq_len, "batch_size": batch_size}
        return Scores({part: score_text(model, texts, **options) for part, texts in self.documents.items()})


@dataclasses.dataclass(frozen=True)
class Scores:
    """Scores by (file, kind)."""

    parts: dict[tuple[str, str | None], Score]

    @property
    def total(self) -> Score:
        return sum(self.parts.values(), Score())

    @property
    def files(self) -> dict[str, Score]:
        return self._summed(0)

    @property
    def kinds(self) -> dict[str, Score]:
        """Those of rows that have a kind."""
        return self._summed(1)

    def _summed(self, index: int) -> dict[Any, Score]:
        names = dict.fromkeys(part[index] for part in self.parts if part[index] is not None)
        return {name: sum((s for part, s in self.parts.items() if part[index] == name), Score()) for name in names}

    def metrics(self) -> dict[str, float]:
        """``eval/bits_per_byte``, ``eval/perplexity``; ``.../file/NAME`` where there are several; ``.../kind/NAME``."""
        found = {f"eval/{name}": value for name, value in self.total.numbers().items()}
        files = self.files if len(self.files) > 1 else {}
        for what, scores in (("file", files), ("kind", self.kinds)):
            for key, score in scores.items():
                found |= {f"eval/{name}/{what}/{key}": value for name, value in score.numbers().items()}
        return found

    def result(self) -> dict[str, Any]:
        """The same as a tree, with the sizes: ``bits_per_byte``, ``perplexity`` and ``heldout``, by file and kind."""
        trees = {
            what: {key: dataclasses.asdict(score) | score.numbers() for key, score in scores.items()}
            for what, scores in (("files", self.files), ("kinds", self.kinds))
        }
        return self.total.numbers() | {"heldout": {what: tree for what, tree in trees.items() if tree}}
