"""The device's side of answering requests as they come: a cache in pages, and the three programs that work on it.

They are compiled for shapes alone and take the cache as theirs. On a mesh each device of the batch has pages of its
own, which its rows' tables number from 0, as if it were alone.
"""

import dataclasses
import functools
from typing import Any, Literal, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Int, Num

from deepseek_jax.compute import ComputeConfig
from deepseek_jax.config import ModelConfig
from deepseek_jax.inference.cache import as_wide, entry_width
from deepseek_jax.inference.generate import OPTIONS
from deepseek_jax.inference.penalties import Wishes, adjusted
from deepseek_jax.inference.rows import Numbers, Rows, Shares
from deepseek_jax.inference.sampling import ALTERNATIVES, BIASES, sample
from deepseek_jax.model import transformer
from deepseek_jax.model.stack import in_stack, stacks_of
from deepseek_jax.parallel.sharding import ShardingRules, constrain, per_device
from deepseek_kernels import InStack, Visible, choose, quantise_entries, write_entries
from deepseek_kernels.cached import Entries, side_by_side
from deepseek_kernels.target import devices


@struct.dataclass
class PagedMemory:
    """One layer's pages (P N W), or of layers that are scanned all of theirs; see ``cache.Memory``.

    start_B: the place of the row's next token. table_BJ: its pages, -1 where it has none: what would be written there
    is dropped. hands: what attention is given. ``pages``, which it reads by ``Visible.pages_BJ``; ``rows``, a copy of
    these side by side; ``new``, the new tokens, where there are no others.
    """

    pages_PNW: Any
    start_B: Any
    table_BJ: Any
    rules: ShardingRules = struct.field(pytree_node=False)
    hands: Literal["pages", "rows", "new"] = struct.field(pytree_node=False)

    def write(self, entry_BSW: Num[Array, "B S W"]) -> tuple[Self, Any]:
        """Put S new tokens behind each row's others -> (the memory with them, what attention is given)."""
        pages, table_BJ = _in_one(self.pages_PNW), self.table_BJ.astype(jnp.int32)
        rows = as_wide(entry_BSW, pages.shape[-1]), self.start_B.astype(jnp.int32), table_BJ
        pages = self._per_device(write_entries, pages, *rows)
        kept = in_stack(pages.stack, pages.layer) if isinstance(pages, InStack) else pages
        memory = dataclasses.replace(self, pages_PNW=kept)
        if self.hands == "new":
            return memory, entry_BSW
        if self.hands == "pages":
            return memory, pages
        gather = functools.partial(side_by_side, dtype=entry_BSW.dtype)
        axes = _axes_of(pages), ("batch", None)
        return memory, per_device(gather, self.rules, (pages, table_BJ), axes, ("batch", None, None))

    def _per_device(self, write, pages: Entries, *rows: jax.Array) -> Entries:
        axes = _axes_of(pages), ("batch", None, None), ("batch",), ("batch", None)
        if not isinstance(pages, InStack):
            return per_device(write, self.rules, (pages, *rows), axes, ("batch", None, None))
        local = lambda pages, *rows: write(pages, *rows).stack  # noqa: E731
        stack = per_device(local, self.rules, (pages, *rows), axes, (None, "batch", None, None))
        return InStack(stack, pages.layer)


def _in_one(pages: Any) -> Entries:
    """A layer of scanned ones as one ``InStack``, where its leaves are such."""
    is_layer = lambda leaf: isinstance(leaf, InStack)  # noqa: E731
    leaf = jax.tree.leaves(pages, is_leaf=is_layer)[0]
    return InStack(stacks_of(pages), leaf.layer) if isinstance(leaf, InStack) else pages


def _axes_of(pages: Entries) -> Any:
    """Pages are split as rows of the batch are."""
    if isinstance(pages, InStack):
        return InStack(_axes_of(pages.stack), ())
    return jax.tree.map(lambda leaf: (*[None] * (leaf.ndim - 3), "batch", None, None), pages)


@struct.dataclass
class Store:
    """What P pages of N tokens hold: of each layer, or of each stack of layers with ``scan_decode``, their entries
    (P N W), and the tokens themselves (P N 1)."""

    layers: tuple[Entries, ...]
    tokens_PN1: jax.Array


