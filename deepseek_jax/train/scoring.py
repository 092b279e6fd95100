"""Log-probabilities of a batch's tokens under a network: the old policy's, a reference's, later a teacher's."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from deepseek_jax.compute import ComputeConfig
from deepseek_jax.config import ModelConfig
from deepseek_jax.model import parameters
from deepseek_jax.model.transformer import Transformer
from deepseek_jax.parallel.processes import together
from deepseek_jax.parallel.sharding import ShardingRules, split_rows
from deepseek_jax.train.cross_entropy import TokenScores, score_targets
from deepseek_jax.train.losses import routed, shift
from deepseek_jax.train.reference import Reference
from deepseek_jax.train.state import TrainState
from deepseek_kernels import Visible

Batch = dict[str, jax.Array]


def score_tokens(model: Transformer, batch: Batch, chunk: int) -> tuple[TokenScores, dict[str, jax.Array]]:
    """The scores at position i of the token at i + 1, and what ``losses.routed`` says of the routers.

    Where the batch has them, ``temperature`` (B 1) divides the logits, as the sampler's did, and ``experts`` (B S L K)
    are those that each MoE layer takes, -1 leaving the choice to its router. ``answer_tokens``: rows hold several
    answers, each a segment that sees itself alone.
    """
    experts_BSLK = batch.get("experts")
    out = model(
        batch["tokens"],
        positions_BS=batch["positions"],
        segment_ids_BS=batch["segment_ids"],
        # A row of one prompt and answer, with padding behind: order within it is enough, and a plain causal kernel.
        visible=Visible.rows(batch["segment_ids"] if "answer_tokens" in batch else None),
        chosen_LBSK=None if experts_BSLK is None else jnp.moveaxis(experts_BSLK, 2, 0),
        head=False,
    )
    scores = score_targets(
        out.hidden,
        model.head_weight(),
        shift(batch["tokens"], 1),
        chunk=chunk,
        temperature_B1=batch.get("temperature"),
        compute=model.compute,
    )
    return scores, routed(model, out.router)


def score_batch(model: Transformer, batch: Batch, *, chunk: int, microbatches: int = 1) -> Float[Array, "B S"]:
    """Each token's log-probability in its own column, 0 in the first; ``microbatches`` parts, one after another."""

    def score(rows):
        return jnp.pad(score_tokens(model, rows, chunk)[0].logprob_BS, ((0, 0), (1, 0)))[:, :-1]

    read = ("tokens", "positions", "segment_ids", "temperature", "experts", "answer_tokens")
    return in_parts(score, {name: batch[name] for name in read if name in batch}, microbatches, model.compute.rules)


def in_parts(
    score: Callable[[Batch], jax.Array], batch: Batch, microbatches: int, rules: ShardingRules
) -> Float[Array, "B S"]:
    """What ``score`` makes of the rows, so many parts of them one after another."""
    if microbatches == 1:
        return score(batch)
    parts = jax.lax.map(score, split_rows(batch, microbatches, rules, "step.microbatches"))
    return jnp.swapaxes(parts, 0, 1).reshape(batch["tokens"].shape)


class Scorer:
    """Adds to a rollout's batch what its loss compares the policy with.

    Args:
      old: add ``old_logprobs``, the policy's before the batch's updates: needed where there is more than one.
      reference: add its ``reference_logprobs``, by its own routing.
    """

    def __init__(
        self,
        config: ModelConfig,
        compute: ComputeConfig,
        *,
        chunk: int,
        microbatches: int = 1,
        old: bool = False,
        reference: Reference | None = None,
    ):
        self.old, self.reference = old, reference

        def score(compute, params, router_bias, batch):
            network = parameters.merge(config, params, router_bias, compute)
            return score_batch(network, batch, chunk=chunk, microbatches=microbatches)

        def compiled(compute: ComputeConfig) -> Callable[..., jax.Array]:
            return together(jax.jit(functools.partial(score, compute)))

        # The old policy drops what the learner does; a reference is a measure.
        self._score = compiled(compute)
        self._measure = self._score if compute.exact == compute else compiled(compute.exact)

    def __call__(self, state: TrainState, batch: Batch) -> Batch:
        found = {}
        if self.old:
            found["old_logprobs"] = self._score(state.params, state.router_bias, batch)
        if self.reference is not None:
            own = {name: value for name, value in batch.items() if name != "experts"}
            found["reference_logprobs"] = self._measure(self.reference.params, self.reference.router_bias, own)
        return batch | found
