"""Log-probabilities of targets, and their cross-entropy, without all logits: a chunk of positions at a time."""

import functools

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from deepseek_jax.compute import ComputeConfig
from deepseek_jax.parallel.sharding import per_batch_shard, split_by
from deepseek_kernels import product, weight_gradient


@struct.dataclass
class TokenScores:
    """logprob_BS: log-probability of each target. entropy_BS: of the whole distribution, no gradient."""

    logprob_BS: jax.Array
    entropy_BS: jax.Array


def score_targets(
    hidden_BSD: Float[Array, "B S D"],
    w_DW: Float[Array, "D W"],
    targets_BS: Int[Array, "B S"],
    *,
    chunk: int,
    temperature_B1: Float[Array, "B 1"] | None = None,
    compute: ComputeConfig = ComputeConfig(),
) -> TokenScores:
    """``log softmax(hidden · w / temperature)`` at the targets, ``chunk`` positions of each row at a time.

    Logits live for one chunk, in float32, and are computed again in the backward pass: B·S·W are never held, and
    splitting the sequence leaves the rows where the mesh has put them.
    """

    between = split_by(compute.rules.vocab)

    @jax.checkpoint
    def score(w_DW, hidden, targets, *temperature):
        logits = _head(hidden, w_DW, compute.kernels)
        if temperature:  # 0 behind the end of the last chunk
            logits = logits / jnp.where(temperature[0] == 0, 1, temperature[0])[..., None]
        log_z = _log_sum(logits, between)[..., 0]
        chosen = _at(logits, targets, between)[0]
        p = jax.lax.stop_gradient(jnp.exp(logits - log_z[..., None]))
        mean = jnp.sum(p * logits, axis=-1)
        entropy = jax.lax.stop_gradient(log_z - (jax.lax.psum(mean, between) if between else mean))
        return chosen - log_z, entropy

    def on_device(*arrays):
        *split, w_DW = arrays
        _, scores = jax.lax.scan(lambda _, piece: (None, score(w_DW, *piece)), None, _pieces(chunk, *split))
        return tuple(_joined(x, split[0].shape[1]) for x in scores), (), None

    split = [hidden_BSD, targets_BS]
    if temperature_B1 is not None:
        split.append(jnp.broadcast_to(temperature_B1, targets_BS.shape))
    return TokenScores(*per_batch_shard(on_device, compute.rules, split, w_DW)[0])


def _head(hidden, w_DW, target):
    return product("bsd,dw->bsw", hidden, w_DW, dtype=jnp.float32, target=target)


def _log_sum(logits, between):
    """``log Σ exp`` over the vocabulary, of which each device of the mesh axes ``between`` has a part: (… 1)."""
    log_z = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    if not between:
        return log_z
    most = jax.lax.stop_gradient(jax.lax.pmax(jax.lax.stop_gradient(log_z), between))
    return most + jnp.log(jax.lax.psum(jnp.exp(log_z - most), between))


def _at(logits, targets, between):
    """The targets' logits, and the targets as columns of this device's part, which one of another part is not."""
    if not between:
        return jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0], targets
    targets = targets - jax.lax.axis_index(between) * logits.shape[-1]
    here = (targets >= 0) & (targets < logits.shape[-1])
    chosen = jnp.take_along_axis(logits, jnp.where(here, targets, 0)[..., None], axis=-1)[..., 0]
    return jax.lax.psum(jnp.where(here, chosen, 0), between), targets


def _head_gradients(hidden, w_DW, dlogits, target):
    """Float32 sums of products in the compute dtype: in float32 they would cost a bf16 run 17 % of its step."""
    dlogits = dlogits.astype(hidden.dtype)
    dhidden = jnp.einsum("bsw,dw->bsd", dlogits, w_DW, preferred_element_type=jnp.float32)
    return dhidden, weight_gradient(hidden, dlogits, target=target)


def cross_entropy(
    hidden_BSD: Float[Array, "B S D"],
    w_DW: Float[Array, "D W"],
    targets_BS: Int[Array, "B S"],
    weights_BS: Float[Array, "B S"],
    chunk: int,
    compute: ComputeConfig = ComputeConfig(),
) -> Float[Array, ""]:
    """``-Σ weights · log softmax(hidden · w)`` at the targets, ``chunk`` positions of each row at a time.

    Where a gradient is asked for, it is taken while a chunk's logits are there, so that they are computed once; w's is
    added up on each device, and over the mesh after the last chunk, in w's dtype. Differentiable in hidden and w.
    """
    loss: jax.Array = _cross_entropy(hidden_BSD, w_DW, targets_BS, weights_BS, chunk, compute)
    return loss


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _cross_entropy(hidden_BSD, w_DW, targets_BS, weights_BS, chunk, compute):
    scores = score_targets(hidden_BSD, w_DW, targets_BS, chunk=chunk, compute=compute)
    return -jnp.sum(scores.logprob_BS * weights_BS)


def _cross_entropy_forward(hidden_BSD, w_DW, targets_BS, weights_BS, chunk, compute):
    rules, between = compute.rules, split_by(compute.rules.vocab)
    sums = w_DW.dtype if split_by((*rules.batch, *rules.sequence)) else jnp.float32

    def body(w_DW, carry, piece):
        loss, dw_DW = carry
        hidden, targets, weights = piece
        logits = _head(hidden, w_DW, compute.kernels)
        log_z, (chosen, columns) = _log_sum(logits, between), _at(logits, targets, between)
        loss += jnp.sum(weights * (log_z[..., 0] - chosen))
        right = columns[..., None] == jnp.arange(logits.shape[-1])
        dlogits = weights[..., None] * (jnp.exp(logits - log_z) - right)
        dhidden, dw = _head_gradients(hidden, w_DW, dlogits, compute.kernels)
        return (loss, dw_DW + dw), dhidden

    def on_device(hidden, targets, weights, w_DW):
        zero = jnp.float32(0), jnp.zeros(w_DW.shape, jnp.float32)
        pieces = _pieces(chunk, hidden, targets, weights)
        (loss, dw_DW), dhidden = jax.lax.scan(functools.partial(body, w_DW), zero, pieces)
        dhidden = _joined(dhidden, hidden.shape[1])
        if between:
            dhidden = jax.lax.psum(dhidden.astype(hidden.dtype), between)
        return dhidden, loss, dw_DW.astype(sums)

    # Cast before it is gathered.
    split, cast_DW = [hidden_BSD, targets_BS, weights_BS], w_DW.astype(hidden_BSD.dtype)
    dhidden_BSD, loss, dw_DW = per_batch_shard(on_device, rules, split, cast_DW)
    return loss, (dhidden_BSD, dw_DW, hidden_BSD[:0], w_DW[:0])


def _cross_entropy_backward(chunk, compute, residuals, dloss):
    dhidden_BSD, dw_DW, hidden, w = residuals
    return (dloss * dhidden_BSD).astype(hidden.dtype), (dloss * dw_DW).astype(w.dtype), None, None


_cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)


def _pieces(chunk: int, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Each array (B S …) as (chunks B chunk …), its end padded with zeros."""

    def cut(x):
        batch, size, *rest = x.shape
        count = -(-size // min(chunk, size))
        x = jnp.pad(x, [(0, 0), (0, count * min(chunk, size) - size)] + [(0, 0)] * len(rest))
        return jnp.moveaxis(x.reshape(batch, count, -1, *rest), 1, 0)

    return tuple(map(cut, arrays))


def _joined(x: jax.Array, size: int) -> jax.Array:
    """The inverse of ``_pieces``."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :size]
