"""DeepSeek-R1-Distill-Qwen-7B, a dense student on Qwen2.5-Math-7B.

deepseek-jax inspect models/r1_distill_qwen_7b
"""

from deepseek_jax.config import ModelConfig


def config() -> ModelConfig:
    return ModelConfig(
        vocab_size=152064,
        hidden_size=3584,
        num_hidden_layers=28,
        intermediate_size=18944,
        attention="gqa",
        num_attention_heads=28,
        num_key_value_heads=4,
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
