"""How well a model predicts text: bits per byte, and the mean loss of packed rows."""

import functools
import math
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.checkpoint.model import Model
from deepseek_jax.compute import ComputeConfig
from deepseek_jax.config import ModelConfig
from deepseek_jax.data.packing import Row, pack_stream
from deepseek_jax.model import transformer
from deepseek_jax.parallel.sharding import place_batch
from deepseek_jax.train.losses import LanguageModelLoss


@functools.cache
def _negative_log_likelihood(config: ModelConfig, compute: ComputeConfig, isolate: bool, chunk: int):
    """A compiled function of (params, router_bias, batch): nats summed over the targets, and their number."""
    loss = LanguageModelLoss(mtp_weight=0.0, balance_weight=0.0, isolate=isolate, chunk=chunk)

    @jax.jit
    def sums(params, router_bias, batch):
        norm = loss.normalisers(batch)
        network = transformer.merge(config, params, router_bias, compute)
        return loss(network, batch, norm, jnp.int32(0))[1]["ce"] * norm["targets"], norm["targets"]

    return sums


def row_loss(
    model: Model,
    rows: Sequence[Row],
    *,
    batch_size: int,
    isolate: bool = False,
    chunk: int = 128,
) -> tuple[float, int]:
    """Cross-entropy in nats summed over all targets of ``rows``, and how many there are."""
    sums = _negative_log_likelihood(model.config, model.compute, isolate, chunk)
    empty = {name: np.zeros_like(value) for name, value in rows[0].items()}
    nats, targets = 0.0, 0.0
    for start in range(0, len(rows), batch_size):
        group = [*rows[start : start + batch_size]]
        group += [empty] * (batch_size - len(group))
        stacked = {name: np.stack([row[name] for row in group]) for name in empty}
        batch = place_batch(stacked, model.mesh, model.compute.rules, whole=True)
        if np.sum([np.sum(row["loss_mask"]) for row in group]) == 0:
            continue  # a count of 0 targets would come back as 1
        with jax.set_mesh(model.mesh):
            part, count = jax.device_get(sums(model.params, model.router_bias, batch))
        nats, targets = nats + float(part), targets + float(count)
    return nats, round(targets)


def bits_per_byte(
    model: Model,
    documents: Iterable[str],
    *,
    seq_len: int,
    batch_size: int,
) -> float:
    """``-log2 p(text) / bytes`` of documents packed into rows of ``seq_len``, as in pretraining.

    The first token of a row is not predicted; the bytes are reduced in the same proportion as the tokens.
    """
    tokenizer = model.text
    size, ids = 0, []
    for text in documents:
        size += len(text.encode())
        ids.append([*tokenizer.bos_ids, *tokenizer.encode(text), tokenizer.eos_id])
    rows = list(pack_stream(ids, seq_len, pad_id=tokenizer.pad_id))
    nats, targets = row_loss(model, rows, batch_size=batch_size)
    return nats / math.log(2) / (size * targets / sum(map(len, ids)))
