"""DeepSeekMoE-16B (arXiv 2401.06066): 16.4 B parameters, 2.8 B active; every head has its own keys.

deepseek-jax inspect models/deepseek_moe_16b
"""

from deepseek_jax.config import ModelConfig


def config() -> ModelConfig:
    return ModelConfig(
        vocab_size=102400,
        hidden_size=2048,
        num_hidden_layers=28,
        intermediate_size=10944,
        attention="gqa",
        num_attention_heads=16,
        num_key_value_heads=16,
        head_dim=128,
        rope_interleave=False,
        max_position_embeddings=4096,
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
