"""Batched generation as one pure function: prefill the prompts, then decode in a loop on the device."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Int

from deepseek_jax.compute import ComputeConfig
from deepseek_jax.config import ModelConfig
from deepseek_jax.inference.sampling import SamplingParams, sample
from deepseek_jax.model import transformer
from deepseek_jax.model.attention import Cache


@struct.dataclass
class Generated:
    """tokens_BN: the answers, the stop token included, ``pad`` behind it. logprobs_BN: of each token, 0 behind the end.
    lengths_B: tokens of each answer. stopped_B: whether it ended by itself, not by the limit."""

    tokens_BN: jax.Array
    logprobs_BN: jax.Array
    lengths_B: jax.Array
    stopped_B: jax.Array


def pad_prompts(prompts: Sequence[Sequence[int]], pad_id: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Right-align prompts in rows of ``width``: tokens and positions (B P), position -1 on the padding."""
    tokens = np.full((len(prompts), width), pad_id, np.int32)
    positions = np.full((len(prompts), width), -1, np.int32)
    for row, ids in enumerate(prompts):
        if not 0 < len(ids) <= width:
            raise ValueError(f"prompt {row} has {len(ids)} tokens: expected 1…{width}")
        tokens[row, width - len(ids) :] = ids
        positions[row, width - len(ids) :] = np.arange(len(ids))
    return tokens, positions


@functools.partial(jax.jit, static_argnames=("config", "compute", "sampling", "stop_ids", "pad_id"))
def generate(
    config: ModelConfig,
    params: Any,
    router_bias: jax.Array | None,
    tokens_BP: Int[Array, "B P"],
    positions_BP: Int[Array, "B P"],
    key: jax.Array,
    *,
    sampling: SamplingParams,
    stop_ids: tuple[int, ...],
    pad_id: int,
    compute: ComputeConfig = ComputeConfig(),
) -> Generated:
    """Answer each prompt with up to ``sampling.max_tokens`` tokens, until one of ``stop_ids``.

    Prefill runs the plain attention over all prompts at once; each further token the absorbed one, over the latent
    cache. Row b's draws depend on ``fold_in(key, b)`` and the step alone. ``sampling.seed`` is not read: ``key`` is.
    """
    model = transformer.merge(config, params, router_bias, compute)
    layers = model.unrolled()
    batch, width = tokens_BP.shape
    limit = sampling.max_tokens
    row_keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(batch))
    stops = jnp.asarray(stop_ids, jnp.int32)

    def draw(hidden_BD, n):
        keys = jax.vmap(lambda row_key: jax.random.fold_in(row_key, n))(row_keys)
        return sample(model.logits(hidden_BD), keys, sampling)

    def record(n, token_B, logprob_B, done_B, tokens_BN, logprobs_BN):
        token_B = jnp.where(done_B, pad_id, token_B)
        logprob_B = jnp.where(done_B, 0.0, logprob_B)
        tokens_BN = jax.lax.dynamic_update_slice(tokens_BN, token_B[:, None], (0, n))
        logprobs_BN = jax.lax.dynamic_update_slice(logprobs_BN, logprob_B[:, None], (0, n))
        return token_B, done_B | jnp.any(token_B[:, None] == stops, axis=1), tokens_BN, logprobs_BN

    def decode(carry):
        n, cache, token_B, done_B, position_B, tokens_BN, logprobs_BN, lengths_B = carry
        lengths_B = lengths_B + ~done_B
        position_B1 = jnp.where(done_B, -1, position_B)[:, None]
        out = model(token_B[:, None], positions_BS=position_B1, cache=cache, layers=layers, absorbed=True, head=False)
        drawn = draw(out.hidden[:, 0], n)
        token_B, done_B, tokens_BN, logprobs_BN = record(n, *drawn, done_B, tokens_BN, logprobs_BN)
        return n + 1, out.cache, token_B, done_B, position_B + 1, tokens_BN, logprobs_BN, lengths_B

    with jax.named_scope("prefill"):
        cache = Cache.empty(config, batch, width + limit, compute.dtype)
        out = model(tokens_BP, positions_BS=positions_BP, cache=cache, layers=layers, head=False)
        empty = jnp.full((batch, limit), pad_id, jnp.int32), jnp.zeros((batch, limit), jnp.float32)
        first = draw(out.hidden[:, -1], 0)
        token_B, done_B, tokens_BN, logprobs_BN = record(0, *first, jnp.zeros(batch, bool), *empty)
    lengths_B = jnp.ones(batch, jnp.int32)
    carry = (
        jnp.int32(1),
        out.cache,
        token_B,
        done_B,
        positions_BP[:, -1] + 1,
        tokens_BN,
        logprobs_BN,
        lengths_B,
    )
    with jax.named_scope("decode"):
        carry = jax.lax.while_loop(lambda carry: (carry[0] < limit) & ~jnp.all(carry[3]), decode, carry)
    *_, done_B, _, tokens_BN, logprobs_BN, lengths_B = carry
    return Generated(tokens_BN, logprobs_BN, lengths_B, done_B)