@functools.partial(jax.jit, static_argnames=("config", "compute", "count", "size", "fp8"))
def empty_pages(config: ModelConfig, compute: ComputeConfig, count: int, size: int, fp8: bool) -> Store:
    """Pages of zeros: entries of ``entry_width`` in ``compute.dtype``, or in FP8. ValueError where that takes none."""
    if fp8 and config.attention != "mla":
        raise ValueError("cache='float8_e4m3': only MLA's latents are kept in FP8")

    width = config.cache_numbers_per_token_layer if fp8 else entry_width(config, compute)

    def buffer(*stack: int) -> Entries:
        zeros = jnp.zeros((*stack, count, size, width), compute.dtype)
        pages = quantise_entries(zeros, config.kv_lora_rank) if fp8 else zeros
        split = lambda leaf: constrain(leaf, compute.rules, *[None] * len(stack), "batch", None, None)  # noqa: E731
        return jax.tree.map(split, pages)

    tokens_PN1 = constrain(jnp.zeros((count, size, 1), jnp.int32), compute.rules, "batch", None, None)
    if compute.scan_decode:
        stacks = config.num_dense_layers, config.num_moe_layers
        return Store(tuple(buffer(layers) for layers in stacks if layers), tokens_PN1)
    return Store(tuple(buffer() for _ in range(config.num_hidden_layers)), tokens_PN1)


@functools.partial(jax.jit, static_argnames="compute", donate_argnames="pages")
def copy_pages(compute: ComputeConfig, pages: Store, source_K: Int[Array, "K"], target_K: Int[Array, "K"]) -> Store:
    """The pages with copies of the ``source`` ones in the places of the ``target`` ones, all at once; beyond the last
    page, none."""

    def copy(leaf):
        def local(leaf, source_K, target_K):
            if leaf.ndim == 4:
                return leaf.at[:, target_K].set(leaf[:, source_K], mode="drop")
            return leaf.at[target_K].set(leaf[source_K], mode="drop")

        axes = (*[None] * (leaf.ndim - 3), "batch", None, None)
        return per_device(local, compute.rules, (leaf, source_K, target_K), (axes, ("batch",), ("batch",)), axes)

    return jax.tree.map(copy, pages)


@functools.partial(
    jax.jit, static_argnames=("config", "compute", "fresh"), donate_argnames="pages", compiler_options=OPTIONS
)
def read(
    config: ModelConfig,
    compute: ComputeConfig,
    params: Any,
    router_bias: jax.Array | None,
    pages: Store,
    tokens_BS: Int[Array, "B S"],
    start_B: Int[Array, "B"],
    table_BJ: Int[Array, "B J"],
    *,
    fresh: bool,
) -> Store:
    """The pages with S tokens of each row behind its first ``start``; what fills a row up is written behind its tokens,
    where others will stand before anybody looks.

    fresh: nothing stands before them, so that the attention is the plain one over what is new; else it is the absorbed
    one over pages.
    """
    network = transformer.merge(config, params, router_bias, compute)
    tokens_BS, start_B, table_BJ = (_rows(x, compute) for x in (tokens_BS, start_B, table_BJ))
    position_BS = start_B[:, None] + jnp.arange(tokens_BS.shape[1], dtype=jnp.int32)
    hands, visible = "new", Visible()
    if not fresh:
        hands, visible = _reading(network, position_BS, table_BJ, pages.tokens_PN1.shape[1])
    options: dict[str, Any] = {"positions_BS": position_BS, "visible": visible, "absorbed": not fresh, "head": False}
    with jax.named_scope("prefill"):
        memories = [_memory(compute, layer, start_B, table_BJ, hands) for layer in pages.layers]
        out = network(tokens_BS, memories=tuple(memories), **options)
        tokens, _ = _memory(compute, pages.tokens_PN1, start_B, table_BJ, "new").write(tokens_BS[..., None])
    return Store(tuple(memory.pages_PNW for memory in out.memories), tokens.pages_PNW)


