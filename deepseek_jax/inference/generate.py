"""Batched generation as one pure function: prefill the prompts, then decode in a loop on the device."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from deepseek_jax.compute import ComputeConfig
from deepseek_jax.config import ModelConfig
from deepseek_jax.inference.cache import Cache, write_rows
from deepseek_jax.inference.requests import Requests
from deepseek_jax.inference.sampling import sample
from deepseek_jax.model import parameters, transformer
from deepseek_jax.parallel.processes import own_rows
from deepseek_jax.parallel.sharding import constrain, per_device
from deepseek_kernels import Visible


@struct.dataclass
class Generated:
    """tokens_BN: the answers, the stop token included, ``pad`` behind it. logprobs_BN: of each token, 0 behind the end.
    lengths_B: tokens of each answer. stopped_B: whether it ended by itself, not by the limit. experts_LBTK: where asked
    for, the experts that each MoE layer chose for token t of prompt and answer together, -1 where none was run: of an
    answer's last token, and behind it."""

    tokens_BN: jax.Array
    logprobs_BN: jax.Array
    lengths_B: jax.Array
    stopped_B: jax.Array
    experts_LBTK: jax.Array | None = None

    def here(self) -> "Generated":
        """The answers to this process's prompts, on the host."""
        if isinstance(self.tokens_BN, np.ndarray):
            return self
        if jax.process_count() == 1:
            return jax.device_get(self)
        rows = (own_rows(x) for x in (self.tokens_BN, self.logprobs_BN, self.lengths_B, self.stopped_B))
        experts = None if self.experts_LBTK is None else own_rows(self.experts_LBTK, 1)
        return Generated(*rows, experts)  # pyright: ignore  # of numpy


@struct.dataclass
class Decoding:
    """Answers on the way: n tokens of each have been drawn, the last of which is token_B; done_B have ended."""

    n: jax.Array
    cache: Cache
    token_B: jax.Array
    done_B: jax.Array
    answered: Generated
    chosen_BTX: jax.Array | None


# On a GPU kernels of a step that need nothing of each other run side by side, such as shared experts and the routing.
# XLA's products are the ones that cuBLAS proposes: XLA would choose among them and its own by timing all, while other
# programs compile on the same processor, and some starts got a prefill, or a step of decoding, of twice the time.
OPTIONS: dict[str, Any] = {"xla_gpu_command_buffer_scheduling_mode": "CONCURRENT"}
OPTIONS |= {"xla_gpu_enable_triton_gemm": False, "xla_gpu_autotune_level": 0}


@functools.partial(jax.jit, static_argnames=("config", "compute", "experts"), compiler_options=OPTIONS)
def generate(
    config: ModelConfig,
    compute: ComputeConfig,
    params: Any,
    router_bias: jax.Array | None,
    requests: Requests,
    *,
    experts: bool = False,
) -> Generated:
    """Answer each request until one of its stop ids or its limit.

    Prefill runs the plain attention over all prompts at once, which several rows may share; each further token the
    absorbed one, over the cache.
    On a mesh each device answers its rows of the batch. Compiled for the shapes alone: see ``Requests``.

    Args:
      params, router_bias: as ``sampling_weights`` makes them, or a model's own (stacks, with ``compute.scan_decode``).
      experts: return the chosen experts too.
    """
    if experts and not config.num_moe_layers:
        raise ValueError(f"experts=True, but n_routed_experts={config.n_routed_experts}: there is nothing to choose")
    network = parameters.merge(config, params, router_bias, compute)
    requests = _rows(requests, compute)
    decoding = _decode(network, requests, _prefill(network, requests, experts=experts), None)
    answered = jax.tree.map(lambda x: _split(x, compute), decoding.answered)  # each process reads its rows
    if decoding.chosen_BTX is None:
        return answered
    shape = (len(requests.limit_B), requests.columns, config.num_moe_layers, -1)
    experts_LBTK = jnp.moveaxis(decoding.chosen_BTX.reshape(shape), 2, 0)
    experts_LBTK = constrain(experts_LBTK, compute.rules, None, "batch", None, None)
    return dataclasses.replace(answered, experts_LBTK=experts_LBTK)


@functools.partial(jax.jit, static_argnames=("config", "compute"))
def begin(
    config: ModelConfig, compute: ComputeConfig, params: Any, router_bias: jax.Array | None, requests: Requests
) -> Decoding:
    """What ``generate`` does up to the first token of each answer; arguments as there."""
    network = parameters.merge(config, params, router_bias, compute)
    return _prefill(network, _rows(requests, compute), experts=False)


@functools.partial(jax.jit, static_argnames=("config", "compute"), donate_argnames="decoding", compiler_options=OPTIONS)
def go_on(
    config: ModelConfig,
    compute: ComputeConfig,
    params: Any,
    router_bias: jax.Array | None,
    requests: Requests,
    decoding: Decoding,
    until: jax.typing.ArrayLike,
) -> Decoding:
    """Decode until ``until`` tokens of each answer have been drawn; ``decoding`` is used up."""
    network = parameters.merge(config, params, router_bias, compute)
    return _decode(network, _rows(requests, compute), decoding, until)


