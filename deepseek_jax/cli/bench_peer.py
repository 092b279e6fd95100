"""transformers' DeepseekV3ForCausalLM of a model's shape: scripts/peer_transformers.py in a process of its own."""

import json
import subprocess
from pathlib import Path
from typing import Any

from deepseek_jax.config import ModelConfig


def ask_peer(python: str, model: ModelConfig, **request: Any) -> dict[str, Any]:
    """What the script found, for the request that its docstring describes."""
    script = Path(__file__).resolve().parents[2] / "scripts" / "peer_transformers.py"
    if not script.is_file():
        raise FileNotFoundError(f"{script}: the peer's benchmark is part of the repository, not of the package")
    done = subprocess.run(
        [python, str(script)],
        input=json.dumps({"config": hf_config(model), **request}),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"the peer failed: {done.stderr.strip().splitlines()[-1:]}")
    return json.loads(done.stdout.strip().split("\n")[-1])


def hf_config(model: ModelConfig) -> dict[str, Any]:
    """The fields that transformers' DeepseekV3Config needs for a network of the same shape."""
    same = """vocab_size hidden_size num_hidden_layers intermediate_size num_attention_heads q_lora_rank kv_lora_rank
    qk_nope_head_dim qk_rope_head_dim v_head_dim n_routed_experts n_shared_experts moe_intermediate_size
    num_experts_per_tok first_k_dense_replace n_group topk_group norm_topk_prob routed_scaling_factor rms_norm_eps
    max_position_embeddings tie_word_embeddings"""
    fields = {name: getattr(model, name) for name in same.split()}
    return {**fields, "num_key_value_heads": model.num_attention_heads}


def peer_row(
    python: str, model: ModelConfig, work: str, *, rows: int, columns: int, new_tokens: int, **request: Any
) -> str:
    """The peer's tokens a second at ``bench RECIPE``'s kind of work, on a GPU if there is one, or why there are none.

    It wants the memory that jax takes for itself with its first array. request: dtype, steps, checkpointed.
    """
    if work == "train":
        request |= {"rows": rows, "seq": columns, "decode_batches": []}
    else:
        prompt = columns - new_tokens if work == "decode" else columns
        request |= {"steps": 0, "phases": [rows], "decode_batches": [], "prompt": prompt, "new_tokens": new_tokens}
    try:
        found = ask_peer(python, model, device="auto", **request)
    except RuntimeError as failed:
        return str(failed)
    speed = found["train"] if work == "train" else found["phases"][str(rows)][work]
    return f"{speed['tokens_per_second']:,.0f} tokens a second, {found['peer']}"
