"""The language-model loss, with its parts of multi-token prediction and balance."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from deepseek_jax.config import ModelConfig
from deepseek_jax.model.dropping import Balancing, spared_tokens
from deepseek_jax.model.router import RouterStats, count_sequences, device_size
from deepseek_jax.model.transformer import Transformer
from deepseek_jax.train.cross_entropy import cross_entropy
from deepseek_jax.typed import check_least, check_types
from deepseek_kernels import Visible


@dataclasses.dataclass(frozen=True)
class LanguageModelLoss:
    """``ce + mtp_weight · mtp + Σ_layers (balance_weight · balance + device_balance_weight · device_balance +
    communication_weight · communication)``; the defaults are V3's. V2 has 0.003, 0.05 and 0.02 with 8 devices, and
    drops tokens with a capacity of 1."""

    mtp_weight: float = 0.3
    """Of multi-token prediction."""
    mtp_weight_late: float = 0.1
    """What it falls to at step mtp_late_from."""
    mtp_late_from: int = 0
    """0: never."""
    balance_weight: float = 1e-4
    """Of the loss that balances the experts' load within sequences."""
    device_balance_weight: float = 0.0
    """Of the loss that balances the devices' load within sequences (V2)."""
    communication_weight: float = 0.0
    """Of the loss that balances how many tokens of a sequence each device receives (V2)."""
    balance_devices: int = 8
    """Devices that these two losses and drop_capacity think of, whatever the run has: each has as many experts,
    neighbours."""
    drop_capacity: float = 0.0
    """Choices (token, expert) that one of balance_devices computes, over the mean of the devices (V2: 1): those of
    the least affinity are dropped, in training alone. 0: all are computed."""
    drop_spared: float = 0.1
    """Share of the sequences whose tokens are never dropped."""
    isolate: bool = False
    """Keep attention, MTP and balance within each packed document; V3 pretrains without."""
    chunk: int = 128
    """Positions of a row whose logits are held at a time."""

    def __post_init__(self) -> None:
        check_types(self)
        check_least(self, 1, "chunk")
        check_least(self, 2, "balance_devices")
        if self.drop_spared > 1:
            raise ValueError(f"drop_spared={self.drop_spared}: must lie in [0, 1]")

    def check(self, model: ModelConfig) -> None:
        """ValueError where this network's experts are not to be dealt to ``balance_devices``."""
        if self._of_devices() or self.drop_capacity:
            device_size(model, self.balance_devices)

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
        model: Transformer,
        batch: dict[str, jax.Array],
        norm: dict[str, jax.Array],
        step: Int[Array, ""],
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The share of a microbatch in the batch's loss, and its parts; each part sums over microbatches."""
        batch = self._view(batch)
        use_mtp = bool(model.config.num_nextn_predict_layers) and self.mtp_weight > 0
        out = model(
            batch["tokens"],
            positions_BS=batch["positions"],
            segment_ids_BS=batch["segment_ids"],
            # Padding stands behind all that counts: order within the row is enough, and a plain causal kernel.
            visible=None if self.isolate else Visible.rows(),
            balancing=self._balancing(batch),
            mtp=use_mtp,
            head=False,
        )
        w_DW = model.head_weight()

        def part(hidden, ahead, count):
            weights_BS = _target_mask(batch, ahead) / count
            targets_BS = shift(batch["tokens"], ahead)
            return cross_entropy(hidden, w_DW, targets_BS, weights_BS, self.chunk, model.compute)

        with jax.named_scope("loss"):
            loss = ce = part(out.hidden, 1, norm["targets"])
            parts = {"ce": ce}
            if use_mtp:
                parts["mtp"] = part(out.mtp_hidden, 2, norm["mtp_targets"])
                weight = jnp.float32(self.mtp_weight)
                if self.mtp_late_from:
                    weight = jnp.where(step >= self.mtp_late_from, self.mtp_weight_late, weight)
                loss = loss + weight * parts["mtp"]
            if out.router is not None:
                parts["balance"] = jnp.sum(out.router.balance) / norm["sequences"]
                parts |= routed(model, out.router)
                loss = loss + self.balance_weight * parts["balance"]
                for name, weight in self._of_devices().items():
                    parts[name] = jnp.sum(getattr(out.router, name)) / norm["sequences"]
                    loss = loss + weight * parts[name]
                if self.drop_capacity:
                    parts["dropped"] = out.router.dropped
        return loss, parts

    def _of_devices(self):
        weights = {"device_balance": self.device_balance_weight, "communication": self.communication_weight}
        return {name: weight for name, weight in weights.items() if weight}

    def _balancing(self, batch):
        """None where the routers are asked for nothing beside what they always tell."""
        if not (self._of_devices() or self.drop_capacity):
            return None
        spared_BS = None
        if self.drop_capacity and self.drop_spared:
            spared_BS = spared_tokens(batch["tokens"], batch["segment_ids"], self.drop_spared)
        return Balancing(self.balance_devices, self.drop_capacity, spared_BS)

    def _view(self, batch):
        """Without isolation a row is one document, its padding left out."""
        if self.isolate:
            return batch
        segments = (batch["segment_ids"] > 0).astype(jnp.int32)
        positions = jnp.broadcast_to(jnp.arange(segments.shape[1], dtype=jnp.int32), segments.shape)
        return {**batch, "segment_ids": segments, "positions": positions}


def routed(model: Transformer, stats: RouterStats | None) -> dict[str, jax.Array]:
    """The routers' ``load`` (L E), where there are experts, and what was ``dropped`` (L) where they may drop."""
    if stats is None:
        return {}
    dropped = {"dropped": stats.dropped} if model.compute.dispatch != "gather" else {}
    return {"load": stats.load_E, **dropped}


def shift(x_BS: jax.Array, ahead: int) -> jax.Array:
    return jnp.pad(x_BS, ((0, 0), (0, ahead)))[:, ahead:]


def _target_mask(batch: dict[str, jax.Array], ahead: int) -> Float[Array, "B S"]:
    """1 where the token ``ahead`` of this one is to be predicted: it counts, and lies in the same segment."""
    segments = batch["segment_ids"]
    same = (segments == shift(segments, ahead)) & (segments > 0)
    return shift(batch["loss_mask"], ahead) * same
