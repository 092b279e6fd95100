"""docs/your-own-data.md, command by command, in miniature: rows of its kind, a network and runs of a few steps."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest

import deepseek_jax
from deepseek_jax.cli.main import main
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.rl.reward_spec import parse_reward
from deepseek_jax.rl.rewards.named import NAMED

PAGE = (Path(__file__).parents[2] / "docs" / "your-own-data.md").read_text(encoding="utf-8")
NETWORK = "--model.hidden-size 16 --model.intermediate-size 16 --model.moe-intermediate-size 8"
NETWORK += " --model.n-routed-experts 8 --model.num-attention-heads 2 --model.num-hidden-layers 2"
NETWORK += " --model.max-position-embeddings 128"
SHORT = "--batch-size 8 --loop.steps 2 --compute.scan-unroll 2"
MINIATURE = {  # the last of an option counts
    "tokenizer train": "--vocab-size 600",
    "pretrain": f"{NETWORK} {SHORT} --data.seq-len 64 --loop.eval-every 2",
    "sft": f"{SHORT} --data.seq-len 128",
    "grpo": "--loop.steps 1 --rollout.prompts 4 --rollout.group 2 --rollout.max-tokens 8",
    "generate": "--max-tokens 4",
    "eval runs/own/grpo": "--count 2 --samples 2 --max-tokens 4 --batch-size 4",
}


def commands() -> list[str]:
    """Those of the page that are whole: others show a part."""
    found = re.findall(r"^\$ deepseek-jax (.+)$", PAGE, flags=re.MULTILINE)
    return [command for command in found if "…" not in command]


def rows(count: int) -> str:
    lines = ""
    for a, b in np.random.default_rng(count).integers(2, 99, (count, 2)).tolist():
        question, answer = f"Ann has {a} figs and finds {b} more. How many?", f"{a} and {b} are {a + b}\n#### {a + b}"
        lines += json.dumps({"question": question, "answer": answer}) + "\n"
    return lines


def test_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    Path("train.jsonl").write_text(rows(120), encoding="utf-8")
    Path("test.jsonl").write_text(rows(12), encoding="utf-8")
    code = re.search(r"`reward\.py`:\n\n```python\n(.+?)```", PAGE, flags=re.DOTALL)
    assert code is not None
    Path("reward.py").write_text(code[1], encoding="utf-8")
    ran = []
    for command in commands():
        name = next((name for name in MINIATURE if command.startswith(name)), "")
        assert main([*shlex.split(command), *shlex.split(MINIATURE.get(name, ""))]) == 0, capsys.readouterr().err
        ran.append(command.split()[0])
    assert set(ran) >= {"tokenizer", "pretrain", "eval", "sft", "grpo", "report", "compare", "generate", "convert"}
    assert {f"reward_reward.{name}" for name in ("right", "marked")} <= last_line("runs/own/grpo").keys()
    vocabulary = Tokenizer.from_folder("tokenizer").vocab_size
    assert deepseek_jax.load("my-model").config.vocab_size == vocabulary
    said = capsys.readouterr().out
    assert "bits per byte" in said and "step.bias_update_speed" in said


def test_the_pages_rewards_are_the_packages() -> None:
    """Each row of the table is a specification that is understood, a run apart, and none is missing."""
    table = PAGE.partition("| reward | for what |")[2].partition("\n\n")[0]
    specs = re.findall(r"^\| `([^`]+)` \|", table, flags=re.MULTILINE)
    assert [re.split("[:=]", spec)[0] for spec in specs] == list(NAMED)
    assert [parse_reward(spec).name for spec in specs if "RUN" not in spec] == [n for n in NAMED if n != "model"]


def last_line(run: str) -> dict[str, float]:
    return json.loads(Path(run, "metrics.jsonl").read_text(encoding="utf-8").split("\n")[-2])
