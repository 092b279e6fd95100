"""Fields of a ``config.json`` that no architecture's table names: what they can mean for the network.

Null is absent. Bookkeeping is passed over. A field is refused where its value is one that changes the arithmetic: by
``ONLY``, or because its name speaks of a part of a network and it says more than "no" or "none". What is left says
nothing of the network; it is passed over with a warning. The lists come from the configurations of all causal language
models in transformers 5 and from what trainers and quantisers write.
"""

import re
from collections.abc import Mapping
from typing import Any

INERT, UNKNOWN = "inert", "unknown"  # verdicts; any other says why a field is refused

# What steers generation, classification, training, storage or transformers itself.
_BOOKKEEPING = """
    architectures model_type auto_map torch_dtype dtype transformers_version name_or_path tokenizer_class
    torchscript use_bfloat16 tf_legacy_loss return_dict use_return_dict return_dict_in_generate output_attentions
    output_scores output_hidden_states output_router_logits output_past use_cache keys_to_ignore_at_inference
    task_specific_params id2label label2id num_labels problem_type finetuning_task classifier_dropout
    classifier_bias classifier_activation prefix suffix is_decoder chunk_size_feed_forward cache_implementation
    transformers.js_config quantization_config max_length min_length max_new_tokens do_sample early_stopping
    num_beams num_beam_groups diversity_penalty temperature top_k top_p min_p typical_p repetition_penalty
    length_penalty no_repeat_ngram_size renormalize_logits encoder_no_repeat_ngram_size bad_words_ids
    num_return_sequences remove_invalid_values suppress_tokens begin_suppress_tokens
    exponential_decay_length_penalty stop_strings generation_config attn_implementation attn_implementation_internal
    experts_implementation use_flash_attn use_flash_attention use_flash_attention_2 flash_attn use_sdpa
    use_liger_kernel gradient_checkpointing use_gradient_checkpointing base_model_tp_plan base_model_pp_plan
    base_model_ep_plan tp_plan num_logits_to_keep device_map model_max_length max_seq_len max_seq_length
    max_sequence_length seq_length seq_len n_ctx tokenizer_model_max_length initializer_factor init_std
    embed_init_std aux_loss_alpha aux_loss_coef router_aux_loss_coef seq_aux ep_size z_loss_coefficient
    router_z_loss_coef mtp_loss_scaling_factor summary_activation summary_first_dropout summary_proj_to_labels
    summary_type summary_use_proj pad_to_multiple_of resize_token_embeddings lora_merged
    lora_r lora_alpha lora_dropout neftune_noise_alpha model_parallel_size tensor_parallel_size
    tensor_parallel_degree pipeline_parallel_size use_memory_efficient_attention fused_mlp
"""
_ALSO = re.compile(r"_.*|(bos|eos|pad|unk|sep|cls|mask)_token|.*_token_(ids?|index)|unsloth(_.*)?|.*_version")

# Fields with values that mean what every network here computes; any other value is refused.
ONLY: Mapping[str, tuple[Any, ...]] = {
    **dict.fromkeys(("hidden_act", "hidden_activation", "activation_function"), ("silu", "swish")),
    **dict.fromkeys(("causal", "is_causal", "use_rope", "use_rms_norm", "scale_attn_weights", "gated_mlp"), (True,)),
    **dict.fromkeys(("partial_rotary_factor", "rotary_pct", "moe_layer_freq", "pretraining_tp"), (1, 1.0)),
    **dict.fromkeys(("logit_scale", "logits_scaling", "lm_head_multiplier", "embedding_multiplier"), (1, 1.0)),
    **dict.fromkeys(("embedding_scale", "scale_emb", "residual_multiplier", "decoder_sparse_step"), (1, 1.0)),
    "position_embedding_type": ("rope", "rotary"),
    "norm_type": ("rms_norm", "rmsnorm", "RMSNorm"),
}
# How words begin, in names with underscores, that speak of parts of a network.
_PARTS = """
    attention attn head q_ k_ v_ qk kv key_ query value_ causal bidirectional window sliding swa sink cross
    multi_query clip clamp limit cap$ capping soft logit rope rotary mrope pos_ position rel_ relative alibi mlp ff_
    ffn feed act$ act_ activ swiglu glu gat moe expert rout share topk group norm rms ln eps scal multiplier mup
    factor resid floor temperature_tuning size dim rank width layer block depth d_ n_embd inner hidden intermediate
    bias dropout drop pdrop emb conv ssm mamba lru recur state time_step time_mix linear kda lora adapter quant
    load_in sparse sparsity prun hc hyper index_ indexer hash ngram engram mtp nextn mem encoder decoder vision
    audio vq text_config tie parallel chunk compress prefix_lm altup laurel zero_expert asm afn scor expan rescal
    jitter noise cycles
"""
_NAMES_A_PART = re.compile(rf"(?:^|_)(?:{'|'.join(_PARTS.split())})")
_NO = (None, False, 0, 0.0, "", "none", "None", [], {})


def verdict(name: str, value: Any) -> str:
    """What a field that its architecture does not name says here: INERT, UNKNOWN, or why it is refused."""
    if value is None or name in _BOOKKEEPING.split():
        return INERT
    if name in ONLY:
        return checked(value, ONLY[name])
    if _ALSO.fullmatch(name):
        return INERT
    if _NAMES_A_PART.search(name.lower()):
        return INERT if any(value == no for no in _NO) else "of a part that is not known here"
    return UNKNOWN


def checked(value: Any, allowed: tuple[Any, ...]) -> str:
    """INERT for one of the allowed values, else which those are."""
    return INERT if among(value, allowed) else f"only {' or '.join(map(repr, allowed))}"


def among(value: Any, allowed: tuple[Any, ...]) -> bool:
    """Equality that keeps true and 1 apart."""
    return any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in allowed)
