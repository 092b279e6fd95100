"""The whole network: embedding, dense layers, MoE layers, norm, head, and the MTP module."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx, struct
from jaxtyping import Array, Float, Int

from deepseek_jax.compute import ComputeConfig
from deepseek_jax.config import ModelConfig
from deepseek_jax.model.attention import Cache, packed_mask
from deepseek_jax.model.block import Block
from deepseek_jax.model.layers import Linear, RMSNorm, RouterBias, param, project
from deepseek_jax.model.mtp import MTP, mtp_segments
from deepseek_jax.model.rope import rotary_tables
from deepseek_jax.model.router import RouterStats
from deepseek_jax.parallel.sharding import constrain


@struct.dataclass
class ModelOutput:
    """What a forward pass returns; nothing is sown, so nothing is lost.

    logits: (B S W) float32, or None where the caller applies the head itself. hidden: (B S D) after the final norm.
    mtp_hidden: (B S D), the head's input for the token after the next. router: statistics per MoE layer, L first, the
    MTP module's last. cache: the cache with the new columns.
    """

    logits: jax.Array | None
    hidden: jax.Array
    mtp_hidden: jax.Array | None
    router: RouterStats | None
    cache: Cache | None


class Transformer(nnx.Module):
    """A DeepSeek network.

    >>> model = Transformer(ModelConfig(), rngs=nnx.Rngs(0))
    >>> model(jnp.zeros((1, 8), jnp.int32)).logits.shape
    (1, 8, 512)

    Layers of a kind are stacked and scanned. ``router_bias`` (L E) has a row for each MoE layer and one for MTP.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, compute: ComputeConfig = ComputeConfig()):
        self.config, self.compute = config, compute
        D, W = config.hidden_size, config.vocab_size
        self.embed = param(config, compute, rngs, (W, D), ("vocab", "embed"))
        self.dense_layers = _stack(config, compute, config.num_dense_layers, moe=False, rngs=rngs)
        self.moe_layers = _stack(config, compute, config.num_moe_layers, moe=True, rngs=rngs)
        self.norm = RMSNorm(config, compute, D, "embed")
        self.head = (
            None if config.tie_word_embeddings else Linear(config, compute, (D, W), ("embed", "vocab"), rngs=rngs)
        )
        self.mtp = MTP(config, compute, rngs=rngs) if config.num_nextn_predict_layers else None
        zeros = jnp.zeros((config.num_routers, config.n_routed_experts), jnp.float32)
        self.router_bias = RouterBias(zeros) if config.has_router_bias else None
        self.source: str | None = None  # the folder it was loaded from: save_hf copies the tokenizer there

    def __call__(
        self,
        tokens_BS: Int[Array, "B S"],
        *,
        positions_BS: Int[Array, "B S"] | None = None,
        segment_ids_BS: Int[Array, "B S"] | None = None,
        cache: Cache | None = None,
        layers: list[Block] | None = None,
        absorbed: bool = False,
        mtp: bool = False,
        head: bool = True,
    ) -> ModelOutput:
        """Run the network on rows of tokens.

        Args:
          positions_BS: defaults to 0…S-1; with a cache, -1 marks padding.
          segment_ids_BS: attention, load and balance loss keep to each segment; 0 is padding. Default: all one.
          cache: continue these rows; ``absorbed`` picks MLA's weight-absorbed form, and ``layers`` hands in
            ``unrolled()``'s result, which a loop makes once outside.
          mtp: run the MTP module too (training); not with a cache.
          head: compute logits.
        """
        if positions_BS is None:
            positions_BS = jnp.broadcast_to(jnp.arange(tokens_BS.shape[1], dtype=jnp.int32), tokens_BS.shape)
        if cache is not None:
            segment_ids_BS = (positions_BS >= 0).astype(jnp.int32)
            cache, mask = cache.claim(positions_BS)
        else:
            segment_ids_BS = jnp.ones_like(tokens_BS) if segment_ids_BS is None else segment_ids_BS
            mask = packed_mask(segment_ids_BS)
        rope = rotary_tables(self.config, positions_BS)
        with jax.named_scope("embed"):
            x = constrain(self._embed(tokens_BS), self.compute.rules, "batch", "sequence", None)
        context = (rope, mask, segment_ids_BS)
        if cache is None:
            x, stats = self._scan_layers(x, context)
        else:
            x, stats, cache = self._cached_layers(x, context, cache, layers or self.unrolled(), absorbed)
        hidden, mtp_hidden = self.norm(x), None
        if mtp:
            if self.mtp is None or cache is not None:
                raise ValueError("mtp=True needs num_nextn_predict_layers=1 and no cache")
            mtp_hidden, mtp_stats = self._run_mtp(hidden, tokens_BS, context)
            if mtp_stats is not None:
                stats.append(jax.tree.map(lambda leaf: leaf[None], mtp_stats))
        router = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *stats) if stats else None
        return ModelOutput(self.logits(hidden) if head else None, hidden, mtp_hidden, router, cache)

    def head_weight(self) -> Float[Array, "D W"]:
        """The output head's matrix: its own, or the embedding's transpose where they are tied."""
        return self.embed[...].T if self.head is None else self.head.w[...]

    def logits(self, hidden_BSD: Float[Array, "*B D"]) -> Float[Array, "*B W"]:
        with jax.named_scope("head"):
            return project(hidden_BSD, self.head_weight().astype(hidden_BSD.dtype), jnp.float32)

    def _embed(self, tokens_BS):
        return self.embed[...].astype(self.compute.dtype)[tokens_BS]

    def _bias(self, row: int | slice):
        return None if self.router_bias is None else self.router_bias[...][row]

    def _stacks(self):
        """The stacks of layers in order, each with its rows of the routing bias."""
        for layers, bias in (
            (self.dense_layers, None),
            (self.moe_layers, self._bias(slice(self.config.num_moe_layers))),
        ):
            if layers is not None:
                yield *nnx.split(layers), bias

    def _scan_layers(self, x, context):
        stats = []
        rope, mask, segment_ids_BS = context
        for graph, state, bias in self._stacks():

            def layer(x, params, graph=graph):
                state, bias_E = params
                x, router, _ = nnx.merge(graph, state)(x, rope, mask, segment_ids_BS, bias_E)
                return x, router

            x, router = jax.lax.scan(
                _rematerialised(layer, self.compute.remat), x, (state, bias), unroll=self.compute.scan_unroll
            )
            if router is not None:
                stats.append(router)
        return x, stats

    def unrolled(self) -> list[Block]:
        """The layers one by one, taken out of their stacks."""
        layers = []
        for graph, state, _ in self._stacks():
            count = len(jax.tree.leaves(state)[0])
            layers += [nnx.merge(graph, jax.tree.map(lambda leaf, i=i: leaf[i], state)) for i in range(count)]
        return layers

    def _cached_layers(self, x, context, cache, layers, absorbed):
        """Layer by layer without a scan, so that each cache buffer is updated in place."""
        stats, buffers = [], []
        for i, (layer, buffer) in enumerate(zip(layers, cache.layers, strict=True)):
            router_row = i - self.config.num_dense_layers
            bias_E = self._bias(router_row) if router_row >= 0 else None
            x, router, buffer = layer(x, *context, bias_E, (buffer, cache.length), absorbed=absorbed)
            buffers.append(buffer)
            if router is not None:
                stats.append(jax.tree.map(lambda leaf: leaf[None], router))
        return x, stats, dataclasses.replace(cache, layers=tuple(buffers), length=cache.length + x.shape[1])

    def _run_mtp(self, hidden, tokens_BS, context):
        assert self.mtp is not None
        rope, mask, segment_ids_BS = context
        with jax.named_scope("mtp"):
            following = self._embed(jnp.roll(tokens_BS, -1, axis=1))

            def run(mtp, hidden, following, segments, bias):
                return mtp(hidden, following, rope, mask, segments, bias)

            graph, state = nnx.split(self.mtp)
            run_pure = _rematerialised(lambda state, *args: run(nnx.merge(graph, state), *args), self.compute.remat)
            return run_pure(state, hidden, following, mtp_segments(segment_ids_BS), self._bias(-1))


