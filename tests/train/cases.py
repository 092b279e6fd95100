"""A small network and packed batches for the tests of losses and steps."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from model.tiny import V3, config, weights

from deepseek_jax.train.state import TrainState

# A dense layer, a MoE layer and an MTP module.
TINY = config(V3, num_hidden_layers=2)
S = 16

Document = tuple[Sequence[int], Sequence[int]]  # tokens and loss mask


def documents(seed: int, lengths: Sequence[int]) -> list[Document]:
    """Random tokens; about a third are no targets, nor is the first of each document."""
    rng = np.random.default_rng(seed)
    made = []
    for length in lengths:
        mask = (rng.random(length) < 0.7).astype(int)
        mask[0] = 0
        made.append((rng.integers(0, TINY.vocab_size, length).tolist(), mask.tolist()))
    return made


def pack(rows: Sequence[Sequence[Document]], *, size: int = S, pad: int = 0) -> dict[str, np.ndarray]:
    """A batch with a row for each list of documents, padded on the right."""
    shape = (len(rows), size)
    names = ("tokens", "segment_ids", "positions")
    batch: dict[str, np.ndarray] = {name: np.zeros(shape, np.int32) for name in names}
    batch["tokens"][:] = pad
    batch["loss_mask"] = np.zeros(shape, np.float32)
    for row, packed in enumerate(rows):
        start = 0
        for segment, (tokens, mask) in enumerate(packed, start=1):
            span = slice(start, start + len(tokens))
            batch["tokens"][row, span], batch["loss_mask"][row, span] = tokens, mask
            batch["segment_ids"][row, span], batch["positions"][row, span] = segment, np.arange(len(tokens))
            start += len(tokens)
        assert start <= size
    return batch


# Eight rows: full, half empty, many short documents (one of a single token), one row of padding only.
LENGTHS = [[5, 7, 4], [16], [9], [2, 3, 1, 2, 6], [10, 6], [], [4, 4, 4, 4], [3, 8]]
BATCH = pack([documents(seed, lengths) for seed, lengths in enumerate(LENGTHS)])


def state_of(params, opt_state) -> TrainState:
    """A state that has taken no step."""
    return TrainState(step=jnp.int32(0), params=params, opt_state=opt_state, router_bias=weights(TINY)[1])


def on_device(batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    return {name: jnp.asarray(value) for name, value in batch.items()}
