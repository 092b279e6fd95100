"""Rejection sampling and distillation as a user runs them: killed on the way, and into another tokenizer."""

import json
import shutil
import signal
from pathlib import Path

import pytest
from data.families import llama
from model.tiny import QWEN, config, weights, whole
from small import SPEAKER, tokenizer
from workflows.miniature import TESTS, run_program

from deepseek_jax import save_hf
from deepseek_jax.checkpoint.model import load
from deepseek_jax.cli.main import main
from deepseek_jax.data.rows import open_rows
from deepseek_jax.files import read_json_lines, read_json_object
from deepseek_jax.workflows.rejection import RejectionConfig

STUDENT = config(QWEN, num_hidden_layers=2, vocab_size=330, max_position_embeddings=256)
TURNS = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
ASKED = ["--init-from", "teacher", "--task.path", "rows.jsonl", "--asking.samples", "4", "--asking.max-tokens", "8"]
ASKED += ["--asking.temperature", "0.7", "--keep.no-thought", "--keep.language", "", "--batch-size", "4"]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    """A folder with a model of many stop tokens, so that answers end; and what it says to four questions."""
    folder = tmp_path_factory.mktemp("rejection")
    save_hf(whole(SPEAKER, *weights(SPEAKER), tokenizer()), folder / "teacher", dtype="float32")
    path = folder / "teacher" / "generation_config.json"
    path.write_text(json.dumps(read_json_object(path) | {"eos_token_id": [1, *range(60, 290, 3)]}))
    write(folder / "rows.jsonl", [{"prompt": f"{n}+1?"} for n in range(4)])
    return folder


