"""How well a model predicts text: bits per byte, and the mean loss of packed rows."""

import functools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from deepseek_jax.config import ModelConfig
from deepseek_jax.data.packing import Row, pack_stream
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.parallel.mesh import use_mesh
from deepseek_jax.parallel.sharding import place_batch
from deepseek_jax.train.losses import LanguageModelLoss
from deepseek_jax.train.state import TrainState


@functools.cache
def _negative_log_likelihood(config: ModelConfig, isolate: bool, chunk: int, mesh: Mesh):
    """A compiled function of (params, router_bias, batch): nats summed over the targets, and their number."""
    loss = LanguageModelLoss(mtp_weight=0.0, balance_weight=0.0, isolate=isolate, chunk=chunk)

    @jax.jit
    def sums(params, router_bias, batch):
        with use_mesh(mesh):
            norm = loss.normalisers(batch)
            state = TrainState(jnp.int32(0), None, None, router_bias)
            return loss(config, state, params, batch, norm)[1]["ce"] * norm["targets"], norm["targets"]

    return sums


def row_loss(
    config: ModelConfig,
    params: Any,
    router_bias: jax.Array | None,
    rows: Sequence[Row],
    *,
    mesh: Mesh,
    batch_size: int,
    isolate: bool = False,
    chunk: int = 128,
) -> tuple[float, int]:
    """Cross-entropy in nats summed over all targets of ``rows``, and how many there are."""
    sums = _negative_log_likelihood(config, isolate, chunk, mesh)
    empty = {name: np.zeros_like(value) for name, value in rows[0].items()}
    nats, targets = 0.0, 0.0
    for start in range(0, len(rows), batch_size):
        group = [*rows[start : start + batch_size]]
        group += [empty] * (batch_size - len(group))
        batch = place_batch({name: np.stack([row[name] for row in group]) for name in empty}, mesh)
        if np.sum([np.sum(row["loss_mask"]) for row in group]) == 0:
            continue  # a count of 0 targets would come back as 1
        part, count = jax.device_get(sums(params, router_bias, batch))
        nats, targets = nats + float(part), targets + float(count)
    return nats, round(targets)


def bits_per_byte(
    config: ModelConfig,
    params: Any,
    router_bias: jax.Array | None,
    tokenizer: Tokenizer,
    documents: Iterable[str],
    *,
    mesh: Mesh,
    seq_len: int,
    batch_size: int,
) -> float:
    """``-log2 p(text) / bytes`` of documents packed into rows of ``seq_len``, as in pretraining.

    The first token of a row is not predicted; the bytes are reduced in the same proportion as the tokens.
    """
    size, ids = 0, []
    for text in documents:
        size += len(text.encode())
        ids.append([tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id])
    rows = list(pack_stream(ids, seq_len, pad_id=tokenizer.pad_id))
    nats, targets = row_loss(config, params, router_bias, rows, mesh=mesh, batch_size=batch_size)
    return nats / math.log(2) / (size * targets / sum(map(len, ids)))
