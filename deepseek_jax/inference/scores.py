"""Log-probabilities of a prompt's tokens while it is read in, a block after the other: never the logits of a chunk."""

import math

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from deepseek_jax.inference.limits import ALTERNATIVES
from deepseek_jax.inference.sampling import most_likely
from deepseek_jax.model.transformer import Transformer
from deepseek_jax.parallel.mesh import current_mesh
from deepseek_jax.parallel.sharding import constrain

ROWS = 128  # of logits that a device holds at a time


@struct.dataclass
class Scores:
    """logprobs_BS: of the token behind each, by the network alone. likely_BSA, likely_logprobs_BSA: the most likely
    ones in its place, as many as are asked for, from the most likely on."""

    logprobs_BS: jax.Array
    likely_BSA: jax.Array
    likely_logprobs_BSA: jax.Array


def score(
    network: Transformer,
    hidden_BSD: Float[Array, "B S D"],
    following_BS: Int[Array, "B S"],
    alternatives: Int[Array, ""],
) -> Scores:
    """``log softmax(hidden · head)`` at the tokens that follow; a token that is the most likely one has the very number
    that stands beside it as an alternative."""
    rules, mesh = network.compute.rules, current_mesh()
    ways = 1 if mesh is None else math.prod(mesh.shape[axis] for axis in rules.batch)
    batch, size, _ = hidden_BSD.shape
    block = min(max(ROWS * ways // batch, 1), size)
    count = -(-size // block)

    def blocks(x_BS):
        rest = [None] * (x_BS.ndim - 1)
        x_BS = jnp.pad(x_BS, ((0, 0), (0, count * block - size), *[(0, 0)] * (x_BS.ndim - 2)))
        x_NBK = jnp.moveaxis(x_BS.reshape(batch, count, block, *x_BS.shape[2:]), 1, 0)
        return constrain(x_NBK, rules, None, "batch", *rest)

    def of_block(given) -> Scores:
        hidden_BKD, following_BK = given
        logits_BKW = network.logits(hidden_BKD)
        total_BK1 = jax.nn.logsumexp(logits_BKW, axis=2, keepdims=True)
        chosen_BK1 = jnp.take_along_axis(logits_BKW, following_BK[..., None], axis=2)
        likely_BKA, best_BKA = jax.lax.cond(alternatives > 0, _likely, _none, logits_BKW)
        return Scores((chosen_BK1 - total_BK1)[..., 0], likely_BKA, best_BKA - total_BK1)

    with jax.named_scope("score"):
        found = jax.lax.map(of_block, (blocks(hidden_BSD), blocks(following_BS)))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(batch, -1, *x.shape[3:])[:, :size], found)


def _likely(logits_BKW):
    best_BKA, likely_BKA = most_likely(logits_BKW, min(ALTERNATIVES, logits_BKW.shape[2]))
    return likely_BKA, best_BKA


def _none(logits_BKW):
    shape = (*logits_BKW.shape[:2], min(ALTERNATIVES, logits_BKW.shape[2]))
    return jnp.zeros(shape, jnp.int32), jnp.zeros(shape)
