"""DeepSeek-R1-Distill-Qwen-14B, a dense student on Qwen2.5-14B.

deepseek-jax inspect models/r1_distill_qwen_14b
"""

from deepseek_jax.config import ModelConfig


def config() -> ModelConfig:
    return ModelConfig(
        vocab_size=152064,
        hidden_size=5120,
        num_hidden_layers=48,
        intermediate_size=13824,
        attention="gqa",
        num_attention_heads=40,
        num_key_value_heads=8,
        head_dim=128,
        attention_bias=True,
        rope_theta=1000000.0,
        rope_interleave=False,
        max_position_embeddings=131072,
        n_routed_experts=0,
        first_k_dense_replace=48,
        num_nextn_predict_layers=0,
        rms_norm_eps=1e-5,
        initializer_range=0.02,
    )