@struct.dataclass
class Decoded:
    """tokens_BN, logprobs_BN: of each row those that it was given, -1 behind them; log-probabilities are those of the
    network, before penalties and cuts, by the temperature ``Shares.scored``. stopped_B: it ended with a stop id.
    likely_BNA, likely_logprobs_BNA: beside each token the most likely ones, where any row asks for alternatives."""

    tokens_BN: jax.Array
    logprobs_BN: jax.Array
    stopped_B: jax.Array
    likely_BNA: jax.Array
    likely_logprobs_BNA: jax.Array


@functools.partial(
    jax.jit, static_argnames=("config", "compute", "most"), donate_argnames="pages", compiler_options=OPTIONS
)
def decode(
    config: ModelConfig,
    compute: ComputeConfig,
    params: Any,
    router_bias: jax.Array | None,
    pages: Store,
    rows: Rows,
    turns: jax.typing.ArrayLike,
    until_end: jax.typing.ArrayLike,
    *,
    most: int,
) -> tuple[Store, Decoded]:
    """Up to ``turns`` (``most`` at most) tokens of each row's answer. A row draws its token n with
    ``fold_in(fold_in(key(seed), draw), n)``, or with another key than the seed's, whatever stands beside it. until_end:
    no more once a row has ended.
    """
    network = transformer.merge(config, params, router_bias, compute)
    rows = jax.tree.map(lambda x: _rows(x, compute), rows)
    at = Numbers(*rows.numbers_BK[:, : len(Numbers._fields)].T)
    stops_BX = rows.numbers_BK[:, len(Numbers._fields) : -BIASES]
    filling_B = at.answered >= at.most

    def goes_on(now):
        n, done_B = now[0], now[4]
        return (n < turns) & ~jnp.all(done_B) & ~(until_end & jnp.any(done_B & ~filling_B))

    def step(now):
        n, pages, token_B, length_B, done_B, found = now
        table_BJ = jnp.where(done_B[:, None], -1, rows.table_BJ)
        hands, visible = _reading(network, length_B[:, None], table_BJ, pages.tokens_PN1.shape[1])
        options: dict[str, Any] = {"positions_BS": length_B[:, None], "visible": visible, "absorbed": True}
        memories = [_memory(compute, layer, length_B, table_BJ, hands) for layer in pages.layers]
        out = network(token_B[:, None], memories=tuple(memories), head=False, **options)
        tokens = _memory(compute, pages.tokens_PN1, length_B, table_BJ, "rows")
        tokens, said_BT1 = tokens.write(token_B[:, None, None])
        drawn_B, found = _draw(network, rows, at, n, out.hidden[:, 0], said_BT1[:, :, 0], length_B, done_B, found)
        stopped_B = ~done_B & jnp.any(drawn_B[:, None] == stops_BX, axis=1)
        found = dataclasses.replace(found, stopped_B=found.stopped_B | stopped_B)
        token_B = jnp.where(done_B, token_B, drawn_B)
        pages = Store(tuple(memory.pages_PNW for memory in out.memories), tokens.pages_PNW)
        over_B = stopped_B | (at.answered + n + 1 >= at.most)
        return n + 1, pages, token_B, length_B + ~done_B, done_B | over_B, found

    found = jax.tree.map(lambda x: _rows(x, compute), _nothing(len(filling_B), most, config.vocab_size))
    now = jnp.int32(0), pages, at.token, at.length, filling_B, found
    with jax.named_scope("decode"):
        _, pages, _, _, _, found = jax.lax.while_loop(goes_on, step, now)
    return pages, _told(found, compute)


def _told(found: Decoded, compute: ComputeConfig) -> Decoded:
    """Where hosts read it: of several processes each reads it all."""
    if jax.process_count() == 1:
        return found
    return jax.tree.map(lambda x: constrain(x, compute.rules, *[None] * x.ndim), found)


def _nothing(batch: int, most: int, width: int) -> Decoded:
    alternatives = (batch, most, min(ALTERNATIVES, width))
    tokens_BN, logprobs_BN = jnp.full((batch, most), -1, jnp.int32), jnp.full((batch, most), -1.0)
    return Decoded(
        tokens_BN, logprobs_BN, jnp.zeros(batch, bool), jnp.zeros(alternatives, jnp.int32), jnp.zeros(alternatives)
    )


