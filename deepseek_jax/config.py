"""What a network is: one frozen dataclass for every DeepSeek and for the dense students.

Field names are those of the released ``config.json`` files; how it is computed stands in ``compute``. Behaviour follows
from the fields; no code asks for a model's name. Everything a user can get wrong is refused here, before anything
compiles.
"""

import dataclasses
import os
from collections.abc import Iterable, Mapping
from typing import Any, Literal, Self

from deepseek_jax import hf_config
from deepseek_jax.typed import check_types, from_dict


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the length that the model was trained on.

    ``yarn`` is arXiv 2309.00071 as DeepSeek uses it (V2 section 3.1.4): frequencies between ``beta_fast`` and
    ``beta_slow`` turns are blended with those divided by ``factor``, and the softmax scale is multiplied by
    ``mscale(factor, mscale_all_dim)²``, cosines and sines by ``mscale(factor, mscale) / mscale(factor,
    mscale_all_dim)``: as in DeepSeek's released code, also where one of the two is 0. ``llama3`` is the rule of
    Llama 3.1 with its two wavelength limits.
    """

    type: Literal["none", "yarn", "llama3"] = "none"
    """none, yarn (DeepSeek) or llama3 (Llama 3.1)."""
    factor: float = 1.0
    """How many times the original length."""
    original_max_position_embeddings: int = 4096
    """The length that the model was first trained on."""
    beta_fast: float = 32.0
    """yarn: frequencies of more turns than this in the original length stay."""
    beta_slow: float = 1.0
    """yarn: frequencies of fewer turns than this are divided by factor."""
    mscale: float = 1.0
    """yarn: of the temperature on cosines and sines."""
    mscale_all_dim: float = 1.0
    """yarn: of the temperature on the softmax."""
    low_freq_factor: float = 1.0
    """llama3: wavelengths over the original length divided by this are stretched by factor."""
    high_freq_factor: float = 4.0
    """llama3: wavelengths under the original length divided by this stay."""

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow"):
            _require(getattr(self, name) > 0, f"rope_scaling.{name}={getattr(self, name)}: must be positive")
        for name in ("mscale", "mscale_all_dim"):
            _require(getattr(self, name) >= 0, f"rope_scaling.{name}={getattr(self, name)}: must not be negative")
        _require(
            self.type != "llama3" or self.low_freq_factor < self.high_freq_factor,
            f"rope_scaling.low_freq_factor={self.low_freq_factor} must be less than high_freq_factor="
            f"{self.high_freq_factor}",
        )


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A DeepSeek network (V1, V2, V3/R1) or a dense student; the defaults are a small DeepSeek-V3.

    Raises ValueError, naming field, value and what is allowed, for a combination that makes no sense.
    """

    vocab_size: int = 512
    """Entries of embedding and output head: at least the tokenizer's."""
    hidden_size: int = 128
    """Width of the model."""
    num_hidden_layers: int = 4
    """Without the MTP module."""
    intermediate_size: int = 384
    """Feed-forward width of a dense layer."""

    attention: Literal["mla", "gqa"] = "mla"
    """mla: over latents. gqa: heads of queries share heads of keys and values; with as many of each, plain multi-head
    attention."""
    num_attention_heads: int = 4
    """Heads of queries."""
    q_lora_rank: int = 64
    """mla: latent width of queries; 0: they are not compressed (V2-Lite)."""
    kv_lora_rank: int = 32
    """mla: latent width of keys and values."""
    qk_nope_head_dim: int = 32
    """mla: a head's width without position."""
    qk_rope_head_dim: int = 16
    """mla: a head's rotated width."""
    v_head_dim: int = 32
    """mla: a head's width of values."""
    num_key_value_heads: int = 4
    """gqa: heads of keys and values."""
    head_dim: int = 32
    """gqa: a head's width."""
    attention_bias: bool = False
    """Whether attention's projections have biases, as V2-Lite's and Qwen2's may."""
    rope_theta: float = 10000.0
    """Base of the rotary wavelengths."""
    rope_scaling: RopeScaling = RopeScaling()
    rope_interleave: bool = True
    """Rotate the pairs (0,1), (2,3), …; else halves (0,R/2), … as in Llama."""
    max_position_embeddings: int = 4096
    """The longest row: prompt and answer together."""

    n_routed_experts: int = 16
    """Of an MoE layer; 0: every layer is dense."""
    n_shared_experts: int = 1
    """Experts that every token goes through."""
    moe_intermediate_size: int = 96
    """Feed-forward width of an expert."""
    num_experts_per_tok: int = 4
    """Routed experts that a token goes to."""
    first_k_dense_replace: int = 1
    """So many layers at the beginning are dense."""
    scoring: Literal["softmax", "sigmoid"] = "sigmoid"
    """How a router's logits become affinities: V3 takes sigmoid, V1 and V2 softmax."""
    topk_method: Literal["greedy", "group_limited_greedy", "noaux_tc"] = "noaux_tc"
    """Experts are chosen from all (greedy), or from the topk_group best groups: by their best expert, or with the
    routing bias by their two best (noaux_tc, V3)."""
    n_group: int = 4
    """Groups of experts; not with greedy."""
    topk_group: int = 2
    """Groups that a token's experts come from; not with greedy."""
    norm_topk_prob: bool = True
    """Divide the chosen experts' weights by their sum."""
    routed_scaling_factor: float = 1.0
    """Of the chosen experts' weights."""

    num_nextn_predict_layers: int = 1
    """Modules that predict the token after the next: 0 or 1."""
    rms_norm_eps: float = 1e-6
    """Added under the root of a norm."""
    num_labels: int = 0
    """Over 0: the network ends in a head of so many numbers a position, as reward models and critics do, not in one of
    the vocabulary."""
    tie_word_embeddings: bool = False
    """The output head is the embedding."""
    initializer_range: float = 0.006
    """Standard deviation of fresh parameters."""

    def __post_init__(self) -> None:
        check_types(self)
        positive = [
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "intermediate_size",
            "num_attention_heads",
        ]
        positive += (
            ["kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"]
            if self.attention == "mla"
            else ["num_key_value_heads", "head_dim"]
        )
        for name in positive:
            _require(getattr(self, name) > 0, f"{name}={getattr(self, name)}: must be positive")
        _require(self.q_lora_rank >= 0, f"q_lora_rank={self.q_lora_rank}: must not be negative (0: not compressed)")
        _require(
            self.attention == "mla" or self.rope_scaling.type != "yarn",
            "rope_scaling.type='yarn' needs attention='mla': no dense student has it",
        )
        _require(self.rope_theta > 1, f"rope_theta={self.rope_theta}: must be greater than 1")
        _require(self.rope_dim % 2 == 0, f"the rotary width {self.rope_dim} must be even")
        if self.attention == "gqa":
            _require(
                self.num_attention_heads % self.num_key_value_heads == 0,
                f"num_key_value_heads={self.num_key_value_heads} does not divide "
                f"num_attention_heads={self.num_attention_heads}",
            )
        _require(
            self.num_nextn_predict_layers in (0, 1),
            f"num_nextn_predict_layers={self.num_nextn_predict_layers}: 0 or 1 (every released model has at most one)",
        )
        for name, no in (("num_nextn_predict_layers", 0), ("tie_word_embeddings", False)):
            _require(
                not self.num_labels or getattr(self, name) == no,
                f"{name}={getattr(self, name)}: must be {no}, as num_labels={self.num_labels} leaves no head of the "
                "vocabulary",
            )
        if self.n_routed_experts:
            self._check_experts()
        else:
            _require(
                self.first_k_dense_replace >= self.num_hidden_layers,
                f"n_routed_experts=0 makes every layer dense, but first_k_dense_replace={self.first_k_dense_replace} "
                f"is less than num_hidden_layers={self.num_hidden_layers}",
            )

    def _check_experts(self) -> None:
        experts, groups, kept, top = (
            self.n_routed_experts,
            self.n_group,
            self.topk_group,
            self.num_experts_per_tok,
        )
        _require(
            self.moe_intermediate_size > 0,
            f"moe_intermediate_size={self.moe_intermediate_size}: must be positive",
        )
        _require(self.n_shared_experts >= 0, f"n_shared_experts={self.n_shared_experts}: must not be negative")
        _require(
            0 <= self.first_k_dense_replace <= self.num_hidden_layers,
            f"first_k_dense_replace={self.first_k_dense_replace}: must lie in 0…num_hidden_layers="
            f"{self.num_hidden_layers}",
        )
        _require(1 <= top <= experts, f"num_experts_per_tok={top}: must lie in 1…n_routed_experts={experts}")
        if self.topk_method == "greedy":
            return
        _require(
            groups >= 1 and experts % groups == 0,
            f"n_group={groups} does not divide n_routed_experts={experts}",
        )
        _require(1 <= kept <= groups, f"topk_group={kept}: must lie in 1…n_group={groups}")
        left = kept * experts // groups
        _require(
            top <= left,
            f"num_experts_per_tok={top}, but topk_group={kept} of n_group={groups} leaves only {left} of "
            f"n_routed_experts={experts}",
        )
        if self.topk_method == "noaux_tc":
            _require(
                experts // groups >= 2,
                f"n_group={groups} leaves {experts // groups} expert a group; topk_method=noaux_tc scores a group by "
                "its two best",
            )

    @property
    def rope_dim(self) -> int:
        """Width R of the rotated part of a head."""
        return self.qk_rope_head_dim if self.attention == "mla" else self.head_dim

    @property
    def num_dense_layers(self) -> int:
        return (
            min(self.first_k_dense_replace, self.num_hidden_layers) if self.n_routed_experts else self.num_hidden_layers
        )

    @property
    def num_moe_layers(self) -> int:
        """MoE layers of the main model; an MTP module has one more."""
        return self.num_hidden_layers - self.num_dense_layers

    @property
    def num_routers(self) -> int:
        """Rows of the routing bias and of the load statistics: MoE layers, then the MTP module's."""
        return self.num_moe_layers + self.num_nextn_predict_layers if self.num_moe_layers else 0

    @property
    def has_router_bias(self) -> bool:
        return self.num_routers > 0 and self.topk_method == "noaux_tc"

    @property
    def cache_numbers_per_token_layer(self) -> int:
        """Numbers kept per token and layer: C + R for MLA, two heads' widths per key-value head for GQA."""
        if self.attention == "mla":
            return self.kv_lora_rank + self.qk_rope_head_dim
        return 2 * self.num_key_value_heads * self.head_dim

    def check_speaks(self) -> None:
        """ValueError where the network has no head of the vocabulary."""
        _require(
            not self.num_labels,
            f"num_labels={self.num_labels}: this is a model that scores text, as a reward model does; it predicts no "
            "tokens, so it cannot answer, and can be neither evaluated as a language model nor trained as one",
        )

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The inverse of ``to_dict``; ValueError names an unknown field."""
        return from_dict(cls, values)

    @staticmethod
    def from_hf(
        source: Mapping[str, Any] | str | os.PathLike[str], *, ignore_config: Iterable[str] = ()
    ) -> "ModelConfig":
        """The network that a released model's ``config.json`` describes, canonical: see ``hf_config.fields_of``."""
        with hf_config.naming(source):
            return ModelConfig.from_dict(hf_config.fields_of(source, ignore_config=ignore_config)).canonical()

    def to_hf(self) -> dict[str, Any]:
        """The content of a ``config.json`` for this network: see ``hf_config.content_of``."""
        return hf_config.content_of(self.canonical().to_dict())

    def canonical(self) -> "ModelConfig":
        """The same network with default values in all fields that do nothing in it: see ``hf_config.essential``."""
        return ModelConfig.from_dict(hf_config.essential(self.to_dict()))
