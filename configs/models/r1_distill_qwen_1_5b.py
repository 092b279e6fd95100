"""DeepSeek-R1-Distill-Qwen-1.5B, a dense student on Qwen2.5-Math-1.5B, its head untied.

deepseek-jax inspect models/r1_distill_qwen_1_5b
"""

from deepseek_jax.config import ModelConfig


def config() -> ModelConfig:
    return ModelConfig(
        vocab_size=151936,
        hidden_size=1536,
        num_hidden_layers=28,
        intermediate_size=8960,
        attention="gqa",
        num_attention_heads=12,
        num_key_value_heads=2,
        head_dim=128,
        attention_bias=True,
        rope_theta=10000.0,
        rope_interleave=False,
        max_position_embeddings=131072,
        n_routed_experts=0,
        first_k_dense_replace=28,
        num_nextn_predict_layers=0,
        rms_norm_eps=1e-6,
        initializer_range=0.02,
    )
