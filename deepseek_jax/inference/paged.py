"""The device's side of answering requests as they come: a cache in pages, and the programs that copy pages and read
prompts in; the third is ``decoding``'s.

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
from deepseek_jax.model import parameters, transformer
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
    (P N W), the tokens themselves (P N 1), and the entries of an MTP module."""

    layers: tuple[Entries, ...]
    tokens_PN1: jax.Array
    mtp: Entries | None = None


@functools.partial(jax.jit, static_argnames=("config", "compute", "count", "size", "cache"))
def empty_pages(config: ModelConfig, compute: ComputeConfig, count: int, size: int, cache: str = "compute") -> Store:
    """Pages of zeros: entries of ``entry_width`` in what ``ServingConfig.cache`` says. ValueError where that takes
    none."""
    fp8, dtype = cache == "float8_e4m3", jnp.bfloat16 if cache == "bfloat16" else compute.dtype
    if fp8 and config.attention != "mla":
        raise ValueError("cache='float8_e4m3': only MLA's latents are kept in FP8")
    if cache == "bfloat16" and compute.kernels.platform == "cpu" and jax.__version_info__ < (0, 11):
        raise ValueError(f"cache='bfloat16', jax {jax.__version__}: on a CPU its XLA copies all pages at each token")

    width = config.cache_numbers_per_token_layer if fp8 else entry_width(config, compute)

    def buffer(*stack: int) -> Entries:
        zeros = jnp.zeros((*stack, count, size, width), dtype)
        pages = quantise_entries(zeros, config.kv_lora_rank) if fp8 else zeros
        split = lambda leaf: constrain(leaf, compute.rules, *[None] * len(stack), "batch", None, None)  # noqa: E731
        return jax.tree.map(split, pages)

    tokens_PN1 = constrain(jnp.zeros((count, size, 1), jnp.int32), compute.rules, "batch", None, None)
    mtp = buffer() if config.num_nextn_predict_layers else None
    if compute.scan_decode:
        stacks = config.num_dense_layers, config.num_moe_layers
        return Store(tuple(buffer(layers) for layers in stacks if layers), tokens_PN1, mtp)
    return Store(tuple(buffer() for _ in range(config.num_hidden_layers)), tokens_PN1, mtp)


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
    where others will stand before anybody looks. With an MTP module a row has a token more, which follows its S.

    fresh: nothing stands before them, so that the attention is the plain one over what is new; else it is the absorbed
    one over pages.
    """
    network = parameters.merge(config, params, router_bias, compute)
    tokens_BS, start_B, table_BJ = (over_batch(x, compute) for x in (tokens_BS, start_B, table_BJ))
    following_BS, mtp = tokens_BS[:, 1:], pages.mtp
    tokens_BS = tokens_BS if mtp is None else tokens_BS[:, :-1]
    position_BS = start_B[:, None] + jnp.arange(tokens_BS.shape[1], dtype=jnp.int32)
    hands, visible = "new", Visible()
    if not fresh:
        hands, visible = reading(network, position_BS, table_BJ, pages.tokens_PN1.shape[1])
    seen: dict[str, Any] = {"positions_BS": position_BS, "visible": visible}
    with jax.named_scope("prefill"):
        memories = [memory_of(compute, layer, start_B, table_BJ, hands) for layer in pages.layers]
        out = network(tokens_BS, memories=tuple(memories), absorbed=not fresh, head=False, **seen)
        tokens, _ = memory_of(compute, pages.tokens_PN1, start_B, table_BJ, "new").write(tokens_BS[..., None])
        if mtp is not None:
            memory, context = memory_of(compute, mtp, start_B, table_BJ, hands), network.context(tokens_BS, **seen)
            options = {"memory": memory, "absorbed": not fresh}
            mtp = network.predict_next(out.hidden, following_BS, context, **options)[2].pages_PNW
    return Store(tuple(memory.pages_PNW for memory in out.memories), tokens.pages_PNW, mtp)


def reading(network: transformer.Transformer, position_BS, table_BJ, page: int) -> tuple[Any, Visible]:
    """What a memory hands to attention, and what that sees of it: each token its row up to itself."""
    visible = Visible(q_positions_BS=position_BS, lengths_B=position_BS[:, -1] + 1)
    if network.config.attention == "mla" or reads_pages(network.config, network.compute, page):
        return "pages", dataclasses.replace(visible, pages_BJ=table_BJ)
    return "rows", visible


def reads_pages(config: ModelConfig, compute: ComputeConfig, page: int, *, queries: int = 1, fp8: bool = False) -> bool:
    """Whether a kernel attends to pages where they lie."""
    facts: dict[str, Any] = {"by_column": True, "queries": queries, "keys": page, "page": page, "fp8": fp8}
    options: dict[str, Any] = {"devices": devices(), "implementation": compute.decode_attention}
    if config.attention == "mla":
        widths = {"key_width": config.cache_numbers_per_token_layer, "value_width": config.kv_lora_rank}
        name = choose("mla_decode", compute.kernels, compute.dtype, **facts, **widths, **options).name
        return name in ("hopper", "tpu", "c")
    if compute.decode_attention not in ("auto", "c"):  # one of gqa_attention's
        return False
    widths = {"key_width": config.head_dim, "value_width": config.head_dim}
    return choose("gqa_decode", compute.kernels, compute.dtype, **facts, **widths, **options).name == "c"


def memory_of(compute: ComputeConfig, entries: Entries, start_B, table_BJ, hands) -> PagedMemory:
    """Of one layer's pages, or of a stack's."""
    layers = (entries.shape[0],) if len(entries.shape) == 4 else ()  # scanned layers are handed theirs of a stack
    start, table = (jnp.broadcast_to(x, (*layers, *x.shape)) for x in (start_B, table_BJ))
    return PagedMemory(entries, start, table, rules=compute.rules, hands=hands)


def over_batch(x, compute: ComputeConfig):
    """Rows split as the batch is."""
    return constrain(jnp.asarray(x), compute.rules, "batch", *[None] * (np.ndim(x) - 1))
