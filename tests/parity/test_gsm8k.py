"""From a model that transformers saved to one that it loads: SFT and GRPO on GSM8K with a reward of one's own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

from deepseek_jax.checkpoint.model import load

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

ROOT = Path(__file__).parents[2]
TRAIN = ROOT.parent / "shared/data/gsm8k_train.jsonl"
ENDS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# On random answers the share of digits differs from one to the next; the row's column makes it the user's own.
REWARD = """
def score(completion, row):
    digits = sum(c in row["digits"] for c in completion)
    return digits / max(len(completion), 1)
"""
SFT = "sft --init-from tiny --data.path chats.jsonl --data.seq-len 512 --data.drop-long --batch-size 4 --run-dir sft"
SFT += " --loop.steps 20 --loop.eval-every 10 --data.heldout heldout.jsonl --optimizer.peak-lr 3e-3"
SFT += " --optimizer.warmup-steps 2"
GRPO = "grpo gsm8k --init-from sft --task.path train.jsonl --reward mine.py:score --run-dir grpo --loop.steps 5"
GRPO += " --rollout.prompts 4 --rollout.group 4 --rollout.max-tokens 24 --rollout.drop-long --rollout.max-prompt 400"
GRPO += " --step.microbatches 1 --optimizer.peak-lr 1e-3"
PROGRAM = f"""
import sys
from deepseek_jax.cli.main import main
for line in ({SFT!r}, {GRPO!r}, "chat grpo --max-tokens 8", "convert grpo released --dtype float32"):
    assert main(line.split()) == 0, line
print([n for n in sys.modules if n.endswith((".demo", ".corpus", ".arithmetic")) and n.startswith("deepseek_jax")])
"""


def write_lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def save_tiny_llama(folder: Path, texts: list[str]) -> None:
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    options = {"initial_alphabet": alphabet, "special_tokens": list(ENDS), "show_progress": False}
    backend.train_from_iterator(texts, tokenizers.trainers.BpeTrainer(vocab_size=600, **options))
    names = {"eos_token": ENDS[2], "pad_token": ENDS[0]}
    peer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=TEMPLATE, **names)
    peer.save_pretrained(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"bos_token_id": None, "eos_token_id": 2, "pad_token_id": 0}
    more = {"num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.1}
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=600, **sizes, **ids, **more)
    transformers.LlamaForCausalLM(config).float().save_pretrained(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not TRAIN.is_file():
        pytest.skip("GSM8K is not here: no shared/data/gsm8k_train.jsonl beside the repository")
    folder = tmp_path_factory.mktemp("gsm8k")
    with open(TRAIN, encoding="utf-8") as file:
        rows = [json.loads(next(file)) for _ in range(220)]
    chats = [
        {"messages": [{"role": "user", "content": r["question"]}, {"role": "assistant", "content": r["answer"]}]}
        for r in rows
    ]
    write_lines(folder / "chats.jsonl", chats[:200])
    write_lines(folder / "heldout.jsonl", [c for c in chats[200:] if len(c["messages"][0]["content"]) < 300])
    write_lines(folder / "train.jsonl", [row | {"digits": "0123456789"} for row in rows])
    (folder / "mine.py").write_text(REWARD)
    save_tiny_llama(folder / "tiny", [text for row in rows for text in (row["question"], row["answer"])])
    return folder


@pytest.fixture(scope="module")
def ran(folder: Path) -> subprocess.CompletedProcess[str]:
    sources = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "1", "PYTHONPATH": sources}
    command = [sys.executable, "-W", "error", "-c", PROGRAM]
    options = {"cwd": folder, "env": environment, "input": "What is 1+1?\n\n", "capture_output": True, "text": True}
    done = subprocess.run(command, check=False, **options)
    assert done.returncode == 0, done.stderr
    return done


def lines_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().split("\n")[:-1]]


def test_both_stages_learn(folder: Path, ran: subprocess.CompletedProcess[str]):
    losses = [line["eval/loss"] for line in lines_of(folder / "sft") if "eval/loss" in line]
    assert losses[-1] < losses[0] < 6.5  # 6.4 is a uniform guess among 600
    lines = lines_of(folder / "grpo")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert all(line["signal_groups"] > 0.5 and 0 <= line["kl_sampler"] < 1e-6 for line in lines)
    assert all(line["grad_norm"] > 0 and line["reward"] == line["reward_mine.score"] for line in lines)


def test_it_answers_by_its_own_template_and_needs_no_demo(ran: subprocess.CompletedProcess[str]):
    assert "grpo · each question is asked by itself" in ran.stdout  # its rows have one question each
    assert ran.stdout.strip().endswith("[]")


def test_transformers_loads_what_was_trained(folder: Path, ran: subprocess.CompletedProcess[str]):
    def read(name: str):
        return transformers.AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32)

    peer, before = read("released"), read("tiny").state_dict()
    assert isinstance(peer, transformers.LlamaForCausalLM)
    for name, tensor in peer.state_dict().items():
        assert not torch.equal(tensor, before[name]), name
    learnt = [np.asarray(leaf) for leaf in (load(folder / stage).params["embed"] for stage in ("sft", "grpo"))]
    assert np.any(learnt[0] != learnt[1])
    spoken = transformers.AutoTokenizer.from_pretrained(folder / "released")
    chat = [{"role": "user", "content": "What is 1+1?"}]
    ids = spoken.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert spoken.decode(ids) == "<|im_start|>user\nWhat is 1+1?<|im_end|>\n<|im_start|>assistant\n"
    with torch.no_grad():
        expected = peer(torch.tensor([ids])).logits.numpy()
    found = load(folder / "grpo")(jnp.array([ids])).logits
    np.testing.assert_allclose(np.asarray(found), expected, atol=1e-5)
