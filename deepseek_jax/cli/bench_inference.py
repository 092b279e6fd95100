"""``bench RECIPE --work prefill`` and ``--work decode``: what ``generate`` does before the first token and after it,
with random weights that are drawn on the device."""

import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from deepseek_jax.cli.bench_report import Measured, bandwidth, peak_memory, rates
from deepseek_jax.compute import ComputeConfig
from deepseek_jax.config import ModelConfig
from deepseek_jax.inference.cache import Cache
from deepseek_jax.inference.generate import Decoding, Generated, begin, go_on
from deepseek_jax.inference.requests import Requests, make_requests
from deepseek_jax.inference.sampling import SamplingParams
from deepseek_jax.inference.weights import random_weights, sampling_compute, sampling_config
from deepseek_jax.model import parameters
from deepseek_jax.model.costs import attention_flops, count_parameters, forward_flops
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.parallel.sharding import constrain
from deepseek_jax.workflows.pretrain import PretrainConfig
from deepseek_kernels import Visible
from deepseek_kernels.integers import GROUP

# Bytes of a number, with the scales of integers.
_STORED = {"float8_e4m3": 1, "int8": 1 + 2 / GROUP, "int4": 0.5 + 2 / GROUP}
QUANTISED: dict[str, Any] = {"fp8": "float8_e4m3", "int8": "int8", "int4": "int4"}
TRACED = 8  # steps of decoding in a profile


@dataclasses.dataclass(frozen=True)
class Setting:
    """A recipe's network with random weights, and a batch of rows to answer."""

    config: ModelConfig
    compute: ComputeConfig
    mesh: Mesh
    weights: tuple[Any, jax.Array | None]
    requests: Requests

    @classmethod
    def of(cls, recipe: PretrainConfig, prompt: int, answer: int, columns: int, quantize: str) -> "Setting":
        mesh, config = make_mesh(recipe.mesh), sampling_config(recipe.model)
        compute = sampling_compute(recipe.compute.on(mesh))
        compute = dataclasses.replace(compute, param_dtype=QUANTISED[quantize]) if quantize in QUANTISED else compute
        rng = np.random.default_rng(0)
        prompts = rng.integers(0, config.vocab_size, (recipe.batch_size, prompt)).tolist()
        with jax.set_mesh(mesh):
            greedy = SamplingParams(temperature=0.0, max_tokens=answer)
            requests = make_requests(prompts, greedy, width=prompt, ways=_ways(mesh, compute.rules.batch))
            weights = jax.block_until_ready(random_weights(config, compute, mesh))
        # Exactly as many columns as there are tokens, and rows that do not end while they are timed.
        limit_B = np.full_like(requests.limit_B, answer + 1)
        return cls(config, compute, mesh, weights, dataclasses.replace(requests, columns=columns, limit_B=limit_B))

    @property
    def batch(self) -> int:
        return len(self.requests.limit_B)

    def compile(self, function: Any, *operands: Any) -> tuple[Any, float]:
        """(The program of ``function(config, compute, params, bias, *operands)``, seconds)."""
        began = time.perf_counter()
        with jax.set_mesh(self.mesh):
            compiled = function.lower(self.config, self.compute, *self.weights, *operands).compile()
        return compiled, time.perf_counter() - began


