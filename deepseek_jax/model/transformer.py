"""The whole network: embedding, dense layers, MoE layers, norm, head, and the MTP module, each callable by itself."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, struct
from jaxtyping import Array, Float, Int

from deepseek_jax.compute import ComputeConfig
from deepseek_jax.config import ModelConfig
from deepseek_jax.model.block import Block, Context
from deepseek_jax.model.dropping import Balancing
from deepseek_jax.model.fresh import Together
from deepseek_jax.model.layers import Linear, RMSNorm, RouterBias, param
from deepseek_jax.model.mtp import MTP, mtp_segments
from deepseek_jax.model.rope import rotary_tables
from deepseek_jax.model.router import RouterStats
from deepseek_jax.model.stack import (
    count_layers,
    in_stack,
    layers_between,
    rematerialised,
    stacks_of,
    weights_of_layer,
)
from deepseek_jax.parallel.context import RowOrder, numbered
from deepseek_jax.parallel.sharding import constrain
from deepseek_jax.parallel.table import rows_of_table
from deepseek_kernels import Visible, look_up, product


@struct.dataclass
class ModelOutput:
    """What a forward pass returns; nothing is sown, so nothing is lost.

    logits: (B S W) float32, or None where the caller applies the head itself; scores: (B S num_labels) float32 in
    their place where the network has a head of these. hidden: (B S D) after the final norm.
    mtp_hidden: (B S D), the head's input for the token after the next. router: statistics per MoE layer, L first, the
    MTP module's last. memories: those given, with the new tokens.
    """

    logits: jax.Array | None
    hidden: jax.Array
    mtp_hidden: jax.Array | None
    router: RouterStats | None
    memories: Any
    scores: jax.Array | None = None


class Transformer(nnx.Module):
    """A DeepSeek network.

    >>> model = Transformer(ModelConfig(), rngs=nnx.Rngs(0))
    >>> model(jnp.zeros((1, 8), jnp.int32)).logits.shape
    (1, 8, 512)

    Layers of a kind are stacked and scanned; with ``stacked=False`` they are modules of their own, one after the other,
    as a sampler wants them. ``router_bias`` (L E) has a row for each MoE layer and one for MTP.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        rngs: nnx.Rngs,
        compute: ComputeConfig = ComputeConfig(),
        stacked: bool = True,
    ):
        self.config, self.compute = config, compute
        D, W = config.hidden_size, config.vocab_size
        together = Together(rngs)
        self.embed = param(config, compute, together, (W, D), ("vocab", "embed"))
        kinds = [False] * config.num_dense_layers + [True] * config.num_moe_layers
        if stacked:
            self.dense_layers = _stack(config, compute, config.num_dense_layers, moe=False, rngs=together)
            self.moe_layers = _stack(config, compute, config.num_moe_layers, moe=True, rngs=together)
            self.layers = None
        else:
            self.layers = nnx.List([Block(config, compute, moe=moe, rngs=together) for moe in kinds])
        self.norm = RMSNorm(config, compute, D, "embed")
        headless = config.tie_word_embeddings or config.num_labels
        self.head = None if headless else Linear(config, compute, (D, W), ("embed", "vocab"), rngs=together)
        scores = (D, config.num_labels)
        self.score = Linear(config, compute, scores, ("embed", None), rngs=together) if config.num_labels else None
        self.mtp = MTP(config, compute, rngs=together) if config.num_nextn_predict_layers else None
        zeros = jnp.zeros((config.num_routers, config.n_routed_experts), jnp.float32)
        self.router_bias = RouterBias(zeros) if config.has_router_bias else None
        self.source: str | None = None  # the folder it was loaded from: save_hf copies the tokenizer there
        together.draw(self)

    def __call__(
        self,
        tokens_BS: Int[Array, "B S"],
        *,
        positions_BS: Int[Array, "B S"] | None = None,
        segment_ids_BS: Int[Array, "B S"] | None = None,
        visible: Visible | None = None,
        memories: Any = None,
        chosen_LBSK: Int[Array, "L B S K"] | None = None,
        absorbed: bool = False,
        balancing: Balancing | None = None,
        mtp: bool = False,
        head: bool = True,
    ) -> ModelOutput:
        """Run the network on rows of tokens.

        Args:
          positions_BS, segment_ids_BS, visible: see ``context``.
          memories, chosen_LBSK, absorbed: see ``run_layers``.
          balancing: what a loss asks of the routers (training).
          mtp: run the MTP module too (training); not with memories.
          head: compute logits, or scores.

        ValueError for tokens that are no array (B, S).
        """
        if getattr(tokens_BS, "ndim", None) != 2:
            shape = getattr(tokens_BS, "shape", type(tokens_BS).__name__)
            raise ValueError(f"tokens {shape}: expected an array (B, S), rows of token ids")
        context = self.context(tokens_BS, positions_BS=positions_BS, segment_ids_BS=segment_ids_BS, visible=visible)
        context = dataclasses.replace(context, balancing=balancing)
        order = RowOrder(self.compute.rules)
        if memories is None and not absorbed:
            order = RowOrder.of(self.compute.rules, context.visible, tokens_BS.shape)
        if chosen_LBSK is not None:
            chosen_LBSK = order.spread(chosen_LBSK, axis=2)
        main = None if chosen_LBSK is None else chosen_LBSK[: self.config.num_moe_layers]
        x, stats, memories = self.run_layers(
            self.embedded(order.spread(tokens_BS)),
            _in(order, context),
            memories=memories,
            chosen_LBSK=main,
            absorbed=absorbed,
        )
        hidden, mtp_hidden = self.norm(x), None
        if mtp:
            if self.mtp is None or memories is not None:
                raise ValueError("mtp=True needs num_nextn_predict_layers=1 and no memories")
            chosen_BSK = None if chosen_LBSK is None else chosen_LBSK[self.config.num_moe_layers]
            # A row's last token has no next one and counts as padding.
            following_BS = order.spread(jnp.roll(tokens_BS, -1, axis=1))
            ahead = _in(order, dataclasses.replace(context, segment_ids_BS=mtp_segments(context.segment_ids_BS)))
            mtp_hidden, mtp_stats, _ = self.predict_next(hidden, following_BS, ahead, chosen_BSK=chosen_BSK)
            mtp_hidden = order.back(mtp_hidden)
            stats = joined([stats, jax.tree.map(lambda leaf: leaf[None], mtp_stats)])
        hidden = order.back(hidden)
        if stats is not None:
            stats = dataclasses.replace(stats, experts_BSK=order.back(stats.experts_BSK, axis=2))
        speaks = head and self.score is None
        logits, scores = self.logits(hidden) if speaks else None, None if speaks or not head else self.scores(hidden)
        return ModelOutput(logits, hidden, mtp_hidden, stats, memories, scores)

    # The phases, which a pipeline stage, a cached decode and speculation put together in their own ways.

    def context(
        self,
        tokens_BS: Int[Array, "B S"],
        *,
        positions_BS: Int[Array, "B S"] | None = None,
        segment_ids_BS: Int[Array, "B S"] | None = None,
        visible: Visible | None = None,
    ) -> Context:
        """What all layers need to know of these rows.

        Args:
          positions_BS: of the rotation; defaults to 0…S-1.
          segment_ids_BS: load and balance loss keep to each segment; 0 is padding. Default: one segment.
          visible: what attention may look at. Default: the row up to the token itself, within its segment.
        """
        if positions_BS is None:
            positions_BS = jnp.broadcast_to(jnp.arange(tokens_BS.shape[1], dtype=jnp.int32), tokens_BS.shape)
        visible = Visible.rows(segment_ids_BS) if visible is None else visible
        segment_ids_BS = jnp.ones_like(tokens_BS) if segment_ids_BS is None else segment_ids_BS
        segment_ids_BS = numbered(segment_ids_BS, self.compute.rules)
        return Context(rotary_tables(self.config, positions_BS), visible, segment_ids_BS)

    def embedded(self, tokens_BS: Int[Array, "B S"]) -> Float[Array, "B S D"]:
        """The tokens' embeddings in the compute dtype."""
        with jax.named_scope("embed"):
            # Cast behind the look-up: the gradient of a row that stands in many places is summed in float32.
            find = functools.partial(look_up, target=self.compute.kernels)
            x = rows_of_table(find, self.embed[...], tokens_BS, self.compute.dtype, self.compute.rules)
            return constrain(x, self.compute.rules, "batch", "sequence", None)

    def run_layers(
        self,
        x_BSD: Float[Array, "B S D"],
        context: Context,
        *,
        first: int = 0,
        count: int | None = None,
        memories: Any = None,
        chosen_LBSK: Int[Array, "L B S K"] | None = None,
        absorbed: bool = False,
    ) -> tuple[Float[Array, "B S D"], RouterStats | None, Any]:
        """Run ``count`` layers from the ``first`` on (default: all) -> (x, statistics of the MoE layers, memories).

        Args:
          memories: a tuple with a ``Memory`` for each layer run; where layers are scanned, one for each stack, whose
            leaves have the layers in front.
          chosen_LBSK: experts of each MoE layer run, in place of the router's choice; see ``router.route``.
          absorbed: MLA's weight-absorbed form.
        """
        dense, stats, kept = self.config.num_dense_layers, [], []
        last = self.config.num_hidden_layers if count is None else first + count
        for start, size, layers, moe in self._runs():
            low, high = max(first, start), min(last, start + size)
            if low >= high:
                continue
            bias = chosen = None
            if moe:
                bias = None if self.router_bias is None else self.router_bias[...][low - dense : high - dense]
                at = low - max(first, dense)
                chosen = None if chosen_LBSK is None else chosen_LBSK[at : at + high - low]
            memory = None if memories is None else memories[len(kept)]
            if self.layers is None:
                part = layers_between(layers, low - start, high - start, size)
                x_BSD, router, memory = self._scanned(part, x_BSD, context, (bias, memory, chosen), absorbed)
            else:
                bias_E, chosen_BSK = (None if x is None else x[0] for x in (bias, chosen))
                graph, state = nnx.split(layers)
                x_BSD, router, memory = _one(graph, absorbed, state, x_BSD, context, bias_E, memory, chosen_BSK)
                router = jax.tree.map(lambda leaf: leaf[None], router)
            kept.append(memory)
            stats.append(router)
        return x_BSD, joined(stats), None if memories is None else tuple(kept)

    def predict_next(
        self,
        hidden_BSD: Float[Array, "B S D"],
        following_BS: Int[Array, "B S"],
        context: Context,
        *,
        memory: Any = None,
        chosen_BSK: Int[Array, "B S K"] | None = None,
        absorbed: bool = False,
    ) -> tuple[Float[Array, "B S D"], RouterStats | None, Any]:
        """The MTP module on the main model's hidden states, each with the token that follows its own -> (the head's
        input for the token after that, statistics, memory)."""
        assert self.mtp is not None
        following_BSD = self.embedded(following_BS)
        bias_E = None if self.router_bias is None else self.router_bias[...][-1]
        graph, state = nnx.split(self.mtp)

        def run(state, hidden, following, context, *more):
            bias_E, memory, chosen_BSK = more
            module: MTP = nnx.merge(graph, state)
            return module(hidden, following, context, bias_E, memory=memory, chosen_BSK=chosen_BSK, absorbed=absorbed)

        with jax.named_scope("mtp"):
            run = rematerialised(run, self.compute.remat, looped=False)
            return run(state, hidden_BSD, following_BSD, context, bias_E, memory, chosen_BSK)

    def head_weight(self) -> Float[Array, "D W"]:
        """The output head's matrix: its own, or the embedding's transpose where they are tied. ValueError where the
        network has scores in its place."""
        self.config.check_speaks()
        return self.embed[...].T if self.head is None else self.head.w[...]

    def logits(self, hidden_BSD: Float[Array, "*B D"]) -> Float[Array, "*B W"]:
        """float32, summed in float32."""
        with jax.named_scope("head"):
            options: dict[str, Any] = {"dtype": jnp.float32, "target": self.compute.kernels}
            if self.head is None and self.config.tie_word_embeddings:
                return product("...d,wd->...w", hidden_BSD, self.embed[...], **options)
            return product("...d,dw->...w", hidden_BSD, self.head_weight(), **options)

    def scores(self, hidden_BSD: Float[Array, "*B D"]) -> Float[Array, "*B X"]:
        """The X=num_labels numbers of each position, float32, summed in float32."""
        assert self.score is not None
        with jax.named_scope("score"):
            target = self.compute.kernels
            return product("...d,dx->...x", hidden_BSD, self.score.w[...], dtype=jnp.float32, target=target)

    def _runs(self) -> Iterator[tuple[int, int, Any, bool]]:
        """What runs in one go, in order: (the first layer's number, how many, their module, whether they are MoE)."""
        dense, moe = self.config.num_dense_layers, self.config.num_moe_layers
        if self.layers is not None:
            yield from ((i, 1, layer, i >= dense) for i, layer in enumerate(self.layers))
        else:
            if dense:
                yield 0, dense, self.dense_layers, False
            if moe:
                yield dense, moe, self.moe_layers, True

    def _scanned(self, layers, x_BSD, context, inputs, absorbed):
        graph, state = nnx.split(layers)
        bias, memories, chosen = inputs
        weights, get = state, lambda part: part
        if memories is not None:  # decoding: a layer's weights and memory are read and written where they lie
            weights, get = np.arange(count_layers(state), dtype=np.int32), functools.partial(in_stack, state)

        def layer(carry, inputs):
            (x, memories), (part, bias_E, chosen_BSK) = carry, inputs
            part = weights_of_layer(part, self.compute.rules) if memories is None else part
            memory = None if memories is None else in_stack(memories, part)
            options = {"memory": memory, "chosen_BSK": chosen_BSK, "absorbed": absorbed}
            x, router, memory = nnx.merge(graph, get(part))(x, context, bias_E, **options)
            return (x, stacks_of(memory)), router

        # Rows of a prompt keep the device busy: nothing is gained there by another copy of a layer's program.
        unroll = 1 if memories is not None and not absorbed else self.compute.scan_unroll
        body = rematerialised(layer, self.compute.remat, looped=count_layers(state) > unroll)
        (x_BSD, memories), router = jax.lax.scan(body, (x_BSD, memories), (weights, bias, chosen), unroll=unroll)
        return x_BSD, router, memories


@functools.partial(jax.jit, static_argnums=(0, 1))
def _one(graph, absorbed, state, x_BSD, context, bias_E, memory, chosen_BSK):
    """A layer by itself, which is traced once for all that are alike."""
    layer: Block = nnx.merge(graph, state)
    return layer(x_BSD, context, bias_E, memory=memory, chosen_BSK=chosen_BSK, absorbed=absorbed)


def _in(order: RowOrder, context: Context) -> Context:
    """What layers need to know of rows in this order."""
    along = context.rope, context.segment_ids_BS, context.balancing
    rope, segment_ids_BS, balancing = jax.tree.map(order.spread, along)
    return Context(rope, order.seen(context.visible), segment_ids_BS, balancing)


def joined(stats: list[RouterStats | None]) -> RouterStats | None:
    """The statistics of several runs of layers, one behind the other; None where no layer routes."""
    found = [part for part in stats if part is not None]
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *found) if found else None


def _stack(config: ModelConfig, compute: ComputeConfig, count: int, *, moe: bool, rngs: Together) -> Block | None:
    if not count:
        return None
    return rngs.stacked(lambda: Block(config, compute, moe=moe, rngs=rngs), count)
