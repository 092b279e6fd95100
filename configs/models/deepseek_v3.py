"""DeepSeek-V3 and R1 (arXiv 2412.19437): 671 B parameters, 37 B active, and a module that predicts one token more.

deepseek-jax inspect models/deepseek_v3
"""

from deepseek_jax.config import ModelConfig, RopeScaling


def config() -> ModelConfig:
    return ModelConfig(
        vocab_size=129280,
        hidden_size=7168,
        num_hidden_layers=61,
        intermediate_size=18432,
        num_attention_heads=128,
        q_lora_rank=1536,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        rope_scaling=RopeScaling(
            "yarn",
            factor=40.0,
            original_max_position_embeddings=4096,
            mscale=1.0,
            mscale_all_dim=1.0,
        ),
        max_position_embeddings=163840,
        n_routed_experts=256,
        n_shared_experts=1,
        moe_intermediate_size=2048,
        num_experts_per_tok=8,
        first_k_dense_replace=3,
        scoring="sigmoid",
        topk_method="noaux_tc",
        n_group=8,
        topk_group=4,
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
        num_nextn_predict_layers=1,
    )
