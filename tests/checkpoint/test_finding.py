"""Where a model lies, and what is said where none does: what is there, and what to do about it."""

import json
import os
from pathlib import Path

import pytest

from deepseek_jax.checkpoint.finding import find_model, is_released
from deepseek_jax.cli.main import main


def folder(base: Path, *files: str, **content: dict) -> Path:
    for name in files:
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        (base / name).touch()
    for name, value in content.items():
        (base / f"{name}.json").write_text(json.dumps(value))
    return base


def test_a_model_is_found(tmp_path, monkeypatch):
    """Released, a run, of a demo its last stage, and behind a ~ that no shell has expanded."""
    released = folder(tmp_path / "released", "config.json", "model.safetensors")
    assert is_released(released) and find_model(released) == released
    for stage in ("pretrain", "sft", "grpo"):
        (tmp_path / "demo" / stage / "checkpoints" / "20").mkdir(parents=True)
        assert find_model(tmp_path / "demo") == find_model(tmp_path / "demo" / stage) == tmp_path / "demo" / stage
    (tmp_path / "demo" / "grpo" / "checkpoints" / "20").rename(tmp_path / "demo" / "grpo" / "checkpoints" / "20.tmp")
    assert find_model(tmp_path / "demo") == tmp_path / "demo" / "sft"  # a first save that was killed is none
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_model("~/released") == released
    (released / "model.safetensors").unlink()
    assert not is_released(released)


ADAPTER = {"base_model_name_or_path": "Qwen/Qwen2.5-1.5B"}
CASES = {  # files of the folder, and what is said of it
    "lora": (["adapter_model.safetensors", "config.json"], "is a LoRA adapter to Qwen/Qwen2.5-1.5B.*merge"),
    "pickle": (["config.json", "pytorch_model.bin"], r"as pickle \(pytorch_model.bin\).*safetensors"),
    "cache": (["refs/main", "snapshots/0a1b/config.json"], "hub cache's top folder.*snapshots/0a1b"),
    "gguf": (["model-q4.gguf"], "holds GGUF files.*safetensors that they were made from"),
    "bare": (["model.safetensors"], "safetensors and no config.json"),
    "cut": (["config.json", "tokenizer.json"], "config.json and no safetensors"),
    "young": (["metrics.jsonl", "config.json"], "has saved no checkpoint yet"),
    "killed": (["checkpoints/3.orbax-checkpoint-tmp/x", "config.json"], "has saved no checkpoint yet"),
    "demo": (["sft/rows/meta.json"], "has saved no checkpoint yet"),
    "mixed": (["sft/checkpoints/3/x", "zero/checkpoints/3/x"], "give one of them, sft, zero"),
    "several": (["a/config.json", "a/m.safetensors", "b/checkpoints/3/x", "c/checkpoints/x"], "give one of them, a, b"),
    "other": (["notes.txt"], "neither a run's checkpoints/ nor config.json beside safetensors, but notes.txt"),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_there_instead_is_said(name, tmp_path):
    files, said = CASES[name]
    path = folder(tmp_path / name, *files, **({"adapter_config": ADAPTER} if name == "lora" else {}))
    with pytest.raises(FileNotFoundError, match=f"^{path} .*{said}"):
        find_model(path)


def test_what_is_no_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(folder(tmp_path, "m.gguf", "m.safetensors", "runs/x"))
    (tmp_path / "empty").mkdir()
    for path, said in {
        "nothing": "nothing does not exist$",
        "runs/typo": "runs/typo does not exist$",
        "deepseek-ai/DeepSeek-R1": "does not exist; if it names a model of the Hugging Face hub: hf download",
        "m.gguf": "m.gguf is a GGUF file",
        "m.safetensors": "m.safetensors is a file: give the folder of the model",
        "empty": "empty is empty",
    }.items():
        with pytest.raises(FileNotFoundError, match=said):
            find_model(path)


@pytest.mark.parametrize("command", ["generate", "chat", "convert", "inspect", "sft", "grpo"])
def test_every_command_that_reads_a_model_says_so(command, tmp_path, monkeypatch, capsys):
    """Before it makes anything."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "1", "answer": "1"}\n')
    read = {"generate": ["m", "--prompt", "a"], "convert": ["m", "out"], "chat": ["m"], "inspect": ["m"]}
    read["sft"] = ["--init-from", "m", "--data.path", "rows.jsonl"]
    read["grpo"] = ["--init-from", "m", "--task.path", "rows.jsonl"]
    assert main([command, *read[command]]) == 1
    assert f"deepseek-jax {command}: m does not exist" in capsys.readouterr().err
    folder(tmp_path / "m", "pytorch_model.bin")
    assert main([command, *read[command]]) == 1
    assert f"deepseek-jax {command}: m holds its weights as pickle" in capsys.readouterr().err
    assert sorted(os.listdir()) == ["m", "rows.jsonl"]
