"""Group relative policy optimisation (DeepSeekMath section 4.1, R1 section 2.1) and its relatives, as one loss.

For token t of answer o_i, with its advantage A and no gradient through sg(·):

    loss = mean( -w · gain + kl_weight · k3 ),  k3 = π_ref/π - log(π_ref/π) - 1
    gain = min(ρ A, clip(ρ) A)                  objective="clip", where clip(ρ) = clip(ρ, 1-clip_low, 1+clip_high)
           sg(clip(ρ)) A log π                  objective="cispo"
    ρ    = π / π_old of the token               ratio="token"
           (Π_t π / π_old)^(1/|o_i|)            ratio="sequence"; a token's gradient is its own share of it
    w    = min(π_old / π_sampler, tis_cap)      no gradient; 1 where tis_cap is 0
    A    = (r_i - mean(r)) / std(r)             rollout.advantage="std": r are the rewards of the prompt's group
           r_i - mean(r)                        "none"
           r_i - mean of the others             "leave_one_out"
           r_i                                  "return"; PPO's critic then makes A of it (train/ppo.py)
           … + Σ r̃ of steps that end at t on    where a reward is of steps (rl/advantages.py)
    mean = 1/N Σ_i 1/|o_i| Σ_t                  normalise="grpo", over the N answers
           1/N Σ_i 1/max_tokens Σ_t             normalise="dr_grpo": a constant, the sampler's limit
           1/Σ_i |o_i| Σ_i Σ_t                  normalise="dapo"
           1/N Σ_i Σ_t                          normalise="rloo"

π_old is the policy before the batch's updates; where there is one update, π itself, so that ρ = 1 and nothing is
clipped. What the papers set, where it differs from the defaults:

================================== ================================================ =============================
paper                              ``loss.``                                        ``rollout.`` and the run's
================================== ================================================ =============================
GRPO, outcome: DeepSeekMath 4.1.2  kl_weight=0.04                                   group=64
GRPO, process: DeepSeekMath 4.1.3  kl_weight=0.04                                   a reward of steps
GRPO, iterative: its algorithm 1   kl_weight=0.04                                   reference_every, inner_epochs
R1-Zero: 2501.12948                kl_weight=0.001                                  prompts=512, group=16,
                                                                                    minibatches=16, and every 400
                                                                                    updates reference_every=25
R1, first stage                    kl_weight=0.001, clip_low=10, clip_high=10       the same
Dr. GRPO: 2503.20783               normalise="dr_grpo"                              advantage="none"
DAPO: 2503.14476                   normalise="dapo", clip_high=0.28                 resample,
                                                                                    overlong_buffer=4096
DAPO's overlong filtering          mask_truncated
GSPO: 2507.18071                   ratio="sequence", clip_low=3e-4, clip_high=4e-4  minibatches=4
CISPO: MiniMax-M1, 2506.13585      objective="cispo", normalise="dapo", clip_low=1  minibatches
RLOO: 2402.14740                   normalise="rloo"                                 advantage="leave_one_out"
truncated importance weights (TIS) tis_cap=2
routing replay (R3): 2510.11370                                                     replay_routing
================================== ================================================ =============================

(With clip_low=1 CISPO's weight has no lower bound; its clip_high is to be tuned. R1 writes ρ of whole answers,
without a power: its trainer is not published, and DeepSeekMath's ρ of tokens is taken.)
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from deepseek_jax.model.router import segment_bounds
from deepseek_jax.model.transformer import Transformer
from deepseek_jax.train.losses import shift
from deepseek_jax.train.scoring import score_tokens
from deepseek_jax.typed import check_least, check_types

Scale = Literal["std", "none", "leave_one_out", "return"]


def group_advantages(rewards_PG: Float[Array, "P G"], *, scale: Scale = "std") -> Float[Array, "P G"]:
    """What each of a prompt's G answers earned beyond its group; zero for a group whose rewards are all equal.

    ``std``: ``(r - mean) / std``, the population's (GRPO); ``none``: ``r - mean`` (Dr. GRPO); ``leave_one_out``: ``r``
    less the mean of the others, ``G/(G-1) (r - mean)`` (RLOO); ``return``: ``r``.
    """
    if scale == "return":
        return rewards_PG
    centred = rewards_PG - jnp.mean(rewards_PG, axis=1, keepdims=True)
    if scale == "none":
        return centred
    if scale == "leave_one_out":
        group = rewards_PG.shape[1]
        return centred * (group / max(group - 1, 1))
    std = jnp.std(rewards_PG, axis=1, keepdims=True)
    signal = std > 1e-6  # rewards that are equal but for rounding carry no signal
    return jnp.where(signal, centred / jnp.where(signal, std, 1.0), 0.0)


@dataclasses.dataclass(frozen=True)
class GRPOLoss:
    """The policy gradient of answers in groups, GRPO's or a relative's, with the KL to a reference policy in the loss.

    The formulas, and what each paper sets, stand at the head of the module.
    """

    objective: Literal["clip", "cispo"] = "clip"
    """What is clipped: the gain of a token, which then teaches nothing, or its weight (CISPO)."""
    ratio: Literal["token", "sequence"] = "token"
    """Of the policy to the old one: each token's, or the geometric mean of the answer's (GSPO)."""
    clip_low: float = 0.2
    """How far under 1 the policy's ratio still counts."""
    clip_high: float = 0.2
    """How far over 1 the policy's ratio still counts."""
    kl_weight: float = 0.0
    """Of the KL to the reference; 0: there is none."""
    normalise: Literal["grpo", "dr_grpo", "dapo", "rloo"] = "grpo"
    """How tokens are averaged: within answers, then over them; by the sampler's limit; over all of the batch; or summed
    within answers."""
    mask_truncated: bool = False
    """Answers that hit the length limit count for nothing."""
    tis_cap: float = 0.0
    """The most that a token's weight, the learner's probability over the sampler's, may be; 0: it has none."""
    chunk: int = 128
    """Positions of a row whose logits are held at a time."""

    several_updates_need = ("old_logprobs",)

    def __post_init__(self) -> None:
        check_types(self)
        check_least(self, 1, "chunk")

    def normalisers(self, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        mask_BS = self._mask(batch)
        if "answer_tokens" in batch:
            answers = jnp.round(jnp.sum(mask_BS / jnp.maximum(batch["answer_tokens"], 1.0)))
        else:
            answers = jnp.sum(jnp.any(mask_BS > 0, axis=1))
        return {"tokens": jnp.maximum(jnp.sum(mask_BS), 1.0), "answers": jnp.maximum(answers, 1.0)}

    def __call__(
        self,
        model: Transformer,
        batch: dict[str, jax.Array],
        norm: dict[str, jax.Array],
        step: Int[Array, ""],
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Rows are prompt and answer, padding behind them; ``loss_mask`` marks the answer.

        Beside the tokens: ``advantages``, of answers (B 1) or of each token (B S); ``truncated``, and the sampler's
        ``temperature`` and ``max_tokens`` (B 1); log-probabilities (B S) of each token, in its own column:
        ``sampler_logprobs``, ``old_logprobs`` of the policy before the batch's first update (absent where there is one
        update: it is the policy itself), and with a kl_weight ``reference_logprobs``; and ``experts`` (B S L K) to
        take in each MoE layer, where routing is replayed.

        Rows may hold several prompts and answers, a segment each: then ``answer_tokens`` (B S) is the number of tokens
        of the answer that a token belongs to, and ``advantages`` and ``truncated`` are of tokens.
        """
        del step
        scores, routing = score_tokens(model, batch, self.chunk)
        new_BS = scores.logprob_BS
        # Position i scores the token at i + 1; move every per-token input there.
        mask_BS = shift(self._mask(batch), 1)
        given = lambda name: shift(batch[name], 1)  # noqa: E731
        old_BS = given("old_logprobs") if "old_logprobs" in batch else jax.lax.stop_gradient(new_BS)
        advantage_BX = given("advantages") if batch["advantages"].shape[1] > 1 else batch["advantages"]
        length_BX = given("answer_tokens") if "answer_tokens" in batch else jnp.sum(mask_BS, axis=1, keepdims=True)
        length_BX = jnp.maximum(length_BX, 1.0)
        log_BS = jnp.where(mask_BS > 0, new_BS - old_BS, 0.0)
        if self.ratio == "sequence":
            mean_BX = jax.lax.stop_gradient(_answer_sum(log_BS, batch) / length_BX)
            log_BS = mean_BX + (log_BS - jax.lax.stop_gradient(log_BS))
        gain_BS, clipped_BS = self._gain(jnp.exp(log_BS), advantage_BX, new_BS)
        weight_BS = self._token_weights(mask_BS, length_BX, batch, norm)
        mean = lambda x_BS: jnp.sum(x_BS * mask_BS) / norm["tokens"]  # noqa: E731
        sampler_BS = jnp.where(mask_BS > 0, given("sampler_logprobs") - old_BS, 0.0)
        parts = {}
        if self.tis_cap:
            off_BS = jnp.exp(-sampler_BS)
            gain_BS = gain_BS * jnp.minimum(off_BS, self.tis_cap)
            parts["tis_capped"] = mean((off_BS > self.tis_cap).astype(jnp.float32))
        loss = -jnp.sum(gain_BS * weight_BS)
        kl_BS = jnp.zeros_like(mask_BS)
        if self.kl_weight:
            kl_BS = k3(jnp.where(mask_BS > 0, given("reference_logprobs") - new_BS, 0.0))
            loss = loss + self.kl_weight * jnp.sum(kl_BS * weight_BS)
        parts |= {
            "kl_sampler": mean(k3(sampler_BS)),
            "kl_reference": mean(kl_BS),
            "clip_fraction": mean(clipped_BS.astype(jnp.float32)),
            "entropy": mean(scores.entropy_BS),
        }
        return loss, parts | routing

    def _gain(self, ratio_BS, advantage_BX, new_BS):
        """What each token adds to the objective, and whether it was clipped."""
        bounded_BS = jnp.clip(ratio_BS, 1 - self.clip_low, 1 + self.clip_high)
        if self.objective == "cispo":
            return jax.lax.stop_gradient(bounded_BS) * advantage_BX * new_BS, bounded_BS != ratio_BS
        gain_BS = jnp.minimum(ratio_BS * advantage_BX, bounded_BS * advantage_BX)
        return gain_BS, ratio_BS * advantage_BX > gain_BS

    def _mask(self, batch):
        mask_BS = batch["loss_mask"]
        return mask_BS * (1 - batch["truncated"]) if self.mask_truncated else mask_BS

    def _token_weights(self, mask_BS, length_BX, batch, norm):
        if self.normalise == "dapo":
            return mask_BS / norm["tokens"]
        if self.normalise == "dr_grpo":
            return mask_BS / (norm["answers"] * batch["max_tokens"])
        if self.normalise == "rloo":
            return mask_BS / norm["answers"]
        return mask_BS / length_BX / norm["answers"]


def _answer_sum(x_BS: jax.Array, batch: dict[str, jax.Array]) -> jax.Array:
    """At each position i the sum over the answer of token i + 1, which is its row's, or where rows hold several, its
    segment's."""
    if "answer_tokens" not in batch:
        return jnp.sum(x_BS, axis=1, keepdims=True)
    first_BS, end_BS = segment_bounds(shift(batch["segment_ids"], 1))
    before_BS = jnp.pad(jnp.cumsum(x_BS, axis=1), ((0, 0), (1, 0)))
    return jnp.take_along_axis(before_BS, end_BS, axis=1) - jnp.take_along_axis(before_BS, first_BS, axis=1)


def k3(log_ratio: jax.Array) -> jax.Array:
    """Estimates KL(π ‖ π_ref) from samples of π: ``r - log r - 1`` with ``r = π_ref / π``; never negative."""
    return jnp.expm1(log_ratio) - log_ratio
