"""A Llama that transformers saved, with a template and a stop token of its own: fine-tuned here in two runs, asked
here, and loaded there again, where it says the same and stops where it stops here."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from small import tokenizer

from deepseek_jax import load
from deepseek_jax.cli.main import main
from deepseek_jax.data.chat import encode_chat, encode_prompt
from deepseek_jax.data.special_tokens import BOS, EOS, EOT
from deepseek_jax.data.template import ChatTemplate
from deepseek_jax.data.tokenizer import Tokenizer

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}<|EOT|>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
CHAT = [{"role": "user", "content": "12+34"}, {"role": "assistant", "content": "46"}]
WIDTHS = dict(
    vocab_size=300,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)


def test_from_transformers_through_a_stage_and_back(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    network = transformers.LlamaForCausalLM(transformers.LlamaConfig(**WIDTHS)).float()
    network.save_pretrained("llama")
    template = ChatTemplate(TEMPLATE, {"bos_token": BOS, "eos_token": EOS})
    Tokenizer(tokenizer()._special, template=template).save("llama")
    stop = tokenizer().token_id(EOT)
    with open("llama/generation_config.json", "w") as file:  # without it, transformers would never stop at EOT
        json.dump({"eos_token_id": stop, "do_sample": True, "top_p": 0.9}, file)
    with open("chats.jsonl", "w") as file:
        file.writelines(json.dumps({"messages": CHAT}) + "\n" for _ in range(32))
    data = ["--data.path", "chats.jsonl", "--data.seq-len", "32"]
    loop = ["--loop.steps", "30", "--loop.eval-every", "0", "--loop.log-every", "10"]
    fast = ["--optimizer.peak-lr", "3e-2", "--optimizer.warmup-steps", "2"]
    assert main(["sft", "--init-from", "llama", "--run-dir", "run", *data, *loop, *fast]) == 0
    rest = ["--loop.steps", "1", "--loop.eval-every", "0", "--optimizer.peak-lr", "1e-6"]
    assert main(["sft", "--init-from", "run", "--run-dir", "again", *data, *rest]) == 0
    assert main(["convert", "again", "out", "--dtype", "float32"]) == 0
    capsys.readouterr()
    peer = transformers.AutoTokenizer.from_pretrained("out")
    learnt = transformers.AutoModelForCausalLM.from_pretrained("out", dtype=torch.float32)
    both = zip(learnt.parameters(), network.parameters(), strict=True)
    moved = [float((a - b).detach().abs().max()) for a, b in both]
    assert min(moved) > 1e-3
    asked = peer.apply_chat_template(CHAT[:1], add_generation_prompt=True, return_dict=False)
    ours = load("again")
    assert asked == encode_prompt(ours.text, CHAT[:1])
    ((ids, _),) = encode_chat(ours.text, CHAT)
    assert ids == peer.apply_chat_template(CHAT, return_dict=False)
    with torch.no_grad():
        wanted = learnt(torch.tensor([ids])).logits.numpy()
    np.testing.assert_allclose(np.asarray(ours(jnp.array([ids])).logits), wanted, atol=1e-4)
    assert (learnt.generation_config.top_p, learnt.generation_config.eos_token_id) == (0.9, [1, stop])
    rows = learnt.generate(torch.tensor([asked]), max_new_tokens=8, do_sample=False)[0].tolist()
    assert rows == ids  # it has learnt the answer, and where it ends
    assert peer.decode(rows[len(asked) :], skip_special_tokens=True) == "46"
    for folder in ("run", "again", "out"):
        assert main(["generate", folder, "--chat", "--prompt", "12+34", "--max-tokens", "8"]) == 0
        assert capsys.readouterr().out == "46\n"
