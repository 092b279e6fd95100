"""``inspect``: published numbers, and the places that a model can be looked up in."""

import dataclasses
import json

import pytest
from model.tiny import QWEN, V3, config

from deepseek_jax.cli.inspect import describe, fp8_bytes
from deepseek_jax.cli.main import main
from deepseek_jax.config import ModelConfig
from deepseek_jax.model.costs import attention_flops, count_parameters, forward_flops
from deepseek_jax.workflows.recipe import load_recipe


def recipe(name: str) -> ModelConfig:
    return load_recipe(f"models/{name}", ModelConfig)


@pytest.fixture
def printed(monkeypatch, capsys):
    """What a command prints, on a console wide enough for one line per row."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: str) -> str:
        assert main(["inspect", *arguments]) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    return run


def test_v3(printed):
    out = printed("models/deepseek_v3")
    assert "671,026,419,200" in out and "11,610,068,224 parameters more" in out  # MTP's on its own line
    assert "37,552,297,472" in out  # 37.55 B
    assert "35,136 numbers, 70,272 bytes in bfloat16" in out
    assert "3 dense, 58 MoE, 1 MTP" in out


# "Insights into DeepSeek-V3" (2025), table 2: training at 4096 tokens.
@pytest.mark.parametrize(("name", "gflops"), [("deepseek_v2", 155), ("deepseek_v3", 250)])
def test_training_arithmetic_is_the_published(name, gflops):
    model = recipe(name)
    assert 3 * (forward_flops(model) + attention_flops(model, 2048)) == pytest.approx(gflops * 1e9, rel=0.005)
    train = describe(model)["with attention, 4,096 tokens"].split("decoding, ")[1]
    assert train.startswith(f"{gflops},")


def test_v3s_fp8_checkpoint_has_the_published_size():
    """Section 1.1 of the facts page: 680.57 G numbers in FP8, 3.92 G in bfloat16 (of which MTP's copies of embedding
    and head are 2 × 926,679,040), 15,104 in float32, 41.5 M float32 scales."""
    published = 680.57e9 + 2 * (3.92e9 - 2 * 926_679_040) + 4 * (15_104 + 41.5e6)
    assert fp8_bytes(recipe("deepseek_v3")) == pytest.approx(published, rel=1e-4)


def test_arithmetic_by_hand():
    """Two heads of key width 6 + 4 and value width 5, latent 8 + 4; three layers; tokens that see ten others."""
    mla = config(V3)
    assert attention_flops(mla, 10) == 3 * 2 * 2 * 10 * (6 + 4 + 5)
    assert attention_flops(mla, 10, absorbed=True) == 3 * 2 * 2 * 10 * (8 + 4 + 8)
    student = config(QWEN)  # four heads of width 6, a tied head
    assert attention_flops(student, 10) == attention_flops(student, 10, absorbed=True) == 3 * 2 * 4 * 10 * (6 + 6)
    assert forward_flops(student) == 2 * count_parameters(student)["parameters_total"]
    untied = dataclasses.replace(student, tie_word_embeddings=False)
    assert forward_flops(untied) == forward_flops(student)


def test_a_released_folder_and_its_file(tmp_path, printed):
    (tmp_path / "config.json").write_text(json.dumps(recipe("r1_distill_qwen_7b").to_hf()), encoding="utf-8")
    for path in (tmp_path, tmp_path / "config.json"):
        out = printed(str(path), "--context", "1000")
        assert "7,615,616,512" in out and "57,344 bytes in bfloat16" in out and "with attention, 1,000" in out
        assert "15,231,233,024 bytes (15.2 GB) + 57,344,000 bytes (0.1 GB) of cache" in out


def test_fields_can_be_ignored(tmp_path, printed, capsys):
    content = config(QWEN, vocab_size=1_000).to_hf() | {"novel_heads": 3}
    (tmp_path / "config.json").write_text(json.dumps(content), encoding="utf-8")
    assert main(["inspect", str(tmp_path)]) == 1
    assert "novel_heads=3" in capsys.readouterr().err
    assert "parameters" in printed(str(tmp_path), "--ignore-config", "novel_heads")


def test_recipes_of_stages(printed, capsys):
    assert "1 dense, 3 MoE, 1 MTP" in printed("demo/pretrain")
    assert main(["inspect", "demo/sft"]) == 1
    assert "SFTConfig; inspect takes a PretrainConfig or a ModelConfig" in capsys.readouterr().err


def test_a_context_that_the_model_does_not_take(printed, capsys):
    assert "4,096 tokens" in printed("models/deepseek_moe_16b", "--context", "4096")
    for context in ("4097", "0"):
        assert main(["inspect", "models/deepseek_moe_16b", "--context", context]) == 1
        assert f"--context {context}" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_broken_file_is_named(tmp_path, capsys, text):
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    assert main(["inspect", str(tmp_path / "config.json")]) == 1
    assert "config.json" in capsys.readouterr().err