def _prefill(network: transformer.Transformer, requests: Requests, *, experts: bool) -> Decoding:
    config, compute = network.config, network.compute
    tokens_UP, length_B = requests.tokens_BP, requests.lengths_B
    batch, (prompts, width) = len(length_B), tokens_UP.shape
    with jax.named_scope("prefill"):
        cache = Cache.empty(config, compute, prompts, requests.columns)
        out = network(tokens_UP, visible=Visible(), memories=cache.memories(first=True), head=False)
        buffers = tuple(_asked(memory.buffer_BTW, requests, compute) for memory in out.memories)
        cache = Cache(buffers, None, length_B)
        chosen_BTX = None
        if experts:
            seen_BP = jnp.arange(width) < length_B[:, None]
            chosen_BPX = jnp.where(seen_BP[:, :, None], _asked(_chosen(out), requests, compute), -1)
            chosen_BTX = jnp.full((batch, requests.columns, chosen_BPX.shape[2]), -1, jnp.int32)
            chosen_BTX = jax.lax.dynamic_update_slice(_split(chosen_BTX, compute), chosen_BPX, (0, 0, 0))
        hidden_BPD = _asked(out.hidden, requests, compute)
        hidden_BD = jnp.take_along_axis(hidden_BPD, (length_B - 1)[:, None, None], axis=1)[:, 0]
        answered = _nothing(requests, compute)
        token_B, done_B, answered = _draw(network, requests, 0, hidden_BD, requests.limit_B < 1, answered)
    return Decoding(jnp.int32(1), cache, token_B, done_B, answered, chosen_BTX)


def _decode(
    network: transformer.Transformer, requests: Requests, decoding: Decoding, until: jax.typing.ArrayLike | None
) -> Decoding:
    def goes_on(now: Decoding):
        some = ~jnp.all(now.done_B)
        return some if until is None else some & (now.n < until)

    def step(now: Decoding) -> Decoding:
        cache, done_B, chosen_BTX = now.cache, now.done_B, now.chosen_BTX
        options: dict[str, Any] = {"positions_BS": cache.positions(1), "visible": cache.visible(1)}
        out = network(now.token_B[:, None], memories=cache.memories(), absorbed=True, head=False, **options)
        if chosen_BTX is not None:
            chosen_B1X = jnp.where(done_B[:, None, None], -1, _chosen(out))
            chosen_BTX = write_rows(chosen_BTX, chosen_B1X, cache.lengths_B)
        cache = cache.grown(out.memories, (~done_B).astype(jnp.int32))
        token_B, done_B, answered = _draw(network, requests, now.n, out.hidden[:, 0], done_B, now.answered)
        return Decoding(now.n + 1, cache, token_B, done_B, answered, chosen_BTX)

    with jax.named_scope("decode"):
        return jax.lax.while_loop(goes_on, step, decoding)


def _rows(requests: Requests, compute: ComputeConfig) -> Requests:
    return jax.tree.map(lambda x: _split(x, compute) if x.ndim else x, requests)


def _nothing(requests: Requests, compute: ComputeConfig) -> Generated:
    batch, room = len(requests.limit_B), requests.answers
    tokens_BN = jnp.broadcast_to(requests.pad, (batch, room))
    nothing = (tokens_BN, jnp.zeros((batch, room), jnp.float32), jnp.zeros(batch, jnp.int32), jnp.zeros(batch, bool))
    return Generated(*(_split(x, compute) for x in nothing))


def _draw(network: transformer.Transformer, requests: Requests, n, hidden_BD, done_B, answered: Generated):
    """Draw token ``n`` of each answer that is not done -> (tokens, which are done now, the answers with them)."""
    keys_B = jax.vmap(lambda key, row: jax.random.fold_in(jax.random.fold_in(key, row), n))(
        requests.keys_B, requests.rows_B
    )
    how = (requests.temperature_B, requests.top_p_B, requests.top_k_B)
    token_B, logprob_B = sample(network.logits(hidden_BD), keys_B, *how)
    token_B = jnp.where(done_B, requests.pad, token_B)
    logprob_B = jnp.where(done_B, 0.0, logprob_B)
    stopped_B = answered.stopped_B | (~done_B & jnp.any(token_B[:, None] == requests.stops_BX, axis=1))
    lengths_B = answered.lengths_B + ~done_B
    answered = dataclasses.replace(
        answered,
        tokens_BN=jax.lax.dynamic_update_slice(answered.tokens_BN, token_B[:, None], (0, n)),
        logprobs_BN=jax.lax.dynamic_update_slice(answered.logprobs_BN, logprob_B[:, None], (0, n)),
        lengths_B=lengths_B,
        stopped_B=stopped_B,
    )
    return token_B, stopped_B | (lengths_B >= requests.limit_B), answered


def _split(x, compute: ComputeConfig):
    """Rows over the batch's devices."""
    return constrain(x, compute.rules, "batch", *[None] * (x.ndim - 1))


def _asked(x, requests: Requests, compute: ComputeConfig):
    """Of prompts (… U P X) as rows of the batch that ask them (… B P X)."""
    if requests.prompt_B is None:
        return x
    axes = (*[None] * (x.ndim - 3), "batch", None, None)
    take = functools.partial(jnp.take, axis=x.ndim - 3)
    return per_device(take, compute.rules, (x, requests.prompt_B), (axes, ("batch",)), axes)


def _chosen(out: transformer.ModelOutput):
    """The experts of all layers beside each other (B S L·K)."""
    assert out.router is not None
    chosen_BSLK = jnp.moveaxis(out.router.experts_BSK, 0, 2)
    return chosen_BSLK.reshape(*chosen_BSLK.shape[:2], -1)
