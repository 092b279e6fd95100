"""``bench RECIPE --work decode --drafts K``: answering as the server does it, without drafts and with them.

The weights are random, so that the module has learnt nothing and its drafts would be wrong: each is taken with the
probability ``--acceptance`` whatever the network says. That costs what it would cost with a module that is right as
often, but for which experts are chosen: those of random tokens.
"""

import concurrent.futures
import dataclasses
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from deepseek_jax.cli.bench_report import Measured, copied_a_second
from deepseek_jax.compute import ComputeConfig
from deepseek_jax.config import ModelConfig
from deepseek_jax.inference.decoding import Decoded, decode
from deepseek_jax.inference.paged import Store, empty_pages
from deepseek_jax.inference.rows import Numbers, Rows
from deepseek_jax.inference.sampling import SamplingParams
from deepseek_jax.inference.weights import random_weights, sampling_compute, sampling_config
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.workflows.pretrain import PretrainConfig

PAGE = 64


@dataclasses.dataclass(frozen=True)
class Drafting:
    """A recipe's network with an MTP module and random weights on one device, for rows of about ``columns`` tokens."""

    config: ModelConfig
    compute: ComputeConfig
    mesh: Mesh
    weights: tuple[Any, jax.Array | None]
    columns: int
    turns: int
    acceptance: float

    @classmethod
    def of(cls, recipe: PretrainConfig, columns: int, turns: int, acceptance: float) -> "Drafting":
        config = dataclasses.replace(recipe.model, num_nextn_predict_layers=1)
        mesh = make_mesh(devices=jax.devices()[:1])
        compute = sampling_compute(recipe.compute.on(mesh))
        with jax.set_mesh(mesh):
            weights = jax.block_until_ready(random_weights(config, compute, mesh, mtp=True))
        return cls(config, compute, mesh, weights, columns, turns, acceptance)

    def network(self, drafts: int) -> tuple[ModelConfig, tuple[Any, jax.Array | None]]:
        """As the engine has it: without the module where nobody drafts."""
        if drafts:
            return self.config, self.weights
        (params, bias), config = self.weights, sampling_config(self.config)
        params = {name: tree for name, tree in params.items() if name != "mtp"}
        return config, (params, None if bias is None else bias[: config.num_routers])

    def rows(self, batch: int, drafts: int) -> Rows:
        """Greedy and free in what they say, with room for all that may be kept."""
        pages = -(-(self.columns + self.turns * drafts) // PAGE)
        rows, rng = Rows.filling(batch, pages), np.random.default_rng(0)
        rows.numbers_BK[:], rows.shares_BF[:] = Rows.described(SamplingParams(temperature=0.0, max_tokens=10**6), (), 0)
        rows.state_BK[:, 0] = rng.integers(0, self.config.vocab_size, batch)
        rows.state_BK[:, 1] = self.columns - self.turns
        rows.numbers_BK[:, Numbers._fields.index("seed")] = np.arange(batch)
        rows.drafts[:, :drafts] = rng.integers(0, self.config.vocab_size, (batch, drafts))
        rows.table_BJ[:] = rng.permutation(batch * pages).reshape(batch, pages)
        anything_BV = np.full((batch, -(-self.config.vocab_size // 32)), -1, np.int32)
        with jax.set_mesh(self.mesh):
            return jax.device_put(dataclasses.replace(rows, allowed_BV=anything_BV))

    def pages(self, batch: int, drafts: int) -> Store:
        """Of random numbers."""
        (config, _), rows = self.network(drafts), self.rows(batch, drafts)
        with jax.set_mesh(self.mesh):
            pages = empty_pages(config, self.compute, rows.table_BJ.size, PAGE)
            return jax.block_until_ready(_drawn(pages))

    def lower(self, batch: int, drafts: int) -> Any:
        with jax.set_mesh(self.mesh):
            (config, weights), rows = self.network(drafts), self.rows(batch, drafts)
            pages = jax.eval_shape(lambda: empty_pages(config, self.compute, rows.table_BJ.size, PAGE))
            options = {"most": self.turns, "drafts": drafts, "forced": self.acceptance * (drafts > 0)}
            given = rows, np.int32(0), np.bool_(False)
            return decode.lower(config, self.compute, *weights, pages, *given, **options)

    def prepared(self, program: Any, batch: int, drafts: int) -> Callable[[], Decoded]:
        """A call that makes ``turns`` turns from the same place on."""
        (_, weights), rows, pages = self.network(drafts), self.rows(batch, drafts), self.pages(batch, drafts)

        def call() -> Decoded:
            nonlocal pages
            with jax.set_mesh(self.mesh):
                pages, found = program(*weights, pages, rows, np.int32(self.turns), np.bool_(False))
            return jax.block_until_ready(found)

        return call

    def time(self, program: Any, batch: int, drafts: int, repeats: int) -> tuple[float, float]:
        """(Seconds of a turn, tokens of a row that it makes)."""
        call, seconds = self.prepared(program, batch, drafts), []
        found = call()
        for _ in range(repeats):
            began = time.perf_counter()
            call()
            seconds.append((time.perf_counter() - began) / self.turns)
        return statistics.median(seconds), np.sum(np.asarray(found.tokens_BN) >= 0) / batch / self.turns

    def bytes(self, batch: int, drafts: int) -> float:
        """That a turn reads: weights, of experts those that so many tokens touch where routing is even, and the cache;
        the head for each draft once more, and from the second draft on the module too, for one token of a row."""
        config, size = self.config, np.dtype(self.compute.dtype).itemsize
        params, nbytes = self.weights[0], lambda tree: sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
        one = 3 * config.hidden_size * config.moe_intermediate_size * size
        share = 1 - config.num_experts_per_tok / max(config.n_routed_experts, 1)
        spared = lambda tokens: one * config.n_routed_experts * share**tokens  # noqa: E731
        entries = batch * self.columns * config.cache_numbers_per_token_layer * size
        head = params["embed"].nbytes if config.tie_word_embeddings else nbytes(params["head"])
        main = nbytes({name: tree for name, tree in params.items() if name not in ("mtp", "embed")})
        main += head * config.tie_word_embeddings + config.num_hidden_layers * entries
        main -= config.num_moe_layers * spared(batch * (1 + drafts))
        module = lambda tokens: nbytes(params["mtp"]) + entries + head - spared(tokens) * (config.num_moe_layers > 0)  # noqa: E731
        return main + (drafts and module(batch * (1 + drafts)) + (drafts - 1) * module(batch))


def measure_drafts(
    recipe: PretrainConfig, columns: int, turns: int, repeats: int, *, drafts: int, acceptance: float
) -> Measured:
    """``turns`` greedy turns over pages of random numbers without drafts, and with them."""
    its, batch = Drafting.of(recipe, columns, turns, acceptance), recipe.batch_size
    with concurrent.futures.ThreadPoolExecutor() as pool:
        compiled = pool.map(lambda count: its.lower(batch, count).compile(), (0, drafts))
        programs = dict(zip((0, drafts), compiled, strict=True))
    found = {count: its.time(program, batch, count, repeats) for count, program in programs.items()}
    return Measured(facts_of(its, batch, drafts, found), its.prepared(programs[drafts], batch, drafts))


def facts_of(its: Drafting, batch: int, drafts: int, found: dict[int, tuple[float, float]]) -> dict[str, str]:
    """found: what ``time`` says of 0 and of ``drafts``."""
    copied, rate = copied_a_second(), {count: batch * tokens / seconds for count, (seconds, tokens) in found.items()}

    def told(count: int) -> str:
        (seconds, tokens), size = found[count], its.bytes(batch, count)
        return (
            f"{rate[count]:,.0f} tokens a second, {tokens:.2f} of a row in a turn of {1e3 * seconds:.2f} ms; it reads "
            f"{size / 1e9:.3g} GB, {size / seconds / copied:.0%} of copying, {copied / 1e9:,.0f} GB/s"
        )

    ratio, bound = rate[drafts] / rate[0], found[drafts][1] * its.bytes(batch, 0) / its.bytes(batch, drafts)
    return {
        "work": f"{batch} rows of {its.columns} columns; a random module, {its.acceptance:.0%} of drafts are forced",
        "without drafts": told(0),
        f"drafts: {drafts}": told(drafts),
        "ratio": f"{ratio:.2f}×, {ratio / bound:.0%} of the {bound:.2f}× that the bytes allow",
    }


@functools.partial(jax.jit, donate_argnums=0)
def _drawn(pages: Store) -> Store:
    def draw(leaf):
        if leaf.dtype == np.int32:
            return leaf
        noise = lambda shape: jax.random.normal(jax.random.key(1, impl="rbg"), shape, leaf.dtype)  # noqa: E731
        return (
            jax.lax.map(lambda _: noise(leaf.shape[1:]), np.arange(len(leaf))) if leaf.ndim == 4 else noise(leaf.shape)
        )

    return jax.tree.map(draw, pages)
