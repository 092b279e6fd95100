"""Group relative policy optimisation (DeepSeekMath section 4.1, R1 section 2.1)."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from deepseek_jax.model.transformer import Transformer
from deepseek_jax.train.losses import shift
from deepseek_jax.train.scoring import score_tokens
from deepseek_jax.typed import check_least, check_types


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
    * ``dr_grpo``: over answers times the sampler's limit, a constant (Dr. GRPO);
    * ``dapo``: over all answer tokens of the batch (DAPO).
    """

    clip_low: float = 0.2
    """How far under 1 the policy's ratio still counts."""
    clip_high: float = 0.2
    """How far over 1 the policy's ratio still counts."""
    kl_weight: float = 0.0
    """Of the KL to the reference; 0: there is none."""
    normalise: Literal["grpo", "dr_grpo", "dapo"] = "grpo"
    """How tokens are averaged: within answers, then over them; by the sampler's limit; or over all of the batch."""
    mask_truncated: bool = False
    """Answers that hit the length limit count for nothing."""
    chunk: int = 128
    """Positions of a row whose logits are held at a time."""

    several_updates_need = ("old_logprobs",)

    def __post_init__(self) -> None:
        check_types(self)
        check_least(self, 1, "chunk")

    def normalisers(self, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        mask_BS = self._mask(batch)
        return {
            "tokens": jnp.maximum(jnp.sum(mask_BS), 1.0),
            "answers": jnp.maximum(jnp.sum(jnp.any(mask_BS > 0, axis=1)), 1.0),
        }

    def __call__(
        self,
        model: Transformer,
        batch: dict[str, jax.Array],
        norm: dict[str, jax.Array],
        step: Int[Array, ""],
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Rows are prompt and answer, padding behind them; ``loss_mask`` marks the answer.

        Beside the tokens: ``advantages``, ``truncated``, and the sampler's ``temperature`` and ``max_tokens`` (B 1);
        log-probabilities (B S) of each token, in its own column: ``sampler_logprobs``, ``old_logprobs`` of the policy
        before the batch's first update (absent where there is one update: it is the policy itself), and with a
        kl_weight ``reference_logprobs``.
        """
        del step
        scores, load_LE = score_tokens(model, batch, self.chunk)
        new_BS = scores.logprob_BS
        # Position i scores the token at i + 1; move every per-token input there.
        mask_BS = shift(self._mask(batch), 1)
        given = lambda name: shift(batch[name], 1)  # noqa: E731
        old_BS = given("old_logprobs") if "old_logprobs" in batch else jax.lax.stop_gradient(new_BS)
        advantage_B1 = batch["advantages"]
        ratio_BS = jnp.exp(jnp.where(mask_BS > 0, new_BS - old_BS, 0.0))
        clipped_BS = jnp.clip(ratio_BS, 1 - self.clip_low, 1 + self.clip_high)
        gain_BS = jnp.minimum(ratio_BS * advantage_B1, clipped_BS * advantage_B1)
        weight_BS = self._token_weights(mask_BS, batch, norm)
        mean = lambda x_BS: jnp.sum(x_BS * mask_BS) / norm["tokens"]  # noqa: E731
        loss = -jnp.sum(gain_BS * weight_BS)
        kl_BS = jnp.zeros_like(mask_BS)
        if self.kl_weight:
            kl_BS = k3(jnp.where(mask_BS > 0, given("reference_logprobs") - new_BS, 0.0))
            loss = loss + self.kl_weight * jnp.sum(kl_BS * weight_BS)
        sampler_BS = jnp.where(mask_BS > 0, given("sampler_logprobs") - old_BS, 0.0)
        parts = {
            "kl_sampler": mean(k3(sampler_BS)),
            "kl_reference": mean(kl_BS),
            "clip_fraction": mean((ratio_BS * advantage_B1 > gain_BS).astype(jnp.float32)),
            "entropy": mean(scores.entropy_BS),
        }
        if load_LE is not None:
            parts["load"] = load_LE
        return loss, parts

    def _mask(self, batch):
        mask_BS = batch["loss_mask"]
        return mask_BS * (1 - batch["truncated"]) if self.mask_truncated else mask_BS

    def _token_weights(self, mask_BS, batch, norm):
        if self.normalise == "dapo":
            return mask_BS / norm["tokens"]
        if self.normalise == "dr_grpo":
            return mask_BS / (norm["answers"] * batch["max_tokens"])
        return mask_BS / jnp.maximum(jnp.sum(mask_BS, axis=1, keepdims=True), 1.0) / norm["answers"]


def k3(log_ratio: jax.Array) -> jax.Array:
    """Estimates KL(π ‖ π_ref) from samples of π: ``r - log r - 1`` with ``r = π_ref / π``; never negative."""
    return jnp.expm1(log_ratio) - log_ratio
