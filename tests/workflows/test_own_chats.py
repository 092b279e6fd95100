"""Chats of one's own: what rows were made of, and what is looked at before training."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
from model.tiny import weights, whole
from small import SPEAKER, tokenizer

from deepseek_jax import save_hf
from deepseek_jax.cli.main import main
from deepseek_jax.data.rows import open_rows
from deepseek_jax.workflows.sft import SFTData, prepare_chats

OPTIONS = "sft --init-from model --batch-size 8 --loop.steps 1 --run-dir run --data.seq-len 32"


def chat(answer: str) -> str:
    messages = [{"role": "user", "content": "1+2="}, {"role": "assistant", "content": answer}]
    return json.dumps({"messages": messages}) + "\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("chats").mkdir()
    Path("chats/a.jsonl").write_text(chat("3") * 3)
    Path("chats/b.jsonl").write_text(chat("3") + chat("3" * 40))
    Path("empty.jsonl").touch()
    return tmp_path


def test_corrected_chats_are_not_trained_on_as_they_were(folder: Path) -> None:
    data = SFTData(path=("chats/a.jsonl",), seq_len=32)
    rows = prepare_chats(data, tokenizer(), folder / "rows")
    assert prepare_chats(data, tokenizer(), folder / "rows") == rows
    Path("chats/a.jsonl").write_text(chat("4") * 3)  # of the same size
    with pytest.raises(ValueError, match=r"other data or settings: sha256\.chats/a\.jsonl is '\w+' there and"):
        prepare_chats(data, tokenizer(), folder / "rows")


def test_packed_chats_are_known_by_their_files_wherever_these_lie(folder: Path) -> None:
    def pack(*path: str) -> str:
        made = prepare_chats(SFTData(path=path, seq_len=64), tokenizer(), folder / "rows")
        return open_rows(made).meta["fingerprint"]

    packed = pack("chats/a.jsonl", "chats/b.jsonl", "chats/a.jsonl")
    Path("chats").rename("moved")
    assert pack("moved/a.jsonl", "moved/b.jsonl", "moved/a.jsonl") == packed
    for other in (("a", "b"), ("a", "b", "b"), ("b", "a", "b")):
        with pytest.raises(ValueError, match=r"other data or settings: data\.path is"):
            pack(*(f"moved/{name}.jsonl" for name in other))


def test_chats_of_folders_and_globs(folder: Path) -> None:
    made = []
    for name, path in (
        ("files", ("chats/a.jsonl", "chats/b.jsonl")),
        ("folder", ("chats",)),
        ("glob", ("chats/*.jsonl",)),
    ):
        data = SFTData(path=path, seq_len=64)
        made.append(open_rows(prepare_chats(data, tokenizer(), folder / name)).meta["fingerprint"])
    assert len(set(made)) == 1


def test_columns_of_other_names(folder: Path) -> None:
    """They make the very chats that the plain form is, nulls and numbers seen to."""
    rows = [
        {"problem": "1+2=", "unit": "m", "n": 3, "solution": "3", "prompt": "not this", "completion": "nor this"}
    ] * 3
    Path("math.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    plain = open_rows(prepare_chats(SFTData(path=("chats/a.jsonl",), seq_len=32), tokenizer(), folder / "plain"))
    named: tuple[tuple[str, dict[str, Any]], ...] = (
        ("columns", {"prompt": "problem", "answer": "solution"}),
        ("numbers", {"prompt": "problem", "answer": "n"}),
        ("template", {"template": "{problem}", "answer": "solution"}),
    )
    for name, how in named:
        made = prepare_chats(SFTData(path=("math.jsonl",), seq_len=32, **how), tokenizer(), folder / name)
        assert open_rows(made).meta["fingerprint"] == plain.meta["fingerprint"], name
    asked = SFTData(template="{problem} in {unit}", answer="solution").conversation(rows[0] | {"system": "Be brief."})
    assert [message["content"] for message in asked.messages] == ["Be brief.", "1+2= in m", "3"]
    with pytest.raises(ValueError, match=r"rows was packed from other data or settings: data\.answer is 'solution'"):
        data = SFTData(path=("math.jsonl",), seq_len=32, prompt="problem", answer="solution")
        prepare_chats(data, tokenizer(), folder / "rows")
        prepare_chats(dataclasses.replace(data, answer="n"), tokenizer(), folder / "rows")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"problem": "p"}, r'a\.jsonl:1: no column "solution"; it has problem'),
        ({"problem": "p", "solution": None}, r'a\.jsonl:1: "solution" is of type NoneType; it must be text or a list'),
        ({"problem": {}, "solution": "s"}, r'a\.jsonl:1: "problem" is of type dict'),
        (["p", "s"], r"a\.jsonl:1: a list; each line must be an object"),
    ],
)
def test_columns_that_are_not_there_are_named(tmp_path: Path, row, message: str) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    data = SFTData(path=(str(tmp_path / "a.jsonl"),), prompt="problem", answer="solution")
    with pytest.raises(ValueError, match=message):
        prepare_chats(data, tokenizer(), tmp_path / "rows")


@pytest.mark.parametrize(
    "given", [{"prompt": "p"}, {"answer": "a"}, {"template": "{p}"}, {"prompt": "p", "template": "{p}"}]
)
def test_columns_are_named_together(given: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"data\.template"):
        SFTData(**given)  # pyright: ignore


@pytest.fixture
def model(folder: Path) -> None:
    save_hf(whole(SPEAKER, *weights(SPEAKER)).network(), folder / "model", dtype="float32")
    tokenizer().save(folder / "model")


def test_a_released_folder_is_measured_on_text(model: None, capsys: pytest.CaptureFixture[str]) -> None:
    Path("a.md").write_text("def add(a, b):\n    return a + b\n" * 9)
    assert main(["eval", "model", "--data", "a.md"]) == 0
    names = [line.split()[0] for line in capsys.readouterr().out.strip().split("\n")]
    assert names == ["a.md", "all"]
    assert main(["eval", "model", "--data", "a.md", "--ema"]) == 1  # a run has one
    assert "model is a released model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--data.path chats", r"chats/b\.jsonl:2: \d+ tokens, where data\.seq_len=32"),
        ("--data.path chats --data.skip-broken", r"chats/b\.jsonl:2: \d+ tokens, where data\.seq_len=32"),
        ("--data.path empty.jsonl", r"data\.path=\['empty\.jsonl'\]: there is no chat in it"),
        ("--data.path chats/a.jsonl --data.heldout empty.jsonl", r"data\.heldout=\['empty\.jsonl'\]: there is no chat"),
        ("--data.path chats/a.jsonl --data.heldout gone.jsonl", r"gone\.jsonl: there is no such file"),
        ("--data.path chats/a.jsonl --evaluation.task.path gone.jsonl", r"gone\.jsonl: there is no such file"),
        ("--data.path chats/a.jsonl --check.task.path empty.jsonl", r"empty\.jsonl: no rows to ask"),
    ],
)
def test_inputs_are_looked_at_before_training(
    model: None, capsys: pytest.CaptureFixture[str], arguments: str, message: str
) -> None:
    assert main(f"{OPTIONS} {arguments}".split()) == 1
    assert re.search(message, capsys.readouterr().err)
    assert not Path("run/checkpoints").exists()
