"""A model as sampling reads it: what all ways to answer share."""

import dataclasses
import math
import threading
from collections.abc import Sequence
from typing import Any

import jax

from deepseek_jax.checkpoint.model import Model
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.inference.requests import as_ids
from deepseek_jax.inference.speculation import check_drafts
from deepseek_jax.inference.weights import (
    Weights,
    random_weights,
    sampling_compute,
    sampling_config,
    sampling_weights,
    with_copies,
)
from deepseek_jax.parallel.copies import as_places, check_places
from deepseek_jax.parallel.sharding import ShardingRules


class SamplingModel:
    """A network, its tokenizer and its mesh, and the weights in the form that decoding reads: made at first use, and
    then by ``update`` alone. For any thread.

    config: the model's. network: without an MTP module that nobody drafts with. stepping: held by a step of requests
    while it reads the weights, and by who gives others.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer | None,
        *,
        rules: ShardingRules | None = None,
        placement: Sequence[Sequence[int]] | None = None,
        drafts: int = 0,
    ):
        """Arguments, and ValueError, as ``Engine``'s; drafts: tokens that the MTP module guesses."""
        model.config.check_speaks()
        check_drafts(model.config, drafts)
        self.config, self.mesh, self._drafts = model.config, model.mesh, bool(drafts)
        self.network = model.config if drafts else sampling_config(model.config)
        self.tokenizer = model.text if tokenizer is None else tokenizer.over(model.config.vocab_size)
        self.compute = sampling_compute(model.compute)
        if rules is not None:
            self.compute = dataclasses.replace(self.compute, rules=rules)
        self._places = None if placement is None else as_places(placement)
        if self._places is not None:
            if self.compute.scan_decode:
                raise ValueError("placement: with compute.scan_decode layers stay in their stacks")
            ways = math.prod(self.mesh.shape[axis] for axis in self.compute.rules.experts)
            check_places(self._places, self.config.num_moe_layers, self.config.n_routed_experts, ways)
        self._given: Weights | None = (model.params, model.router_bias)
        self._weights: Weights | None = None
        self._lock = threading.Lock()
        self.stepping = threading.Lock()

    def weights(self) -> Weights:
        """Parameters and routing bias."""
        with self._lock:
            return self._made()

    def update(self, params: dict[str, Any], router_bias: jax.Array | None) -> None:
        """A copy of these from now on; the former are let go before it is made. By who holds ``stepping``."""
        with self._lock:
            self._given, self._weights = (params, router_bias), None
            self._made()

    def draw(self) -> None:
        """``random_weights`` in the place of the model's."""
        with self._lock, jax.set_mesh(self.mesh):
            self._given, self._weights = None, random_weights(self.config, self.compute, self.mesh, mtp=self._drafts)

    def ids(self, prompt: str | Sequence[int]) -> list[int]:
        """Of a text with the begin-of-sentence token in front where there is one; ids as they are. ValueError for what
        is none."""
        if isinstance(prompt, str):
            return [*self.tokenizer.bos_ids, *self.tokenizer.encode(prompt)]
        return as_ids(prompt)

    def _made(self) -> Weights:
        weights = self._weights
        if weights is None:
            assert self._given is not None
            options: dict[str, Any] = {"config": self.config, "compute": self.compute, "mesh": self.mesh}
            with jax.set_mesh(self.mesh):
                params, bias = sampling_weights(*self._given, **options, mtp=self._drafts)
                if self._places is not None:
                    params = with_copies(params, self._places, config=self.config, rules=self.compute.rules)
                weights = self._weights = params, bias
            self._given = None
        return weights
