"""DeepSeek-V2-Lite (arXiv 2405.04434): 15.7 B parameters, 2.7 B active; queries are not compressed.

deepseek-jax inspect models/deepseek_v2_lite
"""

from deepseek_jax.config import ModelConfig, RopeScaling


def config() -> ModelConfig:
    return ModelConfig(
        vocab_size=102400,
        hidden_size=2048,
        num_hidden_layers=27,
        intermediate_size=10944,
        num_attention_heads=16,
        q_lora_rank=0,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        rope_scaling=RopeScaling(
            "yarn",
            factor=40.0,
            original_max_position_embeddings=4096,
            mscale=0.707,
            mscale_all_dim=0.707,
        ),
        max_position_embeddings=163840,
        n_routed_experts=64,
        n_shared_experts=2,
        moe_intermediate_size=1408,
        num_experts_per_tok=6,
        first_k_dense_replace=1,
        scoring="softmax",
        topk_method="greedy",
        n_group=1,
        topk_group=1,
        norm_topk_prob=False,
        num_nextn_predict_layers=0,
    )