def measure_prefill(recipe: PretrainConfig, columns: int, repeats: int, *, quantize: str = "none") -> Measured:
    """Prompts of ``columns`` tokens up to the first token of each answer: the median of ``repeats``."""
    its = Setting.of(recipe, columns, 1, columns, quantize)
    compiled, compiling = its.compile(begin, its.requests)
    call = functools.partial(compiled, *its.weights, its.requests)
    jax.block_until_ready(call())
    seconds = statistics.median(_seconds(call) for _ in range(repeats))
    tokens = its.batch * columns
    # The head is applied to a row's last token alone.
    head = 2 * its.config.vocab_size * its.config.hidden_size
    flops = tokens * (forward_flops(its.config) - head + attention_flops(its.config, columns // 2)) + its.batch * head
    facts = {
        "work": f"{its.batch} prompts of {columns} tokens, {_network(its)}",
        **rates(tokens, seconds, flops / seconds / its.mesh.size, its.compute.dtype),
        **_program(compiled, compiling),
        **_routing(_loads(its, its.requests.tokens_BP, None)),
    }
    return Measured(facts, call)


def measure_decoding(
    recipe: PretrainConfig, columns: int, new_tokens: int, repeats: int, *, quantize: str = "none"
) -> Measured:
    """``new_tokens`` greedy steps over a cache of random numbers, up to ``columns`` tokens a row: the median of
    ``repeats`` such calls, divided by the steps."""
    its = Setting.of(recipe, columns - new_tokens, new_tokens, columns, quantize)
    decoding = _begun(its, jax.jit(_random_cache, static_argnames=("config", "compute", "batch", "columns")))
    load_LE = _loads(its, decoding.token_B[:, None], decoding.cache)
    compiled, compiling = its.compile(go_on, its.requests, decoding, np.int32(0))

    def call(steps: int = TRACED) -> Any:
        nonlocal decoding
        given = _begun(its, lambda **_: decoding.cache)
        decoding = compiled(*its.weights, its.requests, given, np.int32(1 + steps))
        return decoding.token_B

    timed = functools.partial(call, new_tokens)
    jax.block_until_ready(timed())
    seconds = statistics.median(_seconds(timed) for _ in range(repeats)) / new_tokens
    context = columns - new_tokens // 2
    flops = its.batch * (forward_flops(its.config) + attention_flops(its.config, context, absorbed=True))
    facts = {
        "work": f"{its.batch} rows, {columns - new_tokens}…{columns} tokens before them, {_network(its)}",
        **rates(its.batch, seconds, flops / seconds / its.mesh.size, its.compute.dtype),
        "weights and cache": bandwidth(_touched(its, load_LE, context), seconds),
        **_program(compiled, compiling),
        **_routing(load_LE),
    }
    return Measured(facts, call)


def _begun(its: Setting, cache: Callable[..., Cache]) -> Decoding:
    """Answers of which one token is there, behind prompts that fill all but the answers' columns."""
    requests, batch = its.requests, its.batch
    cached = cache(config=its.config, compute=its.compute, batch=batch, columns=requests.columns)
    room = (batch, requests.answers)
    nothing = jnp.zeros(batch, bool)
    answered = Generated(jnp.zeros(room, jnp.int32), jnp.zeros(room), jnp.zeros(batch, jnp.int32), nothing)
    cached = dataclasses.replace(cached, lengths_B=jnp.asarray(requests.lengths_B))
    first_B = jnp.asarray(requests.tokens_BP[:, -1])
    return Decoding(jnp.int32(1), cached, first_B, jnp.zeros(batch, bool), answered, None)


def _random_cache(config: ModelConfig, compute: ComputeConfig, batch: int, columns: int) -> Cache:
    cache = Cache.empty(config, compute, batch, columns)
    keys = jax.random.split(jax.random.key(1, impl="rbg"), len(cache.layers))

    def draw(key, leaf):  # in parts: the bits of a large one would take more than it
        part = lambda key: jax.random.normal(key, leaf.shape[1:], leaf.dtype)  # noqa: E731
        drawn = jax.lax.map(part, jax.random.split(key, leaf.shape[0]))
        return constrain(drawn, compute.rules, *[None] * (leaf.ndim - 3), "batch", None, None)

    return dataclasses.replace(cache, layers=tuple(map(draw, keys, cache.layers)))


@functools.partial(jax.jit, static_argnames=("config", "compute"))
def _load(config: ModelConfig, compute: ComputeConfig, params, router_bias, tokens_BS, cache: Cache | None):
    """Tokens that each expert of each layer gets (L E), None without experts."""
    network = parameters.merge(config, params, router_bias, compute)
    if cache is None:
        out = network(tokens_BS, visible=Visible(), head=False)
    else:
        options: dict[str, Any] = {"positions_BS": cache.positions(1), "visible": cache.visible(1)}
        out = network(tokens_BS, memories=cache.memories(), absorbed=True, head=False, **options)
    return None if out.router is None else out.router.load_E


def _loads(its: Setting, tokens_BS: Any, cache: Cache | None) -> np.ndarray | None:
    with jax.set_mesh(its.mesh):
        compute = dataclasses.replace(its.compute, scan_unroll=1)  # for it is run once
        load_LE = _load(its.config, compute, *its.weights, jnp.asarray(tokens_BS), cache)
    return None if load_LE is None else np.asarray(load_LE)


def _touched(its: Setting, load_LE: np.ndarray | None, context: int) -> float:
    """Bytes that a step reads on a device: weights, of experts those that any row has chosen, and its rows' cache."""
    config, rules, itemsize = its.config, its.compute.rules, jnp.dtype(its.compute.dtype).itemsize
    # XLA keeps two int4 to a byte, numpy one.
    here = lambda leaf: leaf.addressable_shards[0].data.nbytes // (2 if leaf.dtype == jnp.int4 else 1)  # noqa: E731
    params = its.weights[0]
    read = sum(map(here, jax.tree.leaves(params))) - (0 if config.tie_word_embeddings else here(params["embed"]))
    if load_LE is not None:
        stored = _STORED.get(its.compute.param_dtype, itemsize)
        ways = _ways(its.mesh, (*rules.experts, *rules.expert_mlp))
        one = 3 * config.hidden_size * config.moe_intermediate_size * stored / ways
        read -= one * np.sum(load_LE == 0)
    numbers = config.cache_numbers_per_token_layer * config.num_hidden_layers
    return read + its.batch / _ways(its.mesh, rules.batch) * context * numbers * itemsize


def _ways(mesh: Mesh, axes: tuple[str, ...]) -> int:
    return math.prod(mesh.shape[axis] for axis in axes)


def _seconds(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - began


def _network(its: Setting) -> str:
    name = its.compute.param_dtype
    stored = f", matrices in {'FP8' if name == 'float8_e4m3' else name}" if name in _STORED else ""
    return f"{count_parameters(its.config)['parameters_total']:,} parameters, {its.compute.dtype}{stored}"


def _program(compiled: Any, compiling: float) -> dict[str, str]:
    return {"peak memory": peak_memory(compiled), "compile time": f"{compiling:.1f} s; less from the compile cache"}


def _routing(load_LE: np.ndarray | None) -> dict[str, str]:
    if load_LE is None:
        return {}
    vio = np.mean(load_LE.max(axis=1) / load_LE.mean(axis=1) - 1)
    touched = np.mean(np.sum(load_LE > 0, axis=1))
    return {"routing": f"its own, MaxVio {vio:.2f}, {touched:.1f} of {load_LE.shape[1]} experts touched in a layer"}
