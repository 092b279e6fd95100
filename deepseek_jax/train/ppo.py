"""Proximal policy optimisation (Schulman et al., 2017) beside GRPO: a critic, a network of its own with a scalar head
on the policy's body, says what each token was worth. The policy's own loss is ``GRPOLoss``.

For token t of an answer, with reward r_t, value V_t of what stands before it, both 0 behind the last token:

    δ_t = r_t + γ V_{t+1} - V_t
    A_t = δ_t + γ λ A_{t+1}                                     generalised advantage estimation
    R_t = A_t + V_t                                             what the critic learns
    r_t = the answer's reward at its last token, a step's at its end, each less kl_reward · (log π_old - log π_ref)
    value loss = mean over tokens of ½ max((V - R)², (clip(V, V_old ± value_clip) - R)²)

The policy gets (A - mean) / std over the batch's tokens, if ``whiten``. Values and advantages are those before the
batch's first update.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from deepseek_jax.compute import ComputeConfig
from deepseek_jax.config import ModelConfig
from deepseek_jax.model import parameters
from deepseek_jax.model.scores import scoring, with_scores
from deepseek_jax.model.transformer import Transformer
from deepseek_jax.train.losses import routed
from deepseek_jax.train.optimizer import OptimizerConfig, make_optimizer
from deepseek_jax.train.scoring import in_parts
from deepseek_jax.train.state import TrainState, abstract_state, create_state
from deepseek_jax.train.step import Batch, Step, StepConfig, make_step
from deepseek_jax.typed import check_types
from deepseek_kernels import Visible


@dataclasses.dataclass(frozen=True)
class CriticConfig:
    """How values are learnt, and advantages made of them."""

    gamma: float = 1.0
    """γ: what a token's reward is worth one token earlier."""
    gae_lambda: float = 1.0
    """λ: 1 trusts what was rewarded, 0 the next token's value. On mathematics R1's authors found 0.95 much worse."""
    value_clip: float = 0.2
    """How far a value may move from the one before the batch's updates and still learn; 0: any way."""
    kl_reward: float = 0.0
    """Of the log-probability over the reference's, taken off each token's reward; 0: nothing, and loss.kl_weight is
    the other place for it."""
    whiten: bool = True
    """Advantages less their mean over the batch's tokens, divided by their standard deviation."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """Of the critic; its schedule counts updates as the policy's does."""

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("gamma", "gae_lambda"):
            if getattr(self, name) > 1:
                raise ValueError(f"{name}={getattr(self, name)}: must lie in [0, 1]")


@struct.dataclass
class ActorCritic(TrainState):
    """The policy's state, and the critic's."""

    critic: Any = None


def advantages(
    values_BS: Float[Array, "B S"], batch: Batch, *, gamma: float, gae_lambda: float, kl_reward: float = 0.0
) -> Float[Array, "B S"]:
    """A_t of each answer's tokens, 0 elsewhere, from the values in their columns.

    The batch's ``advantages`` are here returns to go, Σ r from the token on (``rollout.advantage="return"``), so that
    r_t is the difference to that of the answer's next token. Tokens of a segment that the policy did not write, as a
    tool's, are passed over.
    """
    mask_BS, segments_BS = batch["loss_mask"], batch["segment_ids"]
    to_go_BS = jnp.broadcast_to(batch["advantages"], mask_BS.shape)
    cost_BS = jnp.zeros_like(mask_BS)
    if kl_reward:
        cost_BS = kl_reward * (batch["old_logprobs"] - batch["reference_logprobs"])
    goes_on_BS = jnp.pad(segments_BS[:, 1:] == segments_BS[:, :-1], ((0, 0), (0, 1)))

    def back(following, now):
        value_B, to_go_B, cost_B, mask_B, goes_on_B = now
        next_A_B, next_value_B, next_to_go_B = (jnp.where(goes_on_B, x, 0.0) for x in following)
        reward_B = to_go_B - next_to_go_B - cost_B
        A_B = reward_B + gamma * next_value_B - value_B + gamma * gae_lambda * next_A_B
        there = mask_B > 0
        kept = [(A_B, next_A_B), (value_B, next_value_B), (to_go_B, next_to_go_B)]
        return tuple(jnp.where(there, new, old) for new, old in kept), jnp.where(there, A_B, 0.0)

    columns = [jnp.swapaxes(x, 0, 1) for x in (values_BS, to_go_BS, cost_BS, mask_BS, goes_on_BS)]
    nothing = (jnp.zeros(len(mask_BS), jnp.float32),) * 3
    _, A_SB = jax.lax.scan(back, nothing, tuple(columns), reverse=True)
    return jnp.swapaxes(A_SB, 0, 1)


def values(critic: Transformer, batch: Batch) -> tuple[Float[Array, "B S"], dict[str, jax.Array]]:
    """V of what stands before each token, in the token's column (0 in the first), and ``losses.routed``."""
    out = critic(
        batch["tokens"],
        positions_BS=batch["positions"],
        segment_ids_BS=batch["segment_ids"],
        visible=Visible.rows(batch["segment_ids"] if "answer_tokens" in batch else None),
    )
    assert out.scores is not None
    return jnp.pad(out.scores[:, :-1, 0], ((0, 0), (1, 0))), routed(critic, out.router)