def _stack(config: ModelConfig, compute: ComputeConfig, count: int, *, moe: bool, rngs: nnx.Rngs) -> Block | None:
    if not count:
        return None
    make = nnx.vmap(lambda rngs: Block(config, compute, moe=moe, rngs=rngs), in_axes=0, out_axes=0)
    return make(rngs.split(count))


def _rematerialised(function, remat: str):
    """``full`` keeps nothing of a layer for the backward pass, ``dots`` its matrix products, ``none`` everything."""
    if remat == "none":
        return function
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if remat == "dots" else None
    return jax.checkpoint(function, policy=policy, prevent_cse=False)


# The pure half: parameters as nested dicts of arrays, the form in which they are trained, placed and saved.


def split(model: Transformer) -> tuple[dict[str, Any], jax.Array | None]:
    """Parameters and routing bias of a model as plain arrays."""
    _, params, bias = nnx.split(model, nnx.Param, RouterBias)
    return nnx.to_pure_dict(params), nnx.to_pure_dict(bias).get("router_bias")


def merge(
    config: ModelConfig,
    params: dict[str, Any],
    router_bias: jax.Array | None,
    compute: ComputeConfig = ComputeConfig(),
) -> Transformer:
    """The model with these arrays: the inverse of ``split``; traceable."""
    graph, param_state, bias_state = _abstract(config, compute)
    param_state, bias_state = jax.tree.map(lambda leaf: leaf, (param_state, bias_state))
    nnx.replace_by_pure_dict(param_state, params)
    if router_bias is not None:
        nnx.replace_by_pure_dict(bias_state, {"router_bias": router_bias})
    return nnx.merge(graph, param_state, bias_state)


def init(
    config: ModelConfig, seed: int | jax.Array = 0, compute: ComputeConfig = ComputeConfig()
) -> tuple[dict[str, Any], jax.Array | None]:
    """Fresh parameters and a zero routing bias from an int or a key; traceable, so that ``jit`` can create them where
    they live."""
    return split(Transformer(config, compute=compute, rngs=nnx.Rngs(seed)))


def logical_axes(config: ModelConfig) -> dict[str, Any]:
    """A tree like the parameters' with each one's logical axes; stacked layers have ``layers`` in front."""

    def axes(path, variable):
        named = variable.get_metadata("axes")
        return ("layers", *named) if len(named) < len(variable.shape) else named

    is_variable = lambda leaf: isinstance(leaf, nnx.Variable)  # noqa: E731
    named = jax.tree_util.tree_map_with_path(axes, _abstract(config, ComputeConfig())[1], is_leaf=is_variable)
    return nnx.to_pure_dict(named)


def abstract_arrays(config: ModelConfig, compute: ComputeConfig = ComputeConfig()) -> tuple[dict[str, Any], Any]:
    """``split``'s result with shapes and dtypes in place of arrays; builds nothing."""
    _, params, bias = _abstract(config, compute)
    shapes = functools.partial(jax.tree.map, lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
    return shapes(nnx.to_pure_dict(params)), shapes(nnx.to_pure_dict(bias)).get("router_bias")


@functools.cache
def _abstract(config: ModelConfig, compute: ComputeConfig):
    model = nnx.eval_shape(lambda: Transformer(config, compute=compute, rngs=nnx.Rngs(0)))
    return nnx.split(model, nnx.Param, RouterBias)
