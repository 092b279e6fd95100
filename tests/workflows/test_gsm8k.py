"""GRPO as a user runs it: a released folder, rows and a reward of one's own; nothing of the demo is needed."""

import json
import re
import subprocess
from pathlib import Path

import jax
import numpy as np
import pytest
from model.tiny import QWEN, config, weights, whole
from small import tokenizer
from workflows.miniature import run_program

from deepseek_jax import save_hf
from deepseek_jax.checkpoint.model import load
from deepseek_jax.cli.main import main
from deepseek_jax.cli.stages import parse_recipe
from deepseek_jax.train.metrics import read_metrics
from deepseek_jax.workflows.grpo import GRPOConfig

NUMBERS = [(n, n + 3) for n in range(6)]
ROWS = [{"question": f"{a} and {b}?", "answer": f"It is {a + b}.\n#### {a + b}", "unit": "m"} for a, b in NUMBERS]
REWARD = "def score(completion, row):\n    return sum(c > 'M' for c in completion) / 16 + len(row['unit'])\n"
OPTIONS = ["--init-from", "model", "--task.path", "train.jsonl", "--rollout.prompts", "2", "--rollout.group", "4"]
OPTIONS += ["--rollout.max-tokens", "8", "--step.microbatches", "1", "--loop.steps", "2", "--run-dir", "run"]
OTHERS = ["--reward", "accuracy=2", "--reward", "language:zh=0.5", "--reward", "repetition:1=0"]
OPTIONS += ["--evaluation.task.path", "train.jsonl", "--evaluation.max-tokens", "8", "--evaluation.count", "3"]
PROGRAM = """
import sys
from deepseek_jax.cli.main import main
assert main(sys.argv[1:]) == 0
print([n for n in sys.modules if n.endswith((".demo", ".corpus", ".arithmetic", ".countdown"))])
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gsm8k")
    small = config(QWEN, num_hidden_layers=2, first_k_dense_replace=2, vocab_size=300, max_position_embeddings=256)
    save_hf(whole(small, *weights(small)).network(), folder / "model", dtype="float32")
    tokenizer().save(folder / "model")
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "mine.py").write_text(REWARD)
    return folder


@pytest.fixture(scope="module")
def ran(folder: Path) -> subprocess.CompletedProcess[str]:
    arguments = ("grpo", "gsm8k", *OPTIONS, "--reward", "mine.py:score", *OTHERS)
    return run_program("-c", PROGRAM, *arguments, cwd=folder)


def test_grpo_runs_on_ones_own_rows_and_reward(folder: Path, ran: subprocess.CompletedProcess[str]):
    assert ran.returncode == 0, ran.stderr
    lines = read_metrics(folder / "run")
    assert [line["step"] for line in lines] == [1, 2]
    for line in lines:
        assert line["reward_mine.score"] > 1 and "reward_format" not in line and line["reward_errors"] == 0
        more = 2 * line["reward_accuracy"] + 0.5 * line["reward_language"]
        assert line["reward"] == pytest.approx(line["reward_mine.score"] + more)
        assert -1 < line["reward_repetition"] <= 0 <= line["reward_language"] <= 1
        assert line["signal_groups"] > 0 and 0 <= line["kl_sampler"] < 1e-6
    assert lines[1]["kl_reference"] > 0
    before, after = (jax.tree.leaves(load(folder / name).params) for name in ("model", "run"))
    assert any(np.any(old != new) for old, new in zip(before, after, strict=True))
    result = json.loads((folder / "run" / "result.json").read_text())
    assert result["problems"] == 3 and "by_kind" not in result
    samples = [json.loads(line) for line in (folder / "run" / "samples.jsonl").read_text().split("\n")[:-1]]
    assert [sample["answer"] for sample in samples] == ["3", "5", "7"] * 2
    assert samples[0]["prompt"].startswith("0 and 3?\n") and {s["mode"] for s in samples} == {"greedy", "sampled"}


def test_neither_the_demo_nor_arithmetic_is_imported(ran: subprocess.CompletedProcess[str]):
    assert ran.stdout.strip().endswith("[]")


def test_rewards_on_the_command_line_replace_those_of_the_recipe(tmp_path: Path):
    recipe = tmp_path / "recipe.py"
    recipe.write_text(
        "from deepseek_jax.workflows.grpo import GRPOConfig\ndef config():\n    return GRPOConfig(reward=('format',))\n"
    )

    def reward(*arguments: str) -> tuple[str, ...]:
        return parse_recipe("grpo", GRPOConfig, [str(recipe), *arguments], emptied={"reward": ()}).reward

    assert reward() == ("format",)
    assert reward("--reward", "a=1", "--seed", "3", "--reward=b.py:f") == ("a=1", "b.py:f")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task.path", "train.jsonl"], "init_from .*--init-from"),
        (["--init-from", "model"], "task.path .*--task.path"),
        ([*OPTIONS, "--reward", "none.py:f"], "there is no file none.py"),
        ([*OPTIONS, "--task.answer", "solution"], r'train\.jsonl:1: reward accuracy: no column "solution"; it has'),
        ([*OPTIONS, "--task.prompt", "q"], r'train\.jsonl:1: no column "q"'),
        ([*OPTIONS, "--evaluation.by", "kind"], r'train\.jsonl:1: no column "kind"'),
        ([*OPTIONS, "--rollout.max-tokens", "240"], r"train\.jsonl:1: a prompt of \d+ tokens.*max_tokens=240 allow 16"),
        ([*OPTIONS, "--rollout.max-tokens", "256"], "max_position_embeddings=256"),
    ],
)
def test_what_is_missing_is_named_before_training(folder: Path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(folder)
    assert main(["grpo", "gsm8k", *arguments, "--run-dir", "never"]) == 1
    assert not Path("never/checkpoints").exists()
    assert re.search(message, capsys.readouterr().err)


def test_a_run_may_be_evaluated_otherwise_but_not_rewarded_otherwise(folder: Path, ran, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    again = ["grpo", "gsm8k", *OPTIONS, "--reward", "mine.py:score"]
    assert main(again) == 1
    message = r"reward is \['mine.py:score', 'accuracy=2', .*\] there and \['mine.py:score'\] here"
    assert re.search(message, capsys.readouterr().err)
    assert main([*again, *OTHERS, "--evaluation.count", "1", "--evaluation.by", "unit"]) == 0
    result = json.loads((folder / "run" / "result.json").read_text())
    assert result["problems"] == 1 and result["by_kind"].keys() == {"m"}
