"""DeepSeek-R1-Distill-Llama-8B, a dense student on Llama-3.1-8B.

deepseek-jax inspect models/r1_distill_llama_8b
"""

from deepseek_jax.config import ModelConfig, RopeScaling


def config() -> ModelConfig:
    return ModelConfig(
        vocab_size=128256,
        hidden_size=4096,
        num_hidden_layers=32,
        intermediate_size=14336,
        attention="gqa",
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        attention_bias=False,
        rope_theta=500000.0,
        rope_scaling=RopeScaling(
            "llama3",
            factor=8.0,
            original_max_position_embeddings=8192,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
        ),
        rope_interleave=False,
        max_position_embeddings=131072,
        n_routed_experts=0,
        first_k_dense_replace=32,
        num_nextn_predict_layers=0,
        rms_norm_eps=1e-5,
        initializer_range=0.02,
    )
