"""Pretraining on text of one's own: files of every kind, held out by file and kind, the tokenizer's vocabulary."""

import dataclasses
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from small import tokenizer

from deepseek_jax.checkpoint import reading
from deepseek_jax.cli.main import main
from deepseek_jax.data.rows import open_rows
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.data.tokenizer_training import train_tokenizer
from deepseek_jax.evals.text import HeldOut
from deepseek_jax.train.metrics import read_metrics
from deepseek_jax.workflows.pretrain import PretrainData, prepare_rows

PROSE = ["the quick brown fox jumps over the lazy dog\n" * 6, "a second text, shorter\n"]
CODE = ["def add(a, b):\n    return a + b\n" * 3]
MODEL = {
    "hidden-size": 16,
    "num-hidden-layers": 1,
    "first-k-dense-replace": 1,
    "num-nextn-predict-layers": 0,
    "intermediate-size": 24,
    "num-attention-heads": 2,
    "q-lora-rank": 8,
    "kv-lora-rank": 8,
    "qk-nope-head-dim": 8,
    "qk-rope-head-dim": 4,
    "v-head-dim": 8,
    "n-routed-experts": 8,
    "num-experts-per-tok": 2,
    "moe-intermediate-size": 8,
}
OPTIONS = [part for name, value in MODEL.items() for part in (f"--model.{name}", str(value))]
OPTIONS += ["--data.seq-len", "32", "--data.tokenizer", "tokenizer", "--batch-size", "8", "--loop.steps", "2"]
OPTIONS += ["--loop.eval-every", "1", "--loop.log-every", "1", "--step.microbatches", "1"]
TEXT = ["--data.path", "text", "--run-dir", "run"]
HELDOUT = ["--data.heldout", "held/*", "text/a.md"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("own")
    # More ids than a model has by default.
    train_tokenizer([Path(__file__).read_text(encoding="utf-8")], 600).save(folder / "tokenizer")
    assert Tokenizer.from_folder(folder / "tokenizer").vocab_size > 512
    for name in ("text", "held"):
        (folder / name).mkdir()
    (folder / "text" / "a.md").write_text(PROSE[0])
    (folder / "text" / "b.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in PROSE * 4))
    (folder / "held" / "plain.txt").write_text(PROSE[1])
    rows = [{"text": t, "kind": "code"} for t in CODE] + [{"text": t, "kind": "prose"} for t in PROSE]
    rows += [{"text": "without a kind", "kind": None}, {"text": "nor this"}]
    (folder / "held" / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def ran(folder: Path) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        assert main(["pretrain", *OPTIONS, *TEXT, *HELDOUT]) == 0
    return json.loads((folder / "run" / "result.json").read_text())


def test_every_document_is_measured_by_file_and_by_kind(folder: Path, ran: dict[str, Any]) -> None:
    files, kinds = ran["heldout"]["files"], ran["heldout"]["kinds"]
    assert {name: score["documents"] for name, score in files.items()} == {"plain.txt": 1, "rows.jsonl": 5, "a.md": 1}
    assert {name: score["documents"] for name, score in kinds.items()} == {"code": 1, "prose": 2}
    assert files["plain.txt"]["bytes"] == len(PROSE[1]) and kinds["code"]["bytes"] == len(CODE[0])
    nats, targets = (sum(score[name] for score in files.values()) for name in ("nats", "targets"))
    assert ran["perplexity"] == pytest.approx(math.exp(nats / targets))
    size, tokens = (sum(score[name] for score in files.values()) for name in ("bytes", "tokens"))
    assert ran["bits_per_byte"] == pytest.approx(nats / math.log(2) / (size * targets / tokens))
    lines = read_metrics(folder / "run")
    assert [line["step"] for line in lines if "eval/bits_per_byte" in line] == [1, 2]
    assert lines[-1]["eval/bits_per_byte"] == ran["bits_per_byte"]
    for name, value in (("file/plain.txt", files["plain.txt"]), ("kind/code", kinds["code"])):
        assert lines[-1][f"eval/bits_per_byte/{name}"] == value["bits_per_byte"]
        assert lines[-1][f"eval/perplexity/{name}"] == value["perplexity"]


def test_eval_measures_the_same(folder: Path, ran: dict[str, Any], monkeypatch, capsys) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(reading, "FORMAT_VERSION", 3)  # of an older one, which `load` reads
    assert main(["eval", "run", "--data", "held/*", "text/a.md", "--batch-size", "8"]) == 0
    said = dict(re.findall(r"^(\S+|kind \S+) +(\d+\.\d+) bits per byte", capsys.readouterr().out, flags=re.MULTILINE))
    expected = {name: score["bits_per_byte"] for name, score in ran["heldout"]["files"].items()}
    expected |= {f"kind {name}": score["bits_per_byte"] for name, score in ran["heldout"]["kinds"].items()}
    expected |= {"all": ran["bits_per_byte"]}
    assert {name: float(value) for name, value in said.items()} == pytest.approx(expected, abs=6e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run"], "--data FILES to measure"),
        (["run", "--data", "none.txt"], "none.txt: there is no such file or folder"),
        (["run", "--data", "empty.jsonl"], "empty.jsonl: there is no document in it to measure"),
        (["run", "--data", "text", "--seq-len", "4097"], "--seq-len 4097: must lie in 2…max_position_embeddings=4096"),
    ],
)
def test_what_eval_cannot_do(folder: Path, ran, monkeypatch, capsys, arguments, message) -> None:
    monkeypatch.chdir(folder)
    Path("empty.jsonl").touch()
    assert main(["eval", *arguments]) == 1
    assert message in capsys.readouterr().err


def test_the_last_line_names_what_came_out(folder: Path, ran: dict[str, Any], monkeypatch, capsys) -> None:
    monkeypatch.chdir(folder)
    scores, calls = HeldOut.scores, list[int]()
    monkeypatch.setattr(HeldOut, "scores", lambda *args, **options: calls.append(1) or scores(*args, **options))
    assert main(["pretrain", *OPTIONS, *TEXT, *HELDOUT]) == 0  # finished, and again the same
    assert not calls and json.loads(Path("run/result.json").read_text()) == ran
    last = capsys.readouterr().out.strip().split("\n")[-1]
    assert f"bits_per_byte {ran['bits_per_byte']:.4g}, perplexity {ran['perplexity']:.4g}" in last
    assert last.startswith("→ run: ")
    assert main(["pretrain", *OPTIONS, *TEXT, *HELDOUT[:2], "--quiet"]) == 0  # measured on other text
    assert len(calls) == 1 and json.loads(Path("run/result.json").read_text())["bits_per_byte"] != ran["bits_per_byte"]


def test_the_vocabulary_is_the_tokenizers(folder: Path, ran, monkeypatch, capsys) -> None:
    monkeypatch.chdir(folder)
    size = Tokenizer.from_folder("tokenizer").vocab_size
    assert json.loads(Path("run/config.json").read_text())["model"]["vocab_size"] == size
    fewer = ["--data.path", "text", "--data.heldout", "held", "--run-dir", "new", "--model.vocab-size", "300"]
    assert main(["pretrain", *OPTIONS, *fewer]) == 1  # ids that are used, not those that exist
    assert (
        "of which those from 300 on cannot be used" in capsys.readouterr().err and not Path("new/checkpoints").exists()
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--data.path empty.jsonl --data.heldout held", r"data\.path=\['empty\.jsonl'\]: there is no text in it"),
        ("--data.path text --data.heldout empty.jsonl", r"empty\.jsonl: there is no document in it"),
        ("--data.path text", r"loop\.eval_every=1: nothing to evaluate without data\.heldout"),
        ("--data.path no/*.txt --data.heldout held", r"no/\*\.txt: there is no file that matches"),
        ("--data.path text --data.heldout x.jsonl --data.heldout-kinds y", r"x\.jsonl: no document is of the kinds y"),
        ("--data.path text --data.heldout held --data.text-field b", r'rows\.jsonl:1: no field "b"'),
    ],
)
def test_inputs_are_looked_at_before_training(folder: Path, monkeypatch, capsys, arguments, message) -> None:
    monkeypatch.chdir(folder)
    Path("empty.jsonl").touch()
    Path("x.jsonl").write_text('{"text": "a", "kind": "x"}\n')
    assert main(["pretrain", *OPTIONS, *arguments.split(), "--run-dir", "never"]) == 1
    assert re.search(message, capsys.readouterr().err)
    assert not Path("never/checkpoints").exists()


def test_what_a_mesh_cannot_split_is_refused_before_rows_are_packed(folder: Path, monkeypatch, capsys) -> None:
    """Or its nearest that can would be refused, as the folder has rows of other settings."""
    monkeypatch.chdir(folder)
    options = "--data.path text --data.heldout held --mesh.pipe 2 --run-dir split"
    assert main(["pretrain", *OPTIONS, *options.split()]) == 1
    assert "pipe=2: the schedules of a pipeline are not there yet" in capsys.readouterr().err
    assert not Path("split").exists()


def test_a_tokenizer_without_fim_will_do_where_there_is_none(tmp_path: Path) -> None:
    tokenizer().save(tmp_path / "t")
    file = tmp_path / "t" / "tokenizer.json"
    file.write_text(file.read_text().replace("fim", "mif"))
    (tmp_path / "a.txt").write_text(PROSE[0])
    data = PretrainData(path=(str(tmp_path / "a.txt"),), seq_len=8, fim_rate=0.0, cache=str(tmp_path / "cache"))
    plain = Tokenizer.from_folder(tmp_path / "t")
    with pytest.raises(ValueError, match=r"fill in the middle \(--data\.fim-rate 0"):
        prepare_rows(dataclasses.replace(data, fim_rate=0.1), plain, tmp_path / "rows", seed=0)
    assert not list((tmp_path / "cache").rglob("*.tokens"))  # known before a corpus is tokenized
    assert len(open_rows(prepare_rows(data, plain, tmp_path / "rows", seed=0))) > 1
    shutil.rmtree(tmp_path / "cache")  # rows outlive it
    prepare_rows(data, plain, tmp_path / "rows", seed=0)
    (tmp_path / "a.txt").write_text(PROSE[0].replace("quick", "slow!"))
    with pytest.raises(ValueError, match=r"was packed from other data or settings: sha256\..*a\.txt is"):
        prepare_rows(data, plain, tmp_path / "rows", seed=0)
