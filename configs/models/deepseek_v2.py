"""DeepSeek-V2 (arXiv 2405.04434): 236 B parameters, 21 B active; a token goes to 3 of 8 groups of experts.

Copies of its config.json differ in mscale; 0.707 is the paper's. A checkpoint's own file decides when it is loaded.

deepseek-jax inspect models/deepseek_v2
"""

from deepseek_jax.config import ModelConfig, RopeScaling


def config() -> ModelConfig:
    return ModelConfig(
        vocab_size=102400,
        hidden_size=5120,
        num_hidden_layers=60,
        intermediate_size=12288,
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
            mscale=0.707,
            mscale_all_dim=0.707,
        ),
        max_position_embeddings=163840,
        n_routed_experts=160,
        n_shared_experts=2,
        moe_intermediate_size=1536,
        num_experts_per_tok=6,
        first_k_dense_replace=1,
        scoring="softmax",
        topk_method="group_limited_greedy",
        n_group=8,
        topk_group=3,
        norm_topk_prob=False,
        routed_scaling_factor=16.0,
        num_nextn_predict_layers=0,
    )
