"""The probability of a continuation after a context, and of a whole text, token by token."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.checkpoint.model import Model
from deepseek_jax.compute import ComputeConfig
from deepseek_jax.config import ModelConfig
from deepseek_jax.inference.requests import round_up
from deepseek_jax.model import parameters
from deepseek_jax.parallel.sharding import place_batch

_CHUNK = 128  # positions whose logits are held at a time

Pair = tuple[Sequence[int], Sequence[int]]  # ids of a context, at least one, and of what follows it


def likelihoods(model: Model, pairs: Sequence[Pair], *, batch_size: int = 8) -> list[tuple[float, bool]]:
    """Of each pair ``sum log p(token | all before it)`` over the continuation in nats, and whether each of its tokens
    is the most likely one there.

    Rows are batched by length, the longest first, and padded to powers of two; a context that does not fit into
    max_position_embeddings loses its beginning. ValueError for a continuation that does not fit, and no context.
    """
    longest = model.config.max_position_embeddings
    for context, continuation in pairs:
        if not context or len(continuation) > longest:
            raise ValueError(
                f"a context of {len(context)} tokens and a continuation of {len(continuation)}: expected at least one "
                f"and at most max_position_embeddings={longest}"
            )
    rows = [[*context, *continuation][-longest - 1 :] for context, continuation in pairs]
    found: list[tuple[float, bool]] = [(0.0, True)] * len(pairs)
    order = sorted(range(len(pairs)), key=lambda index: -len(rows[index]))
    for start in range(0, len(order), batch_size):
        part = order[start : start + batch_size]
        width = min(round_up(max(len(rows[index]) for index in part) - 1, 16), longest)
        given = {name: np.zeros((batch_size, width), np.int32) for name in ("tokens", "targets", "counted")}
        for place, index in enumerate(part):
            ids, end = rows[index], len(rows[index]) - 1
            given["tokens"][place, :end], given["targets"][place, :end] = ids[:-1], ids[1:]
            given["counted"][place, end - len(pairs[index][1]) : end] = 1
        batch = place_batch(given, model.mesh, model.compute.rules, whole=True)
        score = _scores(model.config, model.compute.exact)
        with jax.set_mesh(model.mesh):
            sums_B, greedy_B = jax.device_get(score(model.params, model.router_bias, **batch))
        for place, index in enumerate(part):
            found[index] = (float(sums_B[place]), bool(greedy_B[place]))
    return found


def windows(ids: Sequence[int], prefix: int, longest: int) -> list[Pair]:
    """A text as pairs in which each token is predicted once, after as many of those before it as `longest` positions
    hold; the first after `prefix`."""
    whole, pairs = [prefix, *ids], []
    for start in range(1, len(whole), longest):
        end = min(start + longest, len(whole))
        pairs.append((whole[max(end - longest - 1, 0) : start], whole[start:end]))
    return pairs


@functools.cache
def _scores(config: ModelConfig, compute: ComputeConfig):
    @jax.jit
    def score(params, router_bias, tokens, targets, counted):
        network = parameters.merge(config, params, router_bias, compute)
        hidden = network(tokens, head=False).hidden

        def chunk(start, size):
            hidden_BSD, targets_BS, counted_BS = (
                jax.lax.dynamic_slice_in_dim(x, start, size, axis=1) for x in (hidden, targets, counted)
            )
            logits = network.logits(hidden_BSD)
            chosen = jnp.take_along_axis(logits, targets_BS[..., None], axis=-1)[..., 0]
            logprob_BS = jnp.where(counted_BS > 0, chosen - jax.nn.logsumexp(logits, axis=-1), 0.0)
            greedy_BS = (counted_BS == 0) | (jnp.argmax(logits, axis=-1) == targets_BS)
            return logprob_BS.sum(axis=1), greedy_BS.all(axis=1)

        width = tokens.shape[1]
        whole = [chunk(start, min(_CHUNK, width - start)) for start in range(0, width, _CHUNK)]
        return sum(part for part, _ in whole), jnp.stack([greedy for _, greedy in whole]).all(axis=0)

    return score
