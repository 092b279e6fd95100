"""What a ``config.json`` may say, as tables: one per architecture, and those for quantisation and rotary scaling.

``FAMILIES`` is the one place where a model's name decides anything: transformers leaves out fields when it saves (V3:
``scoring_func``, ``topk_method``), and an absent field means what its architecture says.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Family:
    """How one architecture spells its configuration.

    architecture: of the language model; ``classifier``, the one with a head of scores, is called after it. reads:
    fields whose values become those of ModelConfig with the same name. absent: what a missing one of these means, where
    transformers and the released code agree; others must be there. fixed: what the architecture itself decides, as
    ModelConfig fields. only: fields that must have one of these values if they are there, since nothing else is
    computed here; the first is written. inert: fields that change nothing. Any others: see ``hf_fields``.
    """

    architecture: str
    reads: tuple[str, ...]
    absent: Mapping[str, Any]
    fixed: Mapping[str, Any]
    only: Mapping[str, tuple[Any, ...]]
    inert: tuple[str, ...] = ()

    @property
    def classifier(self) -> str:
        return self.architecture.replace("ForCausalLM", "ForSequenceClassification")


NULL_MEANS_ZERO = ("q_lora_rank", "n_routed_experts", "n_shared_experts")  # any other null means: not there
ROTARY = ("rope_theta", "rope_scaling", "rope_parameters")

MLA_INERT = ("head_dim", "qk_head_dim", "num_key_value_heads")  # transformers writes them; latent attention has neither

BASE = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads"),
    *("max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "initializer_range"),
)
GQA = ("num_key_value_heads", "head_dim")
MLA = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "attention_bias")
EXPERTS = ("n_shared_experts", "moe_intermediate_size", "num_experts_per_tok", "first_k_dense_replace")
GROUPS = ("n_group", "topk_group")

_ABSENT = {"rms_norm_eps": 1e-6, "tie_word_embeddings": False, "initializer_range": 0.02}
_ONLY = {"hidden_act": ("silu",), "attention_dropout": (0.0,)}
_MOE_ONLY = _ONLY | {"moe_layer_freq": (1,), "pretraining_tp": (1,)}
_DENSE = {"attention": "gqa", "rope_interleave": False, "n_routed_experts": 0, "num_nextn_predict_layers": 0}

FAMILIES = {
    "deepseek": Family(
        "DeepseekForCausalLM",
        reads=(*BASE, *GQA, "n_routed_experts", *EXPERTS, "norm_topk_prob"),
        absent=_ABSENT | {"norm_topk_prob": False},
        fixed={
            **{"attention": "gqa", "attention_bias": False, "rope_interleave": False, "num_nextn_predict_layers": 0},
            **{"scoring": "softmax", "topk_method": "greedy", "routed_scaling_factor": 1.0},
        },
        # A bias would be on the output too, which our grouped-query attention does not have.
        only=_MOE_ONLY | {"attention_bias": (False,), "scoring_func": ("softmax",)},
    ),
    "deepseek_v2": Family(
        "DeepseekV2ForCausalLM",
        reads=(*BASE, *MLA, "n_routed_experts", *EXPERTS, "topk_method", *GROUPS, "routed_scaling_factor"),
        absent=_ABSENT | {"attention_bias": False, "topk_method": "greedy", "routed_scaling_factor": 1.0},
        # norm_topk_prob=true: the released code then drops the scaling factor, transformers ignores the field.
        fixed={
            **{"attention": "mla", "rope_interleave": True, "num_nextn_predict_layers": 0},
            **{"scoring": "softmax", "norm_topk_prob": False},
        },
        only={
            **_MOE_ONLY,
            **{"scoring_func": ("softmax",), "norm_topk_prob": (False,), "mlp_bias": (False,)},
            "topk_method": ("greedy", "group_limited_greedy"),
        },
        inert=MLA_INERT,
    ),
    "deepseek_v3": Family(
        "DeepseekV3ForCausalLM",
        reads=(
            *(*BASE, *MLA, "n_routed_experts", *EXPERTS, *GROUPS),
            *("norm_topk_prob", "routed_scaling_factor", "rope_interleave", "num_nextn_predict_layers"),
        ),
        absent=_ABSENT
        | {"attention_bias": False, "norm_topk_prob": True, "routed_scaling_factor": 2.5}
        | {"rope_interleave": True, "num_nextn_predict_layers": 1},
        fixed={"attention": "mla", "scoring": "sigmoid", "topk_method": "noaux_tc"},
        only=_MOE_ONLY | {"scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",)},
        inert=MLA_INERT,
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        reads=(*BASE, *GQA),
        absent=_ABSENT,
        fixed=_DENSE | {"attention_bias": True},  # on queries, keys and values, always
        only=_ONLY | {"use_sliding_window": (False,), "use_mrope": (False,)},
        # The window's while use_sliding_window is false; attention_bias, which transformers' Qwen2 does not read.
        inert=("sliding_window", "max_window_layers", "attention_bias"),
    ),
    "llama": Family(
        "LlamaForCausalLM",
        reads=(*BASE, *GQA),
        absent=_ABSENT,
        fixed=_DENSE | {"attention_bias": False},
        only=_ONLY | {"attention_bias": (False,), "mlp_bias": (False,), "pretraining_tp": (1,)},
    ),
}

PACKED = "compressed-tensors"  # the quant_method of integers, see ``hf_quantisation``

# Of quantization_config: the values that loading understands; None: whatever, the tensors' own types decide.
QUANTISATION: dict[str, tuple[Any, ...] | None] = {
    "quant_method": ("fp8",),
    "fmt": ("e4m3",),
    "weight_block_size": ([128, 128],),
    "activation_scheme": ("dynamic",),
    "scale_fmt": ("float", "ue8m0"),
    "expert_dtype": ("fp8",),
    **dict.fromkeys(("modules_to_not_convert", "modules_to_convert", "ignored_layers", "dequantize")),
}

# Fields of RopeScaling by type, and what absent ones mean: those of the released code, where mscale_all_dim is 0.
SCALING: dict[str, dict[str, Any]] = {
    "none": {},
    "yarn": {
        **{"factor": None, "original_max_position_embeddings": None},
        **{"beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 0.0},
    },
    "llama3": dict.fromkeys(
        ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"), None
    ),
}
