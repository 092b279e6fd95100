"""`deepseek-jax generate` on a folder that transformers wrote: the same greedy text, raw and in R1's template."""

import json
from pathlib import Path

import pytest
from small import tokenizer

from deepseek_jax.cli.main import main

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

R1_CONFIG = Path(__file__).parents[3] / "shared/data/deepseek_r1_tokenizer/tokenizer_config.json"
WIDTHS = dict(
    vocab_size=300,
    hidden_size=16,
    intermediate_size=32,
    moe_intermediate_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    n_shared_experts=1,
    n_routed_experts=8,
    kv_lora_rank=8,
    q_lora_rank=8,
    qk_rope_head_dim=4,
    qk_nope_head_dim=8,
    v_head_dim=8,
    n_group=2,
    topk_group=1,
    num_experts_per_tok=2,
    first_k_dense_replace=1,
    max_position_embeddings=128,
    initializer_range=0.3,  # so that greedy choices are far apart
    num_nextn_predict_layers=0,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    if not R1_CONFIG.is_file():
        pytest.skip("R1's chat template is not here: no shared/data/deepseek_r1_tokenizer beside the repository")
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    config = transformers.DeepseekV3Config(**WIDTHS, bos_token_id=0, eos_token_id=1, pad_token_id=2)
    transformers.DeepseekV3ForCausalLM(config).float().save_pretrained(folder)
    tokenizer().save(folder)
    (folder / "tokenizer_config.json").write_bytes(R1_CONFIG.read_bytes())
    return folder


def theirs(folder: Path, prompt: list[int], *, stop: list[int]) -> list[int]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    rows = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=stop)
    return rows[0][len(prompt) :].tolist()


def test_the_same_greedy_text(folder, capsys):
    peer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    asked = [{"role": "user", "content": "12+34"}]
    chat = peer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
    raw = [peer.bos_token_id, *peer.encode("12+34")]
    options = ["generate", str(folder), "--prompt", "12+34", "--max-tokens", "12"]
    for more, prompt, start in (([], raw, "12+34"), (["--chat"], chat, "")):
        free = theirs(folder, prompt, stop=[1])
        for stop in (1, free[5]):
            (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, stop]}))
            ids = theirs(folder, prompt, stop=[1, stop])
            assert main([*options, *more]) == 0
            text = peer.decode(ids[:-1] if ids[-1] in (1, stop) else ids)
            assert capsys.readouterr().out == start + text + "\n"
