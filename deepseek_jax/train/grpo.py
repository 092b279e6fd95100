"""Group relative policy optimisation (DeepSeekMath section 4.1, R1 section 2.1)."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from deepseek_jax.config import check_types
from deepseek_jax.model.transformer import Transformer
from deepseek_jax.train.losses import score_targets, shift


def group_advantages(rewards_PG: Float[Array, "P G"], *, scale: Literal["std", "none"] = "std") -> Float[Array, "P G"]:
    """``(r - mean) / std`` within each prompt's group of G answers; zero for a group whose rewards are all equal.

    The standard deviation is the population's. ``none`` leaves the division out (Dr. GRPO).
    """
    centred = rewards_PG - jnp.mean(rewards_PG, axis=1, keepdims=True)
    if scale == "none":
        return centred
    std = jnp.std(rewards_PG, axis=1, keepdims=True)
    signal = std > 1e-6  # rewards that are equal but for rounding carry no signal
    return jnp.where(signal, centred / jnp.where(signal, std, 1.0), 0.0)


@dataclasses.dataclass(frozen=True)
class GRPOLoss:
    """The clipped policy gradient, with the KL to a reference policy in the loss.

    Per answer token, with ``ρ = π / π_old`` and advantage A: ``-min(ρ A, clip(ρ, 1-clip_low, 1+clip_high) A) +
    kl_weight · k3``, where ``k3 = π_ref/π - log(π_ref/π) - 1``. Tokens are averaged

    * ``grpo``: within each answer, then over answers (DeepSeekMath equation 3);
    * ``dr_grpo``: over answers times ``max_length``, a constant (Dr. GRPO);
    * ``dapo``: over all answer tokens of the batch (DAPO).

    mask_truncated: answers that hit the length limit count for nothing. kl_weight 0: no reference is kept.
    temperature: the sampler's. chunk: positions whose logits are held at a time.
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    kl_weight: float = 0.0
    normalise: Literal["grpo", "dr_grpo", "dapo"] = "grpo"
    max_length: int = 32
    mask_truncated: bool = False
    temperature: float = 1.0
    chunk: int = 128

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("clip_low", "clip_high", "kl_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: must not be negative")
        if self.max_length < 1 or self.chunk < 1 or self.temperature <= 0:
            raise ValueError(
                f"max_length={self.max_length}, chunk={self.chunk}, temperature={self.temperature}: must be positive"
            )

    def normalisers(self, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        mask_BS = self._mask(batch)
        return {
            "tokens": jnp.maximum(jnp.sum(mask_BS), 1.0),
            "answers": jnp.maximum(jnp.sum(jnp.any(mask_BS > 0, axis=1)), 1.0),
        }

    def __call__(
        self,
        model: Transformer,
        state: Any,
        batch: dict[str, jax.Array],
        norm: dict[str, jax.Array],
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Rows are prompt and answer; ``loss_mask`` marks the answer. Beside the tokens: ``advantages`` (B, 1),
        ``old_logprobs`` (B S) of each token under the policy that sampled it, ``truncated`` (B, 1)."""
        scores, load_LE = self._score(model, batch)
        # Position i scores the token at i + 1; move every per-token input there.
        mask_BS = shift(self._mask(batch), 1)
        old_BS = shift(batch["old_logprobs"], 1)
        advantage_B1 = batch["advantages"]
        log_ratio_BS = jnp.where(mask_BS > 0, scores.logprob_BS - old_BS, 0.0)
        ratio_BS = jnp.exp(log_ratio_BS)
        clipped_BS = jnp.clip(ratio_BS, 1 - self.clip_low, 1 + self.clip_high)
        gain_BS = jnp.minimum(ratio_BS * advantage_B1, clipped_BS * advantage_B1)
        weight_BS = self._token_weights(mask_BS, norm)
        mean = lambda x_BS: jnp.sum(x_BS * mask_BS) / norm["tokens"]  # noqa: E731
        loss = -jnp.sum(gain_BS * weight_BS)
        kl_BS = jnp.zeros_like(mask_BS)
        if self.kl_weight:
            reference, _ = self._score(state.reference, batch)
            kl_BS = k3(jax.lax.stop_gradient(reference.logprob_BS) - scores.logprob_BS)
            loss = loss + self.kl_weight * jnp.sum(kl_BS * weight_BS)
        outside = (ratio_BS * advantage_B1) > gain_BS
        parts = {
            "kl_sampler": mean(k3(-log_ratio_BS)),
            "kl_reference": mean(kl_BS),
            "clip_fraction": mean(outside.astype(jnp.float32)),
            "entropy": mean(scores.entropy_BS),
        }
        if load_LE is not None:
            parts["load"] = load_LE
        return loss, parts

    def _score(self, model, batch):
        out = model(batch["tokens"], positions_BS=batch["positions"], segment_ids_BS=batch["segment_ids"], head=False)
        scores = score_targets(
            out.hidden,
            model.head_weight(),
            shift(batch["tokens"], 1),
            chunk=self.chunk,
            temperature=self.temperature,
        )
        return scores, None if out.router is None else out.router.load_E

    def _mask(self, batch):
        mask_BS = batch["loss_mask"]
        return mask_BS * (1 - batch["truncated"]) if self.mask_truncated else mask_BS

    def _token_weights(self, mask_BS, norm):
        if self.normalise == "dapo":
            return mask_BS / norm["tokens"]
        if self.normalise == "dr_grpo":
            return mask_BS / (norm["answers"] * self.max_length)
        return mask_BS / jnp.maximum(jnp.sum(mask_BS, axis=1, keepdims=True), 1.0) / norm["answers"]


def k3(log_ratio: jax.Array) -> jax.Array:
    """Estimates KL(π ‖ π_ref) from samples of π: ``r - log r - 1`` with ``r = π_ref / π``; never negative."""
    return jnp.expm1(log_ratio) - log_ratio
