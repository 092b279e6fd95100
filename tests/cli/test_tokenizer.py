"""``tokenizer train`` and ``tokenizer inspect``."""

import json
import os

import pytest
from data.families import write_qwen

from deepseek_jax.cli.main import main
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.data.tokenizer_training import train_tokenizer

TEXTS = ["def add(a, b):\n    return a + b\n", "12+34=46, the quick brown fox\n" * 3]


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with open("a.jsonl", "w") as file:
        file.write(json.dumps({"content": TEXTS[0]}) + "\n")
    with open("b.txt", "w") as file:
        file.write(TEXTS[1])
    return ["a.jsonl", "b.txt", "--text-field", "content"]


def test_training_writes_what_the_library_writes(files, tmp_path, capsys):
    assert main(["tokenizer", "train", *files, "--vocab-size", "300", "--out", "mine"]) == 0
    assert "ids in" in capsys.readouterr().out
    train_tokenizer(TEXTS, 300).save("library")
    for name in os.listdir("library"):
        assert (tmp_path / "mine" / name).read_bytes() == (tmp_path / "library" / name).read_bytes()
    assert Tokenizer.from_folder("mine").encode("add") == train_tokenizer(TEXTS, 300).encode("add")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--vocab-size", "9"], "vocab_size=9 is too small"),
        (["--text-field", "text"], 'a.jsonl:1: no field "text"'),
        (["--out", "old"], "old/tokenizer.json exists already"),
    ],
)
def test_what_cannot_be_trained_is_named(files, arguments, message, capsys):
    train_tokenizer(TEXTS, 300).save("old")
    assert main(["tokenizer", "train", *files, *arguments]) == 1
    assert message in capsys.readouterr().err and not os.path.exists("tokenizer")


def test_no_text_trains_nothing(tmp_path, capsys):
    (tmp_path / "empty.txt").write_text("")
    assert main(["tokenizer", "train", str(tmp_path / "empty.txt"), "--out", str(tmp_path / "out")]) == 1
    assert "empty.txt: there is no text to train a tokenizer on" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_is_in_one(files, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    train_tokenizer(TEXTS, 300).save("mine")
    write_qwen(tmp_path / "qwen")
    text = "12+ü"
    for folder, lines in {
        "mine": [
            "<｜begin▁of▁sentence｜> 0",
            "DeepSeek's format",
            "<｜User｜>Hi<｜Assistant｜>",
            "a.jsonl",
            "32 bytes",
        ],
        "qwen": ["its own, ", "none", "<|im_end|> 2", "<|im_start|>user\\nHi<|im_end|>"],
    }.items():
        arguments = ["--text", text, "--file", "a.jsonl", "--text-field", "content"]
        assert main(["tokenizer", "inspect", folder, *arguments]) == 0
        shown = capsys.readouterr().out
        count = len(Tokenizer.from_folder(folder).encode(text))
        assert f"5 bytes, {count} tokens, {5 / count:.2f} bytes per token" in shown
        assert [line for line in lines if line not in shown] == []
    folder = tmp_path / "[" / "bold]"  # no markup, in a path or a text
    train_tokenizer(TEXTS, 300).save(folder)
    assert main(["tokenizer", "inspect", str(folder), "--text", "[/INST] :key:"]) == 0
    shown = capsys.readouterr().out
    assert "[/bold]" in shown and "'[/INST] :key:'" in shown
    assert main(["tokenizer", "inspect", "nowhere"]) == 1
    assert "nowhere/tokenizer.json: no such tokenizer file" in capsys.readouterr().err
