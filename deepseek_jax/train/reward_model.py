"""Reward models: which of two answers is better (Bradley and Terry), or whether one is good, by one number at its end.

A row holds items, one behind the other, each answer a segment that sees itself alone. Segment 2k+1 is item k's better
answer, or one that is good by itself, and 2k+2 the worse, or one that is bad; with r the score at the last token,

    loss = mean over items of -log σ(margin)
    margin = r_better - r_worse    a pair
             r, or -r              one that is good, or bad: binary cross-entropy
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from deepseek_jax.model.transformer import Transformer
from deepseek_jax.train.losses import routed
from deepseek_kernels import Visible


@dataclasses.dataclass(frozen=True)
class RewardModelLoss:
    """The formula stands at the head of the module. Rows are those of ``data.preferences``."""

    def normalisers(self, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        return {"items": jnp.maximum(jnp.sum(_by_item(batch, batch["loss_mask"]) > 0), 1.0)}

    def __call__(
        self,
        model: Transformer,
        batch: dict[str, jax.Array],
        norm: dict[str, jax.Array],
        step: Int[Array, ""],
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The share of a microbatch in the batch's loss; ``agreement`` is the share of margins over 0, one of 0 being
        half of one."""
        del step
        margin_BI, there_BI, routing = margins(model, batch)
        mean = lambda x_BI: jnp.sum(jnp.where(there_BI, x_BI, 0.0)) / norm["items"]  # noqa: E731
        parts = {"agreement": mean((jnp.sign(margin_BI) + 1) / 2), "margin": mean(margin_BI)}
        return mean(jax.nn.softplus(-margin_BI)), parts | routing


def margins(
    model: Transformer, batch: dict[str, jax.Array]
) -> tuple[Float[Array, "B I"], Bool[Array, "B I"], dict[str, jax.Array]]:
    """Each item's margin, whether there is such an item in the row, and ``losses.routed``."""
    out = model(
        batch["tokens"],
        positions_BS=batch["positions"],
        segment_ids_BS=batch["segment_ids"],
        visible=Visible.rows(batch["segment_ids"]),
    )
    assert out.scores is not None
    sign_BS = batch["loss_mask"] * jnp.where(batch["segment_ids"] % 2 == 1, 1.0, -1.0)
    margin_BI = _by_item(batch, sign_BS * out.scores[..., 0])
    there_BI = _by_item(batch, batch["loss_mask"]) > 0
    return margin_BI, there_BI, routed(model, out.router)


def _by_item(batch: dict[str, jax.Array], x_BS: jax.Array) -> jax.Array:
    """The sum over each item's tokens, (B S+1): of items at 1, 2, …, of padding at 0."""
    B, S = x_BS.shape
    item_BS = (batch["segment_ids"] + 1) // 2
    return jnp.zeros((B, S + 1), jnp.float32).at[jnp.arange(B)[:, None], item_BS].add(x_BS)