@dataclasses.dataclass(frozen=True)
class ValueLoss:
    """The critic's, see the head of the module; a batch holds ``values`` before its updates, and ``returns``."""

    value_clip: float = 0.2

    def normalisers(self, batch: Batch) -> Batch:
        return {"tokens": jnp.maximum(jnp.sum(batch["loss_mask"]), 1.0)}

    def __call__(
        self, model: Transformer, batch: Batch, norm: Batch, step: Int[Array, ""]
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        del step
        new_BS, routing = values(model, batch)
        old_BS, returns_BS = batch["values"], batch["returns"]
        error_BS = jnp.square(new_BS - returns_BS)
        clipped_BS = jnp.zeros_like(error_BS)
        if self.value_clip:
            near_BS = old_BS + jnp.clip(new_BS - old_BS, -self.value_clip, self.value_clip)
            clipped_BS = jnp.square(near_BS - returns_BS)
        mean = lambda x_BS: jnp.sum(x_BS * batch["loss_mask"]) / norm["tokens"]  # noqa: E731
        parts = {"clip_fraction": mean((clipped_BS > error_BS).astype(jnp.float32))}
        return 0.5 * mean(jnp.maximum(error_BS, clipped_BS)), parts | routing


def with_critic(
    policy_step: Step,
    state: TrainState,
    config: ModelConfig,
    critic: CriticConfig,
    options: StepConfig,
    *,
    steps: int,
    epochs: int = 1,
    minibatches: int = 1,
    compute: ComputeConfig,
    mesh: Mesh,
) -> tuple[Step, ActorCritic]:
    """The pure step ``(state, batch) -> (state, metrics)`` of both, and their state.

    policy_step, state: the policy's alone. Its parameters give the critic's body; where they are shapes, as for a run
    that goes on, so are the critic's. steps: how many the schedules are made for.
    """
    value_config = scoring(config, 1)
    optimizer = make_optimizer(critic.optimizer, value_config, steps * epochs * minibatches)
    if isinstance(state.step, jax.ShapeDtypeStruct):
        learner = abstract_state(value_config, optimizer, mesh, compute=compute)
    else:
        _, params, bias = with_scores(config, state.params, state.router_bias, 1)
        learner = create_state(value_config, optimizer, mesh, compute=compute, params=params, router_bias=bias)
    learn = make_step(
        value_config,
        ValueLoss(critic.value_clip),
        optimizer,
        dataclasses.replace(options, ema_decay=0.0),
        compute=compute,
        epochs=epochs,
        minibatches=minibatches,
    )
    judge = functools.partial(judged, value_config, critic, options.microbatches, compute)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        assert isinstance(state, ActorCritic)
        batch, about = judge(state.critic, batch)
        new, metrics = policy_step(state, batch)
        learner, learnt = learn(state.critic, batch)
        finite = jnp.minimum(metrics["finite"], learnt["finite"])
        names = {"loss": "value_loss", "clip_fraction": "value_clip_fraction", "grad_norm": "value_grad_norm"}
        told = {name: learnt[of] for of, name in names.items()}
        return dataclasses.replace(new, critic=learner), metrics | told | about | {"finite": finite}

    fields = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    return step, ActorCritic(**fields, critic=learner)


def judged(
    config: ModelConfig,
    critic: CriticConfig,
    microbatches: int,
    compute: ComputeConfig,
    state: TrainState,
    batch: Batch,
) -> tuple[Batch, dict[str, jax.Array]]:
    """The batch with its ``values`` and ``returns``, and the advantages that the policy learns from."""
    network = parameters.merge(config, state.params, state.router_bias, compute)
    read = {name: batch[name] for name in ("tokens", "positions", "segment_ids", "answer_tokens") if name in batch}
    values_BS = in_parts(lambda rows: values(network, rows)[0], read, microbatches, compute.rules)
    how = {"gamma": critic.gamma, "gae_lambda": critic.gae_lambda, "kl_reward": critic.kl_reward}
    A_BS = advantages(values_BS, batch, **how)
    mask_BS, returns_BS = batch["loss_mask"], A_BS + values_BS
    total = jnp.maximum(jnp.sum(mask_BS), 1.0)
    mean = lambda x_BS: jnp.sum(x_BS * mask_BS) / total  # noqa: E731
    spread = lambda x_BS: mean(jnp.square(x_BS - mean(x_BS)))  # noqa: E731
    about = {
        "value": mean(values_BS),
        "return": mean(returns_BS),
        "explained_variance": 1 - spread(A_BS) / jnp.maximum(spread(returns_BS), 1e-9),
    }
    batch = batch | {"values": values_BS, "returns": returns_BS}
    if critic.whiten:
        A_BS = mask_BS * (A_BS - mean(A_BS)) * jax.lax.rsqrt(spread(A_BS) + 1e-8)
    return batch | {"advantages": A_BS}, about