@pytest.fixture
def here(teacher, tmp_path, monkeypatch) -> Path:
    shutil.copytree(teacher, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def answers(run: str) -> list[dict]:
    (path,) = (path for path in Path(run).glob("*.jsonl") if path.name != "kept.jsonl")
    return read_json_lines(path)


def test_right_answers_are_kept_and_a_killed_run_completes(here, capsys):
    """Of each question's answers one is declared right, by what the model says: so it alone is kept. Killed at the
    first answer, then at the ninth, the same command leaves what a run without a kill does, each answer once."""
    assert main(["rejection", *ASKED, "--unanswered", "--run-dir", "any"]) == 0
    said = answers("any")
    good = [line for line in said if line["ended"] and line["completion"].strip() and "<" not in line["completion"]]
    right = {line["question"]: line["completion"] for line in good}
    assert len(right) == 4
    write(here / "rows.jsonl", [{"prompt": f"{n}+1?", "answer": right[n].strip()} for n in range(4)])
    assert main(["rejection", *ASKED, "--run-dir", "whole"]) == 0
    kept = read_json_lines(Path("whole/kept.jsonl"))
    for n in range(4):
        own = [chat for chat in kept if chat["question"] == n]
        assert own and own[0]["messages"][0] == {"role": "user", "content": f"{n}+1?"}
        assert {chat["messages"][1]["content"] for chat in own} == {right[n].strip()}
    found = read_json_object(Path("whole/result.json"))
    assert found["kept"] + sum(found["dropped"].values()) == found["answers"] == 16 and found["questions_kept"] == 4
    assert found["dropped"]["wrong"] and found["dropped"].keys() <= {
        "cut_off",
        "wrong",
        "form",
        "duplicate",
        "repeated",
    }

    for number in (1, 9):
        killed = run_program(str(TESTS / "workflows" / "killed.py"), "rejection", str(number), "rejection", *ASKED,
                             "--run-dir", "killed", cwd=here)  # fmt: skip
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        assert not Path("killed/result.json").exists()
    assert main(["rejection", *ASKED, "--run-dir", "killed"]) == 0
    assert [(line["question"], line["sample"]) for line in answers("killed")] == [
        (q, s) for q in range(4) for s in range(4)
    ]
    for name in ("kept.jsonl", "result.json"):
        assert Path("killed", name).read_bytes() == Path("whole", name).read_bytes()
    capsys.readouterr()
    shutil.rmtree("teacher")
    assert main(["rejection", *ASKED, "--run-dir", "killed"]) == 0  # asks nothing and reads no model
    assert "stands; remove it" in capsys.readouterr().err


def test_rows_without_a_right_answer_are_refused_kept_or_judged(here, capsys):
    assert main(["rejection", *ASKED, "--run-dir", "run"]) == 1
    assert 'rows.jsonl:1: no column "answer"' in capsys.readouterr().err
    (here / "mine.py").write_text("def score(completion, row):\n    return float(len(completion.strip()) % 2)\n")
    assert main(["rejection", *ASKED, "--unanswered", "--run-dir", "run"]) == 0
    everything = read_json_lines(Path("run/kept.jsonl"))
    assert "correct" not in read_json_object(Path("run/result.json"))
    assert main(["rejection", *ASKED, "--unanswered", "--judge", "mine.py:score", "--run-dir", "run"]) == 0
    judged = read_json_lines(Path("run/kept.jsonl"))
    odd = [chat for chat in everything if len(chat["messages"][1]["content"]) % 2]
    assert 0 < len(judged) < len(everything) and judged == odd
    # A judge that fails on an answer leaves it unjudged, whatever another says of it.
    (here / "fails.py").write_text("def score(completion, row):\n    return 9.0 / (len(completion.strip()) % 2)\n")
    good = ["--judge", "mine.py:score", "--judge", "fails.py:score", "--judge-least", "0", "--run-dir", "run"]
    assert main(["rejection", *ASKED, "--unanswered", *good]) == 0
    assert read_json_lines(Path("run/kept.jsonl")) == odd
    # What was said before the last turn, with tools, is learnt too.
    turns = [{"role": "assistant", "content": "<tool>x: 1</tool>"}, {"role": "user", "content": "<result>2</result>"}]
    (path,) = Path("run").glob("rows-*.jsonl")
    write(path, [line | {"turns": turns} for line in answers("run")])
    assert main(["rejection", *ASKED, "--unanswered", "--run-dir", "run"]) == 0
    chats = [chat["messages"] for chat in everything]
    assert [chat["messages"] for chat in read_json_lines(Path("run/kept.jsonl"))] == [
        [asked, *turns, said] for asked, said in chats
    ]
    assert main(["rejection", *ASKED, "--asking.seed", "1", "--unanswered", "--run-dir", "run"]) == 1
    assert "holds answers by other settings, {'seed': 0}: give another run_dir" in capsys.readouterr().err
    with pytest.raises(ValueError, match="rows without a right answer, which take unanswered"):
        RejectionConfig(judge=("accuracy",))


def test_a_teacher_teaches_a_student_of_another_tokenizer(here, capsys):
    """Text travels: the student's rows say what the teacher said, in ids of its own."""
    speaker = llama().with_template(TURNS)
    save_hf(whole(STUDENT, *weights(STUDENT), speaker), here / "student", dtype="float32")
    samples = [option.replace("--", "--samples.", 1) if option.startswith("--") else option for option in ASKED]
    taught = ["--student.init-from", "student", "--student.data.seq-len", "256", "--student.batch-size", "8"]
    taught += ["--student.step.microbatches", "1", "--student.loop.steps", "2", "--student.loop.no-tensorboard"]
    command = ["distill", *samples, "--samples.unanswered", *taught, "--run-dir", "run"]
    assert main(command) == 0
    kept = read_json_lines(Path("run/samples/kept.jsonl"))
    assert len(kept) > 4 and read_json_object(Path("run/student/result.json"))["steps"] == 2
    rows = open_rows(Path("run/student/rows"))
    text = speaker.decode([i for n in range(len(rows)) for i in rows[n]["tokens"].tolist()], skip_special_tokens=False)
    said = [chat["messages"][1]["content"].replace("▁", " ") for chat in kept]  # sentencepiece's own space
    assert all(reply in text for reply in said)
    assert load("run/student").config.vocab_size == 330 != SPEAKER.vocab_size
    capsys.readouterr()
    assert main(command) == 0  # all is there
    assert "nothing was trained" in capsys.readouterr().err
    assert main([*command, "--samples.keep.longest", "1"]) == 1
    assert "run/samples/kept.jsonl is empty: none of the teacher's answers was kept" in capsys.readouterr().err
    assert main(["distill", "--run-dir", "none"]) == 1
    assert "samples.init_from and student.data.path are empty" in capsys.readouterr().err
