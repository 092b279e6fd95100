"""Two real processes answer, measure and judge what one does: `generate`, `eval`, a reward model's scores."""

import dataclasses
import json
from pathlib import Path

import jax
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from model.tiny import weights, whole
from parallel.two_processes import start
from small import SPEAKER, tokenizer

from deepseek_jax import save_hf
from deepseek_jax.cli.main import main
from deepseek_jax.files import read_json_lines, read_json_object
from deepseek_jax.parallel.mesh import MeshConfig, make_mesh
from deepseek_jax.parallel.processes import own_part
from deepseek_jax.rl.rewards.model import ModelReward
from deepseek_jax.rl.tasks import TaskConfig, make_task
from deepseek_jax.workflows import rejection
from deepseek_jax.workflows.questions import Answers, Asking
from deepseek_jax.workflows.rejection import RejectionConfig

# What is said goes into files: gloo writes where print does.
PROGRAM = """
import contextlib, io, json
from pathlib import Path
from parallel.test_answering import COMMANDS, judged, scores
from deepseek_jax.cli.main import main
said = {"scores": scores(), "judged": judged()}
for name, command in COMMANDS.items():
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        code = main([*command, "--mesh.expert", "2"])
    said[name] = code, out.getvalue(), err.getvalue()
Path(f"said.{jax.process_index()}").write_text(json.dumps(said))
"""
ASK = ("--samples", "1", "--temperature", "1", "--max-tokens", "6", "--batch-size", "3", "--scaling.majority")
ASK += ("--scaling.best-of", "accuracy")
BUDGETS = ("--scaling.budgets", "2", "5", "--scaling.waits", "1", "--scaling.answer-tokens", "3")
COMMANDS = {
    "generate": ["generate", "model", "--max-tokens", "6", "--temperature", "1"],
    "eval": ["eval", "model", "rows=rows.jsonl", *ASK, *BUDGETS, "--data", "text.md", "--out", "answers"],
    "needle": ["eval", "model", "--needle.lengths", "256", "--needle.depths", "0", "99", "--needle.samples", "2"],
    # A process that fails is gone 10 s later, so these come last.
    "chat": ["chat", "model"],
    "too_long": ["generate", "model", "--max-tokens", "60", "--prompt", "1", "--prompt", "12345678"],
}
COMMANDS["generate"] += [word for prompt in ("def", "12", "7*") for word in ("--prompt", prompt)]
COMMANDS["needle"] += ["--needle.others", "0", "--out", "needle"]


def scores() -> list[float | None]:
    """A reward model's, over eight devices, of this process's part of five answers, of which one cannot be judged."""
    judge = object.__new__(ModelReward)
    config = dataclasses.replace(SPEAKER, num_labels=1, num_nextn_predict_layers=0)
    params, bias = weights(config)
    mesh = make_mesh(MeshConfig(expert=2))
    put = lambda x: jax.make_array_from_callback(x.shape, NamedSharding(mesh, PartitionSpec()), lambda at: x[at])  # noqa: E731
    params, bias = jax.tree.map(put, jax.device_get((params, bias)))
    judge._model = whole(config, params, bias, tokenizer(), mesh)
    judge.folder, judge.judges, judge.always = Path("judge"), "all", True
    answers = own_part(["4", "46", "", "7*8=56", "def add"])
    rows = [{"prompt": "12+34="}] * len(answers)
    return [outcome.value for outcome in judge.score_all(answers, rows, make_task(TaskConfig()))]


def judged() -> list[float | None]:
    """By a file, in parts of which the last has fewer answers than there are processes."""
    task = TaskConfig(path=("open.jsonl",))
    config = RejectionConfig(task=task, unanswered=True, judge=("mine.py:long",), batch_size=2)
    lines = [
        {"question": number, "completion": "a" * number, "ended": True, "tokens": number, "correct": None}
        for number in range(5)
    ]
    sampled = rejection._sampled(config, Answers(task, Asking(), unanswered=True), lines)
    return [sample.score for sample in sampled]


@pytest.fixture(scope="module")
def said(tmp_path_factory) -> tuple[Path, list[dict]]:
    """A folder with what two processes wrote, and what each said."""
    folder = tmp_path_factory.mktemp("two")
    _write_inputs(folder)
    program = f"import os\nos.chdir({str(folder)!r})\n" + PROGRAM
    with start(program, folder=folder) as group:
        group.done(300)
    return folder, [json.loads((folder / f"said.{index}").read_text()) for index in range(2)]


def _write_inputs(folder: Path) -> None:
    save_hf(whole(SPEAKER, *weights(SPEAKER), tokenizer()), folder / "model", dtype="float32")
    rows = [{"prompt": f"{number}*8=", "answer": "56"} for number in range(5)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "open.jsonl").write_text("".join(f'{{"prompt": "{number}?"}}\n' for number in range(5)))
    (folder / "mine.py").write_text("def long(completion, row):\n    return len(completion) / 4\n")
    (folder / "text.md").write_text("12+34=46, def add(a, b): return a + b. " * 9)


def _alone(name: str, capsys) -> str:
    """What one process prints, on all its devices."""
    assert main([*COMMANDS[name], "--mesh.data", "0", "--mesh.expert", "2"]) == 0
    return capsys.readouterr().out


def test_they_say_what_one_says(said, tmp_path, monkeypatch, capsys):
    folder, (first, second) = said
    _write_inputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    for name in ("generate", "eval", "needle"):
        assert first[name][:2] == [0, _alone(name, capsys)], first[name][2]
        assert second[name][:2] == [0, ""]
    files = sorted(path for place in ("answers", "needle") for path in Path(place).iterdir())
    for file in files:
        reader = read_json_lines if file.suffix == ".jsonl" else read_json_object
        assert file.suffix == ".png" or reader(folder / file) == reader(tmp_path / file), file
    assert {file.suffix for file in files} >= {".json", ".jsonl"}


def test_what_one_cannot_do_none_does(said):
    """A prompt of the second process alone is too long; the first would wait for its devices."""
    for process in said[1]:
        code, out, error = process["too_long"]
        assert (code, out) == (1, "") and "and max_tokens=60 pass max_position_embeddings=64" in error
        code, out, error = process["chat"]
        assert (code, out) == (1, "") and "(generate --chat answers prompts on many) is the work of one" in error


def test_a_reward_model_scores_all_answers_together(said):
    found = [score for process in said[1] for score in process["scores"]]
    assert found == pytest.approx(scores(), rel=1e-6) and len(set(found)) > 3


def test_what_a_judge_says_of_parts_all_know(said):
    assert [process["judged"] for process in said[1]] == [[0.0, 0.25, 0.5, 0.75, 1.0]] * 2
