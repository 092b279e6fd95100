"""Log-probabilities without the logits, and the language-model loss with its MTP and balance parts."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from deepseek_jax.config import ModelConfig, check_types
from deepseek_jax.model import transformer
from deepseek_jax.model.layers import project
from deepseek_jax.model.router import count_sequences


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
    temperature: float = 1.0,
) -> TokenScores:
    """``log softmax(hidden · w / temperature)`` at the targets, ``chunk`` positions of each row at a time.

    Logits live for one chunk, in float32, and are computed again in the backward pass: B·S·W are never held, and
    splitting the sequence leaves the rows where the mesh has put them.
    """
    batch, size, _ = hidden_BSD.shape
    chunk = min(chunk, size)
    padded = -(-size // chunk) * chunk

    def pieces(x):
        x = jnp.pad(x, [(0, 0), (0, padded - size)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(batch, padded // chunk, chunk, *x.shape[2:]), 1, 0)

    @jax.checkpoint
    def score(hidden, targets):
        logits = project(hidden, w_DW.astype(hidden.dtype), jnp.float32)
        logits = logits / temperature if temperature != 1.0 else logits
        log_z = jax.nn.logsumexp(logits, axis=-1)
        chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        p = jax.lax.stop_gradient(jnp.exp(logits - log_z[..., None]))
        entropy = jax.lax.stop_gradient(log_z - jnp.sum(p * logits, axis=-1))
        return chosen - log_z, entropy

    def body(carry, piece):
        return carry, score(*piece)

    _, scores = jax.lax.scan(body, None, (pieces(hidden_BSD), pieces(targets_BS)))
    logprob, entropy = (jnp.moveaxis(x, 0, 1).reshape(batch, padded)[:, :size] for x in scores)
    return TokenScores(logprob, entropy)


@dataclasses.dataclass(frozen=True)
class LanguageModelLoss:
    """``ce + mtp_weight · mtp + balance_weight · Σ_layers balance``; the defaults are V3's.

    mtp_weight falls to ``mtp_weight_late`` at step ``mtp_late_from`` (0: never). isolate: attention, MTP and balance
    keep to each packed document; V3 pretrains without. chunk: positions whose logits are held at a time.
    """

    mtp_weight: float = 0.3
    mtp_weight_late: float = 0.1
    mtp_late_from: int = 0
    balance_weight: float = 1e-4
    isolate: bool = False
    chunk: int = 128

    def __post_init__(self) -> None:
        check_types(self)
        if self.chunk < 1:
            raise ValueError(f"chunk={self.chunk}: must be at least 1 position")

    def normalisers(self, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """What the sums of a whole batch are divided by, so that any split into microbatches gives the same loss."""
        batch = self._view(batch)
        return {
            "targets": jnp.maximum(jnp.sum(_target_mask(batch, 1)), 1.0),
            "mtp_targets": jnp.maximum(jnp.sum(_target_mask(batch, 2)), 1.0),
            "sequences": jnp.maximum(count_sequences(batch["segment_ids"]), 1.0),
        }

    def __call__(
        self,
        config: ModelConfig,
        state: Any,
        params: Any,
        batch: dict[str, jax.Array],
        norm: dict[str, jax.Array],
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The share of a microbatch in the batch's loss, and its parts; each part sums over microbatches."""
        batch = self._view(batch)
        use_mtp = bool(config.num_nextn_predict_layers) and self.mtp_weight > 0
        model = transformer.merge(config, params, state.router_bias)
        out = model(
            batch["tokens"],
            positions_BS=batch["positions"],
            segment_ids_BS=batch["segment_ids"],
            mtp=use_mtp,
            head=False,
        )
        w_DW = model.head_weight()

        def cross_entropy(hidden, ahead, count):
            scores = score_targets(hidden, w_DW, shift(batch["tokens"], ahead), chunk=self.chunk)
            return -jnp.sum(scores.logprob_BS * _target_mask(batch, ahead)) / count

        with jax.named_scope("loss"):
            loss = ce = cross_entropy(out.hidden, 1, norm["targets"])
            parts = {"ce": ce}
            if use_mtp:
                parts["mtp"] = cross_entropy(out.mtp_hidden, 2, norm["mtp_targets"])
                weight = jnp.float32(self.mtp_weight)
                if self.mtp_late_from:
                    weight = jnp.where(state.step >= self.mtp_late_from, self.mtp_weight_late, weight)
                loss = loss + weight * parts["mtp"]
            if out.router is not None:
                parts["balance"] = jnp.sum(out.router.balance) / norm["sequences"]
                parts["load"] = out.router.load_E
                loss = loss + self.balance_weight * parts["balance"]
        return loss, parts

    def _view(self, batch):
        """Without isolation a row is one document, its padding left out."""
        if self.isolate:
            return batch
        segments = (batch["segment_ids"] > 0).astype(jnp.int32)
        positions = jnp.broadcast_to(jnp.arange(segments.shape[1], dtype=jnp.int32), segments.shape)
        return {**batch, "segment_ids": segments, "positions": positions}


def shift(x_BS: jax.Array, ahead: int) -> jax.Array:
    return jnp.pad(x_BS, ((0, 0), (0, ahead)))[:, ahead:]


def _target_mask(batch: dict[str, jax.Array], ahead: int) -> Float[Array, "B S"]:
    """1 where the token ``ahead`` of this one is to be predicted: it counts, and lies in the same segment."""
    segments = batch["segment_ids"]
    same = (segments == shift(segments, ahead)) & (segments > 0)
    return shift(batch["loss_mask"], ahead) * same