def _draw(network, rows: Rows, at: Numbers, n, hidden_BD, said_BT, length_B, done_B, found: Decoded):
    """Draw the n-th token of this call for each row that is not done -> (tokens, what was found with them)."""
    how, biases_BX = Shares(*rows.shares_BF[:, : len(Shares._fields)].T), rows.shares_BF[:, len(Shares._fields) :]
    wishes = Wishes(how.repetition, how.presence, how.frequency, rows.numbers_BK[:, -BIASES:], biases_BX)
    logits_BW = network.logits(hidden_BD)
    wanted_BW = adjusted(logits_BW, wishes, said_BT, at.length + 1 - at.answered, length_B + 1)
    words_B2 = jax.lax.bitcast_convert_type(jnp.stack([at.high, at.seed], axis=1), jnp.uint32)
    keys_B = jax.random.wrap_key_data(words_B2, impl="threefry2x32")
    keys_B = jax.vmap(lambda key, *at: functools.reduce(jax.random.fold_in, at, key))(keys_B, at.draw, at.answered + n)
    drawn_B, _ = sample(wanted_BW, keys_B, how.temperature, how.top_p, at.top_k, how.min_p)
    logits_BW = logits_BW / how.scored[:, None]
    total_B = jax.nn.logsumexp(logits_BW, axis=1)
    logprob_B = jnp.take_along_axis(logits_BW, drawn_B[:, None], axis=1)[:, 0] - total_B

    def likely(logits_BW):
        best_BA, ids_BA = jax.lax.top_k(logits_BW, found.likely_BNA.shape[2])
        return found.likely_BNA.at[:, n].set(ids_BA), found.likely_logprobs_BNA.at[:, n].set(best_BA - total_B[:, None])

    asked = jnp.any(at.alternatives > 0)
    same = lambda _: (found.likely_BNA, found.likely_logprobs_BNA)  # noqa: E731
    likely_BNA, likely_logprobs_BNA = jax.lax.cond(asked, likely, same, logits_BW)
    put = lambda x_BN, x_B: x_BN.at[:, n].set(jnp.where(done_B, x_BN[:, n], x_B))  # noqa: E731
    tokens_BN, logprobs_BN = put(found.tokens_BN, drawn_B), put(found.logprobs_BN, logprob_B)
    return drawn_B, Decoded(tokens_BN, logprobs_BN, found.stopped_B, likely_BNA, likely_logprobs_BNA)


def _reading(network: transformer.Transformer, position_BS, table_BJ, page: int) -> tuple[Any, Visible]:
    """What a memory hands to attention, and what that sees of it: each token its row up to itself."""
    visible = Visible(q_positions_BS=position_BS, lengths_B=position_BS[:, -1] + 1)
    if network.config.attention == "mla" or reads_pages(network.config, network.compute, page):
        return "pages", dataclasses.replace(visible, pages_BJ=table_BJ)
    return "rows", visible


def reads_pages(config: ModelConfig, compute: ComputeConfig, page: int, *, fp8: bool = False) -> bool:
    """Whether a kernel attends to pages where they lie."""
    facts: dict[str, Any] = {"by_column": True, "queries": 1, "keys": page, "page": page, "fp8": fp8}
    options: dict[str, Any] = {"devices": devices(), "implementation": compute.decode_attention}
    if config.attention == "mla":
        widths = {"key_width": config.cache_numbers_per_token_layer, "value_width": config.kv_lora_rank}
        name = choose("mla_decode", compute.kernels, compute.dtype, **facts, **widths, **options).name
        return name in ("hopper", "tpu", "c")
    if compute.decode_attention not in ("auto", "c"):  # one of gqa_attention's
        return False
    widths = {"key_width": config.head_dim, "value_width": config.head_dim}
    return choose("gqa_decode", compute.kernels, compute.dtype, **facts, **widths, **options).name == "c"


def _memory(compute: ComputeConfig, entries: Entries, start_B, table_BJ, hands) -> PagedMemory:
    layers = (entries.shape[0],) if len(entries.shape) == 4 else ()  # scanned layers are handed theirs of a stack
    start, table = (jnp.broadcast_to(x, (*layers, *x.shape)) for x in (start_B, table_BJ))
    return PagedMemory(entries, start, table, rules=compute.rules, hands=hands)


def _rows(x, compute: ComputeConfig):
    return constrain(jnp.asarray(x), compute.rules, "batch", *[None] * (np.ndim(x) - 1))
